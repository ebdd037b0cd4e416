"""The demo page shows the labels and the Grad-CAM overlay of a picture, in a browser."""

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
from poolformer_jax.cli.demo_page import build_page
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


def test_a_dropped_picture_shows_its_labels_and_overlay(browser, address, classifier):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    photograph = IMAGES / "chelsea.jpg"
    expected = classifier(photograph, top_k=3)
    browser.get(address)
    browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(photograph))
    labels = browser.find_element(By.CSS_SELECTOR, "#labels")
    WebDriverWait(browser, 60).until(lambda _: expected[0].label in labels.text)
    for label, probability in expected:
        assert label in labels.text
        assert f"{round(100 * probability)}%" in labels.text
    overlay = browser.find_element(By.CSS_SELECTOR, "#overlay img")
    size = "return [arguments[0].naturalWidth, arguments[0].naturalHeight]"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(size, overlay) == [192, 192])  # 3 x 64
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
    labels = look(picture.preprocess(gradio.image_utils.ImageData(path=str(grey), orig_name="grey.png")))[0]
    assert labels == dict(classifier(grey, 3))
    with pytest.raises(gradio.Error) as error:
        look(picture.preprocess(gradio.image_utils.ImageData(path=str(damaged), orig_name="damaged.png")))
    assert not error.value.print_exception
    gc.collect()  # while the warnings are ignored


def test_missing_gradio_is_reported_with_its_extra(classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[demo\]'"):
        build_page(classifier, GradCam(CONFIG, VARIABLES, PROCESSOR), "title")
