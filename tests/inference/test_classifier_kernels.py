"""An ImageClassifier uses kernels only if they agree with XLA on its devices; otherwise XLA, with one warning."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from failing_kernels import FAILURES, devices_with_kernels
from poolformer_jax import (
    FlaxPoolFormerForImageClassification,
    GpuKernels,
    ImageClassifier,
    ImageEmbedder,
    InputError,
    PoolFormerImageProcessor,
    pipeline,
)
from poolformer_jax.network.fused.kernels import gpu_narrow, verification
from small_networks import TWO_STAGES, random_variables

CONFIG = dataclasses.replace(TWO_STAGES, depths=(1, 1), hidden_sizes=(16, 16))
PROCESSOR = PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
PIXELS = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)


@pytest.fixture(autouse=True)
def _devices_with_kernels(monkeypatch):
    yield from devices_with_kernels(GpuKernels, monkeypatch)


def classifier(**options):
    variables = random_variables(CONFIG)[1]
    settings = {"dtype": "bfloat16", "batch_size": 1, "devices": jax.devices()[:1]} | options
    return ImageClassifier(CONFIG, variables, PROCESSOR, **settings)


def has_kernels(classifier):
    """Whether the compiled program calls a kernel: folded parameters have no norms."""
    return "norm1" in str(jax.tree.structure(classifier._images.program._programs[1].params))


def test_kernels_that_agree_with_xla_are_used():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has_kernels(classifier())


@FAILURES
def test_xla_classifies_with_one_warning_if_a_kernel_fails_its_check(fail, problem, monkeypatch):
    fail(GpuKernels, gpu_narrow, monkeypatch)
    with pytest.warns(UserWarning, match="XLA computes all blocks") as warned:
        without = classifier()
    assert [problem in str(warning.message) for warning in warned] == [True]
    assert not has_kernels(without)
    (prediction,) = without(PIXELS, top_k=1)
    assert (prediction,) == tuple(classifier(kernels="off")(PIXELS, top_k=1))


def test_on_uses_kernels_unchecked_and_off_uses_none(monkeypatch):
    monkeypatch.setattr(verification, "verify_kernels", lambda *_, **__: pytest.fail("checked"))
    assert has_kernels(classifier(kernels="on"))
    assert not has_kernels(classifier(kernels="off"))
    assert not has_kernels(classifier(dtype="float32"))


@pytest.mark.slow
def test_the_embedder_and_the_pipeline_use_kernels_too(monkeypatch):
    monkeypatch.setattr(verification, "verify_kernels", lambda *_, **__: pytest.fail("checked"))
    variables = random_variables(CONFIG)[1]
    flax_model = FlaxPoolFormerForImageClassification(CONFIG, _do_init=False)
    flax_model.params = variables["params"]

    def answers(kernels):
        options = {"dtype": "bfloat16", "batch_size": 1, "kernels": kernels}
        embedder = ImageEmbedder(CONFIG, variables, PROCESSOR, feature_maps=True, devices=jax.devices()[:1], **options)
        pipe = pipeline("image-classification", flax_model, image_processor=PROCESSOR, **options)
        used = ["norm1" in str(jax.tree.structure(one._images.program._programs[1].params)) for one in (embedder, pipe)]
        features, maps = embedder(PIXELS)
        return used, [features, *maps, [row["score"] for row in sorted(pipe(PIXELS), key=lambda row: row["label"])]]

    (with_kernels, ours), (without, theirs) = answers("on"), answers("off")
    assert (with_kernels, without) == ([True] * 2, [False] * 2)
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05 * np.abs(expected).max())


def test_on_is_refused_where_there_are_no_kernels():
    with pytest.raises(InputError, match="kernels='on', but there are none for float32"):
        classifier(kernels="on", dtype="float32")
    with pytest.raises(InputError, match="kernels='on' and fold_parameters=False exclude each other"):
        classifier(kernels="on", fold_parameters=False)
