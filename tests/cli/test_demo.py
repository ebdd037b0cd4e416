"""The demo page shows the labels and the Grad-CAM overlay of a picture, in a browser."""

import argparse
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from paths import ROOT
from poolformer_jax.cli import demo, main
from poolformer_jax.cli.demo_page import build_page, class_choices
from poolformer_jax.inference.classifier import ImageClassifier
from poolformer_jax.inference.grad_cam import GradCam
from poolformer_jax.weights import save_pretrained
from small_networks import CONFIG, IMAGES, MODEL, PROCESSOR, VARIABLES

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@pytest.fixture
def classifier():
    return ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=1)


@pytest.fixture
def address(tmp_path):
    """The address at which `python -m poolformer_jax demo` serves the page, until Ctrl-C."""
    pytest.importorskip("gradio")
    save_pretrained(tmp_path / "model", MODEL, VARIABLES, image_processor=PROCESSOR)
    (tmp_path / "examples").mkdir()
    small = np.random.default_rng(0).integers(0, 2**16, (8, 8), dtype=np.uint16)
    Image.fromarray(small).save(tmp_path / "examples" / "grey.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "poolformer_jax", "demo", "--weights", str(tmp_path / "model"), "--port", port]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
    root = ROOT
    server = subprocess.Popen(command, env=environment, cwd=root, text=True, stdout=subprocess.PIPE)
    try:
        started = next((line for line in server.stdout if "http://" in line), "")
        assert f"http://127.0.0.1:{port}" in started
        yield f"http://127.0.0.1:{port}/"
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
        assert server.returncode == 0
    finally:
        server.kill()
        server.stdout.close()
        server.wait()


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,900"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.implicitly_wait(60)
    yield driver
    driver.quit()


def size_of(browser, selector):
    """Width and height of a picture's pixels, and of its place on the page."""
    script = "const e = document.querySelector(arguments[0]); return e && "
    script += "[e.naturalWidth, e.naturalHeight, e.clientWidth, e.clientHeight]"
    return browser.execute_script(script, selector)


def test_the_page_shows_labels_and_overlay_of_pictures_and_refuses_large_files(browser, address, classifier, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def wait(condition):
        WebDriverWait(browser, 60).until(lambda _: condition())

    photograph = IMAGES / "chelsea.jpg"
    expected = classifier(photograph, top_k=3)
    browser.get(address)

    too_large = tmp_path / "large.png"
    with too_large.open("wb") as file:
        file.truncate(51 * 2**20)
    upload = "#picture input[type=file]"
    find(upload).send_keys(str(too_large))
    wait(lambda: 'exceed the maximum allowed size of 50.0 Mb: "large.png"' in find("body").text)

    grey = classifier(tmp_path / "examples" / "grey.png", top_k=1)[0]
    grey_shown = f"{grey.label}\n{round(100 * grey.probability)}%"
    labels = find("#labels")
    find(upload).send_keys(str(tmp_path / "examples" / "grey.png"))
    wait(lambda: grey_shown in labels.text)
    find("#picture button[aria-label='Remove Image']").click()
    wait(lambda: grey_shown not in labels.text)

    find(upload).send_keys(str(photograph))
    wait(lambda: expected[0].label in labels.text)
    for label, probability in expected:
        assert label in labels.text
        assert f"{round(100 * probability)}%" in labels.text
    wait(lambda: size_of(browser, "#overlay img")[:2] == [192, 192])  # 3 x 64
    before = find("#overlay img").get_attribute("src")

    def options():
        found = browser.find_elements(By.CSS_SELECTOR, "[role=option]")
        return {option.text.strip("\u2713 \n"): option for option in found}

    find("#label input").click()
    wait(lambda: set(options()) == {"the most probable label", *classifier.id2label.values()})
    options()[expected[1].label].click()
    wait(lambda: find("#overlay img").get_attribute("src") != before)

    find("#samples button").click()
    wait(lambda: grey_shown in labels.text)
    for picture in ("#picture img", "#overlay img"):  # 8 x 8 pixels, and 192 x 192, enlarged
        assert min(size_of(browser, picture)[2:]) > 200

    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


# gradio leaves event loops open, which Python reports when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_the_page_reads_the_uploaded_file_itself_and_reports_a_damaged_one(classifier, tmp_path):
    gradio = pytest.importorskip("gradio")
    grey = tmp_path / "grey.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (70, 80), dtype=np.uint16)).save(grey)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    page = build_page(classifier, GradCam(CONFIG, VARIABLES, PROCESSOR), "title", 3)
    picture = next(block for block in page.blocks.values() if getattr(block, "elem_id", "") == "picture")
    look = next(iter(page.fns.values())).fn
    upload = picture.preprocess(gradio.image_utils.ImageData(path=str(grey), orig_name="grey.png"))
    labels, most_probable = look(upload, -1)
    assert labels == dict(classifier(grey, 3))
    np.testing.assert_array_equal(most_probable, GradCam(CONFIG, VARIABLES, PROCESSOR)(grey).overlay(224))
    np.testing.assert_array_equal(look(upload, 2)[1], GradCam(CONFIG, VARIABLES, PROCESSOR)(grey, 2).overlay(224))
    with pytest.raises(gradio.Error) as error:
        look(picture.preprocess(gradio.image_utils.ImageData(path=str(damaged), orig_name="damaged.png")), -1)
    assert not error.value.print_exception
    gc.collect()  # while the warnings are ignored


def test_pictures_to_try_are_those_of_the_run_or_of_a_given_folder(tmp_path):
    for folder in ("run/model", "run/examples", "other"):
        (tmp_path / folder).mkdir(parents=True)
    arguments = argparse.Namespace(weights=str(tmp_path / "run/model"), samples=None)
    assert demo.pictures_to_try(arguments) == []
    for name in ("run/examples/b.png", "run/examples/notes.txt", "other/a.jpg"):
        (tmp_path / name).touch()
    assert demo.pictures_to_try(arguments) == [tmp_path / "run/examples/b.png"]
    arguments.samples = str(tmp_path / "other")
    assert demo.pictures_to_try(arguments) == [tmp_path / "other/a.jpg"]


def test_the_demo_computes_with_the_runtime_that_is_asked_for(tmp_path, monkeypatch):
    save_pretrained(tmp_path / "model", MODEL, VARIABLES, image_processor=PROCESSOR)
    options = {}
    monkeypatch.setattr("poolformer_jax.inference.ImageClassifier", lambda *_, **given: options.update(given))
    monkeypatch.setattr("poolformer_jax.inference.GradCam", lambda *_: None)
    monkeypatch.setattr("poolformer_jax.cli.demo_page.build_page", lambda *_, **__: None)
    monkeypatch.setattr("poolformer_jax.cli.demo_page.serve", lambda *_: None)
    assert main(["demo", "--weights", str(tmp_path / "model"), "--runtime", "openvino"]) == 0
    assert options["runtime"] == "openvino"


def test_classes_with_the_same_name_are_told_apart_by_their_index():
    assert class_choices({0: "crane", 1: "cat", 2: "crane"}) == [("crane (0)", 0), ("cat", 1), ("crane (2)", 2)]


def test_missing_gradio_is_reported_with_its_extra(classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[demo\]'"):
        build_page(classifier, GradCam(CONFIG, VARIABLES, PROCESSOR), "title")
