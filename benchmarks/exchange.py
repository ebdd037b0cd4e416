"""How fast a core reads what it has written itself, and what another core has written.

On a virtual machine this tells what the guest is not told: whether its cores share a cache. Where they do, both rates
are the same; where they do not, the second is a fraction of the first. It can change within seconds, when the host
moves the machine's processors about, and programs whose cores work on each other's data then lose more than others.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks import command_line, report
from benchmarks.cores import Rates, rates
from poolformer_jax.files import write_json


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its table, writes JSON, and returns the exit code."""
    options = command_line.parse(_parser(), arguments)
    console = Console()
    found: list[Rates] = []
    end = time.monotonic() + options.seconds
    with console.status("two cores hand each other data"):
        while time.monotonic() < end or not found:
            if (one := rates()) is None:
                raise ValueError("This needs two cores, and a system that keeps threads to one of them (Linux).")
            found.append(one)
            time.sleep(0.05)
    table = Table(title=f"GB/s, {len(found)} times in {options.seconds:g} s", title_justify="left")
    for heading in ("", "of the time", "same core", "other core"):
        table.add_column(heading, justify="right" if heading else "left")
    groups = []
    for name, together in (("the cores share a cache", True), ("they do not", False)):
        group = [one for one in found if one.share_a_cache is together]
        if not group:
            continue
        same, other = (statistics.median(values) for values in zip(*group, strict=True))
        table.add_row(name, f"{len(group) / len(found):.0%}", f"{same:.0f}", f"{other:.0f}")
        groups.append({"share_a_cache": together, "times": len(group), "same_core": same, "other_core": other})
    console.print(table)
    write_json(options.json, {"command": options.command, "machine": report.machine(), "groups": groups})
    console.print(f"written to {options.json}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("exchange", __doc__, example="--seconds 60")
    parser.add_argument("--seconds", type=float, default=30, help="how long to look (default: 30)")
    return parser
