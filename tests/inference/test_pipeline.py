"""`pipeline` gives what transformers' pipeline gives: lists of labels with scores."""

import dataclasses

import numpy as np
import pytest

from poolformer_jax import (
    FlaxPoolFormerForImageClassification,
    ImageClassifier,
    PoolFormerForImageClassification,
    PoolFormerImageProcessor,
    pipeline,
    save_pretrained,
)
from poolformer_jax.images import ImageError
from small_networks import PHOTOGRAPHS, TWO_STAGES, random_variables

PROCESSOR = PoolFormerImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, crop_pct=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, *random_variables(TWO_STAGES), image_processor=PROCESSOR)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-classification", folder, batch_size=8)


def test_one_image_gives_dictionaries_with_the_classifiers_probabilities(pipe, folder):
    answers = pipe(PHOTOGRAPHS[0], top_k=3)
    expected = ImageClassifier.from_pretrained(folder, batch_size=8)(PHOTOGRAPHS[0], top_k=3)
    assert [answer["label"] for answer in answers] == [prediction.label for prediction in expected]
    np.testing.assert_allclose([answer["score"] for answer in answers], [p.probability for p in expected], rtol=1e-5)
    assert len(pipe(PHOTOGRAPHS[0], top_k=99)) == len(pipe(PHOTOGRAPHS[0], top_k=None)) == 5


def test_the_function_is_applied_to_the_logits(pipe):
    logits, softmax, sigmoid = (
        {answer["label"]: answer["score"] for answer in pipe(PHOTOGRAPHS[0], function_to_apply=function)}
        for function in ("none", "softmax", "sigmoid")
    )
    powers = {label: np.exp(logit) for label, logit in logits.items()}
    for label, logit in logits.items():
        assert softmax[label] == pytest.approx(powers[label] / sum(powers.values()), rel=1e-5)
        assert sigmoid[label] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-5)
    with pytest.raises(ValueError, match="function_to_apply='tanh': expected one of softmax, sigmoid, none"):
        pipe(PHOTOGRAPHS[0], function_to_apply="tanh")


def test_a_list_gives_a_list_of_lists_and_an_iterator_an_iterator(pipe):
    listed = pipe(PHOTOGRAPHS[:2])
    assert [len(answers) for answers in listed] == [5, 5]
    assert listed[0] == pipe(iter(PHOTOGRAPHS[:2])).__next__()
    with pytest.raises(ImageError, match="missing"):
        pipe([PHOTOGRAPHS[0], "missing.jpg"])


def test_a_model_with_its_parameters_is_taken_as_it_is(pipe, folder):
    model = FlaxPoolFormerForImageClassification.from_pretrained(folder)
    options = {"batch_size": 8, "image_processor": PROCESSOR}
    assert pipeline("image-classification", model, **options)(PHOTOGRAPHS[0]) == pipe(PHOTOGRAPHS[0])
    with pytest.raises(ValueError, match="Pass image_processor"):
        pipeline("image-classification", model)


def test_a_single_label_gets_a_sigmoid(tmp_path):
    config = dataclasses.replace(TWO_STAGES, num_labels=1)
    save_pretrained(tmp_path, *random_variables(config), image_processor=PROCESSOR)
    one = pipeline("image-classification", tmp_path, batch_size=8)
    (logit,), (score,) = one(PHOTOGRAPHS[0], function_to_apply="none"), one(PHOTOGRAPHS[0])
    assert score["score"] == pytest.approx(1 / (1 + np.exp(-logit["score"])), rel=1e-6)


def test_other_tasks_and_networks_without_a_head_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"no pipeline for 'text-generation'\. Expected 'image-classification'"):
        pipeline("text-generation", folder)
    config = dataclasses.replace(TWO_STAGES, num_labels=0)
    variables = {"params": {k: v for k, v in random_variables(TWO_STAGES)[1]["params"].items() if k != "head"}}
    save_pretrained(tmp_path, PoolFormerForImageClassification(config), variables, image_processor=PROCESSOR)
    with pytest.raises(ValueError, match="no head"):
        pipeline("image-classification", tmp_path)
