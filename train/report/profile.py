"""A trace of some steps, as --profile-steps asks for."""

import contextlib
import logging
from typing import Any

import jax

from train.config import TrainConfig

_LOG = logging.getLogger(__name__)
# Steps before the trace starts: compiling and filling the data pipeline happen in them.
_WARM_UP = 10


class Profiler(contextlib.ExitStack):
    """Traces steps of process 0 into the folder `profile` of the run; ends the trace if the run ends before.

    A warning says if the run has too few steps left.
    """

    def __init__(self, config: TrainConfig, steps_left: int) -> None:
        super().__init__()
        self._folder = config.run_dir / "profile"
        self._steps = config.profile_steps if jax.process_index() == 0 else 0
        self._done = 0
        if self._steps and steps_left < _WARM_UP + self._steps:
            _LOG.warning(
                "profile_steps=%d: %d steps are left, and the first %d are not profiled. Expected at least %d for the "
                "whole profile: use a larger --max-steps, or another --run-dir.",
                *(self._steps, steps_left, _WARM_UP, _WARM_UP + self._steps),
            )

    def step(self, metrics: Any) -> None:
        """Counts a step that was dispatched, and starts or ends the trace after it; `metrics` are its results."""
        self._done += 1
        if not self._steps:
            return
        if self._done == _WARM_UP:
            self.enter_context(jax.profiler.trace(self._folder))
        elif self._done == _WARM_UP + self._steps:
            jax.block_until_ready(metrics)
            self.close()
