"""What makes a run the same run: its recipe, its classes and the pixels of its images. Kept with every state.

A state alone does not say what it is of: another run's weights may have the same shapes, and a class folder that was
renamed gives every label after it another meaning. Nor does a recipe say what network the weights are of that it names.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.fields import first_few
from train.compute.distributed import from_process_0, refuse_unlike
from train.config import TrainConfig, as_json
from train.data import Source, choose_resizer
from train.report.reports import last_noted_step
from train.resume.checkpoints import newest_run

Identity = dict[str, Any]
_LOG = logging.getLogger(__name__)
# What may change between the parts of one run, with everything inside of it: none of it changes what is learnt. Sums
# may be rounded in another order, and with another optimizer.accumulate drop path tosses its coins anew.
FREE_TO_CHANGE = (
    "run_dir",
    "mesh",
    "distributed",
    "log_every",
    "evaluate_every",
    "save_every",
    "checkpoint_dir",
    "keep_checkpoints",
    "keep_every",
    "max_skipped",
    "max_steps",
    "profile_steps",
    "example_images",
    "optimizer.accumulate",
    "remat",
    "kernels",
    "data.source",  # wherever it lies: `identity` asks for the same examples
    "data.data_dir",
    "data.workers",
    "data.worker_batches",
    "data.on_bad_image",
    "data.evaluation_split",
    "data.evaluation_batch_size",
    "data.augment.resizer",  # "auto" or by name: `identity` asks for the same one
)


# What each host may have its own of.
FREE_TO_DIFFER = (
    "run_dir",
    "distributed",
    "checkpoint_dir",
    "data.source",
    "data.data_dir",
    "data.workers",
    "data.worker_batches",
    "data.augment.resizer",
)


def identify(config: TrainConfig, source: Source) -> Identity:
    """What the run of `config` on the training images of `source` is, JSON-ready."""
    return {
        "recipe": config.to_dict(),
        "resizer": choose_resizer(config.data.augment.resizer),  # the recipe may say "auto"
        "classes": list(source.class_names),
        "images": len(source),
        "examples": source.digest,
    }


def with_network(identity: Identity, network: PoolFormerConfig) -> Identity:
    """The same and the network it trains, for `kept_network`; without its labels, which follow from the classes."""
    return identity | {"network": dataclasses.replace(network, id2label=None).to_dict()}


def kept_network(config: TrainConfig) -> PoolFormerConfig | None:
    """The network that the newest state of a run is of, as `with_network` noted it.

    None where there is no state, or one from before that was noted: then the weights that the recipe names tell.

    Raises:
        CheckpointError: if there are states and none of them says what it is of.
    """
    found = newest_run(config.checkpoints)
    if found is None or "network" not in found[1]:
        return None
    return PoolFormerConfig.from_dict(found[1]["network"])


def refuse_another_run(config: TrainConfig, source: Source) -> None:
    """Makes sure that what the folders of the run hold, if anything, is of this run; reads only.

    Another version of this program may have written it: a field that is new since then counts with its default, and
    one that is gone by now cannot be compared, which is said.

    Raises:
        ValueError: if it is of another run, or the run keeps its states elsewhere or has none any more.
        CheckpointError: if there are states and none of them says what it is of.
    """
    found = newest_run(config.checkpoints)
    if found is None:
        _refuse_to_forget_states(config)
        _refuse_to_replace_a_model(config)
        return
    step, kept = found
    now = identify(config, source)
    recipe, unknown = in_present_fields(kept["recipe"], config)
    _refuse_changes(config.checkpoints, step, changes(kept | {"recipe": recipe}, now))
    path = config.run_dir / "recipe.json"
    if path.exists():  # the run's folder may be each host's own; process 0's has the recipe
        recipe, _ = in_present_fields(read_recipe(path), config)
        _refuse_changes(config.run_dir, step, differences(recipe, now["recipe"]))
    if unknown:
        _LOG.warning(
            "%s is of a run with fields that this version does not have. It goes on without: %s",
            config.checkpoints,
            ", ".join(unknown),
        )


def told_of_lost_steps(config: TrainConfig) -> str | None:
    """What there is to say where a run without a state begins again although it was further; None where it was not.

    It is not refused: a run that was killed before its first state was complete leaves the same, and has to begin again
    by itself. Nothing is lost but lines of metrics, whereas a model, which is refused, may have taken weeks.
    """
    step = last_noted_step(config.run_dir)
    if step is None:
        return None
    return (
        f"{config.run_dir} has metrics of a run up to step {step}, and {config.checkpoints} has no state of it: it "
        "ended before the first one was complete, or they were removed. It begins again from step 0, and its "
        "metrics as well."
    )


def refuse_unlike_processes(config: TrainConfig, source: Source, held_out: Source) -> None:
    """Makes sure that all processes were started with the same settings and have the same data, before they compute.

    Otherwise they would wait for each other for ever, or train weights that only seem to be the same.

    Raises:
        ValueError: in every process, if they were not; with what differs where it does.
    """
    if jax.process_count() == 1:
        return
    mine = identify(config, source) | {"held out": [list(held_out.class_names), len(held_out), held_out.digest]}
    first = from_process_0(mine)
    changed = changes(first, mine, FREE_TO_DIFFER)
    if first["held out"] != mine["held out"]:
        changed.append(f"held-out images: {first['held out'][1]:,} -> {len(held_out):,}, or others")
    refuse_unlike(changed, "the same command and the same data")


def _refuse_to_forget_states(config: TrainConfig) -> None:
    """Raises ValueError if the run's folder says that its states are in another place, and there they are."""
    path = config.run_dir / "recipe.json"
    if not path.exists():
        return
    place = read_recipe(path).get("checkpoint_dir") or str(config.run_dir / "checkpoints")
    if place != config.checkpoints and (found := newest_run(place)) is not None:
        raise InputError(
            f"The run in {config.run_dir} keeps its states in {place}, up to step {found[0]}; there are none in "
            f"{config.checkpoints}. Expected --checkpoint-dir {place} to go on with it, or another folder with "
            "--run-dir to begin a new run."
        )


def _refuse_to_replace_a_model(config: TrainConfig) -> None:
    """Raises ValueError if the run's folder holds a model: without a state nobody knows whether it is of this run."""
    model = config.run_dir / "model"
    if model.exists():
        raise InputError(
            f"{config.run_dir} holds a finished run whose states are gone: its model is there, and none is in "
            f"{config.checkpoints}. A new run would replace the model and empty the metrics. Nothing was changed. "
            f"Expected another folder with --run-dir, or {config.run_dir} moved away."
        )


def _refuse_changes(place: Path | str, step: int, changed: Sequence[str]) -> None:
    if changed:
        raise InputError(
            f"{place} holds another run, at step {step}. What differs:\n  "
            + "\n  ".join(changed)
            + "\nNothing was changed there. Expected the same values and the same data to go on with it, or another "
            "folder with --run-dir (and --checkpoint-dir, where it is given) to begin a new run."
        )


def read_recipe(path: Path) -> dict[str, Any]:
    """The values that a run noted in its folder.

    Raises:
        ValueError: naming the file, if it holds no recipe.
    """
    try:
        recipe = json.loads(path.read_text())
        reason = f"it holds a {type(recipe).__name__}, not the fields of a recipe"
    except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
        recipe, reason = None, str(error)
    if not isinstance(recipe, dict):
        raise InputError(
            f"{path} is damaged: {reason}. Expected the recipe of the run as it was written. Bring it back from a "
            "copy, or move it away: states say themselves which run they are of, and the file is then written anew."
        )
    return recipe


def changes(
    before: Identity, now: Identity, free: tuple[str, ...] = FREE_TO_CHANGE, images: str = "training images"
) -> list[str]:
    """In what `now` is not the same run, or the same evaluation of `images`, as `before`; for people to read."""
    changed = differences(before["recipe"], now["recipe"], free)
    # States from before it was kept do not tell; an evaluation has none.
    if "resizer" in before and before["resizer"] != now["resizer"]:
        changed.append(f"data.augment.resizer: {before['resizer']!r} -> {now['resizer']!r}")
    if before["classes"] != now["classes"]:
        changed.append(f"classes: {_classes(before['classes'], now['classes'])}")
    if before["images"] != now["images"]:
        # The epochs, the schedule and the order of the images would be others from here on.
        changed.append(f"{images}: {before['images']:,} -> {now['images']:,}")
    elif before["examples"] != now["examples"]:
        changed.append(f"{images}: as many, but others, or in another order")
    return changed


def _classes(before: Sequence[str], now: Sequence[str]) -> str:
    gone, new = [sorted(set(a) - set(b)) for a, b in ((before, now), (now, before))]
    parts = [f"{word}: {first_few(names)}" for word, names in (("gone", gone), ("new", new)) if names]
    return "; ".join(parts) or f"in another order, {first_few(before)} -> {first_few(now)}"


def differences(before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = FREE_TO_CHANGE) -> list[str]:
    """Fields, as "name: before -> now", in which two `to_dict()`s would not continue each other."""
    left, right = _flat(before), _flat(now)
    return [
        f"{name}: {left.get(name)!r} -> {right.get(name)!r}"
        for name in {**left, **right}
        if left.get(name) != right.get(name) and not any(name == one or name.startswith(f"{one}.") for one in free)
    ]


def in_present_fields(noted: dict[str, Any], config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """A `to_dict()` that another version of this program noted, in the fields of `config`, to be compared with it.

    Returns:
        values: by full name ("data.seed"); a field that was not there then has its default, as if nobody had set it.
        unknown: as "name: value", fields that there are no more. What became of them is not known.
    """
    values, fields = _flat(as_json(_defaults(config))) | _flat(noted), _flat(config.to_dict())
    known = {name: value for name, value in values.items() if name in fields}
    return known, [f"{name}: {value!r}" for name, value in values.items() if name not in fields]


def _defaults(config: Any) -> dict[str, Any]:
    """What fields, and those inside of them, hold where nobody sets them; without those that have to be set."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            defaults[field.name] = _defaults(value)
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by full name, as flags have it: "data.seed"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
