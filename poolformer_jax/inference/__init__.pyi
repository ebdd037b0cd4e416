from .classification_pipeline import pipeline as pipeline
from .classifier import ImageClassifier as ImageClassifier, Prediction as Prediction
from .cost_operations import count_macs as count_macs, layer_table as layer_table, parameter_shapes as parameter_shapes
from .description import (
    Operations as Operations,
    Parameters as Parameters,
    classify as classify,
    feature_maps as feature_maps,
)
from .embedding import Embedding as Embedding, ImageEmbedder as ImageEmbedder
from .folding import fold as fold
from .grad_cam import VISIBLE_SIDE as VISIBLE_SIDE, GradCam as GradCam
from .height_sharded import HeightShardedModel as HeightShardedModel
from .jax_operations import folded_apply as folded_apply
from .onnx_model import quantize_int8 as quantize_int8, to_onnx as to_onnx
from .onnx_operations import takes_any_size as takes_any_size
from .program import fastest_network as fastest_network, normalized as normalized, shard_on_cpu as shard_on_cpu
from .runtimes import (
    RuntimeProgram as RuntimeProgram,
    import_runtime as import_runtime,
    load_onnxruntime as load_onnxruntime,
    load_openvino as load_openvino,
    onnxruntime_session as onnxruntime_session,
    run_session as run_session,
)
from .verification import (
    TOLERANCES as TOLERANCES,
    ExportError as ExportError,
    check_finite as check_finite,
    difference_from_network as difference_from_network,
)
