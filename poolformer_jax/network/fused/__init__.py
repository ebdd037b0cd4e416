"""PoolFormer's blocks and convolutions in few passes over the feature map, with custom gradients.

The functions here compute what the linen layers of `network` compute. They take arrays, and know neither the model nor
its config. Other packages use the names below. Each is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
