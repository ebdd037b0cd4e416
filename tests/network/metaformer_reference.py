"""The networks of "MetaFormer Baselines for Vision" (arXiv 2210.13452) in NumPy, with every known mistake as a switch.

Independent of the package: NCHW, float64, and the authors' parameter names (sail-sg/metaformer). Without a mistake it
agrees with the golden arrays; every mistake moves the result further than the parity tests allow.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

State = Mapping[str, np.ndarray]
# Token mixers of the four stages, and the norm of the blocks.
KINDS = {
    "poolformerv2": (("pooling",) * 4, "group"),
    "identityformer": (("identity",) * 4, "group"),
    "randformer": (("identity",) * 2 + ("random",) * 2, "group"),
    "convformer": (("sep_conv",) * 4, "layer"),
    "caformer": (("sep_conv",) * 2 + ("attention",) * 2, "layer"),
}
_GROUP = ("poolformerv2", "identityformer", "randformer")
_MLP_HEAD = ("convformer", "caformer")
# A float32 test does not see these: mistake -> the kinds that can make it.
SILENT_MISTAKES = {
    "final epsilon 1e-5": tuple(KINDS),
    "head epsilon of timm": _MLP_HEAD,
    "downsampling epsilon 1e-5": tuple(KINDS),
    "block epsilon 1e-5": tuple(KINDS),
}
LOUD_MISTAKES = {
    "identity instead of pooling": ("poolformerv2",),
    "pooling instead of identity": ("identityformer",),
    "norm before the average": tuple(KINDS),
    "padding before the activation": _MLP_HEAD,
    "second activation in the separable convolution": _MLP_HEAD,
    "ReLU in the head": _MLP_HEAD,
    "attention scaled by the width": ("caformer",),
    "heads before q, k and v": ("caformer",),
    "StarReLU without its bias": tuple(KINDS),
    "StarReLU in float16": tuple(KINDS),
    "no norm in the stem": tuple(KINDS),
    "layer norm instead of group norm": _GROUP,
    "group norm instead of layer norm": _MLP_HEAD,
    "group norm at downsampling": tuple(KINDS),
    "padding counted in pooling": ("poolformerv2",),
    "SAME padding": tuple(KINDS),
    "tokens in column-major order": ("randformer",),
    "random matrix transposed": ("randformer",),
    "softmax of the random matrix": ("randformer",),
    "residual scale on the branch": tuple(KINDS),
}


def outputs(
    state: State,
    pixels: np.ndarray,
    kind: str,
    mistake: str | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """The output of every stage, [b, c, h, w], and the logits, [b, labels], for pixels [b, 3, h, w].

    Args:
        state: authors' name -> array, in the authors' shapes.
        pixels: normalised images.
        kind: a key of KINDS.
        mistake: a key of SILENT_MISTAKES or LOUD_MISTAKES.
    """
    x, stages = pixels, []
    for stage, mixer in enumerate(KINDS[kind][0]):
        x = _downsample(state, x, stage, mistake)
        block = 0
        while f"stages.{stage}.{block}.norm1.weight" in state:
            x = _block(state, x, f"stages.{stage}.{block}", mixer, KINDS[kind][1], mistake)
            block += 1
        stages.append(x)
    return stages, _head(state, x, mistake)


def _downsample(state: State, x: np.ndarray, stage: int, mistake: str | None) -> np.ndarray:
    """The stem, or a norm and a convolution before a later stage."""
    name, epsilon = f"downsample_layers.{stage}", 1e-5 if mistake == "downsampling epsilon 1e-5" else 1e-6
    axes = (1, 2, 3) if mistake == "group norm at downsampling" else (1,)
    if stage:
        x = _norm(x, axes, epsilon, state[f"{name}.pre_norm.weight"])
    stride, padding = (2, 1) if stage else (4, 2)
    x = _convolution(x, state[f"{name}.conv.weight"], stride, None if mistake == "SAME padding" else padding)
    x = x + state[f"{name}.conv.bias"][:, None, None]
    if stage or mistake == "no norm in the stem":
        return x
    return _norm(x, axes, epsilon, state[f"{name}.post_norm.weight"])


def _block(state: State, x: np.ndarray, name: str, mixer: str, norm: str, mistake: str | None) -> np.ndarray:
    if mistake in ("layer norm instead of group norm", "group norm instead of layer norm"):
        norm = mistake.split()[0]
    axes, epsilon = (1, 2, 3) if norm == "group" else (1,), 1e-5 if mistake == "block epsilon 1e-5" else 1e-6

    def residual(x: np.ndarray, branch: np.ndarray, number: int) -> np.ndarray:
        if f"{name}.res_scale{number}.scale" not in state:
            return x + branch
        scale = state[f"{name}.res_scale{number}.scale"][:, None, None]
        return x + scale * branch if mistake == "residual scale on the branch" else scale * x + branch

    normed = _norm(x, axes, epsilon, state[f"{name}.norm1.weight"])
    x = residual(x, _mix(state, normed, f"{name}.token_mixer", mixer, mistake), 1)
    hidden = _dense(_norm(x, axes, epsilon, state[f"{name}.norm2.weight"]), state[f"{name}.mlp.fc1.weight"])
    hidden = _star_relu(state, hidden, f"{name}.mlp.act", mistake)
    return residual(x, _dense(hidden, state[f"{name}.mlp.fc2.weight"]), 2)


def _mix(state: State, x: np.ndarray, name: str, mixer: str, mistake: str | None) -> np.ndarray:
    if mistake == "identity instead of pooling" or (mixer == "identity" and mistake != "pooling instead of identity"):
        return x
    if mixer in ("pooling", "identity"):
        ones = np.ones((1, 1, *x.shape[2:]))
        count = 9.0 if mistake == "padding counted in pooling" else _windows(ones, 3, 1, 1).sum((-2, -1))
        return _windows(x, 3, 1, 1).sum((-2, -1)) / count - x
    if mixer == "random":
        return _random_mixing(x, state[f"{name}.random_matrix"], mistake)
    if mixer == "sep_conv":
        return _separable_convolution(state, x, name, mistake)
    return _attention(state, x, name, mistake)


def _random_mixing(x: np.ndarray, matrix: np.ndarray, mistake: str | None) -> np.ndarray:
    if mistake == "random matrix transposed":
        matrix = matrix.T
    if mistake == "softmax of the random matrix":
        matrix = _softmax(matrix)
    columns = mistake == "tokens in column-major order"
    image = x.swapaxes(2, 3) if columns else x
    mixed = (image.reshape(*x.shape[:2], -1) @ matrix.T).reshape(image.shape)
    return mixed.swapaxes(2, 3) if columns else mixed


def _separable_convolution(state: State, x: np.ndarray, name: str, mistake: str | None) -> np.ndarray:
    hidden = _dense(x, state[f"{name}.pwconv1.weight"])
    if mistake == "padding before the activation":
        hidden = np.pad(hidden, ((0, 0), (0, 0), (3, 3), (3, 3)))
        windows = _windows(_star_relu(state, hidden, f"{name}.act1", mistake), 7, 1, 0)
    else:
        windows = _windows(_star_relu(state, hidden, f"{name}.act1", mistake), 7, 1, 3)
    kernel = state[f"{name}.dwconv.weight"][:, 0, :, :, None, None]
    # Shifted products, because einsum over windows of a channel takes ten times as long.
    hidden = sum(windows[..., i, j] * kernel[:, i, j] for i in range(7) for j in range(7))
    if mistake == "second activation in the separable convolution":
        hidden = _star_relu(state, hidden, f"{name}.act1", mistake)
    return _dense(hidden, state[f"{name}.pwconv2.weight"])


def _attention(state: State, x: np.ndarray, name: str, mistake: str | None) -> np.ndarray:
    batch, width, height, columns = x.shape
    qkv = _dense(x, state[f"{name}.qkv.weight"])
    if mistake == "heads before q, k and v":
        q, k, v = qkv.reshape(batch, width // 32, 3, 32, -1).transpose(2, 0, 1, 4, 3)
    else:
        q, k, v = qkv.reshape(batch, 3, width // 32, 32, -1).transpose(1, 0, 2, 4, 3)
    scale = (width if mistake == "attention scaled by the width" else 32) ** -0.5
    mixed = _softmax(scale * q @ k.swapaxes(2, 3)) @ v
    return _dense(mixed.swapaxes(2, 3).reshape(batch, width, height, columns), state[f"{name}.proj.weight"])


def _head(state: State, x: np.ndarray, mistake: str | None) -> np.ndarray:
    final_epsilon = 1e-5 if mistake == "final epsilon 1e-5" else 1e-6
    epsilon = 1e-6 if mistake == "head epsilon of timm" else 1e-5
    scale, shift = state["norm.weight"], state["norm.bias"]
    if mistake == "norm before the average":
        x = (_norm(x, (1,), final_epsilon, scale) + shift[:, None, None]).mean((2, 3))
    else:
        x = _norm(x.mean((2, 3)), (1,), final_epsilon, scale) + shift
    if "head.weight" in state:
        return _dense(x, state["head.weight"]) + state["head.bias"]
    x = _relu(_dense(x, state["head.fc1.weight"]) + state["head.fc1.bias"])
    x = x if mistake == "ReLU in the head" else x * x
    x = _norm(x, (1,), epsilon, state["head.norm.weight"]) + state["head.norm.bias"]
    return _dense(x, state["head.fc2.weight"]) + state["head.fc2.bias"]


def _norm(x: np.ndarray, axes: Sequence[int], epsilon: float, weight: np.ndarray) -> np.ndarray:
    """Over `axes` of [b, c] or [b, c, h, w], with one weight a channel."""
    centred = x - x.mean(tuple(axes), keepdims=True)
    standard = centred / np.sqrt((centred * centred).mean(tuple(axes), keepdims=True) + epsilon)
    return standard * weight.reshape(-1, *(1,) * (x.ndim - 2))


def _star_relu(state: State, x: np.ndarray, name: str, mistake: str | None) -> np.ndarray:
    relu = _relu(x)
    square = np.square(relu.astype(np.float16)) if mistake == "StarReLU in float16" else relu * relu
    bias = 0.0 if mistake == "StarReLU without its bias" else state[f"{name}.bias"]
    return state[f"{name}.scale"] * square + bias


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def _softmax(x: np.ndarray) -> np.ndarray:
    exponential = np.exp(x - x.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def _dense(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A weight [out, in] applied to the channels of [b, c] or [b, c, h, w]."""
    return np.moveaxis(np.tensordot(x, weight, (1, 1)), -1, 1)


def _convolution(x: np.ndarray, kernel: np.ndarray, stride: int, padding: int | None) -> np.ndarray:
    """A kernel [out, in, k, k]; padding None: TensorFlow's "SAME"."""
    windows = _windows(x, kernel.shape[2], stride, padding)
    return np.moveaxis(np.tensordot(windows, kernel, ((1, 4, 5), (1, 2, 3))), -1, 1)


def _windows(x: np.ndarray, size: int, stride: int, padding: int | None) -> np.ndarray:
    """[b, c, h, w] -> [b, c, h2, w2, size, size], with zeros around the image."""
    if padding is None:
        totals = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in x.shape[2:]]
        around = [(total // 2, total - total // 2) for total in totals]
    else:
        around = [(padding, padding)] * 2
    padded = np.pad(x, [(0, 0), (0, 0), *around])
    return sliding_window_view(padded, (size, size), (2, 3))[:, :, ::stride, ::stride]
