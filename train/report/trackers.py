"""Experiment trackers that get every line of metrics.jsonl: Weights & Biases, and trackio with the same functions.

Another tracker is a function of the step and the figures: `train.fit(config, log=function)`.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping

from poolformer_jax.errors import MissingDependencyError
from train.config import TrainConfig

# (step, {"train/loss": 0.5, ...}); called on process 0.
Log = Callable[[int, Mapping[str, float]], None]
_PROJECT = "poolformer-jax"


@contextlib.contextmanager
def _open(name: str, config: TrainConfig) -> Iterator[Log]:
    try:
        tracker = importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"--log-to {name} needs {name}. Install it with: pip install -e '.[train,{name}]'"
        ) from error
    # trackio resumes a run by its name; W&B one whose id is in WANDB_RUN_ID.
    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    tracker.init(project=project, name=config.run_dir.name, config=config.to_dict(), resume="allow")
    try:
        yield lambda step, figures: tracker.log(dict(figures), step=step)
    finally:
        tracker.finish()


@contextlib.contextmanager
def open_trackers(config: TrainConfig, log: Log | None) -> Iterator[Log]:
    """A function that passes figures on to `log` and to the trackers of --log-to, which are closed at the end.

    Raises MissingDependencyError if the package of a tracker is not installed.
    """
    with contextlib.ExitStack() as opened:
        logs = [opened.enter_context(_open(name, config)) for name in config.log_to]

        def log_to_all(step: int, figures: Mapping[str, float]) -> None:
            for one in [log, *logs]:
                if one is not None:
                    one(step, figures)

        yield log_to_all
