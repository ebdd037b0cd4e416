"""How many processor cores there are to use. Does not import jax."""

import math
import os

from poolformer_jax import cgroups


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine has, under taskset or in a container.

    A container's limit is one of time, and may be a part of a core, which is rounded up.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(there, cgroups.cores())))
