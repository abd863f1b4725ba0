"""The page `ifseg app` in Chromium, driven by Playwright. Skipped where Gradio, Playwright or Chromium is missing."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from page_process import ROOT, free_port, serve
from PIL import Image
from small_nano import save_small_nano

HELPERS = Path(__file__).parents[1] / "helpers"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-ui-for-media-stream --use-fake-device-for-media-stream"
)
TIMEOUT = 120_000  # milliseconds, long enough for a busy machine


@pytest.fixture(scope="session")
def page_server(tmp_path_factory):
    """The page with the embedded model for small images: `url`, and `calls()`, the number of calls of the model."""
    pytest.importorskip("gradio", reason="Gradio is not installed")
    folder = tmp_path_factory.mktemp("server")
    model = save_small_nano(folder / "nano", steps=10)
    calls, port = folder / "calls", free_port()
    calls.touch()
    own = {"IFSEG_CACHE": str(folder / "cache"), "GRADIO_TEMP_DIR": str(folder / "gradio"), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), str(HELPERS)])
    environment = {**os.environ, **own, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HELPERS / "serve_page.py"), str(calls), "--model", model, "--port", str(port)]
    url = f"http://127.0.0.1:{port}/"
    process = serve(command, environment, url)
    yield SimpleNamespace(url=url, calls=lambda: calls.read_text().count("\n"), cache=folder / "cache")
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture(scope="session")
def browser():
    """Chromium with a new profile."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium), or give its path as CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, page_server):
    """A function that opens the page for a new visitor. At the end: no request went to another host, no error."""
    contexts, requests, errors = [], [], []

    def open_page(width: int = 1280, height: int = 900, **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_server.url)
        page.wait_for_selector("#segment")
        return page

    yield open_page
    for context in contexts:
        context.close()
    elsewhere = [url for url in requests if not url.startswith((page_server.url, "data:", "blob:"))]
    assert elsewhere == []
    assert errors == []


@pytest.fixture
def image_file(tmp_path):
    """The path of an image of an astronaut before a flag."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    Image.fromarray(data.astronaut()).resize((320, 320)).save(tmp_path / "astronaut.jpg")
    return tmp_path / "astronaut.jpg"
