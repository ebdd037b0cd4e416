"""Pictures to pixels: reading images, the preprocessing and its config files, ImageNet's labels. Imports no jax."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
