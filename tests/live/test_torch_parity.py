"""Both ways between this package and the PyTorch models themselves: strict loading, and the same logits and stages."""

from pathlib import Path

import jax
import numpy as np
import pytest

from convert.conversion import convert
from convert.verification import verify
from golden.fixture_values import parameter
from live import peers
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, from_torch_state_dict
from poolformer_jax.network.variants import VARIANTS
from poolformer_jax.weights import load_pretrained, open_model, open_weights, save_pretrained
from saved_models import same
from small_networks import random_variables

# This package cannot fix the warnings of the other libraries.
pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("optimised")]
FIXTURES = Path(__file__).parent.parent / "fixtures"
TOLERANCE = 1e-4  # of the largest value, in float32: sums in another order
ABLATIONS = [name for name in VARIANTS if name.startswith("metaformer")]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def transformers(torch):
    return pytest.importorskip("transformers")


@pytest.fixture
def sail(timm):
    if peers.sail_source() is None:
        pytest.skip("SAIL_POOLFORMER names no checkout of sail-sg/poolformer")
    return peers.sail


def pixels(size=96):
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def torch_logits(torch, model, size=96):
    with torch.no_grad():
        output = model(torch.from_numpy(pixels(size).transpose(0, 3, 1, 2)))
    return getattr(output, "logits", output).numpy()


def our_logits(config, variables, size=96):
    return np.asarray(jax.jit(PoolFormerForImageClassification(config).apply)(variables, pixels(size)).logits)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()


def random_model(variant, **changes):
    return random_variables(PoolFormerConfig.from_variant(variant, **changes))


def test_a_folder_of_transformers_computes_the_same_here(tmp_path, torch, transformers):
    config = transformers.PoolFormerConfig(id2label={index: f"class {index}" for index in range(7)})
    model = peers.fill(transformers.PoolFormerForImageClassification(config))
    model.save_pretrained(tmp_path)
    loaded, variables = load_pretrained(tmp_path)
    assert loaded.config.id2label == config.id2label
    assert_close(our_logits(loaded.config, variables), torch_logits(torch, model))
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels().transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    for ours, stage in zip(jax.jit(loaded.apply)(variables, pixels()).hidden_states, theirs, strict=True):
        assert_close(np.asarray(ours).transpose(0, 3, 1, 2), stage.numpy())
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same(load_pretrained(tmp_path)[1], variables)


def test_a_folder_saved_for_transformers_loads_there_strictly_and_computes_the_same(tmp_path, torch, transformers):
    labels = {index: f"class {index}" for index in range(9)}
    model, variables = random_model("s12", num_labels=9, id2label=labels)
    save_pretrained(tmp_path / "model", model, variables, "hf")
    load = transformers.AutoModelForImageClassification.from_pretrained
    theirs, loading = load(tmp_path / "model", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == labels
    assert_close(our_logits(model.config, variables), torch_logits(torch, theirs.eval()))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    assert (type(processor).__name__.startswith("PoolFormer"), processor.crop_pct) == (True, 0.9)


def test_a_folder_without_a_head_loads_in_transformers(tmp_path, torch, transformers):
    model, variables = random_model("s12", num_labels=0)
    save_pretrained(tmp_path / "model", model, variables, "hf")
    theirs = transformers.PoolFormerForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert_close(our_logits(model.config, variables), torch_logits(torch, theirs))


def test_a_folder_saved_for_timm_loads_there_strictly_and_computes_the_same(tmp_path, torch, timm):
    model, variables = random_model("s12", num_labels=9, head_order="pool_norm")
    save_pretrained(tmp_path / "model", model, variables, "timm")
    checkpoint = str(tmp_path / "model" / "model.safetensors")
    theirs = timm.create_model("poolformer_s12", num_classes=9, checkpoint_path=checkpoint)
    assert_close(our_logits(model.config, variables), torch_logits(torch, theirs.eval()))
    by_config = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=9)
    assert_close(our_logits(model.config, variables), torch_logits(torch, by_config.eval()))
    assert by_config.pretrained_cfg["crop_pct"] == 0.9


def test_a_network_of_other_channels_saved_for_timm_loads_there_strictly(tmp_path, torch, timm):
    channels = 4
    config = PoolFormerConfig.from_variant("s12", num_labels=9, head_order="pool_norm", num_channels=channels)
    model = PoolFormerForImageClassification(config)
    pictures = np.random.default_rng(0).normal(size=(2, 64, 64, channels)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), pictures)
    variables = jax.tree.map(lambda leaf: parameter(str(leaf.shape), leaf.shape), shapes)
    save_pretrained(tmp_path / "model", model, variables, "timm")
    expected = np.asarray(jax.jit(model.apply)(variables, pictures).logits)
    given = {"in_chans": channels, "checkpoint_path": str(tmp_path / "model" / "model.safetensors")}
    for theirs in (
        timm.create_model("poolformer_s12", num_classes=9, **given),
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True),
    ):
        with torch.no_grad():
            assert_close(theirs.eval()(torch.from_numpy(pictures.transpose(0, 3, 1, 2))).numpy(), expected)


def test_a_checkpoint_of_timm_computes_the_same_here(tmp_path, torch, timm):
    theirs = peers.fill(timm.create_model("poolformer_s12", num_classes=5))
    torch.save({"epoch": 3, "state_dict": theirs.state_dict()}, tmp_path / "last.pth.tar")
    model, variables = load_pretrained(tmp_path / "last.pth.tar")
    assert_close(our_logits(model.config, variables), torch_logits(torch, theirs))
    assert same(from_torch_state_dict(theirs.state_dict())[1], variables)  # tensors are taken as they are


def test_a_file_saved_for_sail_is_a_state_dict_of_torch(tmp_path, torch):
    model, variables = random_model("s12", num_labels=9)
    save_pretrained(tmp_path / "model", model, variables, "sail")
    loaded = torch.load(tmp_path / "model" / "model.pth.tar", weights_only=True)
    assert loaded["network.6.1.mlp.fc2.weight"].shape == (512, 2048, 1, 1)
    np.testing.assert_array_equal(loaded["head.bias"].numpy(), variables["params"]["head"]["bias"], strict=True)
    assert all(tensor.is_contiguous() for tensor in loaded.values())


def test_a_folder_saved_for_sail_loads_there_strictly_and_computes_the_same(tmp_path, torch, sail):
    model, variables = random_model("s12", num_labels=9)
    save_pretrained(tmp_path / "model", model, variables, "sail")
    theirs = sail("poolformer").poolformer_s12(num_classes=9)
    theirs.load_state_dict(torch.load(tmp_path / "model" / "model.pth.tar", weights_only=True), strict=True)
    assert_close(our_logits(model.config, variables), torch_logits(torch, theirs.eval()))


@pytest.mark.parametrize("variant", ABLATIONS)
def test_the_authors_ablations_compute_the_same_here_and_there(tmp_path, torch, sail, variant):
    theirs = peers.fill(getattr(sail("metaformer"), variant)())
    expected = torch_logits(torch, theirs, 224)
    torch.save(theirs.state_dict(), tmp_path / f"{variant}.pth.tar")
    model, variables = load_pretrained(tmp_path / f"{variant}.pth.tar")
    assert model.config == PoolFormerConfig.from_variant(variant)
    assert_close(our_logits(model.config, variables, 224), expected)
    save_pretrained(tmp_path / "model", model, variables, "sail")
    back = torch.load(tmp_path / "model" / "model.pth.tar", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())
    theirs.load_state_dict(back, strict=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_this_version_of_pytorch_saves_is_read_bit_for_bit(tmp_path, torch, legacy):
    generator = torch.Generator().manual_seed(0)
    saved = {f"{dtype}": torch.randn(5, 3, generator=generator).to(dtype) for dtype in (torch.float16, torch.float64)}
    saved["view"] = torch.randn(4, 6, generator=generator)[1:, ::2].t()
    torch.save(saved, tmp_path / "some.pth", _use_new_zipfile_serialization=not legacy)
    for name, tensor in open_weights(tmp_path / "some.pth").tensors.items():
        np.testing.assert_array_equal(np.asarray(tensor), saved[name].numpy(), strict=True)


def test_verification_by_pytorch_names_the_first_stage_that_differs(tmp_path, torch, transformers):
    source = open_model(FIXTURES / "hf.bin")
    mapped = convert(source, tmp_path / "model", "jax", lambda size: None, "report.json")
    result = verify(source, tmp_path / "model", mapped)
    assert result.passed and list(result.differences) == ["stage 0", "stage 1", "stage 2", "stage 3", "logits"]
    path = tmp_path / "model" / "flax_model.safetensors"
    content = path.read_bytes()
    mine = parameter("poolformer.encoder.block.2.0.output.conv1.bias", (24,)).tobytes()
    assert content.count(mine) == 1
    path.write_bytes(content.replace(mine, np.ones(24, np.float32).tobytes()))
    result = verify(source, tmp_path / "model", mapped)
    assert (result.first_difference, result.passed) == ("stage 2", False)
    assert result.different == ("poolformer.encoder.block.2.0.output.conv1.bias",)


def test_transformers_does_not_open_our_own_layout_with_random_weights(tmp_path, transformers):
    model, variables = random_model("s12", num_labels=3)
    save_pretrained(tmp_path / "model", model, variables)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModel.from_pretrained(tmp_path / "model")
