"""Class names and preprocessing of the published networks, which their weights files may not contain."""

from poolformer_jax.images import PoolFormerImageProcessor, imagenet_labels
from poolformer_jax.network import PoolFormerConfig, published_variant


def class_names(config: PoolFormerConfig) -> dict[int, str]:
    """The config's class names; else ImageNet's for a published architecture with 1000 classes; else numbers."""
    if config.id2label is not None:
        return dict(config.id2label)
    if config.num_labels == 1000 and published_variant(config) is not None:
        return imagenet_labels()
    return {index: f"class {index}" for index in range(config.num_labels)}


def default_image_processor(config: PoolFormerConfig) -> PoolFormerImageProcessor | None:
    """The preprocessing of the published variant of this architecture; None for other architectures."""
    variant = published_variant(config)
    return None if variant is None else PoolFormerImageProcessor.for_variant(variant)
