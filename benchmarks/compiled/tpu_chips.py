"""TPU chips, from cloud.google.com/tpu/docs/v5e and /v6e. Clocks follow from the peak rates."""

from dataclasses import dataclass

from poolformer_jax.errors import InputError


@dataclass(frozen=True)
class Chip:
    """One TPU chip."""

    peak_flops: float  # bfloat16 operations per second
    clock: float  # cycles per second of the matrix units: peak rate / (2 * multipliers)
    hbm_bytes: float  # memory in bytes
    hbm_bandwidth: float  # bytes per second between memory and chip


CHIPS = {
    # Four matrix units of 128 x 128.
    "v5e": Chip(197e12, 197e12 / (2 * 4 * 128**2), 16e9, 819e9),
    # Four of 256 x 256: the compiler schedules more multiplications per cycle than two such units have.
    "v6e": Chip(918e12, 918e12 / (2 * 4 * 256**2), 32e9, 1640e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:4x4. Raises InputError if CHIPS does not list it."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise InputError(f"Unknown chip in topology {topology!r}. Expected one of {[*CHIPS]}.")
    return CHIPS[name]
