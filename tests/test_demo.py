"""The demo page works in a browser: a picture goes in, labels and the Grad-CAM overlay come out."""

import shutil
import sys

import pytest

from poolformer_jax.cam import GradCam
from poolformer_jax.demo import build_page, serve
from poolformer_jax.inference import ImageClassifier
from test_inference import CONFIG, IMAGES, PROCESSOR, VARIABLES

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")

# gradio and its web server warn about their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def classifier():
    return ImageClassifier(CONFIG, VARIABLES, PROCESSOR, batch_size=1)


@pytest.fixture
def address(classifier, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = build_page(classifier, GradCam(CONFIG, VARIABLES, PROCESSOR), "PoolFormer: a test", top_k=3)
    yield serve(page, "127.0.0.1", wait=False)
    page.close()


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


def test_a_picture_dropped_on_the_page_shows_its_labels_and_what_speaks_for_them(
    address, browser, classifier, tmp_path
):
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


def test_a_missing_gradio_is_named_with_its_extra(classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'poolformer-jax\[demo\]'"):
        build_page(classifier, GradCam(CONFIG, VARIABLES, PROCESSOR), "title")
