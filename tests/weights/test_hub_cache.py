"""Models come from the Hub's cache without the Hub, and one that is nowhere says where it was looked for."""

import shutil
import sys
from pathlib import Path

import pytest

from paths import TESTS
from poolformer_jax import PoolFormerConfig, load_pretrained
from poolformer_jax.inference.classifier import find_image_processor
from poolformer_jax.weights.source import WEIGHTS
from saved_models import LABELS, same

FIXTURES = TESTS / "fixtures"


def make_cache(folder, name, files, commit="0123456789abcdef0123456789abcdef01234567"):
    """The Hub's cache as huggingface_hub lays it out: files by their hash, and links to them for every commit."""
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
    _, from_file = load_pretrained(FIXTURES / "hf.bin")
    assert same(variables, from_file)


def test_a_revision_in_the_hubs_cache_is_the_one_that_is_loaded(tmp_path):
    cache = make_cache(tmp_path, "someone/tiny", sorted((FIXTURES / "hf_sharded").iterdir()))
    commit = "0123456789abcdef0123456789abcdef01234567"
    load_pretrained("someone/tiny", revision=commit, cache_dir=cache, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="not in the Hub's cache"):
        load_pretrained("someone/tiny", revision="v2", cache_dir=cache, local_files_only=True)


def test_what_the_cache_lacks_is_guessed_only_where_the_repository_is_known_to_lack_it(tmp_path):
    cache = make_cache(tmp_path, "someone/tiny", [FIXTURES / "hf_sharded" / "config.json"])
    offline = {"cache_dir": cache, "local_files_only": True}
    config = PoolFormerConfig.from_variant("m36")
    lacks = r"The Hub's cache of someone/tiny has no {}.*, and the Hub was not asked or cannot be reached\. Connect"
    with pytest.raises(FileNotFoundError, match=lacks.format(r"model\.safetensors or ")):
        load_pretrained("someone/tiny", **offline)
    with pytest.raises(ValueError, match=lacks.format(r"preprocessor_config\.json") + ".*Or pass image_processor="):
        find_image_processor("someone/tiny", config, **offline)
    # How huggingface_hub notes that the Hub, once asked, did not have a file.
    absent = cache / "models--someone--tiny" / ".no_exist" / "0123456789abcdef0123456789abcdef01234567"
    absent.mkdir(parents=True)
    for name in ("preprocessor_config.json", *WEIGHTS):
        (absent / name).touch()
    assert find_image_processor("someone/tiny", config, **offline).crop_pct == 0.95
    with pytest.raises(FileNotFoundError, match=r"^someone/tiny on the Hugging Face Hub holds no weights"):
        load_pretrained("someone/tiny", **offline)


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"'sail/poolformer_s12' is no file or folder here and not in the Hub's"
    ):
        load_pretrained("sail/poolformer_s12", cache_dir=tmp_path, local_files_only=True)
    for nowhere in (tmp_path / "model.pth", "s12", "folder/model.safetensors", "./some/model"):
        with pytest.raises(FileNotFoundError, match=r"There is no model at .*a name on the Hugging Face Hub such as"):
            load_pretrained(nowhere)
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'poolformer-jax\[hub\]'"):
        load_pretrained("sail/poolformer_s12")
