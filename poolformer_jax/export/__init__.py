"""The network as a file that runs without this package: ONNX or StableHLO.

Other packages use the names below. Each is imported when it is first used.
"""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from poolformer_jax.export.model_file import FORMATS as FORMATS
    from poolformer_jax.export.model_file import export_model as export_model
    from poolformer_jax.export.verification import ExportError as ExportError

__getattr__, __dir__ = lazy_names(__name__, {"model_file": "FORMATS export_model", "verification": "ExportError"})
