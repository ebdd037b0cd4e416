"""Stopping a run: SIGTERM and Ctrl-C end it between two steps, at the same step on all processes."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Records SIGTERM (from schedulers, and at a preemption) and Ctrl-C, so that the run stops between two steps.

    The handlers only set a flag, because an exception inside a compilation or a callback of jax is lost or aborts the
    interpreter. A second signal ends the process at once. With several processes SIGTERM belongs to jax's preemption
    service: it notifies all processes of a signal to one of them, and chooses a step at which all stop. So the loop
    must call `at(step)` at every step.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self._listen(signal.SIGINT)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def listen_for_sigterm(self) -> None:
        """Starts to listen for SIGTERM; call it after `initialize`, which installs jax's handler."""
        if jax.process_count() == 1:
            self._listen(signal.SIGTERM)

    def check_interrupt(self) -> None:
        """Raises KeyboardInterrupt after Ctrl-C; for the set-up. After SIGTERM the run still saves its first state."""
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt

    def at(self, step: int) -> bool:
        """True if the run should stop after `step` steps; the same on all processes."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = signal.SIGTERM
            elif self.signal is signal.SIGINT:
                raise KeyboardInterrupt
        return self.signal is not None

    def _listen(self, number: signal.Signals) -> None:
        self._before[number] = signal.signal(number, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # The default handlers act at once; one in Python would wait until a compilation ends.
        for listened in self._before:
            signal.signal(listened, signal.SIG_DFL)
