"""Batches are a pure function of (seed, step), for any number of processes, workers and restarts."""

import dataclasses

import numpy as np
import pytest

from poolformer_jax.errors import InputError
from small_data import SMALL, assert_same, photographs, take, write_photographs
from train.data import HostAugmentation, SourceError, open_source
from train.data.make_batch import LabelError
from train.data.pipeline import evaluation_batches, train_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


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


@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_may_have_a_single_image(folder, processes):
    config = dataclasses.replace(photographs(folder), batch_size=processes)
    source = open_source(config, "train")
    for process in range(processes):
        (batch,) = take(config, source, 1, process_index=process, process_count=processes)
        assert batch["image"].shape == (1, 32, 32, 3)


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
    """Replaying all batches before step 10**12 would never end."""
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


def test_a_batch_size_that_the_processes_do_not_divide_is_refused():
    source = open_source(SMALL, "validation")
    with pytest.raises(ValueError, match=r"A batch of 8 images cannot be split evenly over 3 processes"):
        train_batches(SMALL, source, process_count=3)


def test_batches_that_do_not_fit_into_memory_are_refused():
    source, huge = open_source(SMALL, "validation"), dataclasses.replace(SMALL, batch_size=1 << 20, image_size=4096)
    training = dataclasses.replace(huge, workers=3, worker_batches=2)
    with pytest.raises(InputError, match=r"workers \(3\) .* \(6 of 1,048,576 images .* at least 105,553\.3 GB"):
        train_batches(training, source)
    with pytest.raises(InputError, match=r"workers \(1\) .* \(1 of 1,048,576 images .* at least 17,592\.2 GB"):
        evaluation_batches(training, source)
    with pytest.raises(SourceError, match=r"^1,048,576 synthetic images of 4096 x 4096 pixels need 17,592\.2 GB"):
        open_source(dataclasses.replace(huge, source="synthetic", synthetic_examples=1 << 20), "train")


@pytest.mark.parametrize("size", [7, 8, 360])
@pytest.mark.parametrize("processes", [1, 4])
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


def test_evaluation_has_the_pixels_of_inference(folder):
    config = photographs(folder)
    source = open_source(config, "validation")
    processor = config.image_processor()
    with evaluation_batches(config, source) as batches:
        for batch in batches:
            for image, index in zip(batch["image"][batch["mask"]], batch["index"]):
                pixels = processor.preprocess(source[int(index)]["image"])["pixel_values"][0]
                np.testing.assert_array_equal(processor.normalize(image), pixels)


def test_the_filter_of_training_is_not_that_of_evaluation():
    trained = dataclasses.replace(SMALL, augment=HostAugmentation(interpolation="bilinear"))
    assert trained.image_processor().to_dict() == SMALL.image_processor().to_dict()
    assert dataclasses.replace(SMALL, evaluation_interpolation="bilinear").image_processor().resample == 2


def test_closed_batches_raise_an_error():
    batches = train_batches(SMALL, open_source(SMALL, "validation"))
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize(("label", "workers"), [(-1, 0), (10, 0), (-1, 1)])
def test_labels_that_are_not_classes_are_refused_in_training_and_evaluation(label, workers):
    """TFDS marks the images of splits whose labels are not published by -1."""
    config = dataclasses.replace(SMALL, workers=workers, evaluation_split="test")
    source = open_source(config, "validation")
    source = dataclasses.replace(source, labels=np.where(np.arange(len(source)) == 3, label, source.labels))
    wrong = source[3]["id"]
    for batches, split in ((train_batches, "train"), (evaluation_batches, "test")):
        message = rf"{wrong} in the split '{split}' has the label {label}\. Expected 0 to 9, because .* has 10 classes"
        with pytest.raises(LabelError, match=message), batches(config, source) as running:
            for _ in range(len(source) // 8 + 1):
                next(running)
