"""`embed` writes the features of images in three formats, in order; and options of several commands."""

import io
import os
import shutil

import numpy as np
import pytest

from poolformer_jax import ImageEmbedder, PoolFormerImageProcessor, __version__, save_pretrained
from poolformer_jax.cli import main
from small_networks import IMAGES, TWO_STAGES, random_variables

PROCESSOR = PoolFormerImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, crop_pct=None)
CAT, COFFEE = str(IMAGES / "chelsea.jpg"), str(IMAGES / "coffee.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, *random_variables(TWO_STAGES), image_processor=PROCESSOR)
    return str(folder)


@pytest.fixture(scope="module")
def expected(folder):
    return [result.features for result in ImageEmbedder.from_pretrained(folder)([CAT, COFFEE])]


def embed(folder, output, *arguments):
    return main(["embed", "--weights", folder, "--output", str(output), CAT, "missing.jpg", COFFEE, *arguments])


def test_npz_holds_names_features_and_feature_maps_without_unreadable_images(folder, expected, tmp_path, capsys):
    assert embed(folder, tmp_path / "a.npz", "--feature-maps") == 1
    said = capsys.readouterr()
    assert "error: missing.jpg: There is no image file" in said.err
    assert "2 of 3 images, 12 features each" in said.out
    with np.load(tmp_path / "a.npz") as written:
        assert written["images"].tolist() == [CAT, COFFEE]
        np.testing.assert_allclose(written["features"], expected, rtol=1e-5, atol=1e-6)
        assert [written[f"stage_{index}"].shape for index in range(2)] == [(2, 8, 8, 8), (2, 4, 4, 12)]


def test_npy_keeps_a_row_for_an_unreadable_image(folder, expected, tmp_path, capsys):
    assert embed(folder, tmp_path / "\x1b[31ma.npy") == 1
    assert r"\x1b[31ma.npy: 2 of 3 images" in capsys.readouterr().out
    written = np.load(tmp_path / "\x1b[31ma.npy")
    assert np.isnan(written[1]).all()
    np.testing.assert_allclose(written[[0, 2]], expected, rtol=1e-5, atol=1e-6)


def test_parquet_holds_a_row_for_every_readable_image(folder, expected, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    latin1 = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    shutil.copy(COFFEE, latin1)
    assert embed(folder, tmp_path / "a.parquet", str(latin1)) == 1
    rows = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert rows["image"] == [CAT, COFFEE, rf"{tmp_path}/caf\xe9.jpg"]
    np.testing.assert_allclose(rows["features"], [*expected, expected[1]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "a.txt"], r"expected a file that ends in .npz, .npy, .parquet"),
        (["--output", "a.npy", "--feature-maps"], r".npy holds only pooled features"),
    ],
)
def test_another_output_is_refused_before_anything_is_computed(capsys, arguments, message):
    assert main(["embed", CAT, "--weights", "nowhere", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_nothing_is_written_if_no_image_can_be_read(folder, tmp_path, capsys):
    assert main(["embed", "missing.jpg", "--weights", folder, "--output", str(tmp_path / "a.npz")]) == 1
    assert "No image could be read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_predict_writes_csv_for_names_on_stdin_and_for_subfolders(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "photographs" / "inner").mkdir(parents=True)
    shutil.copy(CAT, tmp_path / "photographs" / "inner" / "cat, grey.jpg")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{COFFEE}\n"))
    arguments = ["-", str(tmp_path / "photographs"), "--recursive", "--csv", "--top-k", "1", "--weights", folder]
    assert main(["predict", *arguments]) == 0
    header, coffee, cat = capsys.readouterr().out.splitlines()
    assert header == "image,rank,label,probability"
    assert coffee.startswith(f"{COFFEE},1,class ")
    assert cat.startswith(f'"{tmp_path}/photographs/inner/cat, grey.jpg",1,class ')


@pytest.mark.parametrize("command", [["predict", CAT], ["cam", CAT], ["embed", CAT, "--output", "a.npz"]])
def test_a_model_on_the_hub_is_looked_for_in_the_given_cache(command, tmp_path, capsys):
    pytest.importorskip("huggingface_hub")
    hub = ["--weights", "someone/tiny", "--cache-dir", str(tmp_path), "--revision", "v1", "--local-files-only"]
    assert main([*command, *hub]) == 1
    assert "not in the Hub's cache" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"poolformer-jax {__version__}\n"


@pytest.mark.parametrize("command", [["predict"], ["embed", "--output", "a.npz"]])
def test_no_image_on_standard_input_is_an_error(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main([*command, "-"]) == 1
    assert "No image was given: standard input is empty." in capsys.readouterr().err
