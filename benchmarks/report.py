"""Reports of benchmarks: the machine, medians, quartiles and ratios, as tables of at most 80 columns and as JSON."""

import datetime
import os
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from poolformer_jax.resources import available_cores


@dataclass(frozen=True)
class Result:
    """The times of one implementation."""

    name: str  # name of the implementation
    ours: bool  # True if it is this package's
    seconds: tuple[float, ...]  # seconds per call, one entry per round
    # Largest difference of its result to the first implementation's, relative to the largest number of that; None if
    # the two are not comparable.
    difference: float | None
    versions: Mapping[str, str]  # versions of the libraries that did the work
    threads: int  # number of threads
    facts: Mapping[str, Any]  # further entries, from its `Workload`


def machine() -> dict[str, Any]:
    """The machine, the date, and how busy the machine was."""
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "load_before": load(),
    }


def load() -> float | None:
    """The load average of the last minute; None if the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def summarise(results: Sequence[Result], images: int) -> list[dict[str, Any]]:
    """The results with the figures of the table.

    `milliseconds_per_image` is the median over the rounds and `middle_half` the quartiles. `to_fastest_peer` compares
    with the fastest implementation that is not ours: the time divided by its time in the same round, the median over
    the rounds. The fastest is the one with the largest such ratio of the first implementation to it.
    """
    others = [result for result in results if not result.ours]
    fastest = max(others, key=lambda other: _ratio(results[0], other)) if others else None
    return [_summary(result, fastest, images) for result in results]


def _ratio(result: Result, other: Result) -> float:
    return statistics.median(a / b for a, b in zip(result.seconds, other.seconds, strict=True))


def _summary(result: Result, fastest: Result | None, images: int) -> dict[str, Any]:
    milliseconds = [seconds * 1e3 / images for seconds in result.seconds]
    return {
        **asdict(result),
        "milliseconds_per_image": statistics.median(milliseconds),
        "middle_half": _quartiles(milliseconds),
        "to_fastest_peer": None if fastest is None else _ratio(result, fastest),
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def show(console: Console, title: str, summaries: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
    """Prints one row per implementation, ours in bold, and which implementations are missing."""
    made = table(title, ("", "ms/image", "quartiles", "ratio"))
    for summary in summaries:
        low, high = map(_figure, summary["middle_half"])
        ratio = summary["to_fastest_peer"]
        made.add_row(
            summary["name"],
            _figure(summary["milliseconds_per_image"]),
            f"{low} to {high}",
            "" if ratio is None else f"{ratio:.2f}",
            style="bold" if summary["ours"] else None,
        )
    largest = max(summary["difference"] or 0 for summary in summaries)
    made.caption = f"ratio: time / time of the fastest other library\nlargest difference of results: {largest:.0e}"
    console.print(made)
    names = defaultdict(list)
    for name, reason in left_out.items():
        names[reason].append(name)
    for reason, affected in names.items():
        console.print(f"left out: {'; '.join(affected)} ({reason})", highlight=False, markup=False)


def create_console(stderr: bool = False) -> Console:
    """The screen; without colours and animation unless it is a terminal, although FORCE_COLOR may be set."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, force_terminal=None if stream.isatty() else False)


def _figure(milliseconds: float) -> str:
    """Three significant digits."""
    return f"{milliseconds:.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f}"


def table(title: str, headings: Sequence[str]) -> Table:
    """An empty table: text in the first column, numbers in the others."""
    made = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="left" if heading == headings[0] else "right")
    return made


def costs(title: str, headings: tuple[str, str], rows: Sequence[tuple[str, str, str]]) -> Table:
    """A compiler's costliest instructions.

    `rows` have cost, name, and the JAX operation as the compiler writes it, of which the table shows the end.
    """
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(headings[0], justify="right", no_wrap=True)
    made.add_column(headings[1], overflow="ellipsis", no_wrap=True, max_width=34)
    made.add_column("from", overflow="ellipsis", no_wrap=True)
    for cost, name, source in rows:
        made.add_row(cost, name, "/".join(source.split("/")[-3:]))
    return made
