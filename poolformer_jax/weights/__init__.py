"""Models in and out: PyTorch's names and files, opening a model, model folders. Only this room knows these names."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
