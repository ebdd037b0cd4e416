"""What the TPU compiler schedules for Pallas kernels, for which it gives no estimate: one instruction word a cycle.

On request libtpu writes the instruction words ("bundles") of every kernel that it compiles, with the depth of loops
that each of them stands in. The outermost loop runs over tiles, the next over what the kernel declares as rounds of a
tile; so the bundles at each depth, times how often that loop runs, are the kernel's time in cycles as long as it does
not wait for memory.

The flags are libtpu's own and not documented. Where it does not know them there is simply no schedule.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.compiled_text import Instruction

_PASS = "final_bundles"
_FILE = re.compile(rf"\d+-(?P<name>[\w.]+)-\d+-{_PASS}\.txt")
# "  0x61 LB: >> { ... }": address, label, depth, instructions.
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*: (?P<depth>>*) ?\{")


@contextmanager
def recorded() -> Iterator[Path]:
    """A folder that libtpu writes schedules into; it must not have been started before."""
    before = os.environ.get("LIBTPU_INIT_ARGS")
    with tempfile.TemporaryDirectory(prefix="schedules-") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_PASS}"
        os.environ["LIBTPU_INIT_ARGS"] = f"{before or ''} {flags}".strip()
        try:
            yield Path(folder)
        finally:
            os.environ.pop("LIBTPU_INIT_ARGS")
            if before is not None:
                os.environ["LIBTPU_INIT_ARGS"] = before


def cycles(folder: Path, kernels: list[Instruction]) -> dict[str, int]:
    """Cycles by kernel; those of the same name and shape share one schedule, which is written once."""
    files = {match["name"]: path for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    by_kind = {_kind(kernel): _cycles(files[kernel.name], kernel) for kernel in kernels if kernel.name in files}
    found = {kernel.name: by_kind.get(_kind(kernel)) for kernel in kernels}
    return {name: count for name, count in found.items() if count is not None}


def _kind(kernel: Instruction) -> tuple[str, str]:
    # The compiler numbers kernels of one name; where a result lives (S(1) is VMEM) makes no difference worth counting.
    return re.sub(r"\.\d+$", "", kernel.name), re.sub(r"S\(\d+\)", "", kernel.shape)


def _cycles(path: Path, kernel: Instruction) -> int | None:
    with path.open() as lines:
        depths = Counter(len(match["depth"]) for line in lines if (match := _BUNDLE.match(line)))
    if kernel.kernel is None or max(depths, default=3) > 2:
        return None  # loops that the kernel does not declare
    return depths[0] + kernel.kernel.tiles * (depths[1] + kernel.kernel.rounds * depths[2])
