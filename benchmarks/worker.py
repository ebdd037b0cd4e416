"""The process of one implementation: `python -m benchmarks.worker MODULE:FUNCTION OPTIONS RESULT`.

FUNCTION makes a `Workload` from OPTIONS, a JSON object. The worker saves the workload's result to the file RESULT
(.npy) and prints one line of JSON when it is ready. Then it reads a number of seconds per line from stdin and answers
each with the seconds that one call takes. Everything that libraries print goes to stderr.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import Workload


def main(arguments: list[str]) -> int:
    """Answers until stdin ends."""
    factory, options, result = arguments
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    workload = make_workload(factory, json.loads(options))
    np.save(Path(result), workload.result)
    ready = {"versions": dict(workload.versions), "threads": workload.threads, "facts": dict(workload.facts)}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        print(seconds_per_call(workload.call, float(line)), file=answers)
    return 0


def make_workload(factory: str, options: dict[str, Any]) -> Workload:
    """Calls `module:function` with the options."""
    module, _, function = factory.partition(":")
    workload: Workload = getattr(importlib.import_module(module), function)(**options)
    return workload


def seconds_per_call(call: Callable[[], Any], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The mean time of the calls that fit into `seconds`, at least one.

    One call before them is not counted: it finds the caches filled by another implementation.
    """
    call()
    start, calls = clock(), 0
    while calls == 0 or clock() - start < seconds:
        call()
        calls += 1
    return (clock() - start) / calls


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
