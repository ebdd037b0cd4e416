"""What XLA is told about compiling for a platform, where its defaults cost speed."""

import functools
from typing import Any

import jax

# XLA keeps to 256 bits, because some processors lower their clock for wider vectors. The matrix products, most of the
# time here, use the wider ones anyway.
ON_CPU = {"xla_cpu_prefer_vector_width": 512}


def compiler_options(platform: str) -> dict[str, Any] | None:
    """`compiler_options` of a `jax.jit` whose program runs on devices of this platform; None for XLA's defaults."""
    return dict(ON_CPU) if platform == "cpu" and _known(**ON_CPU) else None


@functools.cache
def _known(**options: Any) -> bool:
    """Whether this version of XLA has the options."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
