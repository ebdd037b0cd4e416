"""A contest: contenders are compared, take turns, and are told of in a table and in JSON."""

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.turns import Contender, measure


def hold_contest(
    console: Console,
    title: str,
    contenders: Sequence[Contender],
    options: argparse.Namespace,
    *,
    images: int,
    tolerance: float,
) -> dict[str, Any]:
    """Compares and times the contenders (`turns.measure`), prints their table, and returns what JSON holds of it.

    `options` have the flags of `command_line.add_turns`; `images` are those in a call.
    """
    with console.status(title) as status:
        results, left_out = measure(
            contenders,
            rounds=options.rounds,
            seconds=options.seconds,
            tolerance=tolerance,
            say=lambda what: status.update(f"{title}: {what}"),
        )
    summaries = report.summarise(results, images)
    report.show(console, title, summaries, left_out)
    return {"load_after": report.load(), "results": summaries, "left_out": left_out}
