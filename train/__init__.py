"""The program `python -m train`: data, augmentation, optimizer, sharded loop, evaluation; `train.fit` from Python."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
