"""ImageClassifier in another runtime gives JAX's labels, from a file that is exported and compared once."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from poolformer_jax import ExportError, ImageClassifier, ImageEmbedder, pipeline
from poolformer_jax.cli import main
from poolformer_jax.images import ImageError
from poolformer_jax.inference import fold, runtimes
from poolformer_jax.weights import save_pretrained
from small_networks import CONFIG, FAMILY, MODEL, PHOTOGRAPHS, PROCESSOR, VARIABLES, random_variables

RUNTIMES = [runtime for runtime in runtimes.RUNTIMES if runtime != "jax"]


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """An empty cache, inside jax's."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "exported"
    jax.config.update("jax_compilation_cache_dir", before)


def test_without_a_compilation_cache_the_files_are_in_the_users_cache(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    ImageClassifier(CONFIG, VARIABLES, PROCESSOR, runtime="onnxruntime")
    assert len(list((tmp_path / "user" / "poolformer_jax" / "exported").glob("*.onnx"))) == 1


@pytest.fixture(scope="module")
def expected():
    return ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=4)(PHOTOGRAPHS, top_k=7)


def check_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [label for label, _ in ours] == [label for label, _ in theirs]
        np.testing.assert_allclose([p for _, p in ours], [p for _, p in theirs], rtol=0, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_labels_order_and_errors_are_those_of_jax(runtime, expected):
    if find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    classifier = ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=4, runtime=runtime)
    assert classifier.batch_sizes == (1, 4)
    results = list(classifier.stream([PHOTOGRAPHS[0], "missing.jpg", *PHOTOGRAPHS[1:]], top_k=7))
    assert isinstance(results.pop(1), ImageError)
    check_same(results, expected)
    check_same([classifier(PHOTOGRAPHS[0], top_k=7)], expected[:1])


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_the_pipeline_and_the_embedder_compute_what_they_compute_in_jax(runtime, cache, tmp_path):
    if find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    save_pretrained(tmp_path / "model", MODEL, VARIABLES, image_processor=PROCESSOR)

    def answers(runtime):
        options = {"batch_size": 2, "decode_threads": 1, "runtime": runtime}
        pipe = pipeline("image-classification", tmp_path / "model", function_to_apply="none", **options)
        embedder = ImageEmbedder(CONFIG, VARIABLES, PROCESSOR, **options)
        scores = [[row["score"] for row in rows] for rows in pipe(PHOTOGRAPHS)]
        return scores, [embedding.features for embedding in embedder(PHOTOGRAPHS)], embedder(PHOTOGRAPHS[0])

    (logits, features, one), expected = answers(runtime), answers("jax")
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features, expected[1], rtol=1e-4, atol=1e-5)
    assert one.feature_maps == ()
    ImageClassifier(CONFIG, VARIABLES, PROCESSOR, runtime=runtime)
    assert len(list(cache.iterdir())) == 2, "the classifier uses the pipeline's file"


@pytest.mark.parametrize(
    "runtime", ["openvino", *(pytest.param(name, marks=pytest.mark.slow) for name in ("jax", "onnxruntime"))]
)
def test_threads_that_share_a_classifier_each_get_the_answer_for_their_image(runtime):
    if find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    classifier = ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=4, runtime=runtime)
    images = [np.full((64, 64, 3), value, np.uint8) for value in (0, 80, 160, 240)]
    requests = [*images, *([image] * 4 for image in images)]
    expected = [classifier(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(classifier, requests * 12)) == expected * 12


@pytest.mark.slow
@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_networks_of_the_second_paper_and_independent_labels(problem_type):
    pytest.importorskip("onnxruntime")
    config = dataclasses.replace(FAMILY["caformer"], problem_type=problem_type)
    variables = random_variables(FAMILY["caformer"])[1]
    ours, expected = (
        ImageClassifier(config, variables, PROCESSOR, batch_size=1, runtime=runtime)(PHOTOGRAPHS[:1], top_k=7)
        for runtime in ("onnxruntime", "jax")
    )
    check_same(ours, expected)


def test_the_network_is_exported_and_compared_once_and_again_for_other_parameters_or_a_damaged_file(monkeypatch, cache):
    pytest.importorskip("onnxruntime")
    compared = []
    compare = runtimes.difference_from_network
    monkeypatch.setattr(
        runtimes, "difference_from_network", lambda *args, **options: compared.append(compare(*args, **options))
    )
    for _ in range(2):
        (cache / ".poolformer-jax-killed").mkdir(parents=True)
        ImageClassifier(CONFIG, VARIABLES, PROCESSOR, runtime="onnxruntime")
    assert len(compared) == 1 and 0 < compared[0] < 1e-5
    other = jax.tree.map(lambda leaf: leaf * 1.01, VARIABLES)
    ImageClassifier(CONFIG, other, PROCESSOR, runtime="onnxruntime")
    ImageClassifier(CONFIG, VARIABLES, dataclasses.replace(PROCESSOR, image_mean=(0.5,) * 3), runtime="onnxruntime")
    assert len(compared) == len(list(cache.iterdir())) == 3
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    for _ in range(2):
        ImageClassifier(CONFIG, other, PROCESSOR, runtime="onnxruntime")
    assert len(compared) == 4


def test_a_runtime_that_computes_other_logits_is_not_used_and_not_cached(monkeypatch, cache):
    pytest.importorskip("onnxruntime")
    wrong = lambda config, variables: jax.tree.map(lambda leaf: leaf * 1.1, fold(config, variables))  # noqa: E731
    monkeypatch.setattr(runtimes, "fold", wrong)
    with pytest.raises(ExportError, match="computes other logits"):
        ImageClassifier(CONFIG, VARIABLES, PROCESSOR, runtime="onnxruntime")
    assert not list(cache.iterdir())


def test_unknown_runtimes_options_of_jax_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"runtime='tensorrt'\. Expected one of jax, openvino, onnxruntime"):
        ImageClassifier(CONFIG, VARIABLES, PROCESSOR, runtime="tensorrt")
    with pytest.raises(ValueError, match=r"Expected no devices, dtype, or runtime='jax'"):
        ImageClassifier(
            CONFIG, VARIABLES, PROCESSOR, runtime="onnxruntime", dtype="bfloat16", devices=jax.local_devices()[:1]
        )
    with pytest.raises(ValueError, match=r"Expected no feature_maps, or runtime='jax'"):
        ImageEmbedder(CONFIG, VARIABLES, PROCESSOR, runtime="onnxruntime", feature_maps=True)
    monkeypatch.setattr(runtimes, "import_runtime", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install onnxruntime onnx; or use runtime='jax'"):
        ImageClassifier(CONFIG, VARIABLES, PROCESSOR, runtime="onnxruntime")


def missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}")


def test_predict_takes_the_runtime(tmp_path, capsys, expected):
    pytest.importorskip("onnxruntime")
    save_pretrained(tmp_path / "model", MODEL, VARIABLES, image_processor=PROCESSOR)
    weights = ["--weights", str(tmp_path / "model"), "--top-k", "1", "--runtime", "onnxruntime"]
    assert main(["predict", str(PHOTOGRAPHS[0]), *weights]) == 0
    assert expected[0][0].label in capsys.readouterr().out
