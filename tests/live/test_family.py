"""The second paper's networks by timm: real files of torch.save, folders for timm, and transformers' TimmWrapper."""

import jax
import numpy as np
import pytest

from live import peers
from poolformer_jax import MetaFormerConfig, MetaFormerModel, from_torch_state_dict
from poolformer_jax.weights import load_pretrained, open_model, save_pretrained, to_torch_state_dict
from small_networks import random_variables

torch = pytest.importorskip("torch")

# This package cannot fix the warnings of the other libraries.
pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("optimised")]
TOLERANCE = 1e-9  # of the largest logit, in float64
IN_TIMM = ("poolformerv2_s12", "convformer_s18", "caformer_s18")


def pixels(size=64):
    return np.random.default_rng(0).normal(size=(1, size, size, 3))


def torch_output(model):
    with torch.no_grad():
        return model.double()(torch.from_numpy(pixels().transpose(0, 3, 1, 2)))


def our_output(model, variables):
    with jax.enable_x64():
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        return jax.jit(model.apply)(variables, pixels())


def assert_close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()


def random_model(variant, **changes):
    return random_variables(MetaFormerConfig.from_variant(variant, **changes))


@pytest.mark.parametrize(("variant", "legacy"), [*((name, False) for name in IN_TIMM), ("poolformerv2_s12", True)])
def test_what_pytorch_saves_of_timms_models_computes_the_same_here(tmp_path, timm, variant, legacy):
    theirs = peers.fill(timm.create_model(variant, num_classes=5))
    path = tmp_path / "last.pth.tar"  # as timm's training writes it
    torch.save({"arch": variant, "state_dict": theirs.state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    if legacy:
        back = open_model(path).read_variables()
        torch.save(theirs.state_dict(), tmp_path / f"{variant}.pth")
        _, variables = load_pretrained(tmp_path / f"{variant}.pth")
        assert jax.tree.all(jax.tree.map(np.array_equal, back, variables))
        return
    with jax.enable_x64():
        model, variables = load_pretrained(path, dtype="float64")
    assert_close(our_output(model, variables).logits, torch_output(theirs))


@pytest.mark.parametrize("variant", IN_TIMM)
def test_a_folder_saved_for_timm_loads_there_strictly_and_bit_for_bit(tmp_path, timm, variant):
    head = {} if variant.startswith("pool") else {"head_norm_epsilon": 1e-6}
    model, variables = random_model(variant, num_labels=9, **head)
    save_pretrained(tmp_path / "model", model, variables, "timm")
    expected = to_torch_state_dict(model.config, variables, "timm")
    checkpoint = str(tmp_path / "model" / "model.safetensors")
    by_config = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    for theirs in (timm.create_model(variant, num_classes=9, checkpoint_path=checkpoint), by_config):
        found = theirs.state_dict()
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name].numpy(), array) for name, array in expected.items())
    assert (by_config.pretrained_cfg["crop_pct"], by_config.num_classes) == (1.0, 9)
    # Another number of classes: timm keeps what `reset_head` keeps.
    fewer = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=4).state_dict()
    config, ours = load_pretrained(tmp_path / "model", num_labels=4, reset_head=True)
    ours = to_torch_state_dict(config.config, ours, "timm")
    new = {name for name, array in ours.items() if not np.array_equal(fewer[name].numpy(), array)}
    assert new == {f"head.fc{'.fc2' if head else ''}.weight"}  # the new biases are zeros in both


@pytest.mark.parametrize("variant", IN_TIMM)
def test_timms_filter_reads_the_authors_layout_as_we_do(timm, variant):
    from timm.models.metaformer import checkpoint_filter_fn

    model, variables = random_model(variant, num_labels=9)
    authors = {name: torch.from_numpy(a) for name, a in to_torch_state_dict(model.config, variables, "sail").items()}
    theirs = checkpoint_filter_fn(authors, timm.create_model(variant, num_classes=9))
    ours = to_torch_state_dict(model.config, variables, "timm")
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name].numpy(), array) for name, array in ours.items())


def test_a_features_only_model_makes_the_same_feature_maps(timm):
    theirs = peers.fill(timm.create_model("caformer_s18", features_only=True))
    config, variables = from_torch_state_dict(theirs.state_dict())
    with jax.enable_x64():
        model = MetaFormerModel(config, dtype="float64")
    maps = our_output(model, variables).hidden_states
    for ours, expected in zip(maps, torch_output(theirs), strict=True):
        assert_close(np.asarray(ours).transpose(0, 3, 1, 2), expected)


def test_a_config_of_transformers_timm_wrapper_is_read(tmp_path, timm):
    """Its model needs torchvision; its file has timm's names below "timm_model."."""
    transformers = pytest.importorskip("transformers")
    labels = [f"label {index}" for index in range(5)]
    options = {"architecture": "caformer_s18", "label_names": labels, "num_labels": 5}
    transformers.TimmWrapperConfig(**options, architectures=["TimmWrapperForImageClassification"]).save_pretrained(
        tmp_path
    )
    theirs = timm.create_model("caformer_s18", num_classes=5).state_dict()
    torch.save({f"timm_model.{name}": tensor for name, tensor in theirs.items()}, tmp_path / "pytorch_model.bin")
    opened = open_model(tmp_path)
    assert opened.config.id2label == dict(enumerate(labels)) and opened.config.head_norm_epsilon == 1e-6
    found = to_torch_state_dict(opened.config, opened.read_variables(), "timm")
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), strict=True)
