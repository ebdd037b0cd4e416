"""What identifies a run, and how two runs differ.

Equal shapes do not make two runs the same: other weights may have the same shapes, and renaming a class folder gives
every label after it another meaning. So each state is saved with the recipe, the classes and the images of its run, and
with the network, which the recipe may give only as a name.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from poolformer_jax import PoolFormerConfig
from poolformer_jax.messages import first_few, printable, short_repr
from train.config import TrainConfig
from train.data import Source, choose_resizer
from train.json_values import as_json

Identity = dict[str, Any]
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
    left, right = flatten_fields(before), flatten_fields(now)
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
    values = flatten_fields(as_json(_defaults(config))) | flatten_fields(saved)
    fields = flatten_fields(config.to_dict())
    known = {name: value for name, value in values.items() if name in fields}
    return known, [f"{printable(name)}: {short_repr(value)}" for name, value in values.items() if name not in fields]


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


def flatten_fields(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by full name, as flags have it: "data.seed"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten_fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
