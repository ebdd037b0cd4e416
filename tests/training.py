"""Tiny runs for the training tests: a network of one block on synthetic images of 16 pixels."""

import contextlib
import dataclasses
import functools
import io
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from poolformer_jax import PoolFormerConfig
from train import loop, setup
from train.compute.sharding import to_devices
from train.compute.state import TrainState
from train.config import DistributedConfig, FreshNetwork, MeshConfig, OptimizerConfig, TrainConfig
from train.data import DataConfig, DeviceAugmentation, HostAugmentation, Source, open_source, train_batches
from train.setup import RunParts, make_parts

NETWORK = FreshNetwork(
    depths=(1, 1),
    hidden_sizes=(8, 16),
    patch_sizes=(7, 3),
    strides=(4, 2),
    padding=(2, 1),
    token_mixers=("pooling",) * 2,
    position_embeddings=(False,) * 2,
    layer_scale_init_value=0.1,
    drop_path_rate=0.2,
)
ONE_STAGE = dataclasses.replace(
    NETWORK,
    depths=(1,),
    hidden_sizes=(8,),
    patch_sizes=(7,),
    strides=(4,),
    padding=(2,),
    token_mixers=("pooling",),
    position_embeddings=(False,),
)
DATA = DataConfig(
    source="synthetic",
    image_size=16,
    crop_pct=None,
    image_mean=(0.5,),
    image_std=(0.25,),
    batch_size=32,
    workers=0,
    synthetic_examples=96,
    augment=HostAugmentation(crop="evaluation", randaugment="none"),
    mix=DeviceAugmentation(mixup=0.0, cutmix=0.0, erase_probability=0.0),
)
# Joining other processes must precede any use of jax, which tests have used already.
ALONE = DistributedConfig(mode="off")
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, learning_rate_batch=None, epochs=4, warmup_epochs=1, cooldown_epochs=0, ema_decay=0.5
)


def tiny(run_dir: Path = Path("unused"), **changes: Any) -> TrainConfig:
    """A run of 12 steps; `changes` name fields, nested ones as `optimizer__epochs=2`."""
    config = TrainConfig(run_dir, ONE_STAGE, DATA, OPTIMIZER, distributed=ALONE, log_every=1, save_every=2)
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            value = dataclasses.replace(getattr(config, part), **{field: value})
        config = dataclasses.replace(config, **{part: value})
    return config


def run(config: TrainConfig) -> loop.Outcome:
    """Runs it and discards what it prints."""
    return loop.run(config, Console(file=io.StringIO()))


def sharded(data: int, fsdp: int) -> MeshConfig:
    """A mesh that shards even the smallest arrays."""
    return MeshConfig(data=data, fsdp=fsdp, fsdp_min_size=0)


def open_and_make_parts(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> tuple[Source, RunParts]:
    source = open_source(config.data, "train")
    return source, make_parts(config, source.class_names, len(source), devices)


def share_programs(patch: pytest.MonkeyPatch) -> None:
    """Lets runs in this process that train the same network share the compiled programs."""

    def shared(
        config: TrainConfig,
        class_names: Sequence[str],
        examples: int,
        checkpoint_network: PoolFormerConfig | None = None,
        class_weights: tuple[float, ...] | None = None,
        use_features: bool = False,
    ) -> RunParts:
        chosen: Any = {
            "checkpoint_network": checkpoint_network,
            "class_weights": class_weights,
            "use_features": use_features,
        }
        if setup.make_train_step is not _make_train_step:
            return make_parts(config, class_names, examples, **chosen)
        if isinstance(config.model, FreshNetwork):
            chosen["checkpoint_network"] = None  # the same network
        usual = {field.name: field.default for field in dataclasses.fields(config) if field.name in _NOT_COMPILED}
        alike = dataclasses.replace(config, **usual, run_dir=Path("unused"), distributed=ALONE)
        return _make_parts_once(alike, tuple(class_names), examples, **chosen)

    patch.setattr(loop, "make_parts", shared)


_make_parts_once = functools.cache(make_parts)
_make_train_step = setup.make_train_step
# Fields that the compiled programs do not depend on.
_NOT_COMPILED = (
    *("log_every", "evaluate_every", "save_every", "checkpoint_dir", "keep_checkpoints", "keep_every"),
    *("max_skipped", "max_steps", "profile_steps", "example_images"),
)


@functools.cache
def first_state(config: TrainConfig) -> TrainState:
    """The state before step 0 as NumPy arrays: compiled once for all meshes, and never donated."""
    alone = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulate=1))
    _, parts = open_and_make_parts(alone, jax.devices()[:1])
    return jax.device_get(parts.init(parts.network.argument()))


def train(
    config: TrainConfig, steps: int, devices: Sequence[jax.Device] | None = None
) -> tuple[TrainState, list[dict[str, Any]]]:
    """The state after some steps from the start, and every step's metrics."""
    source, parts = open_and_make_parts(config, devices)
    alike = dataclasses.replace(config, mesh=sharded(1, 1), remat=False)
    state = jax.device_put(
        first_state(alike), jax.tree.map(lambda leaf: leaf.sharding, parts.abstract_state), may_alias=False
    )
    rows = []
    with train_batches(config.data, source) as batches:
        for _ in range(steps):
            batch = next(batches)
            state, metrics = parts.step(state, to_devices(parts.mesh, batch, ("image", "label")))
            rows.append(jax.device_get(metrics))
    return state, rows


def without_a_finite_gradient(patch: pytest.MonkeyPatch, after: Sequence[int]) -> None:
    """Makes the pixels NaN in the steps that follow these ones."""

    def make(model: Any, optimizer: Any, schedule: Any, augment: Any, *rest: Any) -> Any:
        def broken(key: Any, images: Any, labels: Any) -> Any:
            pixels, targets = augment(key, images, labels)
            return jnp.where(jnp.isin(step.pop(), jnp.array(after)), jnp.nan, pixels), targets

        def train_step(state: TrainState, batch: Any) -> Any:
            step.append(state.step)
            return inner(state, batch)

        inner = make_train_step(model, optimizer, schedule, broken, *rest)
        return train_step

    step: list[Any] = []
    make_train_step = setup.make_train_step
    patch.setattr(setup, "make_train_step", make)


def train_losses(run_dir: Path) -> dict[int, float]:
    """Loss by step, as a run's metrics.jsonl has it."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def lines(run_dir: Path) -> int:
    """The number of lines in its metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saved(run_dir: Path) -> list[int]:
    """Steps of its checkpoints."""
    return steps_in(run_dir / "checkpoints")


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def class_folders(folder: Path, images: int) -> None:
    """Writes `images` images of each of three classes, of different colours."""
    for number, name in enumerate(("ant", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (16, 16), (80 * number, 10 * index, 0)).save(folder / name / f"{index}.png")


def unbalanced_tables(folder: Path) -> None:
    """Writes 36, 12 and 6 images of three classes, named in labels.csv and labels.jsonl, and the same in Parquet."""
    names, rows, images = ["ant"] * 36 + ["bee"] * 12 + ["cat"] * 6, [], []
    for place, name in enumerate(names):
        path = folder / f"{place}.png"
        Image.new("RGB", (16, 16), (80 * "abc".index(name[0]), 4 * place, 0)).save(path)
        rows.append({"file_name": path.name, "label": name})
        images.append({"bytes": path.read_bytes(), "path": path.name})
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "labels.csv").write_text("".join(f"{','.join(row)}\n" for row in [rows[0], *map(dict.values, rows)]))
    parquet.write_table(pa.table({"image": images, "label": names}), folder / "train.parquet", row_group_size=10)


@contextlib.contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mounts a file system of that size for the block."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
