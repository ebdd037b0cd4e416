"""The network as a file that runs without this package: ONNX or StableHLO.

Other packages use the names below. Each is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
