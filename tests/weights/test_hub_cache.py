"""Models are loaded from the Hub's cache offline; a missing model is reported with the places that were searched."""

import shutil
import sys
from pathlib import Path

import pytest

from paths import TESTS
from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor, load_pretrained
from poolformer_jax.weights import WEIGHTS, open_model
from saved_models import LABELS, same, save

FIXTURES = TESTS / "fixtures"


def make_cache(folder, name, files, commit="0123456789abcdef0123456789abcdef01234567"):
    """The Hub's cache in huggingface_hub's layout: files by hash, and links to them for every commit."""
    repository = folder / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for index, file in enumerate(files):
        shutil.copy(file, repository / "blobs" / f"blob{index}")
        (snapshot / Path(file).name).symlink_to(Path("../../blobs") / f"blob{index}")
    return folder


@pytest.mark.parametrize(
    "files", [["hf_sharded/config.json", "hf_sharded/model.safetensors.index.json", "shards"], None]
)
def test_a_model_in_the_hubs_cache_is_loaded_without_asking_the_hub(tmp_path, files):
    if files:
        paths = sorted((FIXTURES / "hf_sharded").iterdir())
    else:  # as the first uploads were: config.json and pytorch_model.bin
        shutil.copy(FIXTURES / "hf.bin", tmp_path / "pytorch_model.bin")
        paths = [FIXTURES / "hf_sharded" / "config.json", tmp_path / "pytorch_model.bin"]
    cache = make_cache(tmp_path / "hub", "someone/tiny", paths)
    model, variables = load_pretrained("someone/tiny", cache_dir=cache, local_files_only=True)
    assert model.config.id2label == LABELS
    _, from_file = load_pretrained(FIXTURES / "hf.bin", revision="main")  # as transformers' scripts do
    assert same(variables, from_file)


def test_a_revision_is_loaded_from_the_hubs_cache(tmp_path):
    cache = make_cache(tmp_path, "someone/tiny", sorted((FIXTURES / "hf_sharded").iterdir()))
    commit = "0123456789abcdef0123456789abcdef01234567"
    load_pretrained("someone/tiny", revision=commit, cache_dir=cache, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="not in the Hub's cache"):
        load_pretrained("someone/tiny", revision="v2", cache_dir=cache, local_files_only=True)


def mark_as_missing(cache, *names):
    """Records files that the Hub does not have, as huggingface_hub does after asking for them."""
    folder = cache / "models--someone--tiny" / ".no_exist" / "0123456789abcdef0123456789abcdef01234567"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def test_a_file_missing_from_the_cache_is_an_error_unless_the_repository_is_known_to_lack_it(tmp_path):
    lacks = r"The Hub's cache of someone/tiny has no {}.*\. The Hub was not asked or cannot be reached\. Connect"
    cache = make_cache(tmp_path / "weights", "someone/tiny", [FIXTURES / "hf_sharded" / "config.json"])
    with pytest.raises(FileNotFoundError, match=lacks.format(r"model\.safetensors or ")):
        load_pretrained("someone/tiny", cache_dir=cache, local_files_only=True)
    mark_as_missing(cache, *WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"^someone/tiny on the Hugging Face Hub has no weights"):
        load_pretrained("someone/tiny", cache_dir=cache, local_files_only=True)


def test_the_published_preprocessing_is_used_only_if_the_repository_is_known_to_have_none(tmp_path):
    save(tmp_path / "model", config=PoolFormerConfig.from_variant("s12", num_labels=2))
    files = [tmp_path / "model" / name for name in ("config.json", "flax_model.safetensors")]
    cache = make_cache(tmp_path, "someone/tiny", files)
    opened = open_model("someone/tiny", cache_dir=cache, local_files_only=True)
    with pytest.raises(
        ValueError, match=r"no preprocessor_config\.json\. The Hub was not.*Or in Python pass image_processor="
    ):
        _ = opened.image_processor
    mark_as_missing(cache, "preprocessor_config.json")
    opened = open_model("someone/tiny", cache_dir=cache, local_files_only=True)
    assert opened.image_processor == PoolFormerImageProcessor.for_variant("s12")


def test_a_missing_model_is_reported_with_the_places_searched(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"'sail/poolformer_s12' is not a file or folder here, and not in the Hub's"
    ):
        load_pretrained("sail/poolformer_s12", cache_dir=tmp_path, local_files_only=True)
    for nowhere in (tmp_path / "model.pth", "s12", "folder/model.safetensors", "./some/model"):
        with pytest.raises(FileNotFoundError, match=r"There is no model at .*Hugging Face Hub"):
            load_pretrained(nowhere)
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[hub\]'"):
        load_pretrained("sail/poolformer_s12")
