"""The TPU compiler's schedules of Pallas kernels, for which it gives no estimate.

libtpu can write the instruction words ("bundles") of every kernel it compiles, each with the depth of its loop. A
bundle takes one cycle. The outermost loop runs over tiles, the next one over the rounds of a tile that the kernel
declares. The bundles at each depth times the iterations of that loop are the kernel's cycles if it never waits for
memory.

The flags are undocumented. A libtpu that does not know them writes no schedule.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.compiled.tpu_program import Instruction

_PASS = "final_bundles"
_FILE = re.compile(rf"\d+-(?P<name>[\w.]+)-\d+-{_PASS}\.txt")
# "  0x61 LB: >> { ... }": address, label, depth, instructions.
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*: (?P<depth>>*) ?\{")


@contextmanager
def recorded() -> Iterator[Path]:
    """A folder into which libtpu writes schedules. libtpu must not have started yet."""
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
    """Cycles by kernel. Kernels of the same name and shape share one schedule, which libtpu writes once."""
    files = {match["name"]: path for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    by_kind = {_kind(kernel): _cycles(files[kernel.name], kernel) for kernel in kernels if kernel.name in files}
    found = {kernel.name: by_kind.get(_kind(kernel)) for kernel in kernels}
    return {name: count for name, count in found.items() if count is not None}


def _kind(kernel: Instruction) -> tuple[str, str]:
    # The compiler numbers kernels of the same name. The memory of a result (S(1) is VMEM) hardly changes the schedule.
    return re.sub(r"\.\d+$", "", kernel.name), re.sub(r"S\(\d+\)", "", kernel.shape)


def _cycles(path: Path, kernel: Instruction) -> int | None:
    with path.open() as lines:
        depths = Counter(len(match["depth"]) for line in lines if (match := _BUNDLE.match(line)))
    if kernel.kernel is None or max(depths, default=3) > 2:
        return None  # loops that the kernel does not declare
    return depths[0] + kernel.kernel.tiles * (depths[1] + kernel.kernel.rounds * depths[2])
