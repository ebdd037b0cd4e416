"""Batches are a pure function of (seed, step): at any number of processes, workers and restarts, whatever happens."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from poolformer_jax.image_reading import ImageError
from train.data.config import DIGITS, DataConfig, HostAugmentation
from train.data.pipeline import BadImageError, evaluation_batches, train_batches
from train.data.sources import open_source

ROOT = Path(__file__).parent.parent
SMALL = dataclasses.replace(DIGITS, batch_size=8, workers=0, image_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty JPEGs of two classes and several sizes, made of a photograph."""
    root = tmp_path_factory.mktemp("photographs")
    with Image.open(Path(__file__).parent / "images" / "coffee.jpg") as image:
        for number in range(40):
            part = image.crop((number, 2 * number, 300 + 5 * number, 350))
            path = root / f"class {number % 2}" / f"{number:02d}.jpg"
            path.parent.mkdir(exist_ok=True)
            part.save(path, quality=90)
    return root


def photographs(folder, **changes):
    config = DataConfig(
        source=f"folder:{folder}", image_size=32, batch_size=8, workers=0, held_out=0.2, augment=HostAugmentation()
    )
    return dataclasses.replace(config, **changes)


def take(config, source, count, **where):
    with train_batches(config, source, **where) as batches:
        return [{name: np.array(value) for name, value in next(batches).items()} for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_batches_have_the_shapes_and_types_of_the_contract(folder):
    config = photographs(folder)
    (batch,) = take(config, open_source(config, "train"), 1)
    described = {name: (value.dtype.name, value.shape) for name, value in batch.items()}
    assert described == {"image": ("uint8", (8, 32, 32, 3)), "label": ("int32", (8,)), "index": ("int64", (8,))}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_the_batches_of_one(folder, processes):
    config = photographs(folder)
    source = open_source(config, "train")
    alone = take(config, source, 6)
    parts = [take(config, source, 6, process_index=p, process_count=processes) for p in range(processes)]
    together = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts)]
    assert_same(together, alone)


def test_workers_make_the_same_batches_in_the_same_order(folder):
    config = photographs(folder)
    source = open_source(config, "train")
    assert_same(take(dataclasses.replace(config, workers=2), source, 5), take(config, source, 5))


def test_a_restart_at_any_step_and_process_count_goes_on_with_the_same_batches(folder):
    config = photographs(folder)
    source = open_source(config, "train")
    uninterrupted = take(config, source, 12)
    for step in (1, 5, 11):
        assert_same(take(config, source, 1, start_step=step), uninterrupted[step : step + 1])
    part = take(config, source, 3, start_step=7, process_index=1, process_count=2)
    assert_same(part, [{name: value[4:] for name, value in batch.items()} for batch in uninterrupted[7:10]])


def test_every_epoch_shows_every_example_once_in_another_order():
    source = open_source(SMALL, "validation")
    count = len(source)
    indices = np.concatenate([batch["index"] for batch in take(SMALL, source, 3 * count // 8 + 1)])
    epochs = [indices[number * count : (number + 1) * count] for number in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    assert not np.array_equal(epochs[0], epochs[1])
    # An order that has nothing to do with the previous one: correlations have a standard deviation of 1 / sqrt(359).
    assert abs(np.corrcoef(epochs[0], epochs[1])[0, 1]) < 5 / np.sqrt(count)
    assert abs(np.corrcoef(epochs[0], np.arange(count))[0, 1]) < 5 / np.sqrt(count)


def test_an_example_is_changed_differently_every_time_and_every_seed_differs():
    source = open_source(SMALL, "validation")
    batches = take(SMALL, source, 2 * len(source) // 8 + 2)
    index = np.concatenate([batch["index"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    first, second = np.flatnonzero(index == 7)[:2]
    assert not np.array_equal(images[first], images[second])
    other = take(dataclasses.replace(SMALL, seed=43), source, 1)[0]
    assert not np.array_equal(other["index"], batches[0]["index"])


def test_a_late_start_costs_nothing():
    """A chain that replayed its way to step 10 ** 12 would not be here before the sun burns out."""
    source = open_source(SMALL, "validation")
    (batch,) = take(SMALL, source, 1, start_step=10**12)
    assert (batch["index"] >= 0).all()


def test_labels_and_images_belong_to_the_index(folder):
    config = photographs(folder, augment=HostAugmentation(crop="evaluation", horizontal_flip=0, randaugment="none"))
    source = open_source(config, "train")
    processor = config.image_processor()
    for batch in take(config, source, 3):
        for image, label, index in zip(batch["image"], batch["label"], batch["index"]):
            example = source[int(index)]
            assert label == example["label"]
            np.testing.assert_array_equal(image, processor.resize_and_crop(example["image"]))


def test_a_batch_that_processes_cannot_share_is_refused():
    source = open_source(SMALL, "validation")
    with pytest.raises(ValueError, match=r"A batch of 8 images cannot be shared evenly by 3 processes"):
        train_batches(SMALL, source, process_count=3)


@pytest.mark.parametrize("size", [1, 7, 8, 360, 1000])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_counts_every_example_exactly_once(size, processes):
    config = dataclasses.replace(SMALL, evaluation_batch_size=size * processes)
    source = open_source(config, "validation")
    parts = []
    for process in range(processes):
        with evaluation_batches(config, source, process_index=process, process_count=processes) as batches:
            parts.append(list(batches))
    assert len({len(part) for part in parts}) == 1  # the same number of steps for every process
    assert {batch["image"].shape[0] for part in parts for batch in part} == {size}
    counted = np.concatenate([batch["index"][batch["mask"]] for step in zip(*parts) for batch in step])
    np.testing.assert_array_equal(counted, np.arange(len(source)))
    filling = np.concatenate([batch["index"][~batch["mask"]] for part in parts for batch in part])
    assert (filling == -1).all()


def test_evaluation_sees_what_inference_sees(folder):
    config = photographs(folder)
    source = open_source(config, "validation")
    processor = config.image_processor()
    with evaluation_batches(config, source) as batches:
        for batch in batches:
            for image, index in zip(batch["image"][batch["mask"]], batch["index"]):
                pixels = processor.preprocess(source[int(index)]["image"])["pixel_values"][0]
                np.testing.assert_array_equal(processor.normalize(image), pixels)


@pytest.fixture
def damaged(tmp_path, folder):
    """The same photographs, one of them cut off in the middle."""
    root = tmp_path / "damaged"
    for path in folder.glob("*/*.jpg"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    bad = root / "class 0" / "06.jpg"
    bad.write_bytes(bad.read_bytes()[:2000])
    return root, bad


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_training_and_is_named(damaged, workers):
    root, bad = damaged
    config = photographs(root, workers=workers)
    with pytest.raises(BadImageError, match=rf"The image {bad} cannot be read: .*\n.*--data.on-bad-image skip"):
        take(config, open_source(config, "train"), 5)


def test_a_damaged_image_can_be_skipped_and_is_counted(damaged, folder, caplog):
    root, bad = damaged
    config = photographs(root, on_bad_image="skip")
    source = open_source(config, "train")
    whole = take(photographs(folder), open_source(photographs(folder), "train"), 8)
    batches = train_batches(config, source)
    taken = [next(batches) for _ in range(8)]
    batches.close()
    assert list(batches.bad_images) == [str(bad)]
    assert "truncated" in batches.bad_images[str(bad)]
    assert len([record for record in caplog.records if str(bad) in record.getMessage()]) == 1
    lost = next(index for index in range(len(source)) if source[index]["id"] == str(bad))
    for batch, expected in zip(taken, whole):
        wanted = np.where(expected["index"] == lost, lost + 1, expected["index"])  # the next one stands in
        np.testing.assert_array_equal(batch["index"], wanted)
        same = expected["index"] != lost
        np.testing.assert_array_equal(batch["image"][same], expected["image"][same])
    assert_same(take(config, source, 2, start_step=5), taken[5:7])
    parts = [take(config, source, 8, process_index=p, process_count=2) for p in range(2)]
    assert_same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts)], taken)


def test_a_damaged_image_is_left_out_of_an_evaluation_that_skips(damaged):
    root, bad = damaged
    config = photographs(root, on_bad_image="skip", held_out=0.9)
    source = open_source(config, "validation")
    assert str(bad) in [source[index]["id"] for index in range(len(source))]
    with evaluation_batches(config, source) as batches:
        counted = sum(int(batch["mask"].sum()) for batch in batches)
        assert counted == len(source) - 1
        assert list(batches.bad_images) == [str(bad)]
    with pytest.raises(BadImageError), evaluation_batches(photographs(root, held_out=0.9), source) as batches:
        list(batches)


class NothingReadable:
    """A data set of which no image can be read."""

    class_names = ("only",)
    num_classes = 1

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": b"no image", "label": 0, "id": f"number {index}"}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_skipping_does_not_go_on_for_ever():
    config = dataclasses.replace(SMALL, on_bad_image="skip", crop_pct=None)
    with pytest.raises(BadImageError, match="3 images in a row cannot be read"):
        take(config, NothingReadable(), 1)


def test_closed_batches_say_so():
    batches = train_batches(SMALL, open_source(SMALL, "validation"))
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


# A program with two workers, started as `python program.py` or `python -m package`: Python prepares their children in
# different ways. It imports jax before anything else, as a person's script may.
PROGRAM = """
    import jax
    import sys
    import numpy as np
    from train.data.config import DIGITS
    from train.data.pipeline import train_batches
    from train.data.sources import ArraySource

    class Spy(ArraySource):
        def __getitem__(self, index):
            imported = any(sys.modules.get(name) is not None for name in ("jax", "jaxlib", "flax", "tensorflow"))
            return {**super().__getitem__(index), "label": int(imported)}

    if __name__ == "__main__":
        import dataclasses

        source = Spy(np.zeros((64, 8, 8), np.uint8), np.zeros(64, int), ("id",) * 64, ("no", "yes"))
        batches = train_batches(dataclasses.replace(DIGITS, batch_size=8, workers=2), source)
        print([int(next(batches)["label"].sum()) for _ in range(4)], flush=True)
        sys.stdin.readline()
        print(next(batches)["image"].shape, flush=True)
"""


@contextlib.contextmanager
def program_with_workers(tmp_path, *start):
    (tmp_path / "package").mkdir()
    for path in (tmp_path / "program.py", tmp_path / "package" / "__main__.py"):
        path.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *(start or ("program.py",))]
    with subprocess.Popen(command, text=True, cwd=tmp_path, env=environment, **pipes) as program:
        try:
            yield program
        finally:
            program.kill()


def workers_of(pid):
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = {child for thread in threads for child in (thread / "children").read_text().split()}
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")


@linux
@pytest.mark.parametrize("start", [("program.py",), ("-m", "package")])
def test_workers_never_import_jax(tmp_path, start):
    with program_with_workers(tmp_path, *start) as program:
        assert program.stdout.readline() == "[0, 0, 0, 0]\n", program.stderr.read()
        workers = workers_of(program.pid)
        assert len(workers) == 2
        assert "jaxlib" in Path(f"/proc/{program.pid}/maps").read_text()
        for worker in workers:
            assert "jaxlib" not in Path(f"/proc/{worker}/maps").read_text()
        _, errors = program.communicate("\n", timeout=60)
    assert errors == ""
    assert program.returncode == 0
    assert not any(alive(worker) for worker in workers)


@linux
def test_workers_survive_the_signals_that_ask_the_program_to_save_and_stop(tmp_path):
    with program_with_workers(tmp_path) as program:
        program.stdout.readline()
        workers = workers_of(program.pid)
        for worker in workers:
            for name in (signal.SIGTERM, signal.SIGINT):  # as a job scheduler sends them to every process
                os.kill(worker, name)
        time.sleep(0.5)
        assert all(alive(worker) for worker in workers)
        output, errors = program.communicate("\n", timeout=60)
    assert (output, errors) == ("(8, 32, 32, 1)\n", "")


@linux
def test_workers_do_not_outlive_a_program_that_is_killed(tmp_path):
    with program_with_workers(tmp_path) as program:
        program.stdout.readline()
        workers = workers_of(program.pid)
        program.kill()
        program.wait()
    deadline = time.monotonic() + 30
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)


@linux
def test_a_worker_that_dies_is_reported():
    config = dataclasses.replace(SMALL, workers=1)
    with train_batches(config, open_source(config, "validation")) as batches:
        next(batches)
        for worker in workers_of(os.getpid()):
            assert "jaxlib" not in Path(f"/proc/{worker}/maps").read_text()
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="terminated unexpectedly"):
            for _ in range(20):
                next(batches)


def test_image_errors_are_what_transforms_raise(folder):
    """Else a damaged image would end a run with a traceback from inside Pillow."""
    from train.data.transforms import TrainingTransform

    for augment in (HostAugmentation(), HostAugmentation(crop="evaluation")):
        transform = TrainingTransform(photographs(folder, augment=augment))
        with pytest.raises(ImageError):
            transform(b"no image", np.random.default_rng(0))
