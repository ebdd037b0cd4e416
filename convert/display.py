"""What a person sees of a conversion, in 80 columns and without a colour that a log could not show."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from convert.conversion import Mapped

if TYPE_CHECKING:
    from convert.verification import Verification


def progress(console: Console) -> Progress:
    """A bar in bytes of the source; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def show_source(console: Console, source: Mapping[str, Any]) -> None:
    """What the source is."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in source["dtypes"].items())
    lines = {
        "container": source["container"] + (f", under the key {source['wrapping']!r}" if source["wrapping"] else ""),
        "arrays": f"{dtypes}, {_bytes(source['bytes'])}",
        "also there": ", ".join(source["beside_the_weights"]),
        "moving average": "yes, with --ema" if source["has_ema"] else "",
    }
    if "layout" in source:
        lines |= {
            "layout": source["layout"],
            "variant": _variant(source),
            "parameters": f"{source['parameters']:,}",
            "classes": f"{source['num_labels']}" + (", named" if source["labels_named"] else ""),
            "head": source["head_order"].replace("_", ", then "),
            "preprocessing": _preprocessing(source),
        }
    grid = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        if text:
            grid.add_row(name, Text(text))
    console.print(grid)


def _variant(source: Mapping[str, Any]) -> str:
    depths = "-".join(map(str, source["config"]["depths"]))
    widths = "-".join(map(str, source["config"]["hidden_sizes"]))
    return f"{source['variant'] or 'not a published one'} (depths {depths}, widths {widths})"


def _preprocessing(source: Mapping[str, Any]) -> str:
    processor, channels = source["preprocessing"], source["config"]["num_channels"]
    if processor is None:
        if channels != 3:
            return f"not written down; for {channels} channels none can be taken"
        return f"not written down; {'that of the published variant is' if source['variant'] else 'none is'} taken"
    side = next(iter(processor["size"].values()))
    return f"{side} pixels, crop_pct {processor['crop_pct']}"


def show_mapping(console: Console, mapped: list[Mapped]) -> None:
    """What became what, the same row of stages and blocks told once."""
    groups: dict[tuple[str, str, str], list[Mapped]] = {}
    for one in mapped:
        key = (_pattern(one.given_name), _pattern(one.target.name), one.transform)
        groups.setdefault(key, []).append(one)
    # The longest name of transformers, indented, fits 80 columns beside the other two.
    table = Table("Source, and what it became", "Layout", "Arrays", box=None, header_style="bold", pad_edge=False)
    table.columns[0].overflow = "fold"
    table.columns[2].justify = "right"
    for (given, target, transform), ones in groups.items():
        names = Text(given) if given == target else Text(f"{given}\n  {target}")
        table.add_row(names, transform, f"{len(ones)}")
    console.print(table)


def _pattern(name: str) -> str:
    """A name with its stage and block numbers taken out, so that names of one row are alike."""
    return re.sub(r"(?<=stages_|blocks_)\d+|(?<=\.)\d+(?=\.)", "*", name)


def show_verification(console: Console, result: "Verification") -> None:
    """What was compared with what, and how far apart it is."""
    same = result.arrays - len(result.different)
    console.print(f"Read back: {same} of {result.arrays} arrays are the source's, bit for bit.")
    for name in result.different[:20]:
        console.print(f"  differs: {name}")
    if result.not_compared:
        console.print(f"Not compared with PyTorch: {result.not_compared}.")
        return
    table = Table("Compared with PyTorch", "Largest difference", "", box=None, header_style="bold")
    for name, difference in result.differences.items():
        verdict = "same" if difference <= result.tolerance else "DIFFERS"
        table.add_row(name, f"{difference:.1e} of the largest value", verdict)
    console.print(table)
    if result.first_difference:
        console.print(f"The first that differs is {result.first_difference}.")


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
