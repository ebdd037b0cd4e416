"""Which implementation of a pass runs: a kernel, or XLA's in the form that suits the platform.

The platform is that of the program being compiled, not of this process, so one traced program runs on all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jax import lax

from poolformer_jax.network.fused import cpu_batching, tpu_layout
from poolformer_jax.network.fused.kernels.base import Kernels, Pass


def run_pass(
    kernels: Kernels | None,
    name: Pass,
    compute: Callable[..., Any],
    batched: Any,
    replicated: Any,
    hidden_features: int | None = None,
    saved: tuple[Any, ...] = (),
    on_gpu: Callable[..., Any] | None = None,
) -> Any:
    """Runs a pass in the way that is fast on the platform that the program is compiled for.

    Args:
        kernels: used if they support the pass.
        name: the pass.
        compute: the pass for XLA: a function of (pixels in a group, arrays of some images, replicated).
        batched: arrays whose first axis is the batch; the first is a feature map.
        replicated: the parameters.
        hidden_features: channels of the hidden layer; None for pooling.
        saved: further arrays like `batched`, which only the CPU's pass takes.
        on_gpu: replaces `compute` on a GPU.

    Returns:
        Results for each image, and sums over all images.
    """
    x = batched[0]
    pixels = tpu_layout.group_size(x.shape[2], x.shape[3], x.dtype)

    def on_cpu(batched: Any, replicated: Any, saved: Any) -> Any:
        return cpu_batching.microbatched(lambda images: compute(1, images, replicated), (*batched, *saved))

    def on_tpu(batched: Any, replicated: Any, _: Any) -> Any:
        return compute(pixels, batched, replicated)

    def on_others(batched: Any, replicated: Any, _: Any) -> Any:
        return (on_gpu or compute)(1, batched, replicated)

    if kernels is not None and not kernels.supports(name, x.shape, x.dtype, hidden_features):
        kernels = None
    platforms = {"cpu": on_cpu, "tpu": on_tpu, "default": on_others}
    return run_on_platform(platforms, kernels, name, batched, replicated, saved, pixels)


def run_on_platform(
    platforms: Mapping[str, Callable[..., Any]],
    kernels: Kernels | None,
    name: Pass,
    batched: Any,
    replicated: Any,
    saved: Any = (),
    pixels: int = 1,
) -> Any:
    """Runs a pass as `platforms` says, or as a kernel on the platform of `kernels`.

    Args:
        platforms: functions of (batched, replicated, saved) by platform, and a "default".
        kernels: None, or kernels that support the pass.
        name: as in `run_pass`.
        batched: arrays whose first axis is the batch.
        replicated: as in `run_pass`.
        saved: as in `run_pass`.
        pixels: in a group.
    """
    if kernels is not None:

        def run_kernel(batched: Any, replicated: Any, _: Any) -> Any:
            return kernels.call(name, pixels, batched, replicated)

        if kernels.interpret:
            return run_kernel(batched, replicated, saved)
        platforms = {**platforms, kernels.platform: run_kernel}
    return lax.platform_dependent(batched, replicated, saved, **platforms)
