"""mIoU against plain NumPy, over several processes, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifseg_hf.evaluation.metrics import MeanIoU, scores


def plain_scores(predictions, references, count, ignored):
    """Category by category, with masks of all pixels."""
    prediction = np.concatenate([x.ravel() for x in predictions])
    reference = np.concatenate([x.ravel() for x in references])
    prediction, reference = prediction[reference != ignored], reference[reference != ignored]
    ious, accuracies = [], []
    for category in range(count):
        here, there = reference == category, prediction == category
        ious.append((here & there).sum() / (here | there).sum() if here.any() else np.nan)
        accuracies.append((here & there).sum() / here.sum() if here.any() else np.nan)
    return ious, accuracies, (prediction == reference).mean()


@st.composite
def random_maps(draw):
    count = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4))
    present = rng.permutation(count)[: draw(st.integers(1, count))]  # some categories never occur in the truth
    references = [np.where(rng.random(size) < 0.2, -100, rng.choice(present, size)) for size in sizes]
    references[0][0, 0] = present[0]
    return count, [rng.integers(0, count, size) for size in sizes], references


@settings(max_examples=100, deadline=None)
@given(random_maps())
def test_equal_to_plain_numpy(maps):
    count, predictions, references = maps
    ious, accuracies, overall = plain_scores(predictions, references, count, -100)
    metric = MeanIoU(count)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=torch.from_numpy(reference))
    assert metric.confusion_matrix.dtype == np.int64
    assert metric.confusion_matrix.sum() == sum((x >= 0).sum() for x in references)
    result = metric.compute()
    np.testing.assert_array_equal(result["per_category_iou"], ious)
    np.testing.assert_array_equal(result["per_category_accuracy"], accuracies)
    assert result["mean_iou"] == pytest.approx(np.nanmean(ious), abs=1e-12)
    assert result["mean_accuracy"] == pytest.approx(np.nanmean(accuracies), abs=1e-12)
    assert result["overall_accuracy"] == overall
    # All at once is the same, and nothing was left from before.
    again = metric.compute(predictions=predictions, references=references)
    np.testing.assert_equal(again, result)


def test_rows_are_the_truth_and_the_ignored_label_counts_nowhere():
    metric = MeanIoU(3, ignore_index=255)
    metric.add(
        prediction=torch.tensor([[0, 1, 2], [2, 2, 0]]), reference=np.array([[0, 0, 2], [0, 255, 255]], np.uint8)
    )
    assert metric.confusion_matrix.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    result = metric.compute()
    assert result["per_category_iou"][0] == pytest.approx(1 / 3)
    assert np.isnan(result["per_category_iou"][1])  # predicted, but not in the truth
    assert result["per_category_iou"][2] == 0.5
    assert result["mean_iou"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result["overall_accuracy"] == 0.5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint64, np.int64])
def test_labels_of_any_integer_type(dtype):
    labels = np.arange(200).reshape(10, 20).astype(dtype)
    metric = MeanIoU(200)
    metric.add(prediction=labels, reference=labels)
    np.testing.assert_array_equal(metric.confusion_matrix, np.eye(200))


def test_subsets_and_their_harmonic_mean():
    """Seen 0.5 and unseen 0.25 by hand; a predicted category of the other subset is wrong all the same."""
    matrix = np.array([[1, 0, 1], [0, 0, 0], [3, 0, 1]])
    result = scores(matrix, {"seen": [0, 1], "unseen": [2]})
    assert result["mean_iou_seen"] == 1 / 5
    assert result["mean_iou_unseen"] == 1 / 5
    matrix = np.array([[2, 1, 0], [1, 2, 0], [1, 1, 1]])
    result = scores(matrix, {"seen": [0, 1], "unseen": [2]})
    seen, unseen = 2 / 5, 1 / 3
    assert result["mean_iou_seen"] == pytest.approx(seen)
    assert result["mean_iou_unseen"] == pytest.approx(unseen)
    assert result["harmonic_mean_iou"] == pytest.approx(2 / (1 / seen + 1 / unseen))
    assert "harmonic_mean_iou" not in scores(matrix, {"seen": [0]})
    assert scores(np.array([[0, 1], [1, 0]]), {"a": [0], "b": [1]})["harmonic_mean_iou"] == 0


def test_nothing_counted_is_no_number_and_no_warning(recwarn):
    result = MeanIoU(2).compute(subsets={"a": [0], "b": [1]})
    assert all(
        np.isnan(result[name]) for name in ("mean_iou", "mean_accuracy", "overall_accuracy", "harmonic_mean_iou")
    )
    assert not recwarn.list


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), r"shape \(2, 2\) for a reference of shape \(2, 3\)"),
        (np.full((2, 2), 3), np.zeros((2, 2), int), "prediction holds label 3; it should be one of 0 ... 2"),
        (np.full((2, 2), -100), np.zeros((2, 2), int), "prediction holds label -100"),
        (np.zeros((2, 2), int), np.full((2, 2), 255), "reference holds label 255; .* or, to be ignored, -100"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "type float64"),
        (np.zeros((2, 2, 1), int), np.zeros((2, 2), int), r"shape \(2, 2, 1\)"),
    ],
)
def test_wrong_maps_are_refused_and_not_counted(prediction, reference, message):
    metric = MeanIoU(3)
    good = np.zeros((2, 2), int)
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=[good, prediction], references=[good, reference])
    assert metric.confusion_matrix.sum() == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        MeanIoU(3).add_batch(predictions=torch.zeros(1, 2, 2).long(), references=torch.zeros(2, 2, 2).long())
    with pytest.raises(ValueError, match="Give both"):
        MeanIoU(3).compute(predictions=[[[0]]])
    with pytest.raises(ValueError, match="is one of the 3 categories"):
        MeanIoU(3, ignore_index=0)
    with pytest.raises(ValueError, match='Subset "seen" holds 3'):
        scores(np.eye(3), {"seen": [3]})
    with pytest.raises(ValueError, match="square"):
        scores(np.zeros((2, 4)))


def test_it_is_a_metric_of_evaluate_that_needs_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    metric = MeanIoU(2)
    assert isinstance(metric, evaluate.Metric)
    assert list(metric.features) == ["predictions", "references"]
    assert "intersection over union" in metric.description
    assert "IFSeg" in metric.citation
    assert metric.compute(predictions=[[[0, 1]]], references=[[[0, 1]]])["mean_iou"] == 1
    assert "height, width" in metric.add.__doc__
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_two_processes_count_the_same_integers(tmp_path):
    """Five images in batches of two, the last batch of one image; the counts exceed the integers of float64."""
    program = Path(__file__).parents[2] / "helpers" / "count_in_two_processes.py"
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, *two = (np.load(tmp_path / f"{name}.npy") for name in ("alone", "0", "1"))
    assert one.min() > 2**53
    for matrix in two:
        assert matrix.dtype == np.int64
        np.testing.assert_array_equal(matrix, one)


def test_predictions_of_no_category_count_as_wrong_for_the_truth():
    metric = MeanIoU(2, allow_no_category=True)
    metric.add(prediction=np.array([[0, -1, -1], [1, 1, -1]]), reference=np.array([[0, 0, 1], [1, 0, -100]]))
    assert metric.confusion_matrix.tolist() == [[1, 1, 1], [0, 1, 1]]
    result = scores(metric.confusion_matrix)
    assert result["per_category_iou"] == [1 / 3, 1 / 3]
    assert result["per_category_accuracy"] == [1 / 3, 1 / 2]
    assert result["overall_accuracy"] == 2 / 5
    for wrong in (-2, 2):
        with pytest.raises(ValueError, match=f"prediction holds label {wrong}; .* 0 ... 1 or, without a category, -1"):
            metric.add(prediction=np.full((1, 1), wrong), reference=np.zeros((1, 1), int))
