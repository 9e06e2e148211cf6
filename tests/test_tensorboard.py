"""TensorBoard in a real browser: what its pages show after a run. Skipped without Chromium, ChromeDriver and selenium.

python -m pytest tests/test_tensorboard.py --screenshots FOLDER also leaves a picture of every page.
"""

import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import SCRIPTS, wait_until
from torch.utils.tensorboard import SummaryWriter

from runs import completion_table

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs Chromium and ChromeDriver"
)

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--enable-unsafe-swiftshader"]
# All text that can be seen, that inside of web components too.
VISIBLE_TEXT = """
    function text(node) {
        if (node.nodeType == Node.TEXT_NODE) return node.textContent;
        if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.tagName)) return '';
        const children = node.shadowRoot ? [...node.shadowRoot.childNodes, ...node.childNodes] : [...node.childNodes];
        return children.map(text).join(' ');
    }
    return text(document.body);
"""
HOSTILE = "<img src=x onerror=\"document.title='run by the browser'\">[link](javascript:alert(1)) | **bold** `code`"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """TensorBoard, serving a GRPO and an ES run."""
    folder = tmp_path_factory.mktemp("logs")
    for name, script in SCRIPTS.items():
        run = script.train(folder / name / "run")
    with SummaryWriter(run) as writer:
        writer.add_text("completions", completion_table([{"prompt": HOSTILE, "answer": "7"}], [HOSTILE]), 10)
    arguments = [f"--logdir_spec=grpo:{folder / 'grpo'},es:{folder / 'es'}", "--port=0"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *arguments], stderr=log)
    try:
        wait_until(lambda: "http://localhost" in (folder / "log").read_text(), server)
        yield re.search(r"http://localhost:\d+", (folder / "log").read_text())[0]
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1400,1400"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser, address, page, *expected, screenshots=None):
    """The text of a page, once all that is expected is in it."""
    browser.get(f"{address}/#{page}")
    browser.refresh()
    limit = time.monotonic() + 30
    while True:
        text = " ".join(browser.execute_script(VISIBLE_TEXT).split())
        missing = [words for words in expected if words not in text]
        if not missing or time.monotonic() > limit:
            break
        time.sleep(0.2)
    if screenshots:
        time.sleep(2)  # curves are drawn last
        browser.save_screenshot(f"{screenshots}/{page}.png")
    assert not missing, text[-2000:]
    return text


@pytest.fixture
def screenshots(request):
    return request.config.getoption("--screenshots")


def test_first_page_begins_with_accuracy_of_all_runs_and_accuracy_by_tokens(address, browser, screenshots):
    runs = ["grpo/run", "es/run", "grpo/run/by_tokens", "es/run/by_tokens"]
    tags = ["accuracy /lenient", "accuracy /strict", "by_tokens /lenient_accuracy", "by_tokens /strict_accuracy"]
    text = show(browser, address, "timeseries", *runs, *tags, screenshots=screenshots)
    assert text.index(tags[0]) < text.index(tags[3]) < text.index("completion 4 cards")


def test_scalars_are_grouped(address, browser, screenshots):
    groups = "accuracy by_tokens completion es eval optim policy progress reward throughput time".split()
    text = show(browser, address, "scalars", "tag: by_tokens/strict_accuracy", "throughput", screenshots=screenshots)
    text = re.sub(r"Page of \d+", "", text[text.index("Filter tags") :])
    headings = re.findall(r" (\w+) \d+(?= )", f"{text} ")
    assert headings == groups


def test_completions_come_first_and_hostile_ones_are_shown_as_they_are(address, browser, screenshots):
    expected = ["completions/text_summary", HOSTILE, "config/text_summary", "<answer>", "✓", "✗"]
    text = show(browser, address, "text", *expected, screenshots=screenshots)
    assert text.index("completions/text_summary") < text.index("config/text_summary")
    assert browser.title == "TensorBoard"


def test_hyperparameters_that_differ_come_first(address, browser, screenshots):
    text = show(browser, address, "hparams", "learning_rate", "grpo/run", "es/run", screenshots=screenshots)
    assert text.index("learning_rate") < text.index("antithetic")  # which only one of them has
