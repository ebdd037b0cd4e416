"""What a network costs: parameters and multiply-accumulate operations (MACs), layer by layer, without computing it.

`description` over shapes, by the rules of fvcore, which made the papers' tables: one MAC for each multiplication of a
convolution, a dense layer or an attention product, five for each number that a norm reads, none for activations,
pooling, softmax and additions (fvcore.nn.jit_handles). Norms without bias, those of the second paper, count nothing:
its authors write them by hand, and fvcore knows only the norms of PyTorch.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from poolformer_jax.inference.description import Operations, Parameters, classify, feature_maps
from poolformer_jax.inference.folding import fold_tree
from poolformer_jax.network import PARAMS, PoolFormerConfig, all_parameters, check_pixel_values

# What fvcore's norm_flop_counter estimates for a norm with gain and shift.
_NORM_MACS = 5

# (height, width, channels) of a feature map, or (channels,) of a vector.
Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """A row of the layer table."""

    name: str  # the layer's place in the parameter tree; the blocks of a stage, which are equal, share a row
    output_shape: Shape  # (height, width, channels), or (channels,) after pooling
    parameters: int  # how many numbers it learns
    macs: int  # multiply-accumulate operations for one image


def parameter_shapes(config: PoolFormerConfig) -> Mapping[str, Any]:
    """The parameters of all collections in one tree, with shapes instead of arrays."""
    shapes = {row.path: jax.ShapeDtypeStruct(row.shape, np.float32) for row in all_parameters(config)}
    tree: Mapping[str, Any] = unflatten_dict(shapes, sep="/")
    return tree


def count_macs(config: PoolFormerConfig, height: int = 224, width: int = 224) -> int:
    """MACs for one image of `height` x `width` pixels."""
    return sum(layer.macs for layer in layer_table(config, height, width))


def layer_table(config: PoolFormerConfig, height: int = 224, width: int = 224) -> list[LayerCost]:
    """Every layer with its cost for one image of `height` x `width` pixels.

    Raises ValueError for an image size that the network does not take.
    """
    pixels = (height, width, config.num_channels)
    check_pixel_values(config, (1, *pixels))
    # The blocks of a stage are equal: one of each is counted, and multiplied by the number of blocks.
    shallow = dataclasses.replace(config, depths=(1,) * len(config.depths))
    folded = jax.eval_shape(partial(fold_tree, shallow), parameter_shapes(shallow))
    ops = CostOperations(norm_macs=_NORM_MACS if config.norm_bias else 0)
    classify(ops, shallow, folded, feature_maps(ops, shallow, folded, pixels)[-1])
    sizes = {
        parameter.path: math.prod(parameter.shape)
        for parameter in all_parameters(config)
        if parameter.row.collection == PARAMS
    }
    return [_row(config, sizes, place, cost) for place, cost in ops.layers.items()]


def _row(config: PoolFormerConfig, sizes: Mapping[str, int], place: str, cost: "_Cost") -> LayerCost:
    """The row for one place of the network, or for all blocks of its stage."""
    stage, _, block = place.partition("/blocks_")
    prefix, name, blocks = f"{place}/", place, 1
    if block:
        index = int(stage.removeprefix("stages_"))
        blocks, prefix = config.depths[index], f"{stage}/blocks_"
        name += f"..{blocks - 1}" * (blocks > 1) + f" ({config.token_mixers[index]})"
    learnt = sum(size for path, size in sizes.items() if f"{path}/".startswith(prefix))
    return LayerCost(name, cost.output_shape, learnt, blocks * cost.macs)


@dataclasses.dataclass
class _Cost:
    output_shape: Shape = ()
    macs: int = 0


@dataclasses.dataclass(frozen=True)
class CostOperations(Operations[Shape]):
    """Values are shapes without the batch."""

    norm_macs: int = _NORM_MACS  # MACs for each number that a norm reads
    place: str = ""  # the layer that is counted now, such as "stages_0/blocks_0"
    # What has been counted, by place, in the order of the network.
    layers: dict[str, _Cost] = dataclasses.field(default_factory=dict)

    def at(self, place: str) -> "CostOperations":
        return dataclasses.replace(self, place="/".join(place.split("/")[:2]))  # a block's mixer and MLP share a row

    def _count(self, output: Shape, macs: int = 0) -> Shape:
        cost = self.layers.setdefault(self.place, _Cost())
        cost.output_shape = output
        cost.macs += macs
        return output

    def convolution(self, x: Shape, params: Parameters, stride: int, padding: int) -> Shape:
        size, _, _, channels = params["kernel"].shape
        output = (*((side + 2 * padding - size) // stride + 1 for side in x[:2]), channels)
        return self._count(output, math.prod(output[:2]) * math.prod(params["kernel"].shape))

    def dense(self, x: Shape, params: Parameters) -> Shape:
        kernel = params["kernel"].shape
        return self._count((*x[:-1], kernel[1]), math.prod(x[:-1]) * math.prod(kernel))

    def elementwise(self, x: Shape, function: str) -> Shape:
        return self._count(x)

    def add(self, x: Shape, y: Shape) -> Shape:
        return self._count(x)

    def multiply(self, x: Shape, y: Shape) -> Shape:
        return self._count(x)

    def add_embedding(self, x: Shape, embedding: Any) -> Shape:
        return self._count(x)

    def affine(self, x: Shape, scale: Any, shift: Any = None) -> Shape:
        return self._count(x)

    def standardize(self, x: Shape, norm: str, epsilon: float) -> Shape:
        return self._count(x, self.norm_macs * math.prod(x))

    def mean(self, x: Shape) -> Shape:
        return self._count(x[2:])

    def standardized_mean(self, x: Shape, norm: str, epsilon: float) -> Shape:
        return self.mean(self.standardize(x, norm, epsilon))

    def pooling(self, x: Shape, pool_size: int) -> Shape:
        return self._count(x)

    def pooling_residual(self, x: Shape, pool_size: int, scale: Any, epsilon: float, trunk: Any = None) -> Shape:
        return self.standardize(x, "group_norm", epsilon)

    def depthwise_convolution(self, x: Shape, kernel: Any) -> Shape:
        return self._count(x, math.prod(x[:2]) * math.prod(kernel.shape))

    def attention(self, qkv: Shape, head_dim: int) -> Shape:
        positions, channels = math.prod(qkv[:2]), qkv[2] // 3
        return self._count((*qkv[:2], channels), 2 * positions**2 * channels)  # the scores, and the weighted values

    def mix_positions(self, x: Shape, kernel: Any) -> Shape:
        return self._count(x, math.prod(kernel.shape) * x[2])
