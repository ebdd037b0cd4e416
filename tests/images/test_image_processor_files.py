"""Settings of the preprocessing are saved, read from the files of other libraries, and checked."""

import dataclasses
import json
import pickle

import pytest

from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.network import VARIANTS


def test_a_saved_processor_reads_back_equal(tmp_path):
    processor = PoolFormerImageProcessor.for_variant("m48", crop_size={"height": 64, "width": 48})
    assert processor.crop_pct == 0.95
    processor.save_pretrained(tmp_path)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path) == processor
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "preprocessor_config.json") == processor
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert pickle.loads(pickle.dumps(processor)) == processor
    assert {processor: "hashable"}[dataclasses.replace(processor)] == "hashable"


def test_the_text_has_the_layout_of_transformers():
    lines = PoolFormerImageProcessor().to_json_string().splitlines()
    assert lines[:2] == ["{", '  "crop_pct": 0.9,'] and lines[-2:] == ["  }", "}"]
    assert json.loads("\n".join(lines)) == PoolFormerImageProcessor().to_dict()
    assert PoolFormerImageProcessor.from_dict({"do_convert_rgb": True}).to_dict()["do_convert_rgb"] is True


def test_keywords_change_what_is_read(tmp_path):
    PoolFormerImageProcessor.for_variant("m48").save_pretrained(tmp_path)
    changed = PoolFormerImageProcessor.from_pretrained(tmp_path, size=64, crop_size=[48, 40], resample="nearest")
    sides = {"height": 48, "width": 40}
    assert changed == PoolFormerImageProcessor(size={"shortest_edge": 64}, crop_size=sides, crop_pct=0.95, resample=0)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path, crop_pct=None).crop_pct is None
    with pytest.raises(ValueError, match=r"Unknown keywords: banana=1, return_tensors='np'\. Expected: crop_pct"):
        PoolFormerImageProcessor.from_pretrained(tmp_path, size=64, banana=1, return_tensors="np")


@pytest.mark.parametrize("name", ["M36", "nonsense", ""])
def test_unknown_variants_are_refused(name):
    with pytest.raises(ValueError, match=rf"no variant '{name}'\. Expected one of: s12, s24"):
        PoolFormerImageProcessor.for_variant(name)


def test_every_published_variant_has_its_preprocessing():
    crops = {name: PoolFormerImageProcessor.for_variant(name).crop_pct for name in VARIANTS}
    assert crops["s36"] == 0.9 and crops["m36"] == crops["metaformer_ppff_s12_224"] == 0.95
    assert PoolFormerImageProcessor.for_variant("poolformer_m36").crop_pct == 0.95


def test_the_published_file_of_2022_is_read():
    # The file of sail/poolformer_m36 on the Hub: a size in pixels, and one flag for resize and crop.
    published = {
        "crop_pct": 0.95,
        "do_normalize": True,
        "do_resize_and_center_crop": True,
        "feature_extractor_type": "PoolFormerFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
    }
    assert PoolFormerImageProcessor.from_dict(published) == PoolFormerImageProcessor.for_variant("m36")
    off = PoolFormerImageProcessor.from_dict({**published, "do_resize_and_center_crop": False})
    assert not off.do_resize and not off.do_center_crop


@pytest.mark.parametrize("entry", ["image_processor_type", "feature_extractor_type"])
def test_another_models_preprocessing_is_refused(entry):
    # ViT's preprocessing does not keep the aspect ratio, and its file has no entry for that.
    with pytest.raises(ValueError, match=rf"another model's preprocessing, {entry}='ViT.*Expected one of PoolFormerIm"):
        PoolFormerImageProcessor.from_dict({entry: "ViTImageProcessor", "size": {"shortest_edge": 224}})
    for name in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"):
        assert PoolFormerImageProcessor.from_dict({entry: f"PoolFormer{name}"}) == PoolFormerImageProcessor()


def test_timms_config_is_read(tmp_path):
    pretrained = {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "poolformer_s12", "pretrained_cfg": pretrained}))
    assert PoolFormerImageProcessor.from_pretrained(tmp_path) == PoolFormerImageProcessor()
    with pytest.raises(ValueError, match="squash"):
        PoolFormerImageProcessor.from_dict({**pretrained, "crop_mode": "squash"})
    # timm's defaults for null.
    of_none = PoolFormerImageProcessor.from_dict({**pretrained, "crop_mode": None, "crop_pct": None})
    assert of_none == PoolFormerImageProcessor(crop_pct=0.875)
    for size in ([3, 224, 192], [224, 224], []):
        with pytest.raises(ValueError, match=r"input_size=\[.*Expected \[channels, side, side\]"):
            PoolFormerImageProcessor.from_dict({**pretrained, "input_size": size})


def test_a_missing_preprocessing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        PoolFormerImageProcessor.from_pretrained(tmp_path)


def test_the_hubs_cache_is_read_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "models--sail--poolformer_m36"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    PoolFormerImageProcessor.for_variant("m36").save_pretrained(snapshot)
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    processor = PoolFormerImageProcessor.from_pretrained("sail/poolformer_m36", **offline)
    assert processor == PoolFormerImageProcessor.for_variant("m36")
    with pytest.raises(
        FileNotFoundError, match=r"'sail/poolformer_s99' is not a file or folder here, and not in the Hub's"
    ):
        PoolFormerImageProcessor.from_pretrained("sail/poolformer_s99", **offline)
    (snapshot / "preprocessor_config.json").rename(snapshot / "config.json")
    with pytest.raises(FileNotFoundError, match=r"sail/poolformer_m36 has no preprocessor_config\.json"):
        PoolFormerImageProcessor.from_pretrained("sail/poolformer_m36", **offline)


@pytest.mark.parametrize(
    "nowhere", ["runs/none/model", "runs/none--model", "./model", "model/preprocessor_config.json"]
)
def test_invalid_repository_names_are_not_requested_from_the_hub(nowhere):
    with pytest.raises(FileNotFoundError, match=rf"There is no model at {nowhere}\. .* Hub such as"):
        PoolFormerImageProcessor.from_pretrained(nowhere)


def test_all_invalid_settings_are_listed():
    with pytest.raises(ValueError, match=r"(?s)size=\{'longest': 3\}.*crop_pct=1.5.*resample=9.*image_std=\(1.0,\)"):
        PoolFormerImageProcessor(size={"longest": 3}, crop_pct=1.5, resample=9, image_std=(1.0,))
    with pytest.raises(ValueError, match=r"(?s)size='224': expected pixels.*crop_pct='0\.9': expected None, or a f"):
        PoolFormerImageProcessor(size="224", crop_pct="0.9")
    with pytest.raises(ValueError, match=r"(?s)size=\[224\].*resample='cubic'"):
        PoolFormerImageProcessor(size=[224], resample="cubic")
    with pytest.raises(ValueError, match=r"do_pad=True, pad_size=\{'height': 3\}"):
        PoolFormerImageProcessor.from_dict({"do_pad": True, "pad_size": {"height": 3}})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{broken", r"preprocessor_config\.json is not JSON .*save_pretrained\(folder\) writes it"),
        ("[224]", r"preprocessor_config\.json is a list"),
        ('{"size": "224", "image_mean": "0.5", "crop_pct": "0.9"}', "(?s)image_mean='0.5'.*size='224'.*crop_pct='0.9'"),
        ('{"interpolation": "bicubic", "mean": [0.5]}', "lacks input_size, std"),
    ],
)
def test_a_malformed_file_or_its_entries_are_named(written, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(written)
    with pytest.raises(ValueError, match=message):
        PoolFormerImageProcessor.from_pretrained(tmp_path)
