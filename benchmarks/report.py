"""What a benchmark tells: the machine, medians and spread, the ratio to the fastest peer; as a table and as JSON.

And the tables of what a compiler tells.
"""

import datetime
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.turns import Result
from poolformer_jax.process import available_cores


def machine() -> dict[str, Any]:
    """Where and when figures come from, and how busy it was there."""
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "load_before": load(),
    }


def load() -> float | None:
    """How many processes wanted a core over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def summarise(results: Sequence[Result], images: int) -> list[dict[str, Any]]:
    """The results with what the table shows.

    `milliseconds_per_image` is the median over the rounds and `middle_half` its quartiles. `to_fastest_peer` is the
    median over the rounds of the time beside the fastest peer's of the same round: below 1 is faster than that. The
    fastest peer is the one beside which the first contender takes longest, told in the same way: of two with like
    medians, the one that was ahead in most rounds. `cores_share_a_cache` and `cores_do_not` are medians of those turns
    only, None where there was no such turn.
    """
    peers = [result for result in results if not result.ours]
    fastest = max(peers, key=lambda peer: _ratio(results[0], peer)) if peers else None
    return [_summary(result, fastest, images) for result in results]


def _ratio(result: Result, other: Result) -> float:
    return statistics.median(own / its for own, its in zip(result.seconds, other.seconds, strict=True))


def _summary(result: Result, fastest: Result | None, images: int) -> dict[str, Any]:
    milliseconds = [seconds * 1e3 / images for seconds in result.seconds]
    return {
        **asdict(result),
        "milliseconds_per_image": statistics.median(milliseconds),
        "middle_half": _quartiles(milliseconds),
        "cores_share_a_cache": _median_where(True, milliseconds, result.share_a_cache),
        "cores_do_not": _median_where(False, milliseconds, result.share_a_cache),
        "to_fastest_peer": None if fastest is None else _ratio(result, fastest),
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _median_where(wanted: bool, values: Sequence[float], states: Sequence[bool | None]) -> float | None:
    chosen = [value for value, state in zip(values, states) if state is wanted]
    return statistics.median(chosen) if chosen else None


def table(title: str, summaries: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each contender, ours in bold; two more columns where the cores lost their common cache meanwhile."""
    made = Table(title=title, title_justify="left", caption_justify="left")
    made.add_column("", no_wrap=True)
    states = ("cores_share_a_cache", "cores_do_not") if any(one["cores_do_not"] for one in summaries) else ()
    for heading in ("ms an image", "middle half", "x fastest peer", *(("common cache", "none") if states else ())):
        made.add_column(heading, justify="right")
    for summary in summaries:
        low, high = summary["middle_half"]
        ratio = summary["to_fastest_peer"]
        made.add_row(
            summary["name"],
            _figure(summary["milliseconds_per_image"]),
            f"{_figure(low)} to {_figure(high)}",
            "" if ratio is None else f"{ratio:.2f}",
            *("" if summary[state] is None else _figure(summary[state]) for state in states),
            style="bold" if summary["ours"] else None,
        )
    largest = max(summary["difference"] or 0 for summary in summaries)
    made.caption = f"What they compute differs by at most {largest:.0e} of the largest number."
    return made


def _figure(milliseconds: float) -> str:
    """Three digits that count."""
    return f"{milliseconds:.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f}"


def show(console: Console, title: str, summaries: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
    """Prints a table, and who is missing from it."""
    console.print(table(title, summaries))
    for reason in left_out.values():
        console.print(f"left out: {reason}", highlight=False, markup=False)


def facts(title: str, heading: str, rows: Mapping[str, str]) -> Table:
    """What a compiler tells of a program: names and figures."""
    made = Table(title=title)
    made.add_column("what")
    made.add_column(heading, justify="right")
    for name, figure in rows.items():
        made.add_row(name, figure)
    return made


def costs(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """What costs most in a program.

    Args:
        title: above the table.
        headings: of all columns but the last: the cost, what has it, ...
        rows: columns, the last of them the JAX operation as the compiler writes it, of which the end is shown.
    """
    made = Table(title=title)
    for column in (*headings, "from"):
        made.add_column(column, justify="right" if column == headings[0] else "left", overflow="fold")
    for *columns, source in rows:
        made.add_row(*columns, "/".join(source.split("/")[-4:]))
    return made
