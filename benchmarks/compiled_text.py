"""Reads the text of a program that the TPU compiler wrote: estimated cycles, collectives, and where they come from.

`compiled.as_text()` is the scheduled program. Most instructions carry the compiler's own `estimated_cycles`, and the
JAX operation they came from. Bodies of loops are counted as often as they run.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.chips import Chip

_COMPUTATION = re.compile(r"^(ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<opcode>[a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_BODY = re.compile(r"body=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=(%[\w.\-]+), false_computation=(%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that do nothing at run time, or that another one waits for and is charged with.
_KERNEL = "tpu_custom_call"
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"')
_LOOPS = re.compile(r'kernel_metadata=\{\s*"rounds":"(\d+)",\s*"tiles":"(\d+)"')
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "while",
    "conditional",
}


@dataclass(frozen=True)
class KernelCost:
    """What a Pallas kernel declares of itself; the compiler does not look inside.

    Attributes:
        flops: operations of one call.
        bytes: read and written by one call.
        tiles: how many tiles its grid has.
        rounds: how often the loop in a tile runs.
    """

    flops: int
    bytes: int
    tiles: int
    rounds: int

    def bound(self, chip: Chip) -> int:
        """Cycles that the chip needs at least, by its peak rate and its memory's bandwidth."""
        return round(max(self.flops / chip.peak_flops, self.bytes / chip.hbm_bandwidth) * chip.clock)


@dataclass(frozen=True)
class Instruction:
    """One line of a compiled program.

    Attributes:
        name: as the compiler calls it.
        opcode: what it does: fusion, copy, all-reduce, ...
        shape: its result, with layout.
        source: the JAX operation it came from; empty where the compiler does not say.
        cycles: the compiler's estimate; None where it has none, as for a Pallas kernel.
        times: how often it runs.
        kernel: of a Pallas kernel that declares it, its cost.
    """

    name: str
    opcode: str
    shape: str
    source: str
    cycles: int | None
    times: int
    kernel: KernelCost | None = None

    @property
    def bytes(self) -> int:
        """Size of the result, without the layout's padding."""
        return sum(_array_bytes(bits, shape) for _, bits, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", self.shape)))


def _array_bytes(bits: str, shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size) * max(int(bits or 8), 8) // 8


def instructions(text: str) -> list[Instruction]:
    """Every instruction that the program runs by itself: of loops with their rounds, of branches the costliest."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match["name"]
            entry = name if line.startswith("ENTRY") else entry
            bodies[name] = []
        elif name and (line.startswith("  ") or not bodies[name]):
            bodies[name].append(line)
        elif name:
            bodies[name][-1] += line  # a kernel's metadata stand on lines of their own
    return list(_run(bodies, entry, 1))


def _run(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[Instruction]:
    for line in bodies[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        cycles, source = _CYCLES.search(line), _SOURCE.search(line)
        yield Instruction(
            name=match["name"],
            # What a TPU scatters while it adds up is written as a fusion of its own kind.
            opcode="reduce-scatter" if "calls=%all-reduce-scatter" in line else match["opcode"],
            shape=match["shape"],
            source=source[1] if source else "",
            cycles=int(cycles[1]) if cycles else None,
            times=times,
            kernel=_kernel_cost(line),
        )
        if match["opcode"] == "while" and (body := _BODY.search(line)):
            trips = _TRIPS.search(line)
            yield from _run(bodies, body[1], times * (int(trips[1]) if trips else 1))
        if match["opcode"] == "conditional" and (branches := _BRANCHES.search(line)):
            names = re.findall(r"%([\w.\-]+)", branches[0])
            yield from max((list(_run(bodies, name, times)) for name in names), key=total_cycles)


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
    """The program with cycles for its kernels, by name; the compiler has none."""
    return [dataclasses.replace(i, cycles=cycles[i.name]) if i.name in cycles else i for i in program]


def total_cycles(program: list[Instruction]) -> int:
    """The sum of all estimates, as if nothing overlapped."""
    return sum((instruction.cycles or 0) * instruction.times for instruction in program)


def without_estimate(program: list[Instruction]) -> dict[str, dict[str, int]]:
    """What the sum leaves out: by opcode, how many instructions have no estimate and how many bytes they return.

    Most are transfers between HBM and VMEM that run while something else computes.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for instruction in program:
        done = instruction.opcode.endswith(("-done", "-update"))
        if instruction.cycles is None and instruction.opcode not in _FREE and not done:
            counts[instruction.opcode] += instruction.times
            sizes[instruction.opcode] += instruction.bytes * instruction.times
    return {opcode: {"count": counts[opcode], "bytes": sizes[opcode]} for opcode in sorted(counts)}


def collectives(program: list[Instruction]) -> list[Instruction]:
    """Every exchange between chips, once: an asynchronous one where it starts."""
    names = {f"{kind}{suffix}" for kind in _COLLECTIVES for suffix in ("", "-start")}
    return [instruction for instruction in program if instruction.opcode in names]


def collective_bytes(instruction: Instruction) -> int:
    """The size of what a chip holds of a collective's result."""
    # An asynchronous all-gather or permute returns (operand, result); an all-reduce only its result.
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = _ARRAY.findall(re.sub(r"\{[^}]*\}", "", instruction.shape))
        return sum(_array_bytes(bits, shape) for _, bits, shape in arrays[len(arrays) // 2 :])
    return instruction.bytes


def costliest(program: list[Instruction], count: int) -> list[Instruction]:
    """The instructions with the largest estimates, all their rounds together."""
    estimated = [instruction for instruction in program if instruction.cycles]
    return sorted(estimated, key=lambda instruction: -(instruction.cycles or 0) * instruction.times)[:count]


def cycles_by_part(program: list[Instruction]) -> dict[str, int]:
    """Cycles by stage and direction, from the names of the JAX operations."""
    parts: Counter[str] = Counter()
    for instruction in program:
        if instruction.cycles:
            stage = re.search(r"stages_\d|stem", instruction.source)
            direction = "backward" if "transpose(" in instruction.source else "forward"
            part = f"{stage[0]} {direction}" if stage else "optimizer, head, augmentation and the rest"
            parts[part] += instruction.cycles * instruction.times
    return dict(sorted(parts.items()))
