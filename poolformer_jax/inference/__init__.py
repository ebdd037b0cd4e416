"""Inference: the folded network, `ImageClassifier`, Grad-CAM, images sharded by height, and MACs.

Other packages use the names below. Each is imported when it is first used.
"""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from poolformer_jax.inference.classification_pipeline import pipeline as pipeline
    from poolformer_jax.inference.classifier import ImageClassifier as ImageClassifier
    from poolformer_jax.inference.classifier import Prediction as Prediction
    from poolformer_jax.inference.cost_operations import count_macs as count_macs
    from poolformer_jax.inference.cost_operations import layer_table as layer_table
    from poolformer_jax.inference.cost_operations import parameter_shapes as parameter_shapes
    from poolformer_jax.inference.description import Operations as Operations
    from poolformer_jax.inference.description import Parameters as Parameters
    from poolformer_jax.inference.description import classify as classify
    from poolformer_jax.inference.description import feature_maps as feature_maps
    from poolformer_jax.inference.embedding import Embedding as Embedding
    from poolformer_jax.inference.embedding import ImageEmbedder as ImageEmbedder
    from poolformer_jax.inference.folding import fold as fold
    from poolformer_jax.inference.grad_cam import VISIBLE_SIDE as VISIBLE_SIDE
    from poolformer_jax.inference.grad_cam import GradCam as GradCam
    from poolformer_jax.inference.height_sharded import HeightShardedModel as HeightShardedModel
    from poolformer_jax.inference.jax_operations import folded_apply as folded_apply
    from poolformer_jax.inference.program import fastest_network as fastest_network
    from poolformer_jax.inference.program import shard_on_cpu as shard_on_cpu

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "classification_pipeline": "pipeline",
        "classifier": "ImageClassifier Prediction",
        "cost_operations": "count_macs layer_table parameter_shapes",
        "description": "Operations Parameters classify feature_maps",
        "embedding": "Embedding ImageEmbedder",
        "folding": "fold",
        "grad_cam": "GradCam VISIBLE_SIDE",
        "height_sharded": "HeightShardedModel",
        "jax_operations": "folded_apply",
        "program": "fastest_network shard_on_cpu",
    },
)
