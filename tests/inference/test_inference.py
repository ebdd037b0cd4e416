"""ImageClassifier gives the network's labels in order, with few compilations, and continues after bad images."""

import dataclasses
import os
import pickle
import threading

import jax
import jax.monitoring
import numpy as np
import pytest
from PIL import Image

from poolformer_jax import (
    ImageEmbedder,
    PoolFormerConfig,
    PoolFormerImageProcessor,
    WeightsMismatch,
)
from poolformer_jax.images import ImageError, imagenet_labels, imagenet_wordnet_ids
from poolformer_jax.inference.classifier import ImageClassifier
from poolformer_jax.inference.cost_operations import parameter_shapes
from poolformer_jax.weights import default_image_processor, save_pretrained
from small_networks import CONFIG, LABELS, MODEL, PHOTOGRAPHS, PROCESSOR, VARIABLES, random_variables


@pytest.fixture(scope="module")
def classifier():
    return ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=16)


@pytest.fixture
def compilations():
    """Counts the programs compiled while the test runs."""
    count = []
    listener = lambda event, *_, **__: count.append(event) if event.endswith("backend_compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield count
    jax.monitoring.unregister_event_duration_listener(listener)


def decode_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def random_images(number, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), np.uint8) for _ in range(number)]


apply = jax.jit(MODEL.apply)  # one by one, its operations take much longer to compile


def expected_probabilities(images):
    pixels = PROCESSOR.preprocess(images)["pixel_values"]
    return np.asarray(jax.nn.softmax(apply(VARIABLES, pixels).logits))


@pytest.mark.parametrize("fold_parameters", [True, False])
def test_probabilities_are_the_softmax_of_the_models_logits(fold_parameters):
    classifier = ImageClassifier(CONFIG, VARIABLES, PROCESSOR, fold_parameters=fold_parameters)
    expected = expected_probabilities(PHOTOGRAPHS)
    results = classifier(PHOTOGRAPHS, top_k=7)
    assert len({result[0].label for result in results}) > 1
    for result, probabilities in zip(results, expected, strict=True):
        assert [label for label, _ in result] == [LABELS[i] for i in np.argsort(-probabilities, stable=True)]
        np.testing.assert_allclose([p for _, p in result], np.sort(probabilities)[::-1], atol=1e-5)


def test_labels_of_a_multi_label_network_have_independent_probabilities():
    config = dataclasses.replace(CONFIG, problem_type="multi_label_classification")
    classifier = ImageClassifier(config, VARIABLES, PROCESSOR, batch_size=1, id2label=[f"name {i}" for i in range(7)])
    (image,) = random_images(1)
    logits = apply(VARIABLES, PROCESSOR(image)["pixel_values"]).logits[0]
    found = {prediction.label: prediction.probability for prediction in classifier(image, top_k=7)}
    np.testing.assert_allclose([found[f"name {i}"] for i in range(7)], jax.nn.sigmoid(logits), atol=1e-6)
    with pytest.raises(ValueError, match=r"problem_type='regression' .*is a regression, which has no probabilities"):
        ImageClassifier(dataclasses.replace(CONFIG, problem_type="regression"), VARIABLES, PROCESSOR)


def test_one_image_gives_one_list_and_several_give_a_list_of_lists(classifier):
    one = classifier(PHOTOGRAPHS[0], top_k=2)
    assert len(one) == 2
    assert one[0].label in LABELS.values()
    assert one[0].probability >= one[1].probability
    assert classifier(Image.open(PHOTOGRAPHS[0]), top_k=2) == one
    assert classifier([PHOTOGRAPHS[0]], top_k=2) == [one]
    assert len(classifier(PHOTOGRAPHS[0], top_k=100)) == 7
    assert classifier([]) == []


@pytest.mark.slow
def test_a_mixed_stream_stays_in_order_and_compiles_a_bounded_number_of_programs(compilations):
    images = random_images(150)
    classifier = ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=32)
    expected = np.argmax(expected_probabilities(images), -1)
    list(classifier.stream(images[:1]))
    before = len(compilations)
    for number in (1, 2, 5, 9, 33, 40, 64, 97, 150):
        results = classifier(images[:number], top_k=1)
        assert [result[0].label for result in results] == [LABELS[index] for index in expected[:number]]
    assert classifier.batch_sizes == (1, 8, 32)
    assert len(compilations) - before <= len(classifier.batch_sizes) - 1


@pytest.mark.parametrize("kind", [ImageClassifier, ImageEmbedder])
def test_after_warm_up_no_batch_compiles(kind, compilations):
    classifier = kind(CONFIG, VARIABLES, PROCESSOR, batch_size=4, devices=jax.devices()[:1])
    classifier.warm_up()
    before = len(compilations)
    assert before >= len(classifier.batch_sizes) == 2
    for size in classifier.batch_sizes:
        classifier(random_images(size))
    assert len(compilations) == before


def test_a_classifier_shows_its_network(classifier):
    assert repr(classifier) == (
        "ImageClassifier(depths (1, 1, 1, 1), hidden sizes (8, 8, 16, 16), 7 labels, batches of 16)"
    )


def test_batch_sizes_are_multiples_of_the_devices_and_end_at_the_largest():
    make = lambda size, devices: ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=size, devices=devices)  # noqa: E731
    assert make(32, jax.devices()[:1]).batch_sizes == (1, 4, 16, 32)
    assert make(1, jax.devices()[:1]).batch_sizes == (1,)
    assert make(30, jax.devices()[:4]).batch_sizes == (1, 4, 16, 32)
    assert make(2, jax.devices()[:4]).batch_sizes == (1, 4)
    assert make(1, jax.devices()[:4]).batch_sizes == (1,)
    assert make(30, jax.devices()[:3]).batch_sizes == (1, 3, 12, 30)


def test_every_device_computes_its_share_of_a_batch(classifier):
    assert jax.local_device_count() == 8
    program = classifier._images.program
    probabilities = program([PROCESSOR.resize_and_crop(photograph) for photograph in PHOTOGRAPHS])
    assert len(PHOTOGRAPHS) < 8
    assert {shard.device for shard in probabilities.addressable_shards} == set(jax.local_devices())
    assert all(shard.data.shape == (1, 7) for shard in probabilities.addressable_shards)
    alone = ImageClassifier(CONFIG, VARIABLES, PROCESSOR, devices=jax.local_devices()[:1])
    for ours, theirs in zip(classifier(PHOTOGRAPHS), alone(PHOTOGRAPHS), strict=True):
        assert [prediction.label for prediction in ours] == [prediction.label for prediction in theirs]


def test_the_first_of_several_cpu_devices_computes_a_single_image():
    first, *_ = jax.local_devices()
    image, found = PROCESSOR.resize_and_crop(PHOTOGRAPHS[0]), []
    for batch_size in (1, 16):
        program = ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=batch_size)._images.program
        probabilities = program([image])
        assert probabilities.sharding.device_set == {first}
        found.append(probabilities[0])
    np.testing.assert_allclose(found, [program([image] * 2)[0]] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    "axis_types", [jax.sharding.AxisType.Explicit, pytest.param(jax.sharding.AxisType.Auto, marks=pytest.mark.slow)]
)
def test_a_mesh_set_by_the_caller_has_no_effect(classifier, axis_types):
    expected = classifier(PHOTOGRAPHS)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(axis_types,), devices=jax.devices()[:2])):
        inside = ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=16)
        assert inside(PHOTOGRAPHS) == classifier(PHOTOGRAPHS) == expected
        assert inside(PHOTOGRAPHS[0]) == classifier(PHOTOGRAPHS[0])


def test_a_bad_image_is_an_error_in_its_place_and_the_others_are_classified(classifier):
    images = [*PHOTOGRAPHS[:2], "missing.jpg", *PHOTOGRAPHS[2:], b"nonsense", object()]
    results = classifier(images)
    assert [index for index, result in enumerate(results) if isinstance(result, ImageError)] == [2, 7, 8]
    assert "missing.jpg" in str(results[2])
    assert [result for result in results if isinstance(result, list)] == classifier(PHOTOGRAPHS)
    assert all(isinstance(result, ImageError) for result in classifier([b"", "nowhere.png"]))
    with pytest.raises(ImageError, match=r"missing\.jpg"):
        classifier("missing.jpg")


def test_weights_that_are_no_numbers_give_an_error_instead_of_labels():
    broken = jax.tree.map(lambda leaf: leaf * np.nan, VARIABLES)
    classifier = ImageClassifier(CONFIG, broken, PROCESSOR, batch_size=1)
    for classify in (classifier, lambda image: list(classifier.stream([image]))):
        with pytest.raises(ValueError, match=r"no numbers\. Expected finite weights"):
            classify(PHOTOGRAPHS[0])


def test_a_stream_is_read_lazily_and_its_threads_end(classifier):
    taken = []

    def endless():
        while True:
            taken.append(None)
            yield np.zeros((64, 64, 3), np.uint8)

    stream = classifier.stream(endless(), top_k=1)
    for _ in range(3):
        next(stream)
    assert len(taken) <= 3 * classifier.batch_sizes[-1] + 1
    stream.close()
    assert not decode_threads()


def test_threads_decode_the_next_batch_while_devices_compute(classifier):
    decoded_by = {}

    class Photograph:
        def __fspath__(self):
            decoded_by[self] = threading.current_thread().name
            return str(PHOTOGRAPHS[0])

    size = classifier.batch_sizes[-1]
    stream = classifier.stream((Photograph() for _ in range(4 * size)), top_k=1)
    next(stream)
    assert len(decoded_by) >= 2 * size  # the first batch is computed while the second is decoded
    assert len(list(stream)) == 4 * size - 1
    assert len(decoded_by) == 4 * size
    assert all(name.startswith("decode") for name in decoded_by.values())


def test_an_exception_of_the_iterable_comes_after_the_results_before_it(classifier):
    def failing():
        yield from PHOTOGRAPHS * 4  # more than a batch
        raise RuntimeError("the camera is gone")

    stream = classifier.stream(failing())
    assert [next(stream) for _ in range(24)] == classifier(PHOTOGRAPHS * 4)
    with pytest.raises(RuntimeError, match="the camera is gone"):
        next(stream)
    assert not decode_threads()


def test_bfloat16_agrees_with_float32_to_its_precision(classifier):
    in_bfloat16 = ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=16, dtype="bfloat16")
    results = [classifier(PHOTOGRAPHS, 7), in_bfloat16(PHOTOGRAPHS, 7)]
    exact, rounded = (
        np.array([[dict(row)[label] for label in LABELS.values()] for row in result]) for result in results
    )
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=5 * 2**-8)  # a few roundings of 8 bits


def test_a_network_with_one_channel_classifies_colour_photographs():
    config = PoolFormerConfig(
        num_channels=1, depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16), num_labels=3, id2label=None
    )
    processor = PoolFormerImageProcessor(crop_size={"height": 64, "width": 64}, image_mean=(0.5,), image_std=(0.5,))
    results = ImageClassifier(config, random_variables(config)[1], processor)(PHOTOGRAPHS)
    assert {prediction.label for prediction in results[0]} == {"class 0", "class 1", "class 2"}


@pytest.mark.parametrize("layout", ["jax", "hf"])
def test_labels_and_preprocessing_are_loaded_from_the_folder(layout, classifier, tmp_path):
    save_pretrained(tmp_path, MODEL, VARIABLES, layout=layout, image_processor=PROCESSOR)
    loaded = ImageClassifier.from_pretrained(tmp_path, batch_size=16)
    assert loaded.image_processor == PROCESSOR
    assert loaded.id2label == LABELS
    assert loaded(PHOTOGRAPHS) == classifier(PHOTOGRAPHS)


def test_weights_without_preprocessing_get_that_of_their_published_variant_or_an_error(tmp_path):
    small = tmp_path / "small"
    save_pretrained(small, MODEL, VARIABLES)
    (small / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json.*pass image_processor="):
        ImageClassifier.from_pretrained(small)
    assert ImageClassifier.from_pretrained(small, image_processor=PROCESSOR).image_processor == PROCESSOR
    assert default_image_processor(PoolFormerConfig.from_variant("m36")).crop_pct == 0.95


def test_published_architectures_have_imagenets_class_names():
    labels, wordnet_ids = imagenet_labels(), imagenet_wordnet_ids()
    assert sorted(labels) == list(range(1000))
    assert list(wordnet_ids.values()) == sorted(set(wordnet_ids.values()))
    assert [wordnet_ids[label] for label in (0, 281, 517, 999)] == ["n01440764", "n02123045", "n03126707", "n15075141"]
    assert labels[0] == "tench, Tinca tinca"
    assert labels[281] == "tabby, tabby cat"
    assert labels[999] == "toilet tissue, toilet paper, bathroom tissue"
    config = PoolFormerConfig.from_variant("s12")
    zeros = {"params": jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), parameter_shapes(config))}
    one = jax.devices()[:1]
    published = ImageClassifier(config, zeros, PoolFormerImageProcessor(), fold_parameters=False, devices=one)
    assert published.id2label == labels
    other = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16))
    assert ImageClassifier(other, random_variables(other)[1], PROCESSOR).id2label[281] == "class 281"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"num_labels": 0, "id2label": None}, {}, "no head"),
        ({"num_labels": 1, "id2label": None}, {}, "problem_type=None with num_labels=1 is a regression"),
        ({"num_channels": 1}, {}, "3 channels and the network takes 1"),
        ({}, {"image_processor": PoolFormerImageProcessor(do_center_crop=False)}, "images of different sizes"),
        (
            {},
            {"image_processor": PoolFormerImageProcessor(crop_size={"height": 64, "width": 16})},
            "at least 32 pixels",
        ),
        ({"image_size": 96}, {}, r"images of \(64, 64\): expected 96 pixels"),
        (
            {"image_size": 64},
            {"image_processor": PoolFormerImageProcessor(crop_size={"height": 64, "width": 96})},
            r"images of \(64, 96\): expected 64 pixels",
        ),
        ({}, {"dtype": "int8"}, "dtype='int8': expected float32 or bfloat16"),
        ({}, {"dtype": "float"}, "dtype='float': expected float32 or bfloat16"),
        ({}, {"dtype": "float64"}, "or float64 with JAX_ENABLE_X64=1"),
        ({}, {"id2label": {0: "cat"}}, "a name for every index from 0 to num_labels - 1, but it has 1"),
        ({}, {"id2label": [*"abcdefgh"]}, "a name for every index from 0 to num_labels - 1, but it has 8"),
        (
            {},
            {"batch_size": 0, "decode_threads": 0},
            "batch_size=0, decode_threads=0: expected a whole number, at least 1",
        ),
        ({}, {"devices": []}, r"devices=\[\]: expected one device or more"),
        ({}, {"devices": jax.devices()[:1] * 2}, "each once"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(changes, options, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        ImageClassifier(config, VARIABLES, **{"image_processor": PROCESSOR, **options})


@pytest.mark.parametrize("fold_parameters", [True, False])
def test_weights_of_another_network_are_refused(fold_parameters):
    variables = {"params": {name: value for name, value in VARIABLES["params"].items() if name != "head"}}
    with pytest.raises(WeightsMismatch, match="missing: head/"):
        ImageClassifier(CONFIG, variables, PROCESSOR, fold_parameters=fold_parameters)


def test_pickling_a_classifier_says_what_to_do_instead(classifier):
    with pytest.raises(ValueError, match=r"ImageClassifier cannot be pickled\. Make one in each process"):
        pickle.dumps(classifier)


def test_top_k_below_one_is_refused(classifier):
    with pytest.raises(ValueError, match="top_k=0"):
        classifier.stream([], top_k=0)
    with pytest.raises(ValueError, match="top_k=-1"):
        classifier(PHOTOGRAPHS[0], top_k=-1)


@pytest.mark.parametrize(
    "image",
    ["cat.jpg", b"JFIF", np.zeros((64, 64, 3), np.uint8), {"image": "cat.jpg"}],
    ids=lambda image: type(image).__name__,
)
def test_a_single_image_is_not_a_stream_of_its_characters_or_rows(classifier, image):
    with pytest.raises(ValueError, match=rf"one image, of type {type(image).__name__}\. .*stream \[image\], or call"):
        classifier.stream(image)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("use", ["call", "stream", "new"])
def test_in_a_forked_process_a_classifier_says_so_instead_of_hanging(classifier, use):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            match use:
                case "call":
                    classifier(PHOTOGRAPHS[0])
                case "stream":
                    next(classifier.stream(PHOTOGRAPHS))
                case "new":
                    ImageClassifier(CONFIG, VARIABLES, PROCESSOR)
        except BaseException as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    assert f"used in process {os.getpid()}, and process {child} was forked from it" in message
    assert 'multiprocessing.get_context("spawn")' in message
    assert classifier(PHOTOGRAPHS[0])
