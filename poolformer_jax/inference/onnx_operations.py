"""The folded network as an ONNX graph, in the operations that runtimes are fastest with: `description` over nodes.

Feature maps are [batch, channels, height, width], a dense layer is a 1 x 1 convolution, pooling is one AveragePool. All
operators are in the ONNX standard. Feature maps have four dimensions, except in
`attention` and `mix_positions`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference.description import Operations, Parameters, classify, feature_maps
from poolformer_jax.network import PoolFormerConfig, check_pixel_values


def network_graph(
    config: PoolFormerConfig,
    folded: Parameters,
    image_size: tuple[int, int],
    *,
    normalization: PoolFormerImageProcessor | None = None,
    probabilities: bool = False,
) -> "Graph":
    """The network from "pixel_values" to "logits".

    Without `normalization` the graph takes float32 pixels that are normalised, with it uint8 pixels.

    Returns:
        A graph that takes [batch, height, width, num_channels], for a batch of any size, and gives what `folded_apply`
        does.

    Raises:
        ValueError: for an image size that the network does not take.
    """
    check_pixel_values(config, (1, *image_size, config.num_channels))
    ops = OnnxOperations(Graph())
    x = ops.input("pixel_values", (*image_size, config.num_channels), normalization)
    classify(ops, config, folded, feature_maps(ops, config, folded, x)[-1])
    ops.graph.nodes[-1] = dataclasses.replace(ops.graph.nodes[-1], output="logits")
    if probabilities:
        independent = config.problem_type == "multi_label_classification"
        operation, attributes = ("Sigmoid", {}) if independent else ("Softmax", {"axis": -1})
        ops.graph.nodes.append(Node(operation, operation, ("logits",), "probabilities", attributes))
    return ops.graph


def takes_any_size(config: PoolFormerConfig) -> bool:
    """True if the network has no parameters for every position and its mixers are known to take any size."""
    return config.image_size is None and set(config.token_mixers) <= _MIXERS_OF_ANY_SIZE


_FLOAT32 = 1  # TensorProto.FLOAT
_MIXERS_OF_ANY_SIZE = {"pooling", "identity", "attention", "sep_conv"}


@dataclasses.dataclass(frozen=True)
class Node:
    """An operation of the standard, with the names of its inputs and its output."""

    name: str
    operation: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in the order of the computation, and constants by name."""

    nodes: list[Node] = dataclasses.field(default_factory=list)
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Value(NamedTuple):
    """The output of a node: its name, and its shape without the batch, (channels, height, width) or (channels,)."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class OnnxOperations(Operations[Value]):
    """Appends the nodes of each step to `graph`. Their names begin with the `place` in the network."""

    graph: Graph
    place: str = ""

    def at(self, place: str) -> "OnnxOperations":
        return dataclasses.replace(self, place=f"{place}/")

    def input(
        self, name: str, shape: tuple[int, int, int], normalization: PoolFormerImageProcessor | None = None
    ) -> Value:
        """The graph's input, [batch, height, width, channels], normalised."""
        height, width, channels = shape
        x = self._node("Transpose", Value(name, shape), shape=(channels, height, width), perm=[0, 3, 1, 2])
        if normalization is None:
            return x
        return self.affine(self._node("Cast", x, to=_FLOAT32), *normalization.scale_and_shift())

    def _node(
        self,
        operation: str,
        *inputs: Value | np.ndarray | float,
        shape: tuple[int, ...] | None = None,
        **attributes: Any,
    ) -> Value:
        """Appends a node; arrays and numbers among its inputs become constants.

        Its output has the shape of the first value among the inputs unless `shape` is given.
        """
        name = f"{self.place}{operation}_{len(self.graph.nodes)}"
        names = []
        for index, value in enumerate(inputs):
            if isinstance(value, Value):
                names.append(value.name)
                shape = value.shape if shape is None else shape
            else:
                names.append(f"{name}/{index}")
                dtype = np.float32 if isinstance(value, float) else None
                self.graph.constants[names[-1]] = np.asarray(value, dtype, order="C")
        self.graph.nodes.append(Node(name, operation, tuple(names), name, attributes))
        return Value(name, shape or ())

    def convolution(self, x: Value, params: Parameters, stride: int, padding: int) -> Value:
        kernel = params["kernel"].transpose(3, 2, 0, 1)  # [h, w, in, out] to [out, in, h, w]
        sides = ((side + 2 * padding - kernel.shape[2]) // stride + 1 for side in x.shape[1:])
        shape, pads = (len(kernel), *sides), [padding] * 4
        return self._node("Conv", x, kernel, params["bias"], shape=shape, strides=[stride] * 2, pads=pads)

    def dense(self, x: Value, params: Parameters) -> Value:
        kernel, bias = params["kernel"], [params["bias"]] if "bias" in params else []
        if len(x.shape) == 1:
            return self._node("Gemm", x, kernel, *bias, shape=(kernel.shape[1],))
        return self._node("Conv", x, kernel.T[..., None, None], *bias, shape=(kernel.shape[1], *x.shape[1:]))

    def elementwise(self, x: Value, function: str) -> Value:
        return _ELEMENTWISE[function](self._node, x)

    def add(self, x: Value, y: Value) -> Value:
        return self._node("Add", x, y)

    def multiply(self, x: Value, y: Value) -> Value:
        return self._node("Mul", x, y)

    def add_embedding(self, x: Value, embedding: np.ndarray) -> Value:
        return self._node("Add", x, embedding.transpose(2, 0, 1))

    def affine(self, x: Value, scale: np.ndarray, shift: np.ndarray | None = None) -> Value:
        scaled = self._node("Mul", x, _over_channels(scale, x))
        return scaled if shift is None else self._node("Add", scaled, _over_channels(shift, x))

    def standardize(self, x: Value, norm: str, epsilon: float) -> Value:
        if norm == "group_norm":
            return self._node("Div", *self._distance_and_std(x, (1, 2, 3), epsilon))
        # OpenVINO computes this quotient in one pass, and multiplies the factor into the convolution that follows.
        axis, channels = np.array((1,)), x.shape[0]
        distance = self._node("Sub", x, self._node("ReduceMean", x, axis, keepdims=1))
        squares = self._node("ReduceSum", self._node("Pow", distance, 2.0), axis, keepdims=1)
        length = self._node("Sqrt", self._node("Add", squares, channels * epsilon))
        return self._node("Mul", self._node("Div", distance, length), channels**0.5)

    def mean(self, x: Value) -> Value:
        return self._node("Flatten", self._node("ReduceMean", x, np.array((2, 3)), keepdims=1), shape=x.shape[:1])

    def standardized_mean(self, x: Value, norm: str, epsilon: float) -> Value:
        return self.mean(self.standardize(x, norm, epsilon))

    def pooling(self, x: Value, pool_size: int) -> Value:
        return self._node("Sub", self._average_pool(x, pool_size), x)

    def pooling_residual(
        self, x: Value, pool_size: int, scale: np.ndarray, epsilon: float, trunk: np.ndarray | None = None
    ) -> Value:
        _, std = self._distance_and_std(x, (1, 2, 3), epsilon)
        # x * trunk + (pool(x) - x) * share as pool(x) * share + x * (trunk - share), which saves a pass over the map.
        share = self._node("Div", _over_channels(scale, x), std)
        kept = self._node("Mul", x, self._node("Sub", 1.0 if trunk is None else _over_channels(trunk, x), share))
        return self._node("Add", self._node("Mul", self._average_pool(x, pool_size), share), kept)

    def depthwise_convolution(self, x: Value, kernel: np.ndarray) -> Value:
        pads = [kernel.shape[0] // 2] * 4
        return self._node("Conv", x, kernel.transpose(3, 2, 0, 1), group=kernel.shape[3], pads=pads)

    def attention(self, qkv: Value, head_dim: int) -> Value:
        channels = qkv.shape[0] // 3
        tokens = self._node("Transpose", qkv, perm=[0, 2, 3, 1])
        parts = self._node("Reshape", tokens, np.array([0, -1, 3, channels // head_dim, head_dim]))
        # [3, batch, heads, positions, head_dim]: in this order OpenVINO computes the attention of a head in one pass.
        parts = self._node("Transpose", parts, perm=[2, 0, 3, 1, 4])
        query, key, value = (self._node("Gather", parts, np.array(index), axis=0) for index in range(3))
        query = self._node("Mul", query, head_dim**-0.5)
        scores = self._node("MatMul", query, self._node("Transpose", key, perm=[0, 1, 3, 2]))
        weights = self._node("Softmax", scores, axis=-1)
        mixed = self._node("Transpose", self._node("MatMul", weights, value), perm=[0, 2, 1, 3])
        # Height and width are those of the images that the file is run with.
        size = self._node("Shape", tokens, start=1, end=3)
        shape = self._node("Concat", np.array([0]), size, np.array([channels]), axis=0)
        y = self._node("Reshape", mixed, shape)
        return self._node("Transpose", y, shape=(channels, *qkv.shape[1:]), perm=[0, 3, 1, 2])

    def mix_positions(self, x: Value, kernel: np.ndarray) -> Value:
        tokens = self._node("Reshape", x, np.array([0, x.shape[0], len(kernel)]))
        return self._node("Reshape", self._node("MatMul", tokens, kernel), np.array([0, *x.shape]), shape=x.shape)

    def _average_pool(self, x: Value, size: int) -> Value:
        pads = [size // 2] * 4
        return self._node("AveragePool", x, kernel_shape=[size] * 2, pads=pads, count_include_pad=0)

    def _distance_and_std(self, x: Value, axes: tuple[int, ...], epsilon: float) -> tuple[Value, Value]:
        """`x - mean`, and the standard deviation with the axes kept."""
        distance = self._node("Sub", x, self._node("ReduceMean", x, np.array(axes), keepdims=1))
        variance = self._node("ReduceMean", self._node("Mul", distance, distance), np.array(axes), keepdims=1)
        return distance, self._node("Sqrt", self._node("Add", variance, epsilon))


def _over_channels(vector: np.ndarray, x: Value) -> np.ndarray:
    """`vector` reshaped to broadcast over the channels of `x`."""
    return vector.reshape(-1, *(1 for _ in x.shape[1:]))


_NodeFunction = Callable[..., Value]


def _gelu(node: _NodeFunction, x: Value) -> Value:
    # Runtimes recognise this form and compute it in one pass. Gelu as one operator came with operator set 20.
    erf = node("Erf", node("Div", x, 2**0.5))
    return node("Mul", node("Mul", x, node("Add", erf, 1.0)), 0.5)


def _gelu_tanh(node: _NodeFunction, x: Value) -> Value:
    cubic = node("Mul", node("Mul", x, x), node("Mul", x, 0.044715))
    tanh = node("Tanh", node("Mul", node("Add", x, cubic), (2 / np.pi) ** 0.5))
    return node("Mul", node("Mul", x, node("Add", tanh, 1.0)), 0.5)


def _laplace(node: _NodeFunction, x: Value) -> Value:
    erf = node("Erf", node("Div", node("Sub", x, 0.707107), 0.282095 * 2**0.5))
    return node("Mul", node("Add", erf, 1.0), 0.5)


def _quick_gelu(node: _NodeFunction, x: Value) -> Value:
    return node("Mul", x, node("Sigmoid", node("Mul", x, 1.702)))


def _relu2(node: _NodeFunction, x: Value) -> Value:
    relu = node("Relu", x)
    return node("Mul", relu, relu)


def _silu(node: _NodeFunction, x: Value) -> Value:
    return node("Mul", x, node("Sigmoid", x))


_ELEMENTWISE: Mapping[str, Callable[[_NodeFunction, Value], Value]] = {
    "gelu": _gelu,
    "gelu_10": lambda node, x: node("Clip", _gelu(node, x), -10.0, 10.0),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda node, x: node("HardSwish", x),
    "laplace": _laplace,
    "leaky_relu": lambda node, x: node("LeakyRelu", x, alpha=0.01),
    "linear": lambda node, x: x,
    "mish": lambda node, x: node("Mul", x, node("Tanh", node("Softplus", x))),
    "quick_gelu": _quick_gelu,
    "relu": lambda node, x: node("Relu", x),
    "relu2": _relu2,
    "relu6": lambda node, x: node("Clip", x, 0.0, 6.0),
    "sigmoid": lambda node, x: node("Sigmoid", x),
    "silu": _silu,
    "sqrtsoftplus": lambda node, x: node("Sqrt", node("Softplus", x)),
    "swish": _silu,
    "tanh": lambda node, x: node("Tanh", x),
}
