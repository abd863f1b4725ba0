"""Web pages in one file: templates, images and charts are inline, and nothing is loaded from elsewhere."""

import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

__all__ = ["jpeg", "line_chart", "page_file", "render_page"]

_WIDTH, _HEIGHT = 560, 280  # of a chart, in units of its SVG
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 12, 30  # margins of a chart
_MOST_POINTS = 500  # of a line
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(template: str, **values: Any) -> str:
    """Returns a page from a template in `templates/`. All values are escaped, except charts."""
    return _ENVIRONMENT.get_template(template).render(values)


def page_file(path: str | Path, name: str) -> Path:
    """Returns the file of a report: `path` if it ends in .html, otherwise `name`.html in the folder `path`."""
    path = Path(path)
    return path if path.suffix.lower() in (".html", ".htm") else path / f"{name}.html"


def jpeg(image: Image.Image) -> bytes:
    """Returns an RGB image as a JPEG file."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=82)
    return file.getvalue()


def line_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], pale: Sequence[str] = (), dots: bool = False
) -> str:
    """
    Returns a chart of lines over the steps of training as SVG, for the style of `training.html`.

    Args:
        lines: steps and values of each line by name. `nan` and infinite values are left out.
        pale: names of lines drawn thin, in the colour of the line after them.
        dots: whether to mark every value.
    """
    points = {name: _thinned(*line) for name, line in lines.items()}
    steps = [step for line in points.values() for step, _ in line]
    values = [value for line in points.values() for _, value in line]
    if not values:
        return '<svg viewBox="0 0 560 40" role="img"><text x="10" y="25">There is no value.</text></svg>'
    x_ticks = [tick for tick in _ticks(min(steps), max(steps)) if min(steps) <= tick <= max(steps)]
    y_ticks = _ticks(min(values), max(values))
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1e-9)
    y_low, y_high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))
    y_high = y_high if y_high > y_low else y_low + 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 5}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text x="{_LEFT - 6}" y="{_HEIGHT - 8}" text-anchor="end">step</text>')
    color = 0
    for name, line in points.items():
        path = " ".join("{},{}".format(*place(*point)) for point in line)
        kind = f"line c{color % 3}" + (" pale" if name in pale else "")
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if dots:
            parts += ['<circle class="dot c{}" cx="{}" cy="{}" r="3.5"/>'.format(color % 3, *place(*x)) for x in line]
        color += name not in pale
    described = "; ".join(f"{name}: {_described(line)}" for name, line in points.items() if name not in pale and line)
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(described)}">'
    return f"{head}{''.join(parts)}</svg>"


def _thinned(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """The finite points of a line; of many, as many as can be seen, among them first and last."""
    points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if len(points) <= _MOST_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]


def _described(line: Sequence[tuple[float, float]]) -> str:
    (first_step, first), (last_step, last) = line[0], line[-1]
    return f"{first:.4g} at step {first_step:g}, {last:.4g} at step {last_step:g}"


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from at most `low` on that cover a range."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if span / (factor * size) <= 5)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
