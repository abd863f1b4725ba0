"""A cache, an image, and the page's service with the embedded model for small images."""

import numpy as np
import pytest
from PIL import Image
from small_nano import save_small_nano

from ifseg_hf.app.segmentation import PostProcessing
from ifseg_hf.app.service import Request, Service


@pytest.fixture(scope="session")
def small_nano(tmp_path_factory):
    return save_small_nano(tmp_path_factory.mktemp("nano") / "small", steps=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IFSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def service(small_nano):
    return Service(small_nano)


@pytest.fixture
def image_file(tmp_path):
    """The path of an image: blue above, green below."""
    pixels = np.zeros((90, 120, 3), np.uint8)
    pixels[:45] = (110, 160, 230)
    pixels[45:] = (60, 140, 50)
    pixels += np.random.default_rng(0).integers(0, 20, pixels.shape, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "field.png")
    return str(tmp_path / "field.png")


@pytest.fixture
def request_for(image_file):
    """A function that returns the request of a visitor."""

    def request_for(words="sky, grass", path=image_file, background=False, vocabulary="", **how):
        return Request(path, words, background, vocabulary, PostProcessing(**{"neighbors": 4, "iterations": 3, **how}))

    return request_for
