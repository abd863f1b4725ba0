"""The data of the viewer, progress, and the loss curve."""

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from ifseg_hf.app.pictures import loss_curve, mask_picture, message, progress_bar, viewer_data
from ifseg_hf.app.segmentation import PostProcessing, segment_image
from ifseg_hf.app.tuning_run import Progress


def decoded(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_the_viewer_has_word_and_probability_of_each_pixel(service, image_file):
    image = Image.open(image_file).convert("RGB")
    words = [f"word {i}" for i in range(300)] + ["sky", "grass"]
    kept = segment_image(service.models, service.start, image, image_file, words, None, False)
    how = PostProcessing(4, 3, 0.5)
    data = viewer_data(kept, how)
    labels, best, likely = kept.label_map(how)
    red, green, blue = np.moveaxis(np.asarray(decoded(data["probe"])).astype(int), -1, 0)
    assert np.array_equal(red + 256 * (green & 127), best)
    assert np.array_equal(green >= 128, labels < 0)
    assert np.abs(blue / 255 - likely).max() <= 0.5 / 255 + 1e-6
    assert data["names"] == words
    assert decoded(data["overlay"]).size == decoded(data["mask"]).size == image.size
    shown = {item["name"] for item in data["legend"]}
    assert shown == {words[i] for i in np.unique(labels[labels >= 0])}
    assert data["summary"].endswith("without a word")
    for item in data["legend"]:
        where = labels == words.index(item["name"])
        color = np.asarray(decoded(data["mask"]).convert("RGB"))[where]
        assert {"#%02x%02x%02x" % tuple(pixel) for pixel in color} == {item["color"]}  # noqa: UP031


def test_masks_are_black_without_a_word():
    labels = np.array([[0, 1], [-1, 1]])
    for names in (["sky", "grass"], [f"word {i}" for i in range(300)]):
        pixels = np.asarray(mask_picture(labels, names).convert("RGB"))
        assert pixels[1, 0].tolist() == [0, 0, 0]
        assert pixels[0, 1].tolist() == pixels[1, 1].tolist() != pixels[0, 0].tolist()


def test_messages_are_escaped():
    assert message("a < b", "<script>") == '<p class="message" role="status">a &lt; b &lt;script&gt;</p>'
    assert 'class="message error" role="alert"' in message("no", error=True)
    assert message("", "") == ""


@pytest.mark.parametrize("count", [2, 7, 40])
def test_the_loss_curve_spans_all_steps(count):
    losses = np.linspace(3, 1, count).tolist()
    figure = ElementTree.fromstring(loss_curve(losses, 40))
    assert figure.get("aria-label") == f"Loss of the first {count} of 40 steps: from 3.000 to 1.000."
    each, mean = figure.findall("polyline")
    points = [tuple(map(float, point.split(","))) for point in each.get("points").split()]
    assert len(points) == count
    assert points == sorted(points)  # the loss falls: y grows with x
    assert all(44 <= x <= 352 and 8 <= y <= 136 for x, y in points)
    assert (points[-1][0] == 352) == (count == 40)
    assert mean.get("points").split()[-1].split(",")[0] == each.get("points").split()[-1].split(",")[0]


def test_progress_says_step_loss_and_time_left():
    assert "aria-label" in progress_bar(Progress(0, 20), "Loading the model ...")
    shown = progress_bar(Progress(5, 20, [3.0, 2.5, 2.0, 1.5, 1.25], 8.0))
    assert '<progress aria-label="Tuning" value="5" max="20">' in shown
    assert "Step 5 of 20, loss 1.250, about 30 s left" in shown
    assert "<svg" in shown
    assert loss_curve([1.0], 20) == ""
    assert "about 10 min left" in progress_bar(Progress(2, 12, [1.0, 1.0], 60.0))
