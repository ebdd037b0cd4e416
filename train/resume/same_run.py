"""Checks that a run resumes only from its own folders: `open_run` does so before the first step."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.files import read_json, write_json
from poolformer_jax.messages import first_few, printable_message
from train.compute import from_process_0, refuse_different_processes
from train.config import TrainConfig
from train.data import Source
from train.folders import lock_folder
from train.report import last_logged_step
from train.resume.checkpoints import Checkpoints, newest_run, wait_for_same_checkpoints
from train.resume.run_comparison import (
    FREE_TO_DIFFER,
    Identity,
    changed_fields,
    current_fields,
    describe_changes,
    flatten_fields,
    identify,
    network_to_dict,
)

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose folders may be used; nothing is written yet."""

    config: TrainConfig  # its recipe
    identity: Identity  # what is saved with every state; see `identify`
    newest_step: int | None = None  # step of the newest checkpoint, or None if the run starts from step 0
    # The network of that checkpoint; with it a run resumes without reading pretrained weights.
    network: PoolFormerConfig | None = None
    lost_steps: int | None = None  # the last step in metrics.jsonl if there is no checkpoint; otherwise None

    @contextlib.contextmanager
    def open_checkpoints(self, network: PoolFormerConfig) -> Iterator[Checkpoints]:
        """Locks the run's folders, writes recipe.json, and opens the checkpoints to restore from and save to.

        Raises InputError if another process uses one of the folders.
        """
        config = self.config
        run = self.identity | {"network": network_to_dict(network)}
        with contextlib.ExitStack() as opened:
            if jax.process_index() == 0:
                _lock_folders(config, opened)
                write_json(config.run_dir / "recipe.json", config.to_dict())
                if self.lost_steps is not None:
                    _LOG.warning("%s", self.lost_steps_message())
            # After the locks, because opening deletes half-written states.
            checkpoints = Checkpoints(
                config.checkpoints, run, config.keep_checkpoints, config.keep_every, config.distributed.timeout
            )
            yield opened.enter_context(checkpoints)

    def lost_steps_message(self) -> str:
        """The warning for a run that starts from step 0 although it has metrics.

        It is not an error, because a run that was killed before its first checkpoint leaves the same files.
        """
        return (
            f"{self.config.run_dir} has metrics up to step {self.lost_steps}, but {self.config.checkpoints} has no "
            "checkpoint: the run ended before the first one was complete, or they were deleted. It starts again from "
            "step 0, and so do its metrics."
        )


def open_run(config: TrainConfig, source: Source, held_out: Source) -> Run:
    """Checks that all processes and the folders of the run fit `config` and its images; reads only.

    All processes must pass the same `config`. Raises InputError if the processes differ, or the folders belong to
    another run; CheckpointError if there are states and none can be read, or the processes see different ones.
    """
    _compare_processes(config, source, held_out)
    wait_for_same_checkpoints(config.checkpoints, config.distributed.timeout)
    return find_run(config, source)


def find_run(config: TrainConfig, source: Source) -> Run:
    """What the folders of the run hold; reads only, and does not wait for other processes.

    A state may be from another version of this program. Fields that it lacks have their defaults; fields that no longer
    exist are logged and not compared. Raises InputError if they hold another run, or the run saved its states
    elsewhere, or a finished run lost its states; CheckpointError if there are states and none can be read.
    """
    identity = identify(config, source)
    found = newest_run(config.checkpoints)
    if found is None:
        _refuse_forgotten_checkpoint_dir(config)
        _refuse_to_replace_a_model(config)
        return Run(config, identity, lost_steps=last_logged_step(config.run_dir))
    step, saved = found
    recipe, unknown = current_fields(saved["recipe"], config)
    _refuse_changes(config.checkpoints, step, describe_changes(saved | {"recipe": recipe}, identity))
    written, now = read_recipe(config.run_dir / "recipe.json"), flatten_fields(identity["recipe"])
    both = [name for name in now if name in written]
    before, after = ({name: values[name] for name in both} for values in (written, now))
    _refuse_changes(config.run_dir, step, changed_fields(before, after))
    if unknown:
        _LOG.warning(
            "%s is of a run with fields that this version does not have. They are ignored: %s",
            config.checkpoints,
            first_few(unknown, 20),
        )
    return Run(config, identity, step, PoolFormerConfig.from_dict(saved["network"]))


def read_recipe(path: Path) -> dict[str, Any]:
    """The values in a run's recipe.json by full name ("data.seed"); none if it is missing or damaged.

    A damaged file is logged and does not stop the run: the checkpoints hold the recipe too, and the run writes the file
    again.
    """
    if not path.is_file():  # only in process 0's folder, if each host has one
        return {}
    try:
        return flatten_fields(read_json(path, "the recipe of the run as it was written"))
    except (InputError, OSError, RecursionError) as error:
        _LOG.warning("Ignores the damaged %s, and writes it again: %s", path, printable_message(str(error)))
        return {}


def _compare_processes(config: TrainConfig, source: Source, held_out: Source) -> None:
    """Raises InputError on every process if one has other settings or data than process 0.

    Otherwise they would wait for each other forever, or train weights that only seem to be the same.
    """
    if jax.process_count() == 1:
        return
    mine = identify(config, source) | {"held out": [list(held_out.class_names), len(held_out), held_out.digest]}
    first = from_process_0(mine)
    changed = describe_changes(first, mine, FREE_TO_DIFFER)
    if first["held out"] != mine["held out"]:
        changed.append(f"held-out images: {first['held out'][1]:,} -> {len(held_out):,}, or other images")
    refuse_different_processes(changed, "the same command and the same data")


def _refuse_forgotten_checkpoint_dir(config: TrainConfig) -> None:
    folder = read_recipe(config.run_dir / "recipe.json").get("checkpoint_dir")
    if not isinstance(folder, str):
        folder = str(config.run_dir / "checkpoints")
    if folder != config.checkpoints and (found := newest_run(folder)) is not None:
        raise InputError(
            f"The run in {config.run_dir} saves its checkpoints in {folder}, up to step {found[0]}; "
            f"{config.checkpoints} has none. Expected --checkpoint-dir {folder} to resume it, or another folder with "
            "--run-dir to start a new run."
        )


def _refuse_to_replace_a_model(config: TrainConfig) -> None:
    model = config.run_dir / "model"
    if model.exists():
        raise InputError(
            f"{config.run_dir} holds the model of a finished run, and {config.checkpoints} has no checkpoint of it. A "
            "new run would replace the model and clear the metrics. Nothing was changed. Expected another folder with "
            f"--run-dir, or {config.run_dir} moved away."
        )


def _refuse_changes(folder: Path | str, step: int, changed: Sequence[str]) -> None:
    if changed:
        raise InputError(
            f"{folder} holds another run, at step {step}. What differs:\n  "
            + "\n  ".join(changed)
            + "\nNothing was changed there. Expected the same values and the same data to resume it, or another folder "
            "with --run-dir (and --checkpoint-dir, if you use it) to start a new run."
        )


def _lock_folders(config: TrainConfig, opened: contextlib.ExitStack) -> None:
    # By their resolved paths: the two may be one folder, which would refuse a second lock.
    folders = {os.path.realpath(folder): folder for folder in (str(config.run_dir), config.checkpoints)}
    for folder in folders.values():
        message = (
            f"Another run is using {folder}. Expected one run at a time: two would overwrite each other's checkpoints. "
            "Stop that run, wait for its end, or choose another folder with --run-dir (and --checkpoint-dir, if you "
            "use it)."
        )
        opened.enter_context(lock_folder(folder, message))
