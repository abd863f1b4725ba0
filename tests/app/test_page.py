"""The page in a browser, as a visitor uses it."""

import itertools
import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

WORDS = "woman, flag"
READOUT = r"^(woman|flag), \d+ %$"


def upload(page, file):
    page.set_input_files("#image input[type=file]", str(file))
    page.wait_for_selector("#image img")


def type_words(page, words):
    page.fill("#words textarea, #words input", words)


def wait_for_mask(page):
    page.wait_for_selector("#viewer .viewer:not(.empty)")
    page.wait_for_function("document.querySelector('#viewer .mask img').naturalWidth > 0")


def segmented(page, image_file, words=WORDS):
    """The page with a segmented image."""
    type_words(page, words)
    upload(page, image_file)
    wait_for_mask(page)
    return page


def hover(page, kind, x, y):
    """The text beside the pointer over a picture, at shares of its width and height."""
    image = page.locator(f"#viewer .{kind} img")
    image.scroll_into_view_if_needed()
    for _ in range(50):  # the map of words is decoded after the picture is shown
        box = image.bounding_box()
        page.mouse.move(box["x"] + x * box["width"] - 1, box["y"] + y * box["height"])
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        tip = page.locator(f"#viewer .{kind} .tip")
        if tip.is_visible():
            return tip.inner_text()
        page.wait_for_timeout(100)
    raise AssertionError("no text beside the pointer")


def word_at(page, x, y):
    """The word whose colour in the legend the mask has at shares of its width and height."""
    color = page.locator("#viewer .mask img").evaluate(
        """(image, [x, y]) => {
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          const place = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
          return `rgb(${[...context.getImageData(...place, 1, 1).data.slice(0, 3)].join(", ")})`;
        }""",
        [x, y],
    )
    for item in page.locator("#viewer .legend li:not(.rest)").all():
        if item.locator(".swatch").evaluate("x => x.style.backgroundColor") == color:
            return item.locator("span").nth(1).inner_text()
    raise AssertionError(f"no word has the colour {color}")


def note(page):
    return page.locator("#note .message").inner_text()


def set_slider(page, name, value):
    """Moves a slider, and waits for the new mask."""
    before = page.locator("#viewer .mask img").get_attribute("src")
    page.locator(f"#{name} input[type=range]").fill(str(value))
    page.wait_for_function("before => document.querySelector('#viewer .mask img').src !== before", arg=before)


def legend(page):
    return {
        item.locator("span").nth(1).inner_text(): item.locator(".share").inner_text()
        for item in page.locator("#viewer .legend li:not(.rest)").all()
    }


# Segmenting -----------------------------------------------------------------------------------------------------------


def test_image_words_mask_and_hover(open_page, image_file):
    page = open_page()
    upload(page, image_file)
    page.wait_for_selector("text=Now type words and press Segment.")
    type_words(page, WORDS)
    page.click("#segment")
    wait_for_mask(page)
    assert "preview" in note(page)
    found = set()
    for kind, x, y in itertools.product(("overlay", "mask"), (0.1, 0.5, 0.9), (0.1, 0.6)):
        text = hover(page, kind, x, y)
        assert re.match(READOUT, text)
        assert text.startswith(f"{word_at(page, x, y)}, ")
        found.add(text.partition(",")[0])
    assert found == {"woman", "flag"}
    page.mouse.move(2, 2)
    assert not page.locator("#viewer .overlay .tip").is_visible()
    assert sorted(legend(page)) == ["flag", "woman"]


def test_sliders_change_the_mask_without_the_model(open_page, image_file, page_server):
    page = segmented(open_page(), image_file)
    hover(page, "overlay", 0.5, 0.5)
    calls = page_server.calls()
    assert calls > 0
    set_slider(page, "threshold", 0.99)
    assert "without a word" in page.locator("#viewer .legend").inner_text()
    assert hover(page, "overlay", 0.5, 0.5).startswith("no word (")
    set_slider(page, "threshold", 0)
    set_slider(page, "iterations", 0)
    assert page_server.calls() == calls


def test_downloads(open_page, image_file, tmp_path):
    page = segmented(open_page(), image_file)
    assert page.locator("#download-model").is_disabled()
    for kind in ("mask", "overlay"):
        with page.expect_download() as download:
            page.click(f"#download-{kind}")
        assert download.value.suggested_filename == f"astronaut_{kind}.png"
        download.value.save_as(tmp_path / f"{kind}.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.size == (320, 320)
        assert json.loads(mask.text["categories"]) == ["woman", "flag"]
        assert set(np.unique(mask)) == {0, 1}
    with Image.open(tmp_path / "overlay.png") as overlay:
        assert overlay.width >= 320


def test_a_tall_image_keeps_its_shape(open_page, tmp_path):
    Image.new("RGB", (100, 400), (110, 160, 230)).save(tmp_path / "tower.png")
    page = segmented(open_page(), tmp_path / "tower.png")
    page.wait_for_timeout(300)
    for kind in ("overlay", "mask"):
        box = page.locator(f"#viewer .{kind} img").bounding_box()
        assert box["height"] == pytest.approx(4 * box["width"], rel=0.02)
        assert box["height"] <= 0.76 * 900
    assert re.match(READOUT, hover(page, "mask", 0.5, 0.99))


def test_an_image_from_the_camera(open_page):
    page = open_page(permissions=["camera"])
    type_words(page, WORDS)
    page.click("#image button[aria-label='Capture from camera']")
    page.click("#image button:has-text('Access Webcam')")
    page.wait_for_selector("#image button[aria-label='capture photo']")
    page.wait_for_function("document.querySelector('#image video').videoWidth > 0")
    page.click("#image button[aria-label='capture photo']")
    wait_for_mask(page)
    assert sorted(legend(page)) in (["flag"], ["flag", "woman"], ["woman"])


def test_two_visitors_do_not_disturb_each_other(open_page, image_file):
    first, second = open_page(), open_page()
    for page, words in ((first, WORDS), (second, "wall, sea, cat")):
        type_words(page, words)
        upload(page, image_file)
    wait_for_mask(first)
    wait_for_mask(second)
    before = first.locator("#viewer .mask img").get_attribute("src")
    assert set(legend(first)) <= {"woman", "flag"}
    assert set(legend(second)) <= {"wall", "sea", "cat"}
    set_slider(second, "threshold", 0.99)
    assert first.locator("#viewer .mask img").get_attribute("src") == before
    set_slider(first, "threshold", 0.99)
    assert set(legend(first)) <= {"woman", "flag"}


# Tuning ---------------------------------------------------------------------------------------------------------------


def test_tuning_ten_steps(open_page, image_file, tmp_path):
    page = segmented(open_page(), image_file)
    page.click("#tune")
    page.wait_for_selector("#progress progress")
    page.wait_for_selector("#stop", state="visible")
    assert not page.locator("#tune").is_visible()
    page.wait_for_selector("#progress >> text=/Step \\d+ of 10, loss/")
    page.wait_for_selector("#progress svg.curve")
    page.wait_for_selector("#progress >> text=Tuned: 10 steps.")
    label = page.locator("#progress svg").get_attribute("aria-label")
    assert label.startswith("Loss of the first 10 of 10 steps: from ")
    page.wait_for_function("!document.querySelector('#note .message')")  # no preview any more
    assert page.locator("#vocabulary input").input_value() == WORDS
    assert page.locator("#tune").is_visible()
    with page.expect_download() as download:
        page.click("#download-model")
    download.value.save_as(tmp_path / "tuned.zip")
    with zipfile.ZipFile(tmp_path / "tuned.zip") as archive:
        assert "woman-flag/model.safetensors" in archive.namelist()

    other = open_page()  # the vocabulary is in the list of the next visitor
    upload(other, image_file)
    other.click("#vocabulary input")
    other.click("[role=option]:has-text('woman, flag')")
    wait_for_mask(other)
    assert other.locator("#words textarea, #words input").first.input_value() == WORDS
    assert not other.locator("#note .message").is_visible()
    type_words(other, "wall, sea")  # a list that is closed without a choice changes no words
    other.click("#vocabulary input")
    other.wait_for_selector("[role=option]")
    other.keyboard.press("Escape")
    other.click("#segment")
    other.wait_for_selector("#note >> text=preview")
    assert set(legend(other)) <= {"wall", "sea"}
    assert other.locator("#words textarea, #words input").first.input_value() == "wall, sea"


def test_tuning_is_stopped(open_page, image_file, page_server):
    page = segmented(open_page(), image_file, "woman, field")
    before = page.locator("#viewer .mask img").get_attribute("src")
    page.locator("#steps input[type=range]").fill("100")
    page.click("#tune")
    page.wait_for_selector("#progress >> text=/Step \\d+ of 100, loss/")
    set_slider(page, "threshold", 0.99)  # the page still responds
    page.click("#stop")
    page.wait_for_selector("#progress >> text=/Stopped after \\d+ of 100 steps./")
    page.wait_for_selector("#tune", state="visible")
    assert list(page_server.cache.glob("tuned/woman-field-*.incomplete"))
    set_slider(page, "threshold", 0)
    assert page.locator("#viewer .mask img").get_attribute("src") == before


# Wrong input ----------------------------------------------------------------------------------------------------------


def alert(page):
    """The sentence of an error."""
    page.wait_for_selector("#note [role=alert]")
    return page.locator("#note [role=alert]").inner_text()


def test_wrong_input_is_one_sentence(open_page, image_file, tmp_path):
    page = open_page()
    page.click("#segment")
    assert alert(page) == "Choose an image first: drop one on the page, or take one with the camera."
    upload(page, image_file)
    page.wait_for_selector("#note [role=status]")
    page.click("#segment")
    assert alert(page) == "Type at least one word, such as: sky, road, car."
    page.click("#tune")
    page.wait_for_selector("#progress [role=alert]")
    assert page.locator("#progress").inner_text() == "Type at least one word, such as: sky, road, car."
    type_words(page, "sky, sky")
    page.click("#segment")
    page.wait_for_selector("#note >> text=given twice")


def test_a_text_file_is_no_image(open_page, tmp_path):
    page = open_page()
    type_words(page, WORDS)
    (tmp_path / "diary.jpg").write_text("Dear diary")
    page.set_input_files("#image input[type=file]", str(tmp_path / "diary.jpg"))
    assert alert(page) == '"diary.jpg" is not an image: choose a JPEG, PNG or WebP file.'
    assert page.locator("#viewer .viewer.empty").count() == 1


@pytest.mark.slow
def test_fifty_megapixels_and_five_hundred_words(open_page, tmp_path):
    Image.new("RGB", (8660, 5774), (110, 160, 230)).save(tmp_path / "wall.jpg")
    page = segmented(open_page(), tmp_path / "wall.jpg")
    assert note(page).startswith("The image has 50 megapixels; this page reduced it to ")
    type_words(page, ", ".join(f"word {index}" for index in range(500)))
    page.click("#segment")
    page.wait_for_selector("#note >> text=of these 500 words together")
    wait_for_mask(page)


# Every window, keyboard and screen reader -----------------------------------------------------------------------------


def test_a_phone_shows_everything_in_its_width(open_page, image_file):
    page = segmented(open_page(390, 844, has_touch=True, is_mobile=True), image_file)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    places = {}
    for name in ("image", "words", "segment", "viewer", "threshold", "download-mask", "vocabulary", "tune"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        places[name] = box["y"]
    assert sorted(places, key=places.get) == list(places)  # the mask comes before tuning
    page.locator("#viewer .mask img").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    box = page.locator("#viewer .mask img").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert re.match(READOUT, page.locator("#viewer .mask .tip").inner_text())


def test_keyboard_alone(open_page, image_file):
    page = open_page()
    upload(page, image_file)  # the browser's own dialogue, which the button opens, cannot be driven
    page.wait_for_selector("#note [role=status]")

    def tab_to(selector):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to("#words textarea, #words input")
    page.keyboard.type(WORDS)
    page.keyboard.press("Enter")
    wait_for_mask(page)
    page.wait_for_timeout(500)
    tab_to("#viewer .overlay .picture")
    assert page.locator("#viewer .overlay .marker").is_visible()
    readout = page.locator("#viewer .readout")
    found = set()
    for key in ["ArrowUp"] * 3 + ["ArrowLeft"] * 4 + ["ArrowRight"] * 8:
        page.keyboard.press(f"Shift+{key}")
        assert re.match(READOUT, readout.inner_text())
        found.add(readout.inner_text().partition(",")[0])
    assert found == {"woman", "flag"}
    tab_to("#threshold input[type=range]")
    before = page.locator("#viewer .mask img").get_attribute("src")
    page.keyboard.press("End")
    page.wait_for_function("before => document.querySelector('#viewer .mask img').src !== before", arg=before)
    with page.expect_download() as download:
        tab_to("#download-mask")
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "astronaut_mask.png"
    tab_to("#tune")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop", state="visible")
    tab_to("#stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("#progress >> text=/Stopped after|Tuned/")


def test_every_image_and_control_has_a_name(open_page, image_file):
    page = segmented(open_page(), image_file)
    texts = [image.get_attribute("alt") for image in page.locator("img:visible").all()]
    assert len(texts) == 3
    assert texts[0] == "The image to segment"
    assert re.match(r"Overlay of image and mask: (woman|flag) \d+ %, (woman|flag) \d+ %\.$", texts[1])
    assert texts[2].startswith("Mask: ")
    for control in page.locator("button:visible, input:visible, textarea:visible, [tabindex='0']:visible").all():
        name = control.evaluate(
            "x => x.getAttribute('aria-label') || x.innerText || x.title || (x.labels && x.labels[0] "
            "&& x.labels[0].innerText) || x.placeholder || x.getAttribute('aria-labelledby')"
        )
        assert (name or "").strip(), control.evaluate("x => x.outerHTML")
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.lang")
