"""The initial network of a run: new, or with pretrained weights."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from paths import TESTS
from poolformer_jax import PoolFormerImageProcessor, load_pretrained, save_pretrained
from train.config import FreshNetwork, PretrainedNetwork
from train.data import DataConfig
from train.network import make_network
from training import tiny

WEIGHTS = PretrainedNetwork(source=str(TESTS / "fixtures" / "hf_sharded"))


def network_for(class_names, wanted=WEIGHTS, seed=0):
    return make_network(tiny(model=wanted, data=DataConfig(), seed=seed), class_names)


def parameters(seed):
    """What a run with this seed starts from: a file of weights with a new head for two classes."""
    network = network_for(("daisy", "tulip"), seed=seed)
    return network.make_variables(network.argument())["params"]


def test_the_seed_of_a_run_draws_the_new_head_of_loaded_weights_and_nothing_else():
    first, again, other = parameters(1), parameters(1), parameters(2)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert not np.array_equal(other["head"].pop("kernel"), first["head"].pop("kernel"))
    jax.tree.map(np.testing.assert_array_equal, other, first)


KEPT = dataclasses.replace(WEIGHTS, keep_head=True)  # of cat, dog, axolotl


def test_a_head_is_kept_for_its_own_classes():
    names = ("cat", "dog", "axolotl")
    assert dict(network_for(names, KEPT).model.config.id2label) == dict(enumerate(names))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("axolotl", "cat", "dog"), "(?s)the same classes in another order.*label 0: cat in the model, axolotl in"),
        (("dog", "axolotl", "zebra"), "(?s)only some classes in common.*label 2: axolotl in the model, zebra in"),
        (("cat", "dog", "zebra"), "(?s)only some classes in common.*label 2: axolotl in the model, zebra in"),
        (("n02121808", "n02084071", "n01632777"), r"(?s)cannot be compared by name.*--data\.class-map FILE"),
        (("cat", "dog"), "has 3 classes, and the data has 2"),
    ],
)
def test_a_head_is_not_kept_for_other_classes(names, message):
    with pytest.raises(ValueError, match=f"{message}.*leave --model.keep-head away"):
        network_for(names, KEPT)


@pytest.mark.parametrize("wanted", [WEIGHTS, FreshNetwork()])
def test_a_network_for_a_single_class_is_refused(wanted):
    with pytest.raises(ValueError, match=r"The data has 1 class, images: .* name the folder that holds one folder per"):
        network_for(("images",), wanted)


# What the recipe prepares images with: as published for s12, at the size of the network's own choice.
PUBLISHED = PoolFormerImageProcessor()


@pytest.fixture(scope="module")
def bringing(tmp_path_factory):
    """Writes the weights and a preprocessing into a folder; returns the model config that names it."""
    model, variables = load_pretrained(WEIGHTS.source)

    def write(**changes):
        folder = tmp_path_factory.mktemp("model")
        save_pretrained(folder, model, variables, image_processor=dataclasses.replace(PUBLISHED, **changes))
        return PretrainedNetwork(str(folder))

    return write


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"image_mean": (0.5,) * 3, "image_std": (0.25,) * 3},
            [
                "--data.image-mean 0.5 0.5 0.5 (this run: 0.485 0.456 0.406)",
                "--data.image-std 0.25 0.25 0.25 (this run: 0.229 0.224 0.225)",
            ],
        ),
        (
            {"image_mean": (127.5,) * 3, "image_std": (127.5,) * 3, "do_rescale": False},
            ["--data.image-mean 0.5 0.5 0.5 (", "--data.image-std 0.5 0.5 0.5 ("],
        ),
        ({"crop_pct": 0.95}, ["--data.crop-pct 0.95 (this run: 0.9)"]),
        ({"crop_pct": None, "size": {"shortest_edge": 256}}, ["--data.crop-pct 0.875 (this run: 0.9)"]),
        ({"crop_pct": None, "size": {"shortest_edge": 245}}, ["--data.crop-pct 0.9142857142857143 (this run: 0.9)"]),
        ({"resample": 2}, ["--data.evaluation-interpolation bilinear (this run: bicubic)"]),
        ({"resample": 1}, ["--data.evaluation-interpolation lanczos (this run: bicubic, and no flag has theirs)"]),
    ],
)
def test_a_run_names_the_flags_for_the_preprocessing_of_its_weights(bringing, caplog, changes, expected):
    wanted = bringing(**changes)
    network_for(("daisy", "tulip"), wanted)
    (message,) = caplog.messages
    assert wanted.source in message
    lines = [line.strip() for line in message.splitlines()[1:-1]]
    assert len(lines) == len(expected)
    assert all(line.startswith(flag) for line, flag in zip(lines, expected))


@pytest.mark.parametrize("changes", [{}, {"size": {"shortest_edge": 248}, "crop_pct": None}, {"do_resize": False}])
def test_a_run_with_the_preprocessing_of_its_weights_logs_nothing(bringing, caplog, changes):
    network_for(("daisy", "tulip"), bringing(**changes))
    network_for(("daisy", "tulip"))  # of a folder without a preprocessing
    assert not caplog.messages


@pytest.mark.parametrize("edge", [225, 245, 257])
def test_a_run_with_the_named_flag_logs_nothing_more(bringing, caplog, edge):
    wanted = bringing(crop_pct=None, size={"shortest_edge": edge})
    network_for(("daisy", "tulip"), wanted)
    (message,) = caplog.messages
    share = float(re.search(r"--data.crop-pct (\S+) ", message)[1])
    make_network(tiny(model=wanted, data=DataConfig(crop_pct=share)), ("daisy", "tulip"))
    assert caplog.messages == [message]


def test_the_preprocessing_is_compared_where_weights_are_read(bringing, caplog):
    wanted = bringing(crop_pct=0.95)
    checkpoint_network = network_for(("daisy", "tulip")).model.config
    make_network(tiny(model=wanted, data=DataConfig()), ("daisy", "tulip"), checkpoint_network=checkpoint_network)
    assert not caplog.messages


def test_a_preprocessing_that_cannot_be_read_stops_no_run(bringing, caplog):
    wanted = bringing()
    (Path(wanted.source) / "preprocessor_config.json").write_text("{")
    network_for(("daisy", "tulip"), wanted)
    (message,) = caplog.messages
    assert "preprocessor_config.json is not JSON" in message
