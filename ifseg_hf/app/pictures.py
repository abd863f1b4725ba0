"""What the page shows: overlay and mask with a map of words and probabilities, progress, and the loss curve."""

import base64
import html
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ifseg_hf.app.segmentation import PostProcessing, Segmentation
from ifseg_hf.app.tuning_run import Progress
from ifseg_hf.visualization.colors import word_colors
from ifseg_hf.visualization.overlays import overlay, save_mask, shares

__all__ = ["loss_curve", "message", "progress_bar", "viewer_data"]

_PROBE_SIDE = 512  # largest side of the map of words and probabilities
_LETTERS = 36  # font sizes in the longer side of the overlay, which the page shows smaller than it is
_LISTED = 24  # words in the legend


def viewer_data(segmentation: Segmentation, how: PostProcessing) -> dict[str, Any]:
    """
    Returns the data of the viewer as JSON types.

    - **overlay**, **mask**: images as data URLs, of the shown image's size.
    - **probe**: a PNG as a data URL, at most 512 pixels on a side. Of a pixel, red and the lower seven bits of green
      are the index of its best word, the upper bit of green is 1 where that word is less probable than the threshold,
      and blue is its probability times 255.
    - **names**: of the labels. **legend**: name, colour and share of the labels in the mask, largest first.
    - **more**: how many labels in the mask the legend leaves out. **without**: share of pixels without a word.
    - **summary**: the legend as a sentence.
    """
    labels, best, likely = segmentation.label_map(how)
    names, size = segmentation.names, round(max(segmentation.image.size) / _LETTERS)
    colors = word_colors(names)
    found = shares(labels, names)
    legend = [
        {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*colors[names.index(name)]), "share": percent(share)}
        for name, share in list(found.items())[:_LISTED]
    ]
    without = float((labels < 0).mean())
    parts = [f"{item['name']} {item['share']}" for item in legend]
    parts += [f"{percent(without)} without a word"] if without else []
    return {
        "overlay": data_url(
            overlay(segmentation.image, labels, names, legend=False, font_size=size), "WEBP", quality=85
        ),
        "mask": data_url(mask_picture(labels, names), "PNG"),
        "probe": data_url(_probe(labels, best, likely), "PNG"),
        "names": names,
        "legend": legend,
        "more": max(0, len(found) - _LISTED),
        "without": percent(without) if without else "",
        "summary": ", ".join(parts),
    }


def mask_picture(labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Returns a label map (H, W) in the colours of the words; black where there is none."""
    if len(names) > 255:  # the mask file then has no colours
        colors = np.asarray([*word_colors(names), (0, 0, 0)], np.uint8)
        return Image.fromarray(colors[labels])
    with tempfile.TemporaryDirectory() as folder:
        save_mask(labels, file := Path(folder) / "mask.png", names)
        with Image.open(file) as image:
            image.load()
            image.info.clear()  # the list of the words
            return image


def _probe(labels: np.ndarray, best: np.ndarray, likely: np.ndarray) -> Image.Image:
    """The map of words and probabilities; see [`viewer_data`]."""
    step = max(1, -(-max(best.shape) // _PROBE_SIDE))
    labels, best, likely = (values[::step, ::step] for values in (labels, best, likely))
    channels = best % 256, best // 256 + 128 * (labels < 0), (likely * 255).round()
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def data_url(image: Image.Image, kind: str, **settings: Any) -> str:
    """Returns an image as a data URL of a kind such as "PNG"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def percent(share: float) -> str:
    """Returns a share as text, such as "12 %"."""
    return f"{100 * share:.0f} %" if share >= 0.005 else "< 1 %"


def message(*sentences: str, error: bool = False) -> str:
    """Returns sentences as HTML that screen readers announce; "" without any."""
    text = " ".join(html.escape(sentence, quote=False) for sentence in sentences if sentence)
    if not text:
        return ""
    return f'<p class="message{" error" if error else ""}" role="{"alert" if error else "status"}">{text}</p>'


def progress_bar(progress: Progress, state: str = "") -> str:
    """Returns the progress of a tuning as HTML: a bar, a sentence and the loss curve.

    Args:
        state: a sentence in place of steps and time left, as after the end.
    """
    parts = [f"Step {progress.step} of {progress.steps}"]
    if progress.losses:
        parts.append(f"loss {progress.losses[-1]:.3f}")
    if progress.seconds_left:
        parts.append(f"about {duration(progress.seconds_left)} left")
    text = state or ", ".join(parts)
    value = f' value="{progress.step}"' if progress.step else ""
    bar = f'<progress aria-label="Tuning"{value} max="{progress.steps}"></progress>'
    return f'{bar}<p role="status">{html.escape(text, quote=False)}</p>{loss_curve(progress.losses, progress.steps)}'


def duration(seconds: float) -> str:
    """Returns a duration as text, such as "40 s" or "3 min"."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def loss_curve(losses: Sequence[float], steps: int) -> str:
    """Returns the loss over the steps as SVG, with a running mean; "" for fewer than two steps.

    Args:
        losses: of the first steps. steps: the number of all steps, the width of the axis.
    """
    if len(losses) < 2:
        return ""
    width, height, left, bottom = 360, 150, 44, 22
    values = np.asarray(losses, float)
    window = min(len(values), max(3, len(values) // 10))
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    low, high = float(values.min()), float(values.max())
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def points(first: int, some: np.ndarray) -> str:
        x = left + (np.arange(first, first + len(some)) / max(1, steps - 1)) * (width - left - 8)
        y = 8 + (high - some) / (high - low) * (height - bottom - 14)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    label = f"Loss of the first {len(losses)} of {steps} steps: from {losses[0]:.3f} to {losses[-1]:.3f}."
    base = height - bottom
    return (
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'<line class="axis" x1="{left}" y1="{base}" x2="{width - 8}" y2="{base}"/>'
        f'<line class="axis" x1="{left}" y1="6" x2="{left}" y2="{base}"/>'
        f'<polyline class="each" points="{points(0, values)}"/>'
        f'<polyline class="mean" points="{points(window - 1, mean)}"/>'
        f'<text x="{left - 6}" y="14" text-anchor="end">{high:.2f}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">{low:.2f}</text>'
        f'<text x="{left}" y="{height - 6}">1</text>'
        f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">loss by step (bold: mean)</text>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">{steps}</text></svg>'
    )
