"""TensorBoard's event files, written at once and in order.

tensorboardX's own SummaryWriter hands events to a thread, which a failing disk leaves behind in a state that it then
complains about at exit. Its file format is all that is needed here.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class EventFile:
    """A new event file for a run that begins or goes on.

    Args:
        folder: where TensorBoard looks.
        start_step: the step the run goes on from; TensorBoard then forgets what other files say of later ones.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        if start_step:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Notes numbers of a step, by name."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Nothing more is noted."""
        self._writer.close()
