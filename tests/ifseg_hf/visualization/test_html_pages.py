"""Charts and files of web pages."""

import re
from pathlib import Path

import pytest
from html_pages import Page

from ifseg_hf.visualization.html_pages import line_chart, page_file, render_page


def test_lines_end_where_their_values_are():
    chart = Page(line_chart({"loss": ([1, 2, 3], [2.0, float("nan"), 0.0])}))
    ((first, last),) = (
        [tuple(map(float, point.split(","))) for point in line["points"].split()] for line in chart.all("polyline")
    )
    assert first[0] < last[0]
    assert first[1] < last[1]  # y points down
    (svg,) = chart.all("svg")
    assert svg["aria-label"] == "loss: 2 at step 1, 0 at step 3"
    assert {"0", "1", "2", "3"} <= set(chart.texts)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-5, 2e-5, 3e-5], [float("inf")], [], [-1.0, 1e6]])
def test_charts_of_any_values_stay_within_their_frame(values):
    text = line_chart({"a <b>": (list(range(len(values))), values)}, dots=True)
    page = Page(text)
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", " ".join(line["points"] for line in page.all("polyline"))):
        assert 0 <= float(x) <= 560
        assert 0 <= float(y) <= 280
    assert "<b>" not in text


def test_long_lines_are_thinned_and_keep_their_ends():
    (line,) = Page(line_chart({"loss": (range(1, 20001), [1.0] * 20000)})).all("polyline")
    points = line["points"].split()
    assert len(points) == 500
    assert points[0].startswith("74.0,")
    assert points[-1].startswith("546.0,")


def test_page_files_are_named_after_their_content():
    assert page_file("out", "report") == Path("out/report.html")
    assert page_file("out/mine.html", "report") == Path("out/mine.html")
    with pytest.raises(Exception, match="undefined"):
        render_page("training.html", title="incomplete")
