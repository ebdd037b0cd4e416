"""The folded network, written once over named operations.

`feature_maps` and `classify` walk the parameters that `folding.fold` returns, and call one method of an `Operations`
for every step. The three implementations of `Operations` compute arrays (`jax_operations`), write ONNX nodes
(`onnx_operations`) and count multiplications (`cost_operations`).

To add a token mixer, add an entry to `TOKEN_MIXERS`; to add an activation, add one to `ACTIVATIONS`. Then all three
implementations have it. Training computes with `network`.

Sources: arXiv 2111.11418, Figure 2 and Section 3; arXiv 2210.13452; `folding` has the algebra.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from poolformer_jax.network import DOWNSAMPLE_EPSILON, HEAD_DIM, HIDDEN_ACTS, POOLED_EPSILON, PoolFormerConfig

X = TypeVar("X")
# Nested dictionaries of arrays, or of anything else that has a shape.
Parameters: TypeAlias = Mapping[str, Any]


class Operations(ABC, Generic[X]):
    """The steps of the network for one kind of value `X`.

    A value stands for a feature map [height, width, channels] or, from `mean` on, a vector [channels] of every image in
    a batch. Implementations choose the order of its axes. Parameters have the layout of the parameter tree: a dense
    kernel is [in, out], a convolution's [height, width, in, out], and a vector has an entry for each channel.
    """

    @abstractmethod
    def at(self, place: str) -> "Operations[X]":
        """The same operations, for the part of the network called `place` in the parameter tree."""

    @abstractmethod
    def convolution(self, x: X, params: Parameters, stride: int, padding: int) -> X:
        """A convolution with square kernels and explicit zero padding. `params`: kernel, bias."""

    @abstractmethod
    def dense(self, x: X, params: Parameters) -> X:
        """A dense layer over the channels. `params`: kernel, and bias if the layer has one."""

    @abstractmethod
    def elementwise(self, x: X, function: str) -> X:
        """A function of each number, one of `config.HIDDEN_ACTS` without parameters."""

    @abstractmethod
    def add(self, x: X, y: X) -> X:
        """The sum of two values of one shape."""

    @abstractmethod
    def multiply(self, x: X, y: X) -> X:
        """The product, number by number, of two values of one shape."""

    @abstractmethod
    def add_embedding(self, x: X, embedding: Any) -> X:
        """`x` plus an array [height, width, channels], the same for every image."""

    @abstractmethod
    def affine(self, x: X, scale: Any, shift: Any = None) -> X:
        """`x * scale + shift` with vectors over the channels; no shift if it is None."""

    @abstractmethod
    def standardize(self, x: X, norm: str, epsilon: float) -> X:
        """`(x - mean) / sqrt(variance + epsilon)`: of an image for "group_norm", of a position for "layer_norm"."""

    @abstractmethod
    def mean(self, x: X) -> X:
        """The mean over all positions: from a feature map to a vector."""

    @abstractmethod
    def standardized_mean(self, x: X, norm: str, epsilon: float) -> X:
        """`mean(standardize(x, norm, epsilon))`; with one group this needs no normalised map."""

    @abstractmethod
    def pooling(self, x: X, pool_size: int) -> X:
        """`pool(x) - x`: stride 1, and the mean counts only pixels inside the image."""

    @abstractmethod
    def pooling_residual(self, x: X, pool_size: int, scale: Any, epsilon: float, trunk: Any = None) -> X:
        """`x * trunk + (pool(x) - x) * scale / sqrt(variance + epsilon)`, with one variance for each image.

        `trunk` and `scale` are vectors over the channels; None for a trunk of ones.
        """

    @abstractmethod
    def depthwise_convolution(self, x: X, kernel: Any) -> X:
        """A convolution of each channel with a separate kernel: stride 1, zero padding that keeps the size.

        The kernel is [height, width, 1, channels], with odd sides.
        """

    @abstractmethod
    def attention(self, qkv: X, head_dim: int) -> X:
        """Softmax attention over all positions. Channels of `qkv`: queries, keys, values, each head by head."""

    @abstractmethod
    def mix_positions(self, x: X, kernel: Any) -> X:
        """A matrix product over the positions, row by row: kernel [positions in, positions out]."""


def feature_maps(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> tuple[X, ...]:
    """The feature map of every stage: the `hidden_states` of the model."""
    maps = []
    for index in range(len(config.depths)):
        stage, name = params[f"stages_{index}"], f"stages_{index}"
        x = _downsample(ops.at(f"{name}/downsample"), config, index, stage["downsample"], x) if index else x
        x = x if index else _stem(ops.at("stem"), config, params["stem"], x)
        if config.position_embeddings[index]:
            x = ops.at(f"{name}/position_embedding").add_embedding(x, stage["position_embedding"])
        for block in block_names(config.depths[index]):
            place = f"{name}/{block}"
            x = _mix_tokens(ops.at(f"{place}/token_mixer"), config, index, stage[block]["token_mixer"], x)
            x = _mix_channels(ops.at(f"{place}/mlp"), config, stage[block]["mlp"], x)
        maps.append(x)
    return tuple(maps)


def classify(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    """The logits for the last feature map; with num_labels=0 the pooled, normalised features."""
    norm = ops.at("norm")
    if config.head_order == "pool_norm":
        pooled = norm.standardize(norm.mean(x), "layer_norm", POOLED_EPSILON)
    else:
        pooled = norm.standardized_mean(x, config.norm, config.norm_epsilon)
    if not config.num_labels:
        return norm.affine(pooled, params["norm"]["scale"], params["norm"]["bias"])
    head = ops.at("head")
    if config.head == "linear":
        return head.dense(pooled, params["head"])
    hidden = head.elementwise(head.dense(pooled, params["head"]["fc1"]), "relu2")
    return head.dense(head.standardize(hidden, "layer_norm", config.head_norm_epsilon), params["head"]["fc2"])


def block_names(depth: int) -> list[str]:
    """The parameter tree's names for the blocks of a stage, first to last."""
    return [f"blocks_{number}" for number in range(depth)]


def _stem(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    """The first convolution; in the second paper a norm follows it."""
    x = ops.convolution(x, params, config.strides[0], config.padding[0])
    if not config.downsample_norm:
        return x
    return ops.affine(ops.standardize(x, "layer_norm", DOWNSAMPLE_EPSILON), params["scale"])


def _downsample(ops: Operations[X], config: PoolFormerConfig, index: int, params: Parameters, x: X) -> X:
    """The convolution at the start of a later stage; in the second paper a norm precedes it."""
    if config.downsample_norm:
        x = ops.standardize(x, "layer_norm", DOWNSAMPLE_EPSILON)
    return ops.convolution(x, params, config.strides[index], config.padding[index])


def _mix_tokens(ops: Operations[X], config: PoolFormerConfig, index: int, params: Parameters, x: X) -> X:
    """The first residual branch and its input. `params` has what `folding` leaves of norm, mixer and scales."""
    mixer = config.token_mixers[index]
    if mixer == "pooling" and config.norm == "group_norm":  # line 3 of `folding`
        return ops.pooling_residual(x, config.pool_size, params["scale"], config.norm_epsilon, params.get("trunk"))
    branch = ops.standardize(x, config.norm, config.norm_epsilon)
    if "norm" in params:
        branch = ops.affine(branch, params["norm"]["scale"], params["norm"].get("bias"))
    branch = TOKEN_MIXERS[mixer](ops, config, params.get("mixer", {}), branch)
    if "scale" in params:
        branch = ops.affine(branch, params["scale"], params.get("shift"))
    return ops.add(_trunk(ops, params, x), branch)


def _mix_channels(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    """The second residual branch and its input."""
    hidden = ops.dense(ops.standardize(x, config.norm, config.norm_epsilon), params["fc1"])
    hidden = ACTIVATIONS[config.hidden_act](ops, hidden)
    return ops.add(_trunk(ops, params, x), ops.dense(hidden, params["fc2"]))


def _trunk(ops: Operations[X], params: Parameters, x: X) -> X:
    """The block's input times its residual scale, where the stage has one."""
    return ops.affine(x, params["trunk"]) if "trunk" in params else x


def _pooling(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    return ops.pooling(x, config.pool_size)


def _identity(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    return x


def _attention(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    return ops.dense(ops.attention(ops.dense(x, params["qkv"]), HEAD_DIM), params["proj"])


def _spatial_fc(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    return ops.mix_positions(x, params["fc"]["kernel"])


def _random(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    return ops.mix_positions(x, params["random"]["kernel"])


def _sep_conv(ops: Operations[X], config: PoolFormerConfig, params: Parameters, x: X) -> X:
    hidden = ops.elementwise(ops.dense(x, params["pwconv1"]), "relu2")
    hidden = ops.affine(hidden, params["act1"]["scale"], params["act1"]["bias"])
    return ops.dense(ops.depthwise_convolution(hidden, params["dwconv"]["kernel"]), params["pwconv2"])


# What each mixer does with a normalised feature map: (operations, config, its parameters, the map) to a map.
TOKEN_MIXERS: dict[str, Callable[[Operations[Any], PoolFormerConfig, Parameters, Any], Any]] = {
    "pooling": _pooling,
    "identity": _identity,
    "attention": _attention,
    "spatial_fc": _spatial_fc,
    "random": _random,
    "sep_conv": _sep_conv,
}

# What each activation does with the MLP's hidden layer. Every implementation knows those of the network by their names.
ACTIVATIONS: dict[str, Callable[[Operations[Any], Any], Any]] = {
    name: partial(lambda name, ops, x: ops.elementwise(x, name), name) for name in HIDDEN_ACTS
}
ACTIVATIONS["star_relu"] = ACTIVATIONS["relu2"]  # line 10 of `folding`
