"""What XLA is told about compiling for a platform, where its defaults cost speed."""

import functools
from typing import Any

import jax

ON_CPU: dict[str, Any] = {
    # XLA keeps to 256 bits, because some processors lower their clock for wider vectors. The matrix products, most of
    # the time here, use the wider ones anyway.
    "xla_cpu_prefer_vector_width": 512,
    # What XLA leaves to YNNPACK: sums, but not, as is its default, convolutions, which YNNPACK computes on one core
    # whatever there are, and matrix products, which of few positions take it twice as long as Eigen on some
    # processors (jaxlib 0.10.2 and 0.12.0; docs/performance.md).
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}

# A training step has many positions, and takes as long with either library's products.
TRAINING_ON_CPU: dict[str, Any] = ON_CPU | {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}

ON_GPU: dict[str, Any] = {
    # Else XLA leaves out roundings to bfloat16, and writes between two kernels what then has twice the bytes.
    "xla_allow_excess_precision": False,
}


def compiler_options(platform: str, *, training: bool = False) -> dict[str, Any] | None:
    """`compiler_options` of a `jax.jit` whose program runs on devices of this platform; None for XLA's defaults.

    Args:
        platform: "cpu", "gpu" or "tpu".
        training: whether the program is a training step, or inference.
    """
    options = {"cpu": TRAINING_ON_CPU if training else ON_CPU, "gpu": ON_GPU}.get(platform, {})
    return {name: value for name, value in options.items() if _known(name, value)} or None


@functools.cache
def _known(name: str, value: Any) -> bool:
    """Whether this version of XLA has the option."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
