"""Features of images are the network's, in order, from networks with or without a head."""

import dataclasses
from functools import lru_cache

import jax
import numpy as np
import pytest

from poolformer_jax import ImageEmbedder, PoolFormerForImageClassification, PoolFormerImageProcessor, save_pretrained
from poolformer_jax.images import ImageError
from small_networks import PHOTOGRAPHS, TWO_STAGES, random_variables

PROCESSOR = PoolFormerImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, crop_pct=None)
MODEL, VARIABLES = random_variables(TWO_STAGES)
HEADLESS = dataclasses.replace(TWO_STAGES, num_labels=0)
WITHOUT_HEAD = {"params": {name: branch for name, branch in VARIABLES["params"].items() if name != "head"}}


@lru_cache
def expected():
    """Pooled features and feature maps of the photographs, from the model as it was trained."""
    pixels = PROCESSOR.preprocess(PHOTOGRAPHS)["pixel_values"]
    output = jax.jit(PoolFormerForImageClassification(HEADLESS).apply)(WITHOUT_HEAD, pixels)
    return np.asarray(output.logits), [np.asarray(feature_map) for feature_map in output.hidden_states]


def test_a_type_that_feature_maps_cannot_have_is_refused():
    with pytest.raises(ValueError, match="dtype='float16': expected float32 or bfloat16"):
        ImageEmbedder(TWO_STAGES, VARIABLES, PROCESSOR, dtype="float16")
    with pytest.raises(ValueError, match="or float64 with JAX_ENABLE_X64=1"):
        ImageEmbedder(TWO_STAGES, VARIABLES, PROCESSOR, dtype="float64")


def test_parameters_without_their_collection_are_refused():
    with pytest.raises(ValueError, match=r"variables holds \['head', .*Expected \{'params': tree\}"):
        ImageEmbedder(TWO_STAGES, VARIABLES["params"], PROCESSOR)


@pytest.mark.parametrize(("config", "variables"), [(TWO_STAGES, VARIABLES), (HEADLESS, WITHOUT_HEAD)])
def test_features_and_feature_maps_are_the_networks_with_and_without_a_head(config, variables):
    embedder = ImageEmbedder(config, variables, PROCESSOR, batch_size=8, feature_maps=True)
    features, maps = expected()
    results = embedder([PHOTOGRAPHS[0], "missing.jpg", *PHOTOGRAPHS[1:]])
    assert isinstance(results.pop(1), ImageError)
    np.testing.assert_allclose([result.features for result in results], features, rtol=1e-4, atol=1e-5)
    for stage, theirs in enumerate(maps):
        ours = np.stack([result.feature_maps[stage] for result in results])
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    if config is TWO_STAGES:  # what the head takes
        head = VARIABLES["params"]["head"]
        pixels = PROCESSOR.preprocess(PHOTOGRAPHS[:1])["pixel_values"]
        logits = jax.jit(MODEL.apply)(VARIABLES, pixels).logits
        np.testing.assert_allclose(results[0].features @ head["kernel"] + head["bias"], logits[0], rtol=1e-4, atol=1e-4)


def test_one_image_gives_one_embedding_without_feature_maps_by_default(tmp_path):
    save_pretrained(tmp_path, PoolFormerForImageClassification(HEADLESS), WITHOUT_HEAD, image_processor=PROCESSOR)
    embedder = ImageEmbedder.from_pretrained(tmp_path, batch_size=8)
    one = embedder(PHOTOGRAPHS[0])
    assert one.feature_maps == ()
    np.testing.assert_allclose(one.features, expected()[0][0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ImageError):
        embedder("missing.jpg")


def test_preprocessing_of_another_number_of_channels_is_refused():
    grey = dataclasses.replace(PROCESSOR, image_mean=(0.5,), image_std=(0.5,))
    with pytest.raises(ValueError, match="makes 1 channels and the network takes 3"):
        ImageEmbedder(TWO_STAGES, VARIABLES, grey)
