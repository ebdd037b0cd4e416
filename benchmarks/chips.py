"""What Google publishes of a TPU chip: cloud.google.com/tpu/docs/v5e and /v6e. Clocks follow from the peak rates."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One TPU chip.

    Attributes:
        peak_flops: bfloat16 operations a second.
        clock: cycles a second of the matrix units: peak rate / (2 * multipliers).
        hbm_bytes: memory.
        hbm_bandwidth: bytes a second between memory and chip.
        ici_bandwidth: bytes a second between a chip and all its neighbours, both directions added.
    """

    peak_flops: float
    clock: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float


CHIPS = {
    # Four matrix units of 128 x 128.
    "v5e": Chip(197e12, 197e12 / (2 * 4 * 128**2), 16e9, 819e9, 1600e9 / 8),
    # Four times 256 x 256: the compiler schedules more multiplications in a cycle than two such units have.
    "v6e": Chip(918e12, 918e12 / (2 * 4 * 256**2), 32e9, 1640e9, 3584e9 / 8),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:4x4.

    Raises:
        ValueError: if its figures are not listed here.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"There are no figures for the chip of topology {topology!r}. Expected one of {[*CHIPS]}.")
    return CHIPS[name]
