"""PoolFormer from the block up: block -> stage -> PoolFormerModel -> PoolFormerForImageClassification.

Sources: arXiv 2111.11418, Figure 2 and Section 3; sail-sg/poolformer, models/poolformer.py. Arrays are NHWC,
parameters float32, and `dtype` sets the type that activations are computed in.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float, Num

from poolformer_jax.errors import InputError
from poolformer_jax.network import functional
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.fused import block
from poolformer_jax.network.fused.kernels import Kernels
from poolformer_jax.network.fused.statistics import Moments, moments_of
from poolformer_jax.network.layers import (
    KERNEL_INIT,
    DropPath,
    GroupNorm,
    LayerNorm,
    LayerScale,
    Mlp,
    MlpParameters,
    PatchEmbedding,
)
from poolformer_jax.network.token_mixers import TOKEN_MIXERS, TokenMixer

# As the two public modules take them; `check_pixel_values` and `_loss` say more than an annotation can.
Pixels = Num[Array | np.ndarray, "..."]
Labels = Num[Array | np.ndarray, "..."]

NORMS: dict[str, type[nn.Module]] = {"group_norm": GroupNorm, "layer_norm": LayerNorm}


# Outputs are pytrees, and JAX fills pytrees with more than arrays: shapes, shardings, axes. So their fields are typed
# for the reader, and not checked.
@no_type_check
@flax.struct.dataclass
class PoolFormerModelOutput:
    """What the backbone returns.

    Attributes:
        last_hidden_state: [batch, height / 32, width / 32, hidden_sizes[-1]]; the last of `hidden_states`.
        hidden_states: one feature map per stage, at strides 4, 8, 16 and 32 of the published networks.
    """

    last_hidden_state: Float[Array, "b h w c"]
    hidden_states: tuple[Float[Array, "b _h _w _c"], ...]


@no_type_check
@flax.struct.dataclass
class ImageClassifierOutput:
    """What the classifier returns.

    Attributes:
        loss: mean cross entropy in nats, a scalar; None without labels.
        logits: [batch, num_labels], float32; with num_labels=0 the pooled, normalised features.
        hidden_states: as in `PoolFormerModelOutput`.
    """

    loss: Float[Array, ""] | None
    logits: Float[Array, "b labels"]
    hidden_states: tuple[Float[Array, "b _h _w _c"], ...]


class MetaFormerBlock(nn.Module):
    """Two residual branches: the token mixer communicates between positions, the MLP works on each of them."""

    token_mixer: Callable[..., TokenMixer]
    norm: Callable[..., nn.Module]
    hidden_features: int
    activation: Callable[[Array], Array]
    layer_scale_init_value: float | None
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        mixer = self.token_mixer(name="token_mixer")
        mlp = Mlp(self.hidden_features, self.activation, self.dropout_rate, self.dtype, name="mlp")
        x = x + self._branch("1", mixer(self.norm(name="norm1")(x)), train)
        return x + self._branch("2", mlp(self.norm(name="norm2")(x), train), train)

    def _branch(self, index: str, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        if self.layer_scale_init_value is not None:
            x = LayerScale(self.layer_scale_init_value, name=f"layer_scale_{index}")(x)
        return DropPath(self.drop_path_rate, name=f"drop_path_{index}")(x, train)


class PoolFormerBlock(nn.Module):
    """`MetaFormerBlock` with pooling and group norm: the same parameters and function, in the passes of `fused`."""

    pool_size: int
    hidden_features: int
    activation: Callable[[Array], Array]
    layer_scale_init_value: float | None
    drop_path_rate: float = 0.0
    kernels: Kernels | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], moments: Moments, train: bool
    ) -> tuple[Float[Array, "b h w c"], Moments]:
        channels, wide = x.shape[-1], moments.mean.dtype
        # norm1's bias is a constant over the image, and the mixer subtracts it again.
        gain1, _ = GroupNorm(name="norm1").parameters(channels)
        gain2, shift2 = GroupNorm(name="norm2").parameters(channels)
        mlp = MlpParameters(self.hidden_features, name="mlp")(channels)
        scale1, scale2 = self._layer_scale("1", channels), self._layer_scale("2", channels)
        keep1, keep2 = self._keep("1", x, train), self._keep("2", x, train)

        gain = gain1.astype(wide) * scale1.astype(wide)
        x, moments = block.pooling_residual(self.pool_size, x, moments, gain, keep1, self.kernels)
        weights = block.fold_mlp(gain2, shift2, *mlp, scale2, dtype=wide)
        return block.mlp_residual(self.activation, x, moments, weights, keep2, self.kernels)

    def _layer_scale(self, index: str, channels: int) -> Float[Array, " c"]:
        if self.layer_scale_init_value is None:
            return jnp.ones(channels)
        return LayerScale(self.layer_scale_init_value, name=f"layer_scale_{index}").parameters(channels)

    def _keep(self, index: str, x: Float[Array, "b h w c"], train: bool) -> Float[Array, " b"]:
        """Drop path's factor for each image: what it makes of 1."""
        ones = jnp.ones(len(x), functional.wide_type(x.dtype))
        return DropPath(self.drop_path_rate, name=f"drop_path_{index}")(ones, train)


class Stage(nn.Module):
    """Blocks of one resolution, after the convolution that leads to it (the first stage follows the stem)."""

    config: PoolFormerConfig
    index: int
    dtype: Dtype = jnp.float32
    fused: bool = True
    kernels: Kernels | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        config, index = self.config, self.index
        if index > 0:
            x = _patch_embedding(config, index, self.dtype, self.fused, "downsample")(x)
        if config.position_embeddings[index]:
            embedding = self.param("position_embedding", nn.initializers.zeros, x.shape[1:], jnp.float32)
            x = x + embedding[None].astype(x.dtype)
        rates = functional.drop_path_rates(config.drop_path_rate, config.depths)[index]
        return self._fused_blocks(x, rates, train) if self._can_fuse(train) else self._blocks(x, rates, train)

    def _blocks(self, x: Float[Array, "b h w c"], rates: tuple[float, ...], train: bool) -> Float[Array, "b h w c"]:
        config, index = self.config, self.index
        for number, rate in enumerate(rates):
            x = MetaFormerBlock(
                token_mixer=partial(TOKEN_MIXERS[config.token_mixers[index]], config, self.dtype),
                norm=NORMS[config.norm],
                hidden_features=config.mlp_hidden_sizes[index],
                activation=functional.ACTIVATIONS[config.hidden_act],
                layer_scale_init_value=config.layer_scale_init_value if config.use_layer_scale else None,
                drop_path_rate=rate,
                dropout_rate=config.dropout_rate,
                dtype=self.dtype,
                name=f"blocks_{number}",
            )(x, train)
        return x

    def _can_fuse(self, train: bool) -> bool:
        config = self.config
        pools = config.token_mixers[self.index] == "pooling" and config.norm == "group_norm"
        return self.fused and pools and not (train and config.dropout_rate)

    def _fused_blocks(
        self, x: Float[Array, "b h w c"], rates: tuple[float, ...], train: bool
    ) -> Float[Array, "b h w c"]:
        config, moments = self.config, moments_of(x)
        for number, rate in enumerate(rates):
            x, moments = PoolFormerBlock(
                pool_size=config.pool_size,
                hidden_features=config.mlp_hidden_sizes[self.index],
                activation=functional.ACTIVATIONS[config.hidden_act],
                layer_scale_init_value=config.layer_scale_init_value if config.use_layer_scale else None,
                drop_path_rate=rate,
                kernels=self.kernels,
                name=f"blocks_{number}",
            )(x, moments, train)
        return x


def _patch_embedding(
    config: PoolFormerConfig, index: int, dtype: Dtype, own_gradient: bool, name: str
) -> PatchEmbedding:
    shape = (config.hidden_sizes[index], config.patch_sizes[index], config.strides[index], config.padding[index])
    return PatchEmbedding(*shape, dtype=dtype, own_gradient=own_gradient, name=name)


class PoolFormerModel(nn.Module):
    """The backbone: pixels in, one feature map per stage out.

    Args:
        config: the architecture.
        dtype: type that activations are computed in, float32 or bfloat16. Parameters stay float32.
        remat: whether training keeps only the stages' inputs and computes the rest again for the gradient.
        fused: whether blocks that can be are computed in the passes of `fused`; False computes all of them as the
            paper writes them, which also has a forward-mode derivative.
        kernels: kernels for the fused blocks on TPUs (`TpuKernels`) or NVIDIA GPUs (`GpuKernels`).
    """

    config: PoolFormerConfig
    dtype: Dtype = jnp.float32
    remat: bool = False
    fused: bool = True
    kernels: Kernels | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, pixel_values: Pixels, train: bool = False) -> PoolFormerModelOutput:
        """Feature maps of a batch of images.

        Args:
            pixel_values: [batch, height, width, num_channels], normalised; any size from `config.smallest_side`.
            train: switches dropout and drop path on; they draw from `rngs={"dropout": key}`.

        Raises:
            ValueError: for another layout than NHWC, another number of channels, or too small an image.
        """
        hidden_states = _stages(self, pixel_values, train)
        return PoolFormerModelOutput(last_hidden_state=hidden_states[-1], hidden_states=hidden_states)


class PoolFormerForImageClassification(nn.Module):
    """The backbone with a final norm, average pooling and a linear head on top.

    Args:
        config: the architecture.
        dtype: type that activations are computed in, float32 or bfloat16. Parameters stay float32.
        remat: whether training keeps only the stages' inputs and computes the rest again for the gradient.
        fused: whether blocks that can be are computed in the passes of `fused`; False computes all of them as the
            paper writes them, which also has a forward-mode derivative.
        kernels: kernels for the fused blocks on TPUs (`TpuKernels`) or NVIDIA GPUs (`GpuKernels`).
    """

    config: PoolFormerConfig
    dtype: Dtype = jnp.float32
    remat: bool = False
    fused: bool = True
    kernels: Kernels | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        pixel_values: Pixels,
        labels: Labels | None = None,
        train: bool = False,
    ) -> ImageClassifierOutput:
        """Logits of a batch of images, and the loss where labels are given.

        Args:
            pixel_values: [batch, height, width, num_channels], normalised; any size from `config.smallest_side`.
            labels: class indices [batch], or a probability for each class [batch, num_labels].
            train: switches dropout and drop path on; they draw from `rngs={"dropout": key}`.

        Raises:
            ValueError: for another layout than NHWC, another number of channels, too small an image, or labels that are
                not those of this batch and this head.
        """
        config = self.config
        hidden_states = _stages(self, pixel_values, train)
        if config.head_order == "norm_pool":
            features = NORMS[config.norm](name="norm")(hidden_states[-1]).mean((1, 2))
        else:
            features = LayerNorm(epsilon=functional.POOLED_EPSILON, name="norm")(hidden_states[-1].mean((1, 2)))
        # The head is float32 also where maps are not: it costs nothing, and its gradients add up with all others.
        logits = functional.widen(features)
        if config.num_labels:
            logits = nn.Dense(config.num_labels, kernel_init=KERNEL_INIT, dtype=logits.dtype, name="head")(logits)
        loss = None if labels is None else _loss(config, logits, jnp.asarray(labels))
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)


def _stages(
    network: PoolFormerModel | PoolFormerForImageClassification, pixel_values: Pixels, train: bool
) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Stem and stages, as submodules of the network that calls this: backbone and classifier share one tree."""
    config, dtype = network.config, network.dtype
    check_pixel_values(config, pixel_values.shape)
    # `train` is Python's, so a rematerialised stage must not trace it.
    stage = nn.remat(Stage, static_argnums=(2,)) if network.remat else Stage
    x = _patch_embedding(config, 0, dtype, network.fused, "stem")(jnp.asarray(pixel_values, dtype))
    hidden_states = []
    for index in range(len(config.depths)):
        x = stage(config, index, dtype, network.fused, network.kernels, name=f"stages_{index}")(x, train)
        hidden_states.append(x)
    return tuple(hidden_states)


def _loss(config: PoolFormerConfig, logits: Float[Array, "b labels"], labels: Num[Array, "..."]) -> Float[Array, ""]:
    """The mean cross entropy of a class index, or a probability for each class, for every image.

    Raises:
        ValueError: for labels of another shape. They might be broadcast against the logits, to the loss of nothing.
    """
    if config.num_labels == 0:
        raise InputError("labels were given, and the network has no head (num_labels=0). Expected labels=None.")
    indices = labels.shape == logits.shape[:1] and jnp.issubdtype(labels.dtype, jnp.integer)
    if not indices and labels.shape != logits.shape:
        batch, classes = logits.shape
        raise InputError(
            f"labels has shape {labels.shape} and type {labels.dtype}, for a batch of {batch} and {classes} classes. "
            f"Expected whole numbers [{batch}], the class of each image, or a probability for each class "
            f"[{batch}, {classes}]."
        )
    return functional.cross_entropy(logits, labels).mean()


def check_dtype(dtype: Dtype) -> None:
    """Raises ValueError unless feature maps can be computed in this type. Whole numbers would lose all of them."""
    try:
        fits = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)  # NumPy takes None for float64
    except TypeError:  # no type at all
        fits = False
    if not fits:
        raise InputError(f"dtype={dtype!r}: expected float32 or bfloat16.")


def check_pixel_values(config: PoolFormerConfig, shape: tuple[Any, ...]) -> None:  # a symbolic batch is no int
    """Raises ValueError, with how to mend it, if the network cannot take an input of this shape."""
    channels, smallest = config.num_channels, config.smallest_side
    wanted = f"Expected [batch, height, width, {channels}]"
    if len(shape) != 4:
        raise InputError(f"pixel_values has shape {shape}. {wanted}; add the batch axis with pixel_values[None].")
    if shape[3] != channels:
        if shape[1] == channels:
            advice = "; this looks like PyTorch's NCHW: use pixel_values.transpose(0, 2, 3, 1)."
        else:
            advice = f", because config.num_channels={channels}."
        raise InputError(f"pixel_values has shape {shape}. {wanted}{advice}")
    if min(shape[1:3]) < smallest:
        raise InputError(
            f"pixel_values has shape {shape}, which is too small for this network. "
            f"{wanted} with height and width of at least {smallest} pixels; resize the images."
        )
    if config.image_size is not None and shape[1:3] != (config.image_size, config.image_size):
        raise InputError(
            f"pixel_values has shape {shape}, and this network has parameters for every position of images of "
            f"{config.image_size} by {config.image_size} pixels. Resize the images, or take a network without position "
            "embeddings and spatial_fc."
        )
