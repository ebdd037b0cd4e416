"""Every argument of transformers' PoolFormerConfig and of its two PoolFormer models, given to both libraries.

The arguments are read from the signatures of the installed transformers, so that a new one fails here until it is
supported or listed with a reason.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from live import peers
from poolformer_jax import FlaxPoolFormerForImageClassification, FlaxPoolFormerModel, PoolFormerConfig
from poolformer_jax.network import ACTIVATIONS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("optimised")]

SMALL = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 8, 16, 16], "num_labels": 3}
PIXELS = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
LOSS, LOGITS = 1e-6, 1e-5  # of the loss, and of the largest logit, in float32

# A value other than the default for every argument of the config.
CONFIG_VALUES = {
    "num_channels": 4,
    "pool_size": 5,
    "mlp_ratio": 2.0,
    "depths": [2, 1, 1, 1],
    "hidden_sizes": [8, 16, 8, 16],
    "patch_sizes": [5, 3, 3, 3],
    "strides": [2, 2, 2, 2],
    "padding": [2, 1, 1, 0],
    "num_encoder_blocks": 4,
    "drop_path_rate": 0.2,
    "hidden_act": "quick_gelu",
    "use_layer_scale": False,
    "layer_scale_init_value": 1e-2,
    "output_hidden_states": True,
    "return_dict": False,
    "id2label": {0: "a", 1: "b", 2: "c", 3: "d"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "problem_type": "multi_label_classification",
}
# Accepted by both, and without effect on what either computes from given parameters.
CONFIG_WITHOUT_EFFECT = {
    "patch_size": 8,
    "stride": 8,
    "initializer_range": 0.5,  # of random parameters, which are the authors' here
    "transformers_version": "5.0.0",
    "architectures": ["PoolFormerModel"],
    "chunk_size_feed_forward": 1,
    "is_encoder_decoder": True,
    "dtype": "float32",  # an argument of the models here
}
# Arguments of the models that are not supported: keyword arguments that transformers passes on to no one.
NOT_OF_THE_MODEL = {"kwargs"}
PROBLEMS = {
    "regression": np.array([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]], np.float32),
    "single_label_classification": np.array([2, -100]),
    "multi_label_classification": np.array([[1, 0, 1], [0, 0, 1]], np.float32),
}


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def pair(tmp_path, kind="ForImageClassification", **arguments):
    """The same model in both libraries, with parameters that move the output."""
    config = transformers.PoolFormerConfig(**{**SMALL, **arguments})
    theirs = peers.fill(getattr(transformers, f"PoolFormer{kind}")(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = {"Model": FlaxPoolFormerModel, "ForImageClassification": FlaxPoolFormerForImageClassification}[kind]
    return theirs, ours.from_pretrained(tmp_path / "theirs", from_pt=True)


def assert_close(found, expected, tolerance=LOGITS):
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


def assert_same_outputs(ours, theirs):
    """All entries by name, or by position in tuples."""
    if isinstance(theirs, tuple):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    assert list(ours) == list(theirs)
    for key, expected in theirs.items():
        if isinstance(expected, tuple):
            for found, feature_map in zip(ours[key], expected, strict=True):
                assert_close(found, nhwc(feature_map))
        elif expected.ndim == 0:
            np.testing.assert_allclose(ours[key], expected.detach(), rtol=LOSS)
        else:
            assert_close(ours[key], nhwc(expected) if expected.ndim == 4 else expected.detach().numpy())


def test_every_argument_of_the_config_is_known():
    fields = {field.name for field in dataclasses.fields(transformers.PoolFormerConfig) if field.init}
    assert fields == CONFIG_VALUES.keys() | CONFIG_WITHOUT_EFFECT.keys()
    assert PoolFormerConfig(**CONFIG_WITHOUT_EFFECT) == PoolFormerConfig()


@pytest.mark.parametrize("name", [*CONFIG_VALUES, *CONFIG_WITHOUT_EFFECT])
def test_an_argument_of_the_config_has_the_same_effect(tmp_path, name):
    value = (CONFIG_VALUES | CONFIG_WITHOUT_EFFECT)[name]
    arguments = {name: value} | ({"num_labels": 4} if name == "id2label" else {})
    theirs, ours = pair(tmp_path, **arguments)
    made = PoolFormerConfig(**{**SMALL, **arguments})
    names = ours.config.id2label if made.id2label is None else made.id2label  # transformers writes LABEL_0 and so on
    assert dataclasses.replace(made, id2label=names) == ours.config or name in ("label2id", "num_encoder_blocks")
    pixels = np.concatenate([PIXELS, PIXELS], -1)[..., : made.num_channels]
    labels = np.ones((2, made.num_labels), np.float32) if name == "problem_type" else np.array([0, 2])
    output = ours(pixels, labels=labels)
    assert_same_outputs(output, theirs(nchw(pixels), labels=torch.from_numpy(labels)))


def test_names_and_numbers_of_labels_are_those_of_transformers():
    for arguments in ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}, {"id2label": {"0": "a", "1": "b"}}):
        ours, theirs = PoolFormerConfig(**arguments), transformers.PoolFormerConfig(**arguments)
        assert (ours.num_labels, dict(ours.id2label)) == (theirs.num_labels, theirs.id2label)
    for library in (PoolFormerConfig, transformers.PoolFormerConfig):
        with pytest.raises(ValueError, match="num_labels"):
            library(num_labels=1, problem_type="single_label_classification")


def test_configs_are_read_by_each_other(tmp_path):
    theirs = transformers.PoolFormerConfig(**SMALL, problem_type="regression", drop_path_rate=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PoolFormerConfig.from_pretrained(tmp_path / "theirs")
    assert (ours.problem_type, ours.drop_path_rate, ours.num_labels) == ("regression", 0.1, 3)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.PoolFormerConfig.from_pretrained(tmp_path / "ours")
    for name in CONFIG_VALUES:
        found, expected = getattr(again, name), getattr(theirs, name)
        assert tuple(found) == tuple(expected) if isinstance(found, list | tuple) else found == expected, name


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("Model", {"output_hidden_states": True, "return_dict": True}),
        ("ForImageClassification", {"labels": np.array([0, 2]), "output_hidden_states": True, "return_dict": False}),
    ],
)
def test_every_argument_of_a_call_has_the_same_effect(tmp_path, kind, arguments):
    theirs, ours = pair(tmp_path, kind)
    known = inspect.signature(theirs.forward).parameters.keys() - NOT_OF_THE_MODEL
    assert known == {"pixel_values", *arguments}
    torch_arguments = {n: torch.from_numpy(v) if n == "labels" else v for n, v in arguments.items()}
    for count in range(len(arguments) + 1):
        chosen = list(arguments)[:count]
        output = ours(pixel_values=PIXELS, **{name: arguments[name] for name in chosen})
        expected = theirs(pixel_values=nchw(PIXELS), **{name: torch_arguments[name] for name in chosen})
        assert_same_outputs(output, expected)


def test_a_tuple_of_the_backbone_has_no_place_for_a_pooled_output(tmp_path):
    """transformers puts a None there, which its ModelOutput does not have."""
    theirs, ours = pair(tmp_path, "Model")
    last, nothing, maps = theirs(nchw(PIXELS), output_hidden_states=True, return_dict=False)
    assert nothing is None
    assert_same_outputs(ours(PIXELS, output_hidden_states=True, return_dict=False), (last, maps))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_losses_and_their_gradients_are_those_of_transformers(tmp_path, problem):
    theirs, ours = pair(tmp_path, problem_type=problem)
    labels = PROBLEMS[problem]
    expected = theirs(nchw(PIXELS), labels=torch.from_numpy(labels)).loss
    expected.backward()
    loss, gradient = jax.value_and_grad(lambda params: ours(PIXELS, params, labels=labels).loss)(ours.params)
    np.testing.assert_allclose(loss, expected.item(), rtol=LOSS)
    assert_close(gradient["head"]["bias"], theirs.classifier.bias.grad.numpy())


@pytest.mark.parametrize("problem", [None, "regression"])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_single_output_is_a_regression(tmp_path, problem, shape):
    theirs, ours = pair(tmp_path, num_labels=1, problem_type=problem)
    labels = np.array([0.3, -2.0], np.float32).reshape(shape)
    expected = theirs(nchw(PIXELS), labels=torch.from_numpy(labels)).loss
    np.testing.assert_allclose(ours(PIXELS, labels=labels).loss, expected.item(), rtol=LOSS)


# The second paper's StarReLU, which transformers does not have.
OWN_ACTIVATIONS = {"star_relu"}


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - OWN_ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    x = np.linspace(-12, 12, 4097, dtype=np.float32)
    expected = transformers.activations.ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_every_activation_without_parameters_is_here():
    assert set(transformers.activations.ACT2CLS) == {*ACTIVATIONS, "prelu", "xielu"} - OWN_ACTIVATIONS


def test_every_parameter_has_a_gradient_in_training(tmp_path):
    _, ours = pair(tmp_path)

    def loss(params):
        return ours(PIXELS, params, jax.random.key(0), train=True, labels=np.array([0, 2])).loss

    gradient = flatten_dict(jax.grad(loss)(ours.params), sep="/")
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())
    without = [path for path, leaf in gradient.items() if np.abs(leaf).max() == 0]
    # pool(x) - x cancels the shift of the norm before it.
    assert all(path.endswith("/norm1/bias") for path in without), without


def test_saving_and_loading_in_either_library_keeps_the_outputs(tmp_path):
    theirs, ours = pair(tmp_path)
    ours.save_pretrained(tmp_path / "hf", layout="hf")
    loaded = transformers.PoolFormerForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert_same_outputs(ours(PIXELS), loaded(nchw(PIXELS)))
    ours.save_pretrained(tmp_path / "jax")
    again = FlaxPoolFormerForImageClassification.from_pretrained(tmp_path / "jax")
    np.testing.assert_array_equal(again(PIXELS).logits, ours(PIXELS).logits)
    assert_same_outputs(again(PIXELS), theirs(nchw(PIXELS)))


def test_mismatched_sizes_are_refused_or_give_a_new_head_in_both(tmp_path):
    pair(tmp_path)
    for load, errors in (
        (transformers.PoolFormerForImageClassification.from_pretrained, (RuntimeError, ValueError)),
        (FlaxPoolFormerForImageClassification.from_pretrained, ValueError),
    ):
        with pytest.raises(errors, match="ignore_mismatched_sizes"):
            load(tmp_path / "theirs", num_labels=7)
        assert load(tmp_path / "theirs", num_labels=7, ignore_mismatched_sizes=True).config.num_labels == 7
