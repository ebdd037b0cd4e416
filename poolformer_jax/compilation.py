"""XLA's compiler options for each platform, where XLA's defaults are slow."""

import functools
from typing import Any

import jax

ON_CPU: dict[str, Any] = {
    # XLA's default is 256, because some processors lower their clock for wider vectors. Matrix products, which take
    # most of the time here, use 512 bits anyway.
    "xla_cpu_prefer_vector_width": 512,
    # YNNPACK computes only sums. By default it also computes convolutions, for which it uses a single core, and matrix
    # products, which for few positions take twice as long as with Eigen on some processors (jaxlib 0.10.2 and 0.12.0;
    # docs/notes/speed.md).
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}

# A training step has many positions. Its matrix products take the same time with YNNPACK and with Eigen.
TRAINING_ON_CPU: dict[str, Any] = ON_CPU | {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}

ON_GPU: dict[str, Any] = {
    # By default XLA skips roundings to bfloat16, and writes float32 between two kernels: twice the bytes.
    "xla_allow_excess_precision": False,
}


def compiler_options(platform: str, *, training: bool = False) -> dict[str, Any] | None:
    """`compiler_options` of a `jax.jit` whose program runs on devices of this platform; None for XLA's defaults."""
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
