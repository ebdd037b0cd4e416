"""PoolFormer and the other MetaFormers in JAX / Flax: the public names, and nothing else.

Each is imported when it is first used, so that data-loading processes can use the image processor without jax.
"""

import lazy_loader

from poolformer_jax.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
