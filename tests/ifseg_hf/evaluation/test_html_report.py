"""The web page of an evaluation: numbers, escapes, inline images, and the best and the worst images."""

import json

import numpy as np
import pytest
from html_pages import Page

from ifseg_hf.evaluation.examples import ExtremeImages, extremes, image_ious, read_examples
from ifseg_hf.evaluation.html_report import write_evaluation_report
from ifseg_hf.evaluation.metrics import MeanIoU, scores
from ifseg_hf.evaluation.report import Evaluation, percent, results_table

ODD = '<script>alert("x")</script>'


def evaluated(names, images=5, count=2, smoothing=((1, 0), (3, 2)), no_category=True):
    """An evaluation of random maps, with results as `ifseg evaluate` has them."""
    rng = np.random.default_rng(0)
    metrics = {setting: MeanIoU(len(names), allow_no_category=no_category) for setting in smoothing}
    extreme = ExtremeImages(names, count)
    for i in range(images):
        truth = rng.integers(0, max(1, len(names) - 1), (30, 40))  # the last category is not in the truth
        truth[:4] = -100
        prediction = np.where(rng.random(truth.shape) < i / images, truth, rng.integers(0, len(names), truth.shape))
        prediction[prediction < 0] = 0
        if no_category:
            prediction[-3:] = -1
        for metric in metrics.values():
            metric.add(prediction=prediction, reference=truth)
        extreme.add(i, f"folder/{i}", rng.integers(0, 256, (30, 40, 3), dtype=np.uint8), truth, prediction)
    matrices = {setting: metric.confusion_matrix for setting, metric in metrics.items()}
    evaluation = Evaluation(names, matrices, images, ["2.png is damaged"], 1.5, examples=extreme.kept)
    results = {"command": "ifseg evaluate --model a&b", "model": "some/tuned", "baseline": None, "dataset": "streets"}
    results |= {"split": "val", "inference": "whole", "background": ["sand", "sea"], "threshold": 0.5, "images": images}
    results |= {"skipped": evaluation.skipped, "seconds": 1.5, "processes": 1, "device": "cpu"}
    return evaluation, {**results, "versions": {"torch": "2"}, "results": evaluation.results()}


def page_of(tmp_path, evaluation, results) -> Page:
    file = write_evaluation_report(tmp_path / "out", evaluation, results)
    assert file == tmp_path / "out" / "report.html"
    assert list(file.parent.iterdir()) == [file]
    page = Page(file.read_text("utf-8"))
    page.check_self_contained()
    return page


def test_numbers_are_those_of_the_printed_tables(tmp_path):
    names = ["sky", "road", "tree", "car"]
    evaluation, results = evaluated(names)
    page = page_of(tmp_path, evaluation, results)
    table = results_table(results["results"])
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ("none", "k=3, n=2"):
            assert cells in page.rows
        if cells[0] in names[:3]:
            rows = [[text for text in row if text] for row in page.rows]
            share = evaluation.matrices[1, 0].sum(1)[names.index(cells[0])] / evaluation.matrices[1, 0].sum()
            assert [*cells, percent(share)] in rows
    assert "car" not in [row[0] for row in page.rows if len(row) == 6]
    assert any("Not in the truth, and in no mean: car." in text for text in page.texts)
    assert percent(results["results"][0]["mean_iou"]) in page.texts
    bars = [x["style"] for tag, x in page.elements if tag == "span" and "width" in x.get("style", "")]
    ious = sorted(result["iou"] for result in results["results"][0]["categories"].values() if result["iou"])
    assert bars[::2] == [f"width:{percent(iou)}%" for iou in reversed(ious)]


def test_settings_and_skipped_images_are_listed(tmp_path):
    page = page_of(tmp_path, *evaluated(["sky", "road", "tree"]))
    for row in (["model", "some/tuned"], ["threshold", "0.5"], ["background", "sand, sea"], ["torch", "2"]):
        assert row in page.rows
    assert "ifseg evaluate --model a&b" in page.texts
    assert "1 images were left out" in page.texts
    assert "2.png is damaged" in page.texts


def test_the_matrix_has_shares_of_the_rows(tmp_path):
    evaluation, results = evaluated(["sky", "road", "tree", "car"])
    page = page_of(tmp_path, evaluation, results)
    (header,) = (row for row in page.rows if row[0] == "true / predicted")
    assert header == ["true / predicted", "sky", "road", "tree", "other words", "no word"]
    matrix = evaluation.matrices[1, 0]
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 6 and row[0] != "true / predicted" and row[2]}
    for i, name in enumerate(["sky", "road", "tree"]):
        expected = [f"{100 * count / matrix[i].sum():.0f}" for count in matrix[i]]
        assert [rows[name][j] for j in range(5)] == expected
    assert any("predicted no word" in x.get("title", "") for x in page.all("td"))


def test_many_categories_fit_the_matrix(tmp_path):
    names = [f"word {i}" for i in range(151)]
    evaluation, results = evaluated(names, images=3, smoothing=((1, 0),), no_category=False)
    page = page_of(tmp_path, evaluation, results)
    (table,) = (x for x in page.all("table") if "matrix" in x["class"])
    assert "dense" in table["class"]
    matrix_rows = [row for row in page.rows if len(row) > 100]
    assert len(matrix_rows) == 151
    assert {len(row) for row in matrix_rows} == {152}  # its name, 150 words, other words
    assert not any(row[1:] != [""] * 151 for row in matrix_rows[1:])
    assert any(x.get("title", "").startswith("true word 0, predicted word ") for x in page.all("td"))


@pytest.mark.parametrize("name", [ODD, '"><img src=x onerror=alert(1)>', "a & b", "猫", "\udc80", "{{ 7*7 }}"])
def test_names_are_escaped(tmp_path, name):
    evaluation, results = evaluated([name, "road", "tree"])
    results |= {"model": name, "dataset": name, "command": name}
    for example in evaluation.examples:
        example.id = name
    page = page_of(tmp_path, evaluation, results)
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert [row[0] for row in page.rows].count(shown) >= 2
    assert any(shown in x["alt"] for x in page.all("img"))


def test_worst_and_best_images_are_inline_with_alternative_texts(tmp_path):
    evaluation, results = evaluated(["sky", "road", "tree"], images=6)
    page = page_of(tmp_path, evaluation, results)
    images = page.images()
    assert len(images) == 3 * 4
    assert {image.size for image in images} == {(40, 30)}
    titles = [text for text in page.texts if text.startswith("folder/")]
    ranked = [f"{x.id}: mIoU {percent(x.score)} %" for x in evaluation.examples]
    assert titles == [*ranked[:2], *reversed(ranked[2:])]
    assert [x["alt"].split(":")[0] for x in page.all("img")[:3]] == [
        f"Image {evaluation.examples[0].id}",
        f"Ground truth of {evaluation.examples[0].id}",
        f"Prediction for {evaluation.examples[0].id}",
    ]
    assert all(" %" in x["alt"] for x in page.all("img")[1::3])


def test_the_page_works_by_keyboard_on_phones_and_in_the_dark(tmp_path):
    page = page_of(tmp_path, *evaluated(["sky", "road"]))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert page.all("html") == [{"lang": "en"}]
    targets = {x["href"][1:] for x in page.all("a")}
    assert targets == {x["id"] for x in page.all("section")}
    scrolling = [x for x in page.all("div") if "wide" in x.get("class", "")]
    assert len(scrolling) >= 3
    assert all(x["tabindex"] == "0" and x["aria-label"] for x in scrolling)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert ":focus-visible" in text


def test_a_report_without_images_says_why(tmp_path):
    evaluation, results = evaluated(["sky", "road"], count=0)
    page = page_of(tmp_path, evaluation, results)
    assert page.images() == []
    assert any(text.startswith("No image was kept") for text in page.texts)
    file = write_evaluation_report(tmp_path / "new" / "mine.html", evaluation, results)
    assert file == tmp_path / "new" / "mine.html"


# The best and the worst images ----------------------------------------------------------------------------------------


def add_with_scores(extreme: ExtremeImages, shares: list[float], first: int = 0) -> None:
    """Adds images of two categories, of whose first half a share is predicted as the other."""
    for i, share in enumerate(shares, first):
        truth = np.repeat([0, 1], 100).reshape(10, 20)
        prediction = truth.copy()
        prediction.reshape(-1)[: round(100 * share)] = 1
        extreme.add(i, str(i), np.zeros((10, 20, 3), np.uint8), truth, prediction)


def test_the_best_and_the_worst_images_are_kept():
    shares = [0.5, 0.1, 0.9, 0.0, 0.3, 0.7, 0.2, 1.0, 0.6, 0.4]
    extreme = ExtremeImages(["a", "b"], 3)
    add_with_scores(extreme, shares)
    assert [example.index for example in extreme.kept] == [7, 2, 5, 6, 1, 3]
    assert [example.score for example in extreme.kept] == sorted(example.score for example in extreme.kept)
    assert extreme.kept[-1].score == 1


def test_of_equal_images_the_earlier_counts_as_worse():
    extreme = ExtremeImages(["a", "b"], 2)
    add_with_scores(extreme, [0.5] * 8)
    assert [example.index for example in extreme.kept] == [0, 1, 6, 7]
    add_with_scores(extreme, [0.4, 0.6], 8)
    assert [example.index for example in extreme.kept] == [9, 0, 7, 8]


def test_parts_together_keep_what_one_run_keeps():
    shares = np.random.default_rng(0).permutation(20) / 20
    one, parts = ExtremeImages(["a", "b"], 3), [ExtremeImages(["a", "b"], 3) for _ in range(2)]
    add_with_scores(one, list(shares))
    for i, share in enumerate(shares):
        add_with_scores(parts[i % 2], [share], i)
    assert extremes(read_examples(part.to_json() for part in parts), 3) == one.kept


def test_memory_is_of_the_kept_images_only():
    extreme = ExtremeImages(["a", "b"], 2)
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 500_000).reshape(1000, 1000)
    for i in range(8):
        prediction = np.where(rng.random(truth.shape) < i / 8, truth, 0)
        extreme.add(i, str(i), rng.integers(0, 256, (1000, 1000, 3), dtype=np.uint8), truth, prediction)
    assert len(extreme.kept) == 4
    assert (extreme.kept[0].width, extreme.kept[0].height) == (480, 480)
    assert len(extreme.to_json()) < 4 * 3 * 400_000
    assert all(isinstance(x, (str, int, float, dict)) for example in extreme.kept for x in vars(example).values())


def test_the_score_is_the_mean_iou_of_the_image():
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(-1, 4, (20, 30)), rng.integers(-1, 6, (20, 30))
    truth[truth < 0] = -100
    metric = MeanIoU(6, allow_no_category=True)
    metric.add(prediction=prediction, reference=truth)
    expected = scores(metric.confusion_matrix)
    ious, in_truth = image_ious(prediction, truth, 6)
    assert np.nanmean(ious[in_truth]) == pytest.approx(expected["mean_iou"])
    np.testing.assert_allclose(np.where(in_truth, ious, np.nan), expected["per_category_iou"])
    extreme = ExtremeImages(list("abcdef"), 1)
    extreme.add(0, "x", np.zeros((20, 30, 3), np.uint8), truth, prediction)
    assert extreme.kept[0].score == pytest.approx(expected["mean_iou"])
    assert extreme.kept[0].ious["e"] is None  # predicted, but not in the truth
    assert json.loads(extreme.to_json())[0]["truth_shares"].keys() == set("abcd")


def test_images_without_labels_have_no_score():
    extreme = ExtremeImages(["a"], 2)
    extreme.add(0, "x", np.zeros((4, 4, 3), np.uint8), np.full((4, 4), -100), np.zeros((4, 4), int))
    assert extreme.kept == []
