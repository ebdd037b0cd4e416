"""The folded network as an ONNX graph, in the operations that runtimes are fastest with.

It is `folding.folded_apply` once more, for others to run. What differs is what they are made for: maps are
[batch, channels, height, width], a dense layer is a convolution of 1 x 1, pooling is one AveragePool. Everything is of
the standard's plain operators, and of four dimensions but within attention.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.functional import EPSILON, POOLED_EPSILON
from poolformer_jax.network.model import check_pixel_values
from poolformer_jax.network.token_mixers import Attention

_CHANNELS, _POSITIONS = (1,), (2, 3)


def network_graph(config: PoolFormerConfig, folded: Mapping[str, Any], image_size: tuple[int, int]) -> "Graph":
    """The network from "pixel_values" to "logits".

    Args:
        config: the architecture.
        folded: what `folding.fold` returns, as NumPy arrays.
        image_size: height and width of the input in pixels.

    Returns:
        A graph that takes float32 [batch, height, width, num_channels], normalised, for a batch of any size, and gives
        what `folding.folded_apply` does.

    Raises:
        ValueError: for an image size that the network does not take.
    """
    check_pixel_values(config, (1, *image_size, config.num_channels))
    graph = Graph()
    x = graph.add("Transpose", "pixel_values", perm=[0, 3, 1, 2])
    x = _convolve(graph.at("stem"), config, 0, folded["stem"], x)
    sizes = zip(config.feature_sizes(image_size[0]), config.feature_sizes(image_size[1]))
    for index, (depth, size) in enumerate(zip(config.depths, sizes)):
        name, mixer = f"stages_{index}", config.token_mixers[index]
        stage, maps = folded[name], (config.hidden_sizes[index], *size)
        if index > 0:
            x = _convolve(graph.at(f"{name}/downsample"), config, index, stage["downsample"], x)
        if "position_embedding" in stage:
            x = graph.at(name).add("Add", x, stage["position_embedding"].transpose(2, 0, 1))
        for block in (f"blocks_{number}" for number in range(depth)):
            params, place = stage[block], f"{name}/{block}"
            x = _mix_tokens(graph.at(f"{place}/token_mixer"), config, mixer, maps, params["token_mixer"], x)
            x = _mix_channels(graph.at(f"{place}/mlp"), config, params["mlp"], x)
    _classify(graph.at("head"), config, folded, x)
    return graph


@dataclasses.dataclass(frozen=True)
class Node:
    """An operation of the standard, with the names of what it takes and gives."""

    name: str
    operation: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in order, and constants by name. Names say where in the network something comes from."""

    place: str = ""
    nodes: list[Node] = dataclasses.field(default_factory=list)
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def at(self, place: str) -> "Graph":
        """The same graph, for what belongs to another place."""
        return dataclasses.replace(self, place=f"{place}/")

    def add(self, operation: str, *inputs: str | np.ndarray | float, output: str = "", **attributes: Any) -> str:
        """Appends a node and returns the name of its output; arrays and numbers among the inputs become constants."""
        name = f"{self.place}{operation}_{len(self.nodes)}"
        names = [value if isinstance(value, str) else f"{name}/{index}" for index, value in enumerate(inputs)]
        for key, value in zip(names, inputs):
            if not isinstance(value, str):
                self.constants[key] = np.asarray(value, np.float32 if isinstance(value, float) else None, order="C")
        self.nodes.append(Node(name, operation, tuple(names), output or name, attributes))
        return output or name


def _convolve(graph: Graph, config: PoolFormerConfig, index: int, conv: Mapping[str, np.ndarray], x: str) -> str:
    """The convolution before the blocks of a stage."""
    kernel = conv["kernel"].transpose(3, 2, 0, 1)  # [h, w, in, out] to [out, in, h, w]
    stride, padding = config.strides[index], config.padding[index]
    return graph.add("Conv", x, kernel, conv["bias"], strides=[stride] * 2, pads=[padding] * 4)


def _mix_tokens(
    graph: Graph, config: PoolFormerConfig, mixer: str, maps: tuple[int, int, int], params: Mapping[str, Any], x: str
) -> str:
    """The first residual branch and its input, for maps of so many channels, rows and columns."""
    scale, norm_axes = _over_channels(params["scale"]), _norm_axes(config)
    if mixer == "pooling" and config.norm == "group_norm":
        _, std = _distance_and_std(graph, x, norm_axes)
        # x + (pool(x) - x) * a, with a = scale / std of an image's channels, as pool(x) * a + x * (1 - a): a pass less.
        share = graph.add("Div", scale, std)
        kept = graph.add("Mul", x, graph.add("Sub", 1.0, share))
        return graph.add("Add", graph.add("Mul", _pool(graph, config, x), share), kept)
    normalised = _standardize(graph, x, norm_axes)
    if mixer == "pooling":
        branch = graph.add("Mul", graph.add("Sub", _pool(graph, config, normalised), normalised), scale)
    elif mixer == "identity":
        branch = graph.add("Add", graph.add("Mul", normalised, scale), _over_channels(params["shift"]))
    else:
        gain, shift = (_over_channels(params["norm"][name]) for name in ("scale", "bias"))
        normalised = graph.add("Add", graph.add("Mul", normalised, gain), shift)
        branch = graph.add("Mul", _MIXERS[mixer](graph, maps, params["mixer"], normalised), scale)
    return graph.add("Add", x, branch)


def _pool(graph: Graph, config: PoolFormerConfig, x: str) -> str:
    size, padding = config.pool_size, config.pool_size // 2
    return graph.add("AveragePool", x, kernel_shape=[size] * 2, pads=[padding] * 4, count_include_pad=0)


def _attention(graph: Graph, maps: tuple[int, int, int], params: Mapping[str, Any], x: str) -> str:
    """`token_mixers.Attention`; queries, keys and values are [batch, heads, head_dim, positions]."""
    channels, height, width = maps
    split = np.array([0, 3, channels // Attention.head_dim, Attention.head_dim, height * width])
    qkv = graph.add("Reshape", _dense(graph, params["qkv"], x), split)
    query, key, value = (graph.add("Gather", qkv, np.array(index), axis=1) for index in range(3))
    query = graph.add("Mul", query, Attention.head_dim**-0.5)
    scores = graph.add("MatMul", graph.add("Transpose", query, perm=[0, 1, 3, 2]), key)
    weights = graph.add("Transpose", graph.add("Softmax", scores, axis=-1), perm=[0, 1, 3, 2])
    mixed = graph.add("Reshape", graph.add("MatMul", value, weights), np.array([0, *maps]))
    return _dense(graph, params["proj"], mixed)


def _spatial_fc(graph: Graph, maps: tuple[int, int, int], params: Mapping[str, Any], x: str) -> str:
    """`token_mixers.SpatialFc`."""
    channels, height, width = maps
    tokens = graph.add("Reshape", x, np.array([0, channels, height * width]))
    return graph.add("Reshape", graph.add("MatMul", tokens, params["fc"]["kernel"]), np.array([0, *maps]))


# Those that folding leaves as they are.
_MIXERS: Mapping[str, Callable[[Graph, tuple[int, int, int], Mapping[str, Any], str], str]] = {
    "attention": _attention,
    "spatial_fc": _spatial_fc,
}


def _mix_channels(graph: Graph, config: PoolFormerConfig, params: Mapping[str, Any], x: str) -> str:
    """The second residual branch and its input."""
    hidden = _dense(graph, params["fc1"], _standardize(graph, x, _norm_axes(config)))
    return graph.add("Add", x, _dense(graph, params["fc2"], _ACTIVATIONS[config.hidden_act](graph, hidden)))


def _gelu(graph: Graph, x: str) -> str:
    # In this form runtimes know it and compute it in one pass; Gelu as one operator came with operator set 20.
    erf = graph.add("Erf", graph.add("Div", x, 2**0.5))
    return graph.add("Mul", graph.add("Mul", x, graph.add("Add", erf, 1.0)), 0.5)


def _gelu_tanh(graph: Graph, x: str) -> str:
    cubic = graph.add("Mul", graph.add("Mul", x, x), graph.add("Mul", x, 0.044715))
    tanh = graph.add("Tanh", graph.add("Mul", graph.add("Add", x, cubic), (2 / np.pi) ** 0.5))
    return graph.add("Mul", graph.add("Mul", x, graph.add("Add", tanh, 1.0)), 0.5)


def _silu(graph: Graph, x: str) -> str:
    return graph.add("Mul", x, graph.add("Sigmoid", x))


_ACTIVATIONS: Mapping[str, Callable[[Graph, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda graph, x: graph.add("Relu", x),
    "silu": _silu,
}


def _classify(graph: Graph, config: PoolFormerConfig, folded: Mapping[str, Any], x: str) -> str:
    """The logits for the last map; without labels the pooled, normalised features."""
    if config.head_order == "pool_norm":
        pooled = _standardize(graph, _mean(graph, x, _POSITIONS), _CHANNELS, POOLED_EPSILON)
    else:
        pooled = _mean(graph, _standardize(graph, x, _norm_axes(config)), _POSITIONS)
    pooled = graph.add("Flatten", pooled)
    if "head" in folded:
        return graph.add("Gemm", pooled, folded["head"]["kernel"], folded["head"]["bias"], output="logits")
    return graph.add("Add", graph.add("Mul", pooled, folded["norm"]["scale"]), folded["norm"]["bias"], output="logits")


def _dense(graph: Graph, params: Mapping[str, np.ndarray], x: str) -> str:
    """A dense layer over the channels of every position."""
    kernel = params["kernel"].T[..., None, None]  # [in, out] to [out, in, 1, 1]
    return graph.add("Conv", x, kernel, *(params[name] for name in ("bias",) if name in params))


def _standardize(graph: Graph, x: str, axes: tuple[int, ...], epsilon: float = EPSILON) -> str:
    return graph.add("Div", *_distance_and_std(graph, x, axes, epsilon))


def _distance_and_std(graph: Graph, x: str, axes: tuple[int, ...], epsilon: float = EPSILON) -> tuple[str, str]:
    """`x - mean`, and the standard deviation with the axes kept."""
    distance = graph.add("Sub", x, _mean(graph, x, axes))
    variance = _mean(graph, graph.add("Mul", distance, distance), axes)
    return distance, graph.add("Sqrt", graph.add("Add", variance, epsilon))


def _mean(graph: Graph, x: str, axes: tuple[int, ...]) -> str:
    return graph.add("ReduceMean", x, np.array(axes), keepdims=1)


def _norm_axes(config: PoolFormerConfig) -> tuple[int, ...]:
    """What a block's norm averages over."""
    return _CHANNELS + _POSITIONS if config.norm == "group_norm" else _CHANNELS


def _over_channels(vector: np.ndarray) -> np.ndarray:
    return vector[:, None, None]
