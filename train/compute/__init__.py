"""The computation: mesh and shardings, state, optimizer, training step, evaluation, and the processes of a run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
