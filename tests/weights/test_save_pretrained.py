"""Model folders are written whole or not at all, and the libraries of each layout can read them."""

import dataclasses
import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from golden.fixture_values import parameter
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor, WeightsMismatch
from poolformer_jax.weights import leaves, load_pretrained, open_weights, save_pretrained, write_model
from saved_models import CONFIG, PROCESSOR, make_variables, same, save


@pytest.mark.parametrize("layout", ["jax", "hf", "sail"])
def test_a_saved_model_is_loaded_bit_for_bit_with_labels_and_preprocessing(tmp_path, layout):
    saved = save(tmp_path / "model", layout, image_processor=PROCESSOR)
    model, variables = load_pretrained(tmp_path / "model")
    assert model.config == CONFIG
    assert same(variables, saved)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "model") == PROCESSOR
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "README.md",
        {"jax": "flax_model.safetensors", "sail": "model.pth.tar"}.get(layout, "model.safetensors"),
    }


def test_a_folder_for_timm_is_loaded_with_its_labels_and_preprocessing(tmp_path):
    labels = {index: f"class {index}" for index in range(3)}
    config = PoolFormerConfig.from_variant("s12", num_labels=3, id2label=labels, head_order="pool_norm")
    saved = save(tmp_path / "model", "timm", config, image_processor=PROCESSOR)
    model, variables = load_pretrained(tmp_path / "model")
    assert model.config == config
    assert same(variables, saved)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "model") == PROCESSOR
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["architecture"], written["num_classes"]) == ("poolformer_s12", 3)


S12 = PoolFormerConfig.from_variant("s12", num_labels=0, head_order="pool_norm")
SQUARE = {"height": 5, "width": 5}


def write_zeros_for_timm(folder, changes):
    arrays = (np.zeros(leaf.stored_shape, np.float32) for leaf in leaves(S12, "timm"))
    processor = PoolFormerImageProcessor(**{"size": {"shortest_edge": 5}, "crop_size": SQUARE, **changes})
    write_model(folder, S12, "timm", arrays, processor)
    return processor


def test_a_folder_for_timm_has_the_preprocessing_in_timms_terms(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (23, 31, 3), np.uint8)
    for changes, crop_pct in [
        ({"crop_pct": 0.7}, 0.7),
        ({"crop_pct": None, "size": {"shortest_edge": 7}}, 5 / 7),
        ({"crop_pct": None, "size": {"shortest_edge": 29}}, np.nextafter(5 / 29, 0)),  # of 5 / 29 itself it makes 28
        ({"crop_pct": 0.9, "size": SQUARE, "do_normalize": False}, 0.9),
        # timm divides by 255 whatever comes after.
        ({"crop_pct": None, "do_rescale": False}, 1.0),
        ({"crop_pct": 0.999, "rescale_factor": 1 / 127.5, "do_normalize": False}, 0.999),
    ]:
        processor = write_zeros_for_timm(tmp_path / "model", changes)
        written = json.loads((tmp_path / "model" / "config.json").read_text())["pretrained_cfg"]
        assert (written["input_size"], written["crop_pct"]) == ([3, 5, 5], crop_pct)
        expected, made = (
            one(picture)["pixel_values"] for one in (processor, PoolFormerImageProcessor.from_dict(written))
        )
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"crop_pct": None, "size": SQUARE},  # squashes a picture
        {"crop_pct": None, "size": {"shortest_edge": 4}},  # a black margin
        {"crop_size": {"height": 5, "width": 4}},
    ],
    ids=str,
)
def test_preprocessing_that_timm_cannot_express_is_not_saved_for_it(tmp_path, changes):
    ((name, value),) = list(changes.items())[-1:]
    with pytest.raises(ValueError, match=f"timm cannot preprocess with .*{name}={re.escape(str(value))}.*'hf', 'sail'"):
        write_zeros_for_timm(tmp_path / "model", changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_save_changes_nothing(tmp_path, exists):
    folder = tmp_path / "model"
    if exists:
        save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if exists else None

    def breaks():
        yield parameter("any", leaves(CONFIG)[0].shape)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_model(folder, CONFIG, "jax", breaks())
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if exists else [])
    assert before == ({path.name: path.read_bytes() for path in folder.iterdir()} if exists else None)


def test_an_existing_folder_gets_no_temporary_files_beside_it(tmp_path):
    # The parent of a link or a mount point may be another file system, or not writable.
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "link").symlink_to(tmp_path / "disk" / "model")

    def arrays():
        for leaf in leaves(CONFIG):
            assert [path.name for path in (tmp_path / "home").iterdir()] == ["link"]
            assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]
            yield parameter(leaf.path, leaf.shape)

    write_model(tmp_path / "home" / "link", CONFIG, "jax", arrays(), PROCESSOR)
    assert same(load_pretrained(tmp_path / "disk" / "model")[1], make_variables(CONFIG))
    assert len(list((tmp_path / "disk" / "model").iterdir())) == 4
    assert (tmp_path / "home" / "link").is_symlink()


def test_a_folder_is_overwritten_only_by_the_same_layout(tmp_path):
    save(tmp_path / "model")
    changed = make_variables(CONFIG)
    changed["params"]["head"]["bias"] += 1
    save_pretrained(tmp_path / "model", PoolFormerForImageClassification(CONFIG), changed)
    assert same(load_pretrained(tmp_path / "model")[1], changed)
    with pytest.raises(ValueError, match=r"already has other weights \(flax_model.safetensors\)"):
        save(tmp_path / "model", "sail")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Cannot write .*file: File exists"):
        save(tmp_path / "file")


def test_a_model_replaces_another_one_together_with_its_preprocessing(tmp_path):
    save(tmp_path / "model")
    (tmp_path / "model" / "README.md").touch()
    grey = dataclasses.replace(CONFIG, num_channels=1)
    save(tmp_path / "model", config=grey)
    assert load_pretrained(tmp_path / "model")[0].config == grey
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "flax_model.safetensors",
        "README.md",
    }
    # A folder without weights keeps its preprocessing.
    processor = dataclasses.replace(PROCESSOR, image_mean=(0.5,), image_std=(0.5,))
    processor.save_pretrained(tmp_path / "new")
    save(tmp_path / "new", config=grey)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "new") == processor


@pytest.mark.parametrize("moves", range(5))
def test_a_folder_never_holds_parts_of_two_models(tmp_path, monkeypatch, moves):
    folder = tmp_path / "model"
    save(folder)
    replace, moved = Path.replace, []

    def killed(path, target):
        if target.parent == folder:
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    renamed = dataclasses.replace(CONFIG, id2label=dict(enumerate("abc")))
    with pytest.raises(KeyboardInterrupt) if moves < 4 else nullcontext():
        save(folder, config=renamed, image_processor=PROCESSOR)
    with pytest.raises(FileNotFoundError, match="has no weights") if moves < 4 else nullcontext():
        assert load_pretrained(folder)[0].config == renamed
        assert PoolFormerImageProcessor.from_pretrained(folder) == PROCESSOR


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            "hf",
            {"token_mixers": ("identity",) * 4},
            r"hf cannot compute a network with token_mixers=.*'jax' takes",
        ),
        ("hf", {"norm": "layer_norm"}, "cannot compute a network with norm='layer_norm'"),
        ("timm", {}, r"timm\.create_model has no network of depths"),
        ("keras", {}, "There is no layout 'keras'"),
    ],
)
def test_a_network_is_not_saved_for_a_library_that_cannot_compute_it(tmp_path, layout, changes, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "model", layout, dataclasses.replace(CONFIG, **changes))
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save("~/model", image_processor=PROCESSOR)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load_pretrained("~/model")[0].config == CONFIG
    assert PoolFormerImageProcessor.from_pretrained("~/model") == PROCESSOR
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    PROCESSOR.save_pretrained("~/model")
    assert PoolFormerImageProcessor.from_pretrained("~/model") == PROCESSOR


def test_variables_of_another_network_are_not_saved(tmp_path):
    variables = make_variables(CONFIG)
    del variables["params"]["norm"]
    with pytest.raises(WeightsMismatch, match="missing: norm/scale"):
        save_pretrained(tmp_path / "model", PoolFormerForImageClassification(CONFIG), variables)
    assert not list(tmp_path.iterdir())


def test_another_head_order_is_a_warning_and_saved_as_the_library_computes_it(tmp_path):
    config = dataclasses.replace(CONFIG, head_order="pool_norm")
    with pytest.warns(UserWarning, match="head_order='pool_norm', and the model of hf computes 'norm_pool'"):
        save(tmp_path / "model", "hf", config)
    assert load_pretrained(tmp_path / "model")[0].config.head_order == "norm_pool"


def test_saved_files_have_the_format_that_other_libraries_expect(tmp_path):
    saved = save(tmp_path / "hf", "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(opened.get_tensor("norm.bias"), saved["params"]["norm"]["bias"], strict=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not {"head_order", "token_mixers", "norm", "image_size"} & set(config)
    save(tmp_path / "sail", "sail")
    opened = open_weights(tmp_path / "sail" / "model.pth.tar")
    assert (opened.container, opened.wrapping) == ("torch zip", None)


@pytest.mark.parametrize(("channels", "means"), [(1, 3), (4, 3), (3, 1)])
def test_preprocessing_with_another_number_of_channels_is_not_saved(tmp_path, channels, means):
    processor = PoolFormerImageProcessor(image_mean=(0.5,) * means, image_std=(0.5,) * means)
    with pytest.raises(ValueError, match=f"makes {means} channels, and this network takes {channels}. Expected"):
        save(tmp_path / "model", config=dataclasses.replace(CONFIG, num_channels=channels), image_processor=processor)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("layout", "channels"), [("jax", 1), ("hf", 4), ("sail", 1), ("timm", 4)])
def test_a_network_with_other_channels_is_saved_without_preprocessing(tmp_path, layout, channels):
    order = "pool_norm" if layout == "timm" else "norm_pool"
    config = PoolFormerConfig.from_variant("s12", num_labels=3, num_channels=channels, head_order=order)
    save(tmp_path / "model", layout, config)
    assert load_pretrained(tmp_path / "model")[0].config == config
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        PoolFormerImageProcessor.from_pretrained(tmp_path / "model")


def test_an_unpublished_network_has_no_default_preprocessing(tmp_path):
    save(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        PoolFormerImageProcessor.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("layout", ["jax", "hf", "sail"])
def test_training_rates_are_saved(tmp_path, layout):
    config = dataclasses.replace(CONFIG, dropout_rate=0.1, drop_path_rate=0.2)
    save(tmp_path / "model", layout, config)
    assert load_pretrained(tmp_path / "model")[0].config == config


def test_the_default_preprocessing_is_that_of_the_published_variant(tmp_path):
    config = PoolFormerConfig.from_variant("s12", num_labels=0)
    save(tmp_path / "model", config=config)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "model") == PoolFormerImageProcessor.for_variant("s12")
    assert "head" not in load_pretrained(tmp_path / "model")[1]["params"]


def test_saving_a_model_keeps_the_preprocessing_in_its_folder(tmp_path):
    PROCESSOR.save_pretrained(tmp_path / "model")
    save(tmp_path / "model")
    save(tmp_path / "model")
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "model") == PROCESSOR
    assert "ImageClassifier" in (tmp_path / "model" / "README.md").read_text()


def test_saving_a_published_network_says_that_it_keeps_other_preprocessing(tmp_path):
    config = PoolFormerConfig.from_variant("s12")
    arrays = [np.zeros(leaf.stored_shape, np.float32) for leaf in leaves(config)]
    write_model(tmp_path / "model", config, "jax", arrays, PROCESSOR)
    with pytest.warns(UserWarning, match="Keeps the preprocessing in .*, which is not that of s12"):
        write_model(tmp_path / "model", config, "jax", arrays)
