"""Output on the terminal, in 80 columns; nothing depends on colours, which logs do not show."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from convert.conversion import ArrayMapping
from poolformer_jax.messages import first_few, printable, short_repr

if TYPE_CHECKING:
    from convert.verification import Verification


def progress(console: Console) -> Progress:
    """A progress bar in bytes of the source; nothing if the output is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def show_source(console: Console, source: Mapping[str, Any]) -> None:
    """Prints what the source is."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in source["dtypes"].items())
    lines = {
        "container": source["container"]
        + (f", under the key {short_repr(source['wrapping'])}" if source["wrapping"] else ""),
        "arrays": f"{dtypes}, {_bytes(source['bytes'])}",
        "also contains": first_few(source["beside_the_weights"], 20),
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
            return f"not saved; there is no default for {channels} channels"
        return "not saved; " + ("default of the published variant" if source["variant"] else "there is no default")
    side = next(iter(processor["size"].values()))
    return f"{side} pixels, crop_pct {processor['crop_pct']}"


def show_mappings(console: Console, mappings: list[ArrayMapping]) -> None:
    """Prints what each array became, with one row for the same parameter of all stages and blocks."""
    groups = Counter((_pattern(one.given_name), _pattern(one.target.name), one.transform) for one in mappings)
    # The longest name of transformers, indented, fits 80 columns beside the other two.
    table = Table("Source, and what it became", "Layout", "Arrays", box=None, header_style="bold", pad_edge=False)
    table.columns[0].overflow = "fold"
    table.columns[2].justify = "right"
    for (given, target, transform), count in groups.items():
        given = printable(given)
        names = Text(given) if given == target else Text(f"{given}\n  {target}")
        table.add_row(names, transform, f"{count}")
    console.print(table)


def _pattern(name: str) -> str:
    """A name with "*" for its stage and block numbers."""
    return re.sub(r"(?<=stages_|blocks_)\d+|(?<=\.)\d+(?=\.)", "*", name)


def show_verification(console: Console, result: "Verification") -> None:
    """Prints what was compared, and the differences."""
    same = result.arrays - len(result.different)
    console.print(f"Read back: {same} of {result.arrays} arrays are the source's, bit for bit.")
    for name in result.different[:20]:
        console.print(f"  differs: {name}")
    if result.head_order_difference is not None:
        console.print(
            "The head of the layout's model has another order or epsilon: its logits differ from the source's by "
            f"{result.head_order_difference:.1e} of the largest value."
        )
    if result.not_verified:
        console.print(
            f"Not verified: {result.not_verified}. No array shows it, so nothing in the file can contradict it. "
            "Confirm it with --variant."
        )
    if result.not_compared:
        console.print(f"Not compared with PyTorch: {result.not_compared}.")
        return
    table = Table("Compared with PyTorch", "Largest difference", "", box=None, header_style="bold")
    for name, difference in result.differences.items():
        verdict = "same" if difference <= result.tolerance else "DIFFERS"
        table.add_row(name, f"{difference:.1e} of the largest value", verdict)
    console.print(table)
    if result.first_difference:
        console.print(f"The first difference is in {result.first_difference}.")


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
