"""What a network costs: parameters and multiply-accumulate operations (MACs), layer by layer, without computing it.

Parameters are counted from the shapes that initialisation would give (`jax.eval_shape`). MACs are counted from the
configuration by the rules of fvcore, which the paper's table was made with: one for each multiplication of a
convolution, a dense layer or an attention product, five for each element that a norm reads, none for activations,
pooling, softmax and additions (fvcore.nn.jit_handles).
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.model import PoolFormerForImageClassification, check_pixel_values

# What fvcore's norm_flop_counter estimates for a norm with gain and shift.
_NORM_MACS = 5


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """A row of the layer table.

    Attributes:
        name: where it is in the parameter tree; the equal blocks of a stage share a row.
        output_shape: (height, width, channels), or (channels,) after pooling.
        parameters: how many numbers it learns.
        macs: multiply-accumulate operations for one image.
    """

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int


def parameter_shapes(config: PoolFormerConfig) -> Mapping[str, Any]:
    """The parameter tree with shapes in the place of arrays; nothing is allocated."""
    side = config.image_size or config.smallest_side
    pixels = jax.ShapeDtypeStruct((1, side, side, config.num_channels), jnp.float32)
    init = partial(PoolFormerForImageClassification(config).init, jax.random.key(0))
    shapes: Mapping[str, Any] = jax.eval_shape(init, pixels)["params"]
    return shapes


def count_parameters(tree: Any) -> int:
    """How many numbers a tree of arrays or shapes holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_macs(config: PoolFormerConfig, height: int = 224, width: int = 224) -> int:
    """MACs for one image of `height` x `width` pixels."""
    return sum(layer.macs for layer in layer_table(config, height, width))


def layer_table(config: PoolFormerConfig, height: int = 224, width: int = 224) -> list[LayerCost]:
    """Every layer with its cost for one image of `height` x `width` pixels.

    Raises:
        ValueError: for an image that the network does not take.
    """
    check_pixel_values(config, (1, height, width, config.num_channels))
    # The blocks of a stage are equal: one of each is enough to trace.
    shapes = parameter_shapes(dataclasses.replace(config, depths=(1,) * len(config.depths)))
    rows: list[LayerCost] = []
    channels = config.num_channels
    sizes = list(zip(config.feature_sizes(height), config.feature_sizes(width)))
    for index, (depth, size) in enumerate(zip(config.depths, sizes)):
        stage = shapes[f"stages_{index}"]
        shape = (*size, config.hidden_sizes[index])
        name, conv = ("stem", shapes["stem"]) if index == 0 else (f"stages_{index}/downsample", stage["downsample"])
        patch = config.patch_sizes[index] ** 2 * channels
        rows.append(LayerCost(name, shape, count_parameters(conv), math.prod(shape) * patch))
        if "position_embedding" in stage:
            positions = count_parameters(stage["position_embedding"])
            rows.append(LayerCost(f"stages_{index}/position_embedding", shape, positions, 0))
        blocks = f"stages_{index}/blocks_0..{depth - 1}" if depth > 1 else f"stages_{index}/blocks_0"
        learnt = depth * count_parameters(stage["blocks_0"])
        macs = depth * _block_macs(config, index, math.prod(size))
        rows.append(LayerCost(f"{blocks} ({config.token_mixers[index]})", shape, learnt, macs))
        channels = config.hidden_sizes[index]
    normalised = channels * (math.prod(sizes[-1]) if config.head_order == "norm_pool" else 1)
    rows.append(LayerCost("norm", (channels,), count_parameters(shapes["norm"]), _NORM_MACS * normalised))
    if config.num_labels:
        head = count_parameters(shapes["head"])
        rows.append(LayerCost("head", (config.num_labels,), head, channels * config.num_labels))
    return rows


def _block_macs(config: PoolFormerConfig, index: int, positions: int) -> int:
    channels = config.hidden_sizes[index]
    mlp = 2 * positions * channels * config.mlp_hidden_sizes[index]
    mixer = {
        "pooling": 0,
        "identity": 0,
        # query, key, value and projection; then the scores and the weighted sum of values
        "attention": 4 * positions * channels**2 + 2 * positions**2 * channels,
        "spatial_fc": positions**2 * channels,
    }
    return mlp + mixer[config.token_mixers[index]] + 2 * _NORM_MACS * positions * channels
