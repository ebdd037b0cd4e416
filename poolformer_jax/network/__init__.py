"""The network: config, published variants, parameters, and linen modules.

Other packages use the names below. Each is imported when it is first used, because the config, the variants and the
parameter table do not need jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
