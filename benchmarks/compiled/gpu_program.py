"""Reads the text of a program that the GPU compiler wrote: its kernels and the bytes they read and write."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.compiled.hlo import FREE, Line, array_bytes, walk

# These run the kernels of another computation.
_CALLS = {"call", "async-start"}
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_BACKEND = re.compile(r'"fusion_backend_config":\{"kind":"([^"]*)"')
_KIND = re.compile(r"\bkind=(\w+)")


@dataclass(frozen=True)
class Kernel:
    """One launch of the program: a fusion, a library call, a Pallas kernel, a copy."""

    name: str  # the compiler's name
    kind: str  # target of a custom call, kind of a fusion, otherwise the opcode
    read: int  # bytes of its operands; it may read only a part
    written: int  # bytes of its results; it may write only a part
    source: str  # the JAX operation it came from; empty if the compiler names none
    times: int  # how often it runs

    @property
    def bytes(self) -> int:
        """Bytes read and written by all its runs."""
        return (self.read + self.written) * self.times


def kernels(text: str) -> list[Kernel]:
    """The kernels that the program launches. Loop bodies count once per iteration; of branches, the costliest one.

    Conditions of loops are not counted.
    """
    found = walk(text, _kernel, lambda branch: total_bytes([one for one in branch if one]), _CALLS)
    return [kernel for kernel in found if kernel is not None]


def _kernel(line: Line, times: int) -> Kernel | None:
    if line.opcode in FREE | _CALLS or line.opcode.endswith(("-done", "-update")):
        return None
    read, written = (sum(sum(array_bytes(shape)) for shape in shapes) for shapes in (line.operands, [line.shape]))
    if line.opcode.endswith("-start"):
        written = max(0, written - read)  # the result includes the operands
    return Kernel(line.name, _kind(line), read, written, line.source, times)


def _kind(line: Line) -> str:
    if line.opcode == "custom-call" and (target := _TARGET.search(line.text)):
        return target[1]
    if line.opcode == "fusion" and (kind := _BACKEND.search(line.text) or _KIND.search(line.text)):
        return f"fusion, {kind[1]}"
    return line.opcode


def total_bytes(kernels: Sequence[Kernel]) -> int:
    """Bytes read and written by all runs of the kernels."""
    return sum(kernel.bytes for kernel in kernels)


def costliest(kernels: Sequence[Kernel], count: int) -> list[Kernel]:
    """The kernels that read and write most, over all runs."""
    return sorted(kernels, key=lambda kernel: -kernel.bytes)[:count]


def by_kind(kernels: Sequence[Kernel]) -> dict[str, dict[str, int]]:
    """Number of kernels and their bytes by kind, most bytes first."""
    kinds = defaultdict(list)
    for kernel in kernels:
        kinds[kernel.kind].append(kernel)
    described = {
        kind: {"count": sum(one.times for one in ones), "bytes": total_bytes(ones)} for kind, ones in kinds.items()
    }
    return dict(sorted(described.items(), key=lambda kind: -kind[1]["bytes"]))
