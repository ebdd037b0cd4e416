"""Compares kernels with XLA on the devices; a program uses them only if they agree.

Every pass is compiled and compared on random maps with the network's numbers of channels, before the first training
step and when an `ImageClassifier` is made. Both results are in bfloat16 and differ by its rounding, a few percent at
most. A wrong kernel, or a wrongly compiled one, is off by as much as its result.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array

from poolformer_jax.compilation import compiler_options
from poolformer_jax.errors import InputError
from poolformer_jax.messages import short_repr
from poolformer_jax.network.fused.kernels.base import Kernels, Pass
from poolformer_jax.network.fused.kernels.choice import kernels_for
from poolformer_jax.network.fused.kernels.pass_inputs import (
    EXPANSION,
    BlockInputs,
    Branch,
    SepConvInputs,
    StageShape,
    images_per_device,
    random_inputs,
    run_pass,
)
from poolformer_jax.network.parameter_table import HEAD_DIM

KernelMode = Literal["auto", "on", "off"]
"""auto: use kernels that compute what XLA computes; on: use them unverified; off: leave all passes to XLA."""

TOLERANCE = 0.1
"""The largest distance to XLA's result at which kernels are used, relative to the norm of that result."""

_FORWARD: dict[Pass, Branch] = {
    "pooling_residual": "pooling",
    "mlp_residual": "mlp",
    "norm_dense": "sep_conv",
    "depthwise_convolution": "sep_conv",
    "dense_residual": "sep_conv",
    "norm_mlp_residual": "norm_mlp",
    "layer_norm": "layer_norm",
    "attention": "attention",
}
_BACKWARD: dict[Pass, Branch] = {
    "pooling_gradient": "pooling",
    "mlp_gradient": "mlp",
    "norm_dense_gradient": "sep_conv",
    "depthwise_gradient": "sep_conv",
    "dense_residual_gradient": "sep_conv",
    "norm_mlp_gradient": "norm_mlp",
    "layer_norm_gradient": "layer_norm",
    "attention_gradient": "attention",
}
_BRANCHES = _FORWARD | _BACKWARD
_LARGEST_SIDE = 56  # of a map: the first stage's at 224 pixels


@dataclasses.dataclass(frozen=True)
class Verification:
    """How kernels compare with XLA.

    Attributes:
        difference: the largest distance between their results, relative to the result.
        where: the pass and stage of that difference.
        problem: why the kernels should not be used: the pass, and the difference or the exception. None if they agree.
    """

    difference: float = 0.0
    where: str = ""
    problem: str | None = None

    @property
    def warning(self) -> str:
        """The message to show if there is a problem."""
        return (
            f"XLA computes all blocks, more slowly, because the kernels for these devices fail their check: "
            f"{self.problem}. Please report this with the device's name and the versions of jax and jaxlib."
        )


def choose_kernels(
    mode: KernelMode,
    mesh: Mesh,
    batch_axes: tuple[str, ...],
    dtype: Dtype,
    stages: Sequence[StageShape],
    *,
    gradients: bool,
    agree: Callable[[Verification], Verification] = lambda verification: verification,
) -> tuple[Kernels | None, Verification | None]:
    """The kernels that a network should use on these devices, and how "auto" verified them.

    Args:
        mode: as `KernelMode` says.
        mesh: the devices.
        batch_axes: the axes of the mesh over which the batch is sharded.
        dtype: type of the feature maps.
        stages: the stages that kernels may compute.
        gradients: whether the network is trained.
        agree: turns this process's result into the result of all processes that share the mesh.

    Returns:
        The kernels, or None to leave all passes to XLA; and the verification, or None if there was none.

    Raises:
        ValueError: for another mode, or if the mode is "on" and there are no kernels for these devices and this type.
    """
    if mode not in get_args(KernelMode):
        raise InputError(f"kernels={short_repr(mode)}: expected {', '.join(map(repr, get_args(KernelMode)))}.")
    if mode == "off":
        return None, None
    kernels = kernels_for(mesh, batch_axes) if jnp.dtype(dtype) == jnp.bfloat16 else None
    if mode == "on":
        if kernels is None:
            raise InputError(
                f"kernels='on', but there are none for {jnp.dtype(dtype).name} on {mesh.devices.flat[0].device_kind}. "
                "Expected bfloat16 on TPUs v5e or v6e or on NVIDIA GPUs from Ampere on; or kernels='auto'."
            )
        return kernels, None
    names = (*_FORWARD, *(_BACKWARD if gradients else ()))
    if kernels is None or not any(_supported(kernels, name, stage) for name in names for stage in stages):
        return None, None
    verification = agree(verify_kernels(kernels, stages, gradients=gradients))
    return (None if verification.problem else kernels), verification


def verify_kernels(kernels: Kernels, stages: Sequence[StageShape], *, gradients: bool) -> Verification:
    """Compiles every pass with kernels and by XLA on this process's devices, and compares the results.

    Passes that the kernels do not support are left out.

    Args:
        kernels: with the mesh that they are to be used on.
        stages: the network's; maps larger than 56 x 56 are compared at about that size.
        gradients: whether to compare the backward passes, too.
    """
    # Only this process's devices: with those of others, all processes would hang if the compiler of one fails.
    devices = kernels.mesh.local_devices if kernels.mesh is not None else jax.local_devices()[:1]
    mesh = Mesh(np.asarray(devices), ("batch",))
    kernels = dataclasses.replace(kernels, mesh=mesh, batch_axes=mesh.axis_names)
    maps = [_small_map(stage) for stage in stages]
    inputs = functools.cache(lambda index, branch: random_inputs(maps[index], branch, mesh))
    compute = _compiled_differences(devices[0].platform)
    largest = Verification()
    for name in (*_FORWARD, *(_BACKWARD if gradients else ())):
        try:
            supported = [i for i, stage in enumerate(maps) if _supported(kernels, name, stage)]
            if not supported:
                continue
            with jax.set_mesh(mesh):
                # Waits for the devices, whose errors count too.
                differences = np.asarray(compute(name, kernels, [inputs(i, _BRANCHES[name]) for i in supported]))
        # Of any type: there is no compiler, the compiler rejects a kernel, or a device fails.
        except Exception as error:
            return Verification(math.inf, name, f"{name} cannot run: {type(error).__name__}: {error}")
        for index, difference in zip(supported, differences.tolist()):
            current = Verification(difference, f"{name}, stage {index}")
            if not difference <= TOLERANCE:  # also for nan
                problem = f"the results of {name} in stage {index} differ from XLA's by {difference:.1%}"
                return dataclasses.replace(current, problem=problem)
            largest = max(largest, current, key=lambda verification: verification.difference)
    return largest


def stages_without_kernels(kernels: Kernels, stages: Sequence[StageShape], images: int) -> list[int]:
    """The stages that XLA computes because of the number of images; with another number kernels would.

    Args:
        kernels: with the mesh that shares the images.
        stages: the network's.
        images: on all devices at a time.
    """
    return [
        index
        for index, stage in enumerate(stages)
        if any(_supported(kernels, name, stage) and not _supports(kernels, name, stage, images) for name in _FORWARD)
    ]


def _small_map(stage: StageShape) -> StageShape:
    """The stage with at most about `_LARGEST_SIDE` positions per side; still even or odd, for `tpu_layout`."""
    height, width = (min(side, _LARGEST_SIDE + side % 2) for side in stage[:2])
    return stage._replace(height=height, width=width)


def _supported(kernels: Kernels, name: Pass, stage: StageShape) -> bool:
    """Whether kernels compute this pass of the stage for some number of images."""
    return _supports(kernels, name, stage, images_per_device(stage) * kernels.shards)


def _supports(kernels: Kernels, name: Pass, stage: StageShape, images: int) -> bool:
    height, width, channels, hidden, branches = stage
    if _BRANCHES[name] not in branches:
        return False
    if name.startswith("attention"):
        heads = images, channels // HEAD_DIM, HEAD_DIM, height * width
        return kernels.supports(name, heads, jnp.bfloat16, None)
    if name.startswith("depthwise"):
        channels *= EXPANSION
    hidden_features = hidden if _BRANCHES[name] in ("mlp", "norm_mlp") else None
    return kernels.supports(name, (images, height, width, channels), jnp.bfloat16, hidden_features)


@functools.cache
def _compiled_differences(platform: str) -> jax.stages.Wrapped:
    """`_differences`, compiled with the options of the networks."""
    return jax.jit(_differences, static_argnums=(0, 1), compiler_options=compiler_options(platform))


def _differences(name: Pass, kernels: Kernels, inputs: list[BlockInputs | SepConvInputs]) -> Array:
    """The largest relative distance between the results with kernels and by XLA, for each of `inputs`."""
    pairs = [(run_pass(name, kernels, one), run_pass(name, None, one)) for one in inputs]
    return jnp.asarray([jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(_distance, *pair)))) for pair in pairs])


def _distance(found: Array, exact: Array) -> Array:
    found, exact = (array.astype(jnp.float32).ravel() for array in (found, exact))
    distance: Array = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
    return distance
