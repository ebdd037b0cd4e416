"""A MetaFormer as two linen modules: the backbone, and the backbone with a classifier on top.

Sources: arXiv 2111.11418, Figure 2 and Section 3; sail-sg/poolformer, models/poolformer.py; arXiv 2210.13452;
sail-sg/metaformer, metaformer_baselines.py. Arrays are NHWC, parameters float32, and `dtype` sets the type that
activations are computed in.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NoReturn, no_type_check

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from poolformer_jax.errors import InputError
from poolformer_jax.network.block import MetaFormerBlock, can_fuse, supports
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.functional import DOWNSAMPLE_EPSILON, drop_path_rates, layer_norm
from poolformer_jax.network.fused import (
    Kernels,
    convolve,
    convolve_with_default_gradient,
    layer_norm as fused_layer_norm,
    moments_of,
    partition_spec,
    with_auto_sharding,
)
from poolformer_jax.network.heads import classify
from poolformer_jax.network.inputs import Pixels, check_config, check_dtype, check_pixel_values
from poolformer_jax.network.layers import Params, declare
from poolformer_jax.network.loss import Labels, mean_loss
from poolformer_jax.network.parameter_table import NETWORK, STAGE
from poolformer_jax.network.parameters import subtree


# Not type-checked: outputs are pytrees, and JAX also fills pytrees with shapes, shardings and axes.
class ModelOutput(Mapping[str, Any]):
    """A mapping from the fields of an output that are not None, in their order, also by position or as a tuple."""

    def __getitem__(self, key: Any) -> Any:
        return dict(self._fields())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._fields())

    def __len__(self) -> int:
        return len(self._fields())

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are not None."""
        return tuple(value for _, value in self._fields())

    def _fields(self) -> list[tuple[str, Any]]:
        values = vars(self).items()  # of a dataclass: its fields, in their order
        return [(name, value) for name, value in values if value is not None]


@no_type_check
@flax.struct.dataclass
class MetaFormerModelOutput(ModelOutput):
    """What the backbone returns. A pytree; fields can also be read as `output["hidden_states"]` or `output[1]`.

    Attributes:
        last_hidden_state: [batch, height / 32, width / 32, hidden_sizes[-1]]; the last of `hidden_states`.
        hidden_states: one feature map per stage, at strides 4, 8, 16 and 32 of the published networks.
    """

    last_hidden_state: Float[Array, "b h w c"]
    hidden_states: tuple[Float[Array, "b _h _w _c"], ...]


@no_type_check
@flax.struct.dataclass
class ImageClassifierOutput(ModelOutput):
    """What the classifier returns. A pytree; fields can also be read as `output["logits"]`, or by position.

    A field that is None has no position: without labels `output[0]` is the logits, with labels the loss.

    Attributes:
        loss: the mean loss, a scalar (see `labels` of the classifier's `__call__`); None without labels.
        logits: [batch, num_labels], float32; with num_labels=0 the pooled, normalised features.
        hidden_states: as in `MetaFormerModelOutput`.
    """

    loss: Float[Array, ""] | None
    logits: Float[Array, "b labels"]
    hidden_states: tuple[Float[Array, "b _h _w _c"], ...]


class Stage(nn.Module):
    """Blocks of one resolution, after the convolution that leads to it (the first stage follows the stem)."""

    config: PoolFormerConfig
    index: int
    fused: bool = True
    kernels: Kernels | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        config, index = self.config, self.index
        params = declare(self, subtree(config, STAGE, index))
        if "downsample" in params:
            x = _norm(config, params["downsample"], x, self.fused, self.kernels)
            x = _convolution(config, index, params["downsample"], x, self.fused)
        if "position_embedding" in params:
            x = x + params["position_embedding"][None].astype(x.dtype)
        moments = moments_of(x) if self.fused and can_fuse(config, index, train) else None
        for number, rate in enumerate(drop_path_rates(config.drop_path_rate, config.depths)[index]):
            block = MetaFormerBlock(config, index, rate, self.kernels, self.fused, name=f"blocks_{number}")
            x, moments = block(x, moments, train)
        return x


def _norm(
    config: PoolFormerConfig, params: Params, x: Float[Array, "b h w c"], fused: bool, kernels: Kernels | None
) -> Float[Array, "b h w c"]:
    """The second paper's norm after the stem, and before the convolution at the start of each later stage.

    Over the channels of each position, also in networks whose blocks have group norms.
    """
    if "norm" not in params:
        return x
    norm = params["norm"]
    if fused and supports(kernels, config, "layer_norm", x):
        parameters = norm["scale"], norm.get("bias", jnp.zeros_like(norm["scale"]))
        run = partial(fused_layer_norm, kernels, DOWNSAMPLE_EPSILON)
        y: Array = with_auto_sharding(run, x, parameters, specs=PartitionSpec(*partition_spec(x)))
        return y
    return layer_norm(x, **norm, epsilon=DOWNSAMPLE_EPSILON)


def _convolution(
    config: PoolFormerConfig, stage: int, params: Params, x: Float[Array, "b h w c"], fused: bool
) -> Float[Array, "b h2 w2 c2"]:
    """The convolution that makes the feature map smaller.

    The padding is explicit, because JAX's "SAME" pads on other sides.
    """
    convolution = convolve if fused else convolve_with_default_gradient
    return convolution(x, **params["conv"], stride=config.strides[stage], padding=config.padding[stage])


class _Network(nn.Module):
    """The arguments that the backbone and the classifier share."""

    config: PoolFormerConfig
    dtype: Dtype = jnp.float32
    remat: bool = False
    fused: bool = True
    kernels: Kernels | None = None

    def __post_init__(self) -> None:
        check_config(self.config)
        check_dtype(self.dtype)
        super().__post_init__()

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        """Raises InputError: a linen module holds no weights. The message says what loads them."""
        raise InputError(
            f"{cls.__name__} is a linen module, which holds no weights. Expected load_pretrained(source), which "
            "returns the module and its variables; or FlaxPoolFormerModel or FlaxPoolFormerForImageClassification, "
            "which hold them as in transformers."
        )


class MetaFormerModel(_Network):
    """The backbone: pixels in, one feature map per stage out.

    Its variables are `{"params": tree}`; RandFormer has its mixing matrices beside them, in the collection "constants",
    which training leaves as they are. Pass both to `apply`.

    Args:
        config: the architecture.
        dtype: type that activations are computed in, float32 or bfloat16. Parameters stay float32.
        remat: keeps only the stages' inputs for the gradient, and computes the rest again.
        fused: computes the blocks that `block.can_fuse` names in the passes of `fused`, and the others with custom
            gradients; False computes everything as the papers write it, which has a forward-mode derivative.
        kernels: kernels for the fused blocks on TPUs (`TpuKernels`) or NVIDIA GPUs (`GpuKernels`).
    """

    @nn.compact
    def __call__(self, pixel_values: Pixels, train: bool = False) -> MetaFormerModelOutput:
        """Feature maps of a batch of images.

        Args:
            pixel_values: [batch, height, width, num_channels], normalised; any size from `config.smallest_side`.
            train: applies dropout and drop path, which draw from `rngs={"dropout": key}`.

        Raises:
            ValueError: if the pixels are not NHWC, have another number of channels, or are too small an image.
        """
        params = declare(self, subtree(self.config, NETWORK, classifier=False))
        hidden_states = _hidden_states(self, params, pixel_values, train)
        return MetaFormerModelOutput(last_hidden_state=hidden_states[-1], hidden_states=hidden_states)


class MetaFormerForImageClassification(_Network):
    """The backbone with a final norm, average pooling and a head. Arguments and variables are `MetaFormerModel`'s."""

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
            labels: class indices [batch] (-100 leaves an image out), or a probability for each class
                [batch, num_labels], for the mean cross entropy in nats. With problem_type
                "multi_label_classification" a 0 or 1 for each class, for the mean binary cross entropy; with
                "regression" numbers [batch, num_labels], for the mean squared error.
            train: applies dropout and drop path, which draw from `rngs={"dropout": key}`.

        Raises:
            ValueError: if the pixels are not NHWC, have another number of channels or are too small an image, or if the
                labels do not fit the batch and the head.
        """
        params = declare(self, subtree(self.config, NETWORK))
        hidden_states = _hidden_states(self, params, pixel_values, train)
        dropout = nn.Dropout(self.config.head_dropout_rate, deterministic=not train, name="head_dropout")
        logits = classify(self.config, params, hidden_states[-1], dropout)
        loss = None if labels is None else mean_loss(self.config, logits, jnp.asarray(labels))
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)


def _hidden_states(
    network: _Network, params: Params, pixel_values: Pixels, train: bool
) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """The feature map of every stage. The stages are submodules of `network`, so both networks have the same tree."""
    config = network.config
    check_pixel_values(config, pixel_values.shape, pixel_values.dtype)
    # `train` is a Python bool, so a rematerialised stage must not trace it.
    stage = nn.remat(Stage, static_argnums=(2,)) if network.remat else Stage
    x = _convolution(config, 0, params["stem"], jnp.asarray(pixel_values, network.dtype), network.fused)
    x = _norm(config, params["stem"], x, network.fused, network.kernels)
    hidden_states = []
    for index in range(len(config.depths)):
        x = stage(config, index, network.fused, network.kernels, name=f"stages_{index}")(x, train)
        hidden_states.append(x)
    return tuple(hidden_states)


# The names of transformers; `config` says why there are two.
PoolFormerModelOutput = MetaFormerModelOutput
PoolFormerModel = MetaFormerModel
PoolFormerForImageClassification = MetaFormerForImageClassification
