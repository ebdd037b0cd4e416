"""Reads the text of a program that the TPU compiler wrote: estimated cycles, collectives, and their JAX operations.

`compiled.as_text()` is the scheduled program. Most instructions carry the compiler's `estimated_cycles` and the JAX
operation they came from. Bodies of loops count once per iteration.
"""

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass

from benchmarks.compiled.hlo import FREE, Line, array_bytes, walk
from benchmarks.compiled.tpu_chips import Chip

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Slices of a multislice run exchange arrays over the data center's network, through their hosts.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_KERNEL = "tpu_custom_call"
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"')
_LOOPS = re.compile(r'kernel_metadata=\{\s*"rounds":"(\d+)",\s*"tiles":"(\d+)"')


@dataclass(frozen=True)
class KernelCost:
    """The cost that a Pallas kernel declares; the compiler does not estimate it."""

    flops: int  # operations per call
    bytes: int  # bytes read and written per call
    tiles: int  # tiles of its grid
    rounds: int  # iterations of the loop in a tile

    def bound(self, chip: Chip) -> int:
        """The fewest cycles that the chip's peak rate and memory bandwidth allow."""
        return round(max(self.flops / chip.peak_flops, self.bytes / chip.hbm_bandwidth) * chip.clock)


@dataclass(frozen=True)
class Instruction:
    """One line of a compiled program."""

    name: str  # the compiler's name
    opcode: str  # fusion, copy, all-reduce, ...
    shape: str  # shape and layout of the result
    source: str  # the JAX operation it came from; empty if the compiler names none
    cycles: int | None  # the compiler's estimate; None if it has none, as for a Pallas kernel
    times: int  # how often it runs
    kernel: KernelCost | None = None  # the cost that a Pallas kernel declares

    @property
    def bytes(self) -> int:
        """Size of the result, without the layout's padding."""
        return sum(array_bytes(self.shape))


def instructions(text: str) -> list[Instruction]:
    """The instructions that the program runs. Loop bodies count once per iteration; of branches, the costliest one."""
    return walk(text, _instruction, total_cycles)


def _instruction(line: Line, times: int) -> Instruction:
    cycles = _CYCLES.search(line.text)
    return Instruction(
        name=line.name,
        opcode=_opcode(line),
        shape=line.shape,
        source=line.source,
        cycles=int(cycles[1]) if cycles else None,
        times=times,
        kernel=_kernel_cost(line.text),
    )


def _opcode(line: Line) -> str:
    if line.opcode == "send" and (transfer := _BETWEEN_SLICES.search(line.text)):
        return f"{transfer[1].lower().replace('_', '-')}-between-slices"
    # The TPU compiler writes a reduce-scatter as a fusion.
    return "reduce-scatter" if "calls=%all-reduce-scatter" in line.text else line.opcode


def _kernel_cost(line: str) -> KernelCost | None:
    if _KERNEL not in line or (cost := _COST.search(line)) is None:
        return None
    loops = _LOOPS.search(line)
    rounds, tiles = (int(loops[1]), int(loops[2])) if loops else (1, 1)
    return KernelCost(int(cost[1]), int(cost[2]), tiles, rounds)


def kernels(program: list[Instruction]) -> list[Instruction]:
    """The Pallas kernels that declare their cost."""
    return [instruction for instruction in program if instruction.kernel is not None]


def with_kernels(program: list[Instruction], cycles: dict[str, int]) -> list[Instruction]:
    """The program with the given cycles, by name, for its Pallas kernels."""
    return [dataclasses.replace(i, cycles=cycles[i.name]) if i.name in cycles else i for i in program]


def total_cycles(program: list[Instruction]) -> int:
    """The sum of all estimates, as if nothing overlapped."""
    return sum((instruction.cycles or 0) * instruction.times for instruction in program)


def without_estimate(program: list[Instruction]) -> dict[str, dict[str, int]]:
    """What the sum leaves out: by opcode, the number of instructions without an estimate and the bytes they return.

    Most are transfers between HBM and VMEM that overlap with other work.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for instruction in program:
        done = instruction.opcode.endswith(("-done", "-update"))
        if instruction.cycles is None and instruction.opcode not in FREE and not done:
            counts[instruction.opcode] += instruction.times
            sizes[instruction.opcode] += instruction.bytes * instruction.times
    return {opcode: {"count": counts[opcode], "bytes": sizes[opcode]} for opcode in sorted(counts)}


def collectives(program: list[Instruction]) -> list[Instruction]:
    """Every collective, once: an asynchronous one at its start."""
    names = {f"{kind}{suffix}" for kind in _COLLECTIVES for suffix in ("", "-start", "-between-slices")}
    return [instruction for instruction in program if instruction.opcode in names]


def collective_bytes(instruction: Instruction) -> int:
    """The bytes of a collective's result on one chip; between slices, the bytes that the chip sends."""
    if instruction.opcode.endswith("-between-slices"):
        return array_bytes(instruction.shape)[0]
    # An asynchronous all-gather or permute returns (operand, result), an all-reduce only its result.
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        sizes = array_bytes(instruction.shape)
        return sum(sizes[len(sizes) // 2 :])
    return instruction.bytes


def costliest(program: list[Instruction], count: int) -> list[Instruction]:
    """The instructions with the largest estimates, over all iterations."""
    estimated = [instruction for instruction in program if instruction.cycles]
    return sorted(estimated, key=lambda instruction: -(instruction.cycles or 0) * instruction.times)[:count]


def cycles_by_part(program: list[Instruction]) -> dict[str, int]:
    """Cycles by stage and direction, from the names of the JAX operations."""
    parts: Counter[str] = Counter()
    for instruction in program:
        if instruction.cycles:
            stage = re.search(r"stages_\d|stem", instruction.source)
            direction = "backward" if "transpose(" in instruction.source else "forward"
            part = f"{stage[0]} {direction}" if stage else "optimizer, head and the rest"
            parts[part] += instruction.cycles * instruction.times
    return dict(sorted(parts.items()))
