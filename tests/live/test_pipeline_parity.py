"""`pipeline` and transformers' pipeline give the same labels and scores for the same files."""

import dataclasses

import numpy as np
import pytest

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor, pipeline, save_pretrained
from small_networks import PHOTOGRAPHS, random_variables

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.live

CONFIG = PoolFormerConfig(
    depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16), num_labels=7, id2label=dict(enumerate("abcdefg"))
)


def both(folder, config):
    """Our pipeline and transformers', of the same files."""
    processor = PoolFormerImageProcessor.for_variant("s12")
    save_pretrained(folder, *random_variables(config), layout="hf", image_processor=processor)
    return pipeline("image-classification", folder), transformers.pipeline("image-classification", model=str(folder))


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return both(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"top_k": 99}, *({"function_to_apply": f} for f in ("softmax", "sigmoid", "none"))]
)
def test_labels_and_scores_equal_those_of_transformers(pipes, options):
    compare(pipes, **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 1, "id2label": {0: "a"}},
        {"problem_type": "regression"},
        {"problem_type": "multi_label_classification"},
    ],
    ids=lambda fields: fields.get("problem_type", "one label"),
)
def test_the_default_function_follows_the_problem_as_in_transformers(tmp_path, fields):
    compare(both(tmp_path, dataclasses.replace(CONFIG, **fields)))


def compare(pipes, **options):
    ours, theirs = (pipe([str(path) for path in PHOTOGRAPHS], **options) for pipe in pipes)
    for mine, expected in zip(ours, theirs, strict=True):
        assert [answer["label"] for answer in mine] == [answer["label"] for answer in expected]
        scores = [[answer["score"] for answer in answers] for answers in (mine, expected)]
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)


def test_one_image_gives_the_same_form_as_transformers(pipes):
    mine, expected = (pipe(str(PHOTOGRAPHS[0])) for pipe in pipes)
    assert [sorted(answer) for answer in mine] == [sorted(answer) for answer in expected]
