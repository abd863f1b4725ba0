"""Reads the pages of reports."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "br", "line", "circle", "polyline", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, whose tags are checked to be closed in order.

    Attributes:
        elements (`list[tuple[str, dict]]`): tag and attributes of every element.
        texts (`list[str]`): the texts outside of styles, without spaces around them.
        rows (`list[list[str]]`): the texts of the cells of every table row.
    """

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" in self.open or not data.strip():
            return
        self.texts.append(data.strip())
        if "tr" in self.open:
            self.rows[-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict]:
        """Attributes of the elements with a tag."""
        return [attributes for name, attributes in self.elements if name == tag]

    def images(self) -> list[Image.Image]:
        """The images, each of which must be inline and have an alternative text."""
        images = []
        for attributes in self.all("img"):
            head, _, content = attributes["src"].partition(",")
            assert head == "data:image/jpeg;base64"
            assert attributes["alt"]
            image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
            images.append(image)
        return images

    def check_self_contained(self) -> None:
        """Checks that nothing is loaded or run, that links are to the page, and that ids are unique."""
        assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in self.elements}
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        for tag, attributes in self.elements:
            assert not [name for name in attributes if name.startswith("on")], attributes
            for name in ("src", "href", "xlink:href", "action"):
                value = attributes.get(name)
                assert value is None or value.startswith("data:") or value[1:] in ids, (tag, value)
            assert "url(" not in attributes.get("style", "")
