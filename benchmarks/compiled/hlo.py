"""Reads the text of a compiled program: its instructions, and how often each of them runs.

`compiled.as_text()` is the scheduled program, one instruction per line. What the TPU and the GPU compiler add to the
lines is read in tpu_program.py and gpu_program.py.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

_COMPUTATION = re.compile(r"^(ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<opcode>[a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_BODY = re.compile(r"body=%([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=(%[\w.\-]+), false_computation=(%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(?:pred|[a-z]+?(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")
# Instructions that do nothing at run time, or whose computations are counted instead.
FREE = {
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

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """One instruction."""

    name: str  # the compiler's name
    opcode: str  # fusion, copy, all-reduce, ...
    shape: str  # shape and layout of the result
    operands: tuple[str, ...]  # shapes of the operands, each array once
    source: str  # the JAX operation it came from; empty if the compiler names none
    text: str  # the whole line


def walk(
    text: str, read: Callable[[Line, int], T], cost: Callable[[list[T]], float], calls: Collection[str] = ()
) -> list[T]:
    """`read(line, times)` of every instruction that the program runs, without the insides of fusions.

    Loop bodies count once per iteration, or once if the number of iterations is unknown. Of branches, the one with the
    highest cost counts.

    `read` makes the entry of one instruction from its line and how often it runs; `cost` is that of a branch, from its
    entries; `calls` are opcodes whose called computation counts, too.
    """
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
            bodies[name][-1] += line  # the metadata of a Pallas kernel spans several lines

    def run(name: str, times: int) -> Iterator[T]:
        shapes: dict[str, str] = {}
        for text in bodies[name]:
            match = _INSTRUCTION.match(text)
            if match is None:
                continue
            shapes[match["name"]] = match["shape"]
            yield read(_line(match, text, shapes), times)
            if match["opcode"] == "while" and (body := _BODY.search(text)):
                trips = _TRIPS.search(text)
                yield from run(body[1], times * (int(trips[1]) if trips else 1))
            if match["opcode"] == "conditional" and (branches := _BRANCHES.search(text)):
                yield from max((list(run(branch, times)) for branch in _NAME.findall(branches[0])), key=cost)
            if match["opcode"] in calls and (called := _CALLED.search(text)):
                yield from run(called[1], times)

    return list(run(entry, 1))


def _line(match: re.Match[str], text: str, shapes: dict[str, str]) -> Line:
    operands = dict.fromkeys(_NAME.findall(text[match.end() :].partition(")")[0]))
    source = _SOURCE.search(text)
    return Line(
        name=match["name"],
        opcode=match["opcode"],
        shape=match["shape"],
        operands=tuple(shapes[operand] for operand in operands if operand in shapes),
        source=source[1] if source else "",
        text=text,
    )


def array_bytes(shape: str) -> list[int]:
    """The bytes of every array of a result, without the padding of its layout."""
    return [
        math.prod(int(size) for size in array["shape"].split(",") if size) * max(int(array["bits"] or 8), 8) // 8
        for array in _ARRAY.finditer(re.sub(r"\{[^}]*\}", "", shape))
    ]
