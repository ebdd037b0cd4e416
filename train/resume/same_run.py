"""Checks that a run resumes only from its own folders: `open_run` does so before the first step.

Equal shapes do not make two runs the same: other weights may have the same shapes, and renaming a class folder gives
every label after it another meaning. So each state is saved with the recipe, the classes and the images of its run, and
with the network, which the recipe may give only as a name.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.files import read_json, write_json
from poolformer_jax.messages import first_few, printable, printable_message, short_repr
from train.compute import from_process_0, refuse_different_processes
from train.config import TrainConfig
from train.data import Source, choose_resizer
from train.folders import lock_folder
from train.json_values import as_json
from train.report import last_logged_step
from train.resume.checkpoints import Checkpoints, newest_run, wait_for_same_checkpoints

Identity = dict[str, Any]
_LOG = logging.getLogger(__name__)
# Fields, with all fields inside them, that may differ when a run is resumed, because they do not change what is learnt.
# (Sums may be rounded in another order, and optimizer.accumulate changes the random numbers of drop path.)
FREE_TO_CHANGE = (
    "run_dir",
    "mesh",
    "distributed",
    "log_every",
    "evaluate_every",
    "patience",
    "save_every",
    "checkpoint_dir",
    "keep_checkpoints",
    "keep_every",
    "max_skipped",
    "max_steps",
    "profile_steps",
    "log_to",
    "push_to_hub",
    "example_images",
    "optimizer.accumulate",
    "remat",
    "kernels",
    "data.source",  # the images are compared instead
    "data.data_dir",
    "data.image_column",
    "data.label_column",
    "data.class_map",  # the classes are compared instead
    "data.workers",
    "data.worker_batches",
    "data.on_bad_image",
    "data.evaluation_split",
    "data.evaluation_batch_size",
    "data.augment.resizer",  # the one that is used is compared instead: the recipe may say "auto"
)
# Fields that may differ between the hosts of one run.
FREE_TO_DIFFER = (
    "run_dir",
    "distributed",
    "checkpoint_dir",
    "data.source",
    "data.data_dir",
    "data.class_map",
    "data.workers",
    "data.worker_batches",
    "data.augment.resizer",
)


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
    written, now = read_recipe(config.run_dir / "recipe.json"), _flatten(identity["recipe"])
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


def identify(config: TrainConfig, source: Source) -> Identity:
    """What identifies a run, JSON-ready: its recipe, classes and images, and the resizer that makes the pixels."""
    return {
        "recipe": config.to_dict(),
        "resizer": choose_resizer(config.data.augment.resizer),
        "classes": list(source.class_names),
        "images": len(source),
        "examples": source.digest,
    }


def describe_changes(
    before: Identity, now: Identity, free: tuple[str, ...] = FREE_TO_CHANGE, images: str = "training images"
) -> list[str]:
    """The differences between two runs, or two evaluations of `images`, as lines of a message."""
    changed = changed_fields(before["recipe"], now["recipe"], free)
    if before.get("resizer") != now.get("resizer"):
        changed.append(f"data.augment.resizer: {short_repr(before.get('resizer'))} -> {short_repr(now.get('resizer'))}")
    if before["classes"] != now["classes"]:
        changed.append(f"classes: {_changed_classes(before['classes'], now['classes'])}")
    if before["images"] != now["images"]:
        # Another number of images means other epochs, another schedule and another order.
        changed.append(f"{images}: {before['images']:,} -> {now['images']:,}")
    elif before["examples"] != now["examples"]:
        changed.append(f"{images}: the same number, but other images, or another order")
    return changed


def changed_fields(before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = FREE_TO_CHANGE) -> list[str]:
    """Fields of two `to_dict()`s that differ, as "name: before -> now", except those in `free`."""
    left, right = _flatten(before), _flatten(now)
    return [
        f"{printable(name)}: {short_repr(left.get(name))} -> {short_repr(right.get(name))}"
        for name in {**left, **right}
        if left.get(name) != right.get(name) and not any(name == one or name.startswith(f"{one}.") for one in free)
    ]


def current_fields(saved: dict[str, Any], config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """A `to_dict()` of another version of this program, converted to this version's fields.

    Returns:
        values: by full name ("data.seed"); a field that the other version did not have has its default.
        unknown: fields that this version does not have, as "name: value".
    """
    values, fields = _flatten(as_json(_defaults(config))) | _flatten(saved), _flatten(config.to_dict())
    known = {name: value for name, value in values.items() if name in fields}
    return known, [f"{printable(name)}: {short_repr(value)}" for name, value in values.items() if name not in fields]


def read_recipe(path: Path) -> dict[str, Any]:
    """The values in a run's recipe.json by full name ("data.seed"); none if it is missing or damaged.

    A damaged file is logged and does not stop the run: the checkpoints hold the recipe too, and the run writes the file
    again.
    """
    if not path.is_file():  # only in process 0's folder, if each host has one
        return {}
    try:
        return _flatten(read_json(path, "the recipe of the run as it was written"))
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
    folders = {Path(folder).resolve(): folder for folder in (str(config.run_dir), config.checkpoints)}
    for folder in folders.values():
        message = (
            f"Another run is using {folder}. Expected one run at a time: two would overwrite each other's checkpoints. "
            "Stop that run, wait for its end, or choose another folder with --run-dir (and --checkpoint-dir, if you "
            "use it)."
        )
        opened.enter_context(lock_folder(folder, message))


def network_to_dict(network: PoolFormerConfig) -> dict[str, Any]:
    """The network without its labels, which follow from the classes."""
    return dataclasses.replace(network, id2label=None).to_dict()


def _changed_classes(before: Sequence[str], now: Sequence[str]) -> str:
    gone, new = [sorted(set(a) - set(b)) for a, b in ((before, now), (now, before))]
    parts = [f"{word}: {first_few(names)}" for word, names in (("gone", gone), ("new", new)) if names]
    return "; ".join(parts) or f"in another order, {first_few(before)} -> {first_few(now)}"


def _defaults(config: Any) -> dict[str, Any]:
    """The defaults of the fields of a config and of the configs inside it; fields without a default are left out."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            defaults[field.name] = _defaults(value)
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by full name, as flags have it: "data.seed"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
