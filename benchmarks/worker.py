"""The process of one contender: `python -m benchmarks.worker MODULE:FUNCTION OPTIONS RESULT`.

The function makes a `Job` from the options, a JSON object. Its result goes into the file RESULT (.npy), and one line of
JSON to standard output tells that it is ready. Then every line of standard input, a number of seconds, is answered
with the seconds that one call takes. Whatever the libraries print goes to standard error.
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

from benchmarks.job import Job


def main(arguments: list[str]) -> int:
    """Serves until standard input ends."""
    factory, options, result = arguments
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = make_job(factory, json.loads(options))
    np.save(Path(result), job.result)
    ready = {"versions": dict(job.versions), "threads": job.threads, "facts": dict(job.facts)}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        print(seconds_per_call(job.call, float(line)), file=answers)
    return 0


def make_job(factory: str, options: dict[str, Any]) -> Job:
    """What `module:function` makes of the options."""
    module, _, function = factory.partition(":")
    job: Job = getattr(importlib.import_module(module), function)(**options)
    return job


def seconds_per_call(call: Callable[[], Any], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The mean over as many calls as fill `seconds`, at least one, after one that is not counted.

    Another contender has just had the caches and the cores: the first call pays for that.
    """
    call()
    start, calls = clock(), 0
    while calls == 0 or clock() - start < seconds:
        call()
        calls += 1
    return (clock() - start) / calls


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
