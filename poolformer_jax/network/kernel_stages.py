"""The stages of a network that the kernels of `fused` may compute."""

from poolformer_jax.network.block import can_fuse
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.fused import StageShape


def kernel_stages(config: PoolFormerConfig, image_size: tuple[int, int], *, train: bool) -> list[StageShape]:
    """The shapes of the stages whose blocks are fused.

    Args:
        config: the architecture.
        image_size: height and width of the images in pixels.
        train: whether the network is trained; with dropout its blocks are not fused.
    """
    heights, widths = map(config.feature_sizes, image_size)
    shapes = map(StageShape, heights, widths, config.hidden_sizes, config.mlp_hidden_sizes)
    return [shape for stage, shape in enumerate(shapes) if can_fuse(config, stage, train)]
