"""Images may be reused, closed or changed by the caller once they have been given to ImageClassifier."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from paths import TESTS
from poolformer_jax import FlaxPoolFormerForImageClassification, GradCam, ImageEmbedder, ImageError, pipeline
from poolformer_jax.inference.classifier import ImageClassifier
from small_networks import CONFIG, PHOTOGRAPHS, PROCESSOR, VARIABLES

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
CLASSIFIER = "from small_networks import *; from poolformer_jax.inference.classifier import ImageClassifier; "
CLASSIFIER += "classifier = ImageClassifier(CONFIG, VARIABLES, PROCESSOR)\n"


@pytest.fixture(scope="module")
def classifier():
    return ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=4, decode_threads=2)


def run(program):
    """Runs a program in a new process."""
    command = [sys.executable, "-c", CLASSIFIER + program]
    here = TESTS
    return subprocess.run(command, env=ENVIRONMENT, cwd=here, text=True, capture_output=True, check=True)


def test_a_lazily_opened_image_may_be_given_many_times(classifier, tmp_path):
    large = Image.open(PHOTOGRAPHS[0]).resize((2000, 1600))  # takes a while to read
    large.save(tmp_path / "large.jpg")
    with Image.open(tmp_path / "large.jpg") as image:
        assert classifier([image] * 8) == classifier([tmp_path / "large.jpg"] * 8)


def test_a_generator_may_close_its_files(classifier):
    def opened():
        for path in PHOTOGRAPHS:
            with Image.open(path) as image:
                yield image

    assert list(classifier.stream(opened())) == classifier(PHOTOGRAPHS)


@pytest.mark.parametrize("kind", [np.asarray, memoryview])
def test_a_generator_may_use_one_buffer_for_all_frames(classifier, kind):
    frames = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8) for seed in range(9)]
    files = [path.read_bytes() for path in map(Path, PHOTOGRAPHS)]

    def camera():
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield buffer

    def socket():
        buffer = bytearray(max(map(len, files)))
        for file in files:
            buffer[: len(file)] = file
            yield memoryview(buffer)[: len(file)]

    given, wanted = (camera, frames) if kind is np.asarray else (socket, files)
    assert list(classifier.stream(given())) == classifier(wanted)


def test_frames_of_an_animation_are_separate_images(classifier, tmp_path):
    colours = ["red", "green", "blue", "white", "black", "yellow"]
    frames = [Image.new("RGB", (64, 64), colour) for colour in colours]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as animation:
        results = list(classifier.stream(ImageSequence.Iterator(animation)))
    assert results == classifier(frames)


def test_an_unfinished_stream_ends_silently_with_the_program():
    assert run("stream = classifier.stream(PHOTOGRAPHS[0] for _ in range(999)); next(stream)").stderr == ""


def test_compiled_programs_are_loaded_from_the_folder_they_were_kept_in(tmp_path):
    program = f"""
import jax, jax.monitoring
from poolformer_jax.inference.from_pretrained import keep_compiled_programs
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
for folder in ("first", "second", "first"):
    keep_compiled_programs({str(tmp_path)!r} + "/" + folder)
    jax.clear_caches()
    classifier = ImageClassifier(CONFIG, VARIABLES, PROCESSOR)
    hits.clear()
    classifier(PHOTOGRAPHS[0])
    print(len(hits))
"""
    assert run(program).stdout.split() == ["0", "0", "1"]


def test_a_mapping_is_refused(classifier):
    with pytest.raises(ImageError, match="of type BatchFeature cannot be read"):
        classifier(PROCESSOR.preprocess(PHOTOGRAPHS))


def test_an_open_file_is_refused_with_advice(classifier):
    with Path(PHOTOGRAPHS[0]).open("rb") as file, pytest.raises(ImageError, match=r"the result of its \.read\(\)"):
        classifier(file)


@pytest.mark.slow  # compiles four networks
def test_transparent_images_are_put_on_white_wherever_an_image_is_taken():
    white = dataclasses.replace(PROCESSOR, do_convert_rgb=True)
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    transparent = Image.fromarray(array)
    colours = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), transparent).convert("RGB")
    model = FlaxPoolFormerForImageClassification(CONFIG, _do_init=False)
    model.params = VARIABLES["params"]
    pipe = pipeline("image-classification", model, image_processor=white, batch_size=1)
    classifier, embedder = (
        kind(CONFIG, VARIABLES, white, batch_size=1, kernels="off") for kind in (ImageClassifier, ImageEmbedder)
    )
    for answer in (
        lambda image: [prediction.probability for prediction in classifier(image)],
        lambda image: [prediction.probability for prediction in classifier([image])[0]],
        lambda image: pipe(image)[0]["score"],
        lambda image: embedder(image).features,
        lambda image: GradCam(CONFIG, VARIABLES, white)(image).picture,
    ):
        np.testing.assert_array_equal(answer(transparent), answer(colours))
