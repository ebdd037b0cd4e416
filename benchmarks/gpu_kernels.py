"""Reads the text of a program that the GPU compiler wrote: its kernels, and the bytes that they read and write."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.hlo_text import FREE, Line, array_bytes, walk

# What runs in the place of these are the kernels of another computation.
_CALLS = {"call", "async-start"}
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_BACKEND = re.compile(r'"fusion_backend_config":\{"kind":"([^"]*)"')
_KIND = re.compile(r"\bkind=(\w+)")


@dataclass(frozen=True)
class Kernel:
    """What the program starts as one thing: a fusion, a library's function, a Pallas kernel, a copy.

    Attributes:
        name: as the compiler calls it.
        kind: of a call its target, of a fusion how it is compiled, otherwise what it does.
        read: bytes of its operands. It may need only a part of them.
        written: bytes of its results. It may leave a part of them as it is.
        source: the JAX operation it came from; empty where the compiler does not say.
        times: how often it runs.
    """

    name: str
    kind: str
    read: int
    written: int
    source: str
    times: int

    @property
    def bytes(self) -> int:
        """Read and written, each time that it runs."""
        return (self.read + self.written) * self.times


def kernels(text: str) -> list[Kernel]:
    """What the program starts: of loops with their rounds, of branches the costliest.

    The conditions of loops are left out; they are numbers that the host may know.
    """
    found = walk(text, _kernel, lambda branch: total_bytes([one for one in branch if one]), _CALLS)
    return [kernel for kernel in found if kernel is not None]


def _kernel(line: Line, times: int) -> Kernel | None:
    if line.opcode in FREE | _CALLS or line.opcode.endswith(("-done", "-update")):
        return None
    read, written = (sum(sum(array_bytes(shape)) for shape in shapes) for shapes in (line.operands, [line.shape]))
    if line.opcode.endswith("-start"):
        written = max(0, written - read)  # it returns its operands beside its results
    return Kernel(line.name, _kind(line), read, written, line.source, times)


def _kind(line: Line) -> str:
    if line.opcode == "custom-call" and (target := _TARGET.search(line.text)):
        return target[1]
    if line.opcode == "fusion" and (kind := _BACKEND.search(line.text) or _KIND.search(line.text)):
        return f"fusion, {kind[1]}"
    return line.opcode


def total_bytes(kernels: Sequence[Kernel]) -> int:
    """Of all their runs."""
    return sum(kernel.bytes for kernel in kernels)


def costliest(kernels: Sequence[Kernel], count: int) -> list[Kernel]:
    """Those that read and write most, all their runs together."""
    return sorted(kernels, key=lambda kernel: -kernel.bytes)[:count]


def by_kind(kernels: Sequence[Kernel]) -> dict[str, dict[str, int]]:
    """How many are of each kind, and what these read and write; the most bytes first."""
    kinds = defaultdict(list)
    for kernel in kernels:
        kinds[kernel.kind].append(kernel)
    described = {
        kind: {"count": sum(one.times for one in ones), "bytes": total_bytes(ones)} for kind, ones in kinds.items()
    }
    return dict(sorted(described.items(), key=lambda kind: -kind[1]["bytes"]))
