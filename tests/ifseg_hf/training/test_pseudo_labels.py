"""Pseudo-labels: given labels stay, predictions are the segmenter's, and the folder is an ordinary dataset."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import NAMES, save_masked_images, save_tiny_segmenter
from PIL import Image

from ifseg_hf.data.crops import load_training_dataset
from ifseg_hf.data.image_files import SampleError
from ifseg_hf.data.segmentation import load_segmentation_dataset
from ifseg_hf.data.unnamed_masks import load_unnamed_masks
from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.processing.post_processing_ifseg import resize_scores
from ifseg_hf.training import pseudo_labels
from ifseg_hf.training.pseudo_labels import (
    PseudoLabelConfig,
    confident_labels,
    load_images,
    mask_labels,
    write_pseudo_labels,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_segmenter(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def data(tmp_path):
    return load_training_dataset(save_masked_images(tmp_path / "images", count=3))


def write(model, data, folder, **arguments):
    config = PseudoLabelConfig(**{name: arguments.pop(name) for name in ("min_confidence",) if name in arguments})
    return write_pseudo_labels(model, data, folder, config, cpu=True, **arguments)


def masks_of(folder: Path, name: str = "masks") -> dict[str, np.ndarray]:
    return {file.stem: np.asarray(Image.open(file)) for file in sorted((folder / name).glob("*.png"))}


@pytest.mark.parametrize("candidates", [(), (2, 0)])
def test_confident_pixels_get_the_most_probable_label(candidates):
    probabilities = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0))
    resized = resize_scores(probabilities, (20, 31))[sorted(candidates or range(4))]
    values, indices = resized.max(0)
    expected = torch.tensor(sorted(candidates or range(4)))[indices]
    labels = confident_labels(probabilities, (20, 31), 0.6, sorted(candidates))
    assert torch.equal(labels[values >= 0.6], expected[values >= 0.6])
    assert (labels[values < 0.6] == -100).all()
    assert 0 < (values < 0.6).sum() < values.numel()


@pytest.mark.parametrize("candidates", [(), (2, 0)])
def test_a_mask_gets_the_category_of_the_highest_mean(candidates):
    probabilities = (3 * torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0))).softmax(0)
    masks = np.arange(30)[None].repeat(20, 0) // 6 * 1000  # five bands
    masks[:4] = -100
    labels = mask_labels(probabilities, masks, 0.35, sorted(candidates)).numpy()
    resized, found = resize_scores(probabilities, (20, 30)).numpy(), []
    for number in range(0, 5000, 1000):
        means = [resized[category][masks == number].mean() for category in sorted(candidates or range(4))]
        best = sorted(candidates or range(4))[int(np.argmax(means))]
        found.append(best if max(means) >= 0.35 else -100)
        assert (labels[masks == number] == found[-1]).all()
    assert (labels[masks == -100] == -100).all()
    assert -100 in found
    assert len(set(found)) == 3 - bool(candidates)


def load_tuned(model, names=NAMES):
    """Model and processor of a segmenter with these words."""
    segmenter = load_segmenter(model, untuned=True)
    segmenter.set_words(names)
    return segmenter.model, segmenter.processor


def test_without_kept_labels_all_are_predicted(model, data, tmp_path):
    """The masks are those of post-processing at the image's size."""
    folder = write(model, data, tmp_path / "out")
    segmenter, processor = load_tuned(model)
    for sample in data.samples:
        image, _ = data.read(sample)
        with torch.no_grad():
            outputs = segmenter(**processor(images=image, return_tensors="pt"))
        (expected,) = processor.post_process_semantic_segmentation(outputs, [image.shape[:2]])
        agree = masks_of(folder)[sample["id"]] == expected.numpy()
        assert agree.mean() > 0.999  # of equal scores
    again = load_segmentation_dataset(str(folder))
    assert again.names == NAMES
    assert [sample["id"] for sample in again.samples] == ["0", "1", "2"]
    image, _ = again.read(again.samples[0])
    assert np.array_equal(image, data.read(data.samples[0])[0])


def test_the_models_own_words_are_kept_if_they_suffice(model, data, tmp_path):
    tuned, processor = load_tuned(model, ["sea", "moon", "cup"])
    for part in (tuned, processor):
        part.save_pretrained(tmp_path / "tuned")
    folder = write(str(tmp_path / "tuned"), data, tmp_path / "out", unseen="sea, cup")
    with torch.no_grad():
        image, _ = data.read(data.samples[0])
        outputs = tuned.eval()(**processor(images=image, return_tensors="pt"))
    (scores,) = processor.post_process_semantic_segmentation(
        outputs, [image.shape[:2]], return_segmentation_scores=True
    )
    sea = (scores["segmentation_scores"][0] >= scores["segmentation_scores"][2]).numpy()
    expected = np.where(sea, NAMES.index("sea"), NAMES.index("cup"))
    assert (masks_of(folder)["0"] == expected).mean() > 0.999


def test_other_words_replace_the_models_own(model, data, tmp_path):
    tuned, processor = load_tuned(model, ["sea", "moon", "cup"])
    for part in (tuned, processor):
        part.save_pretrained(tmp_path / "tuned")
    masks = masks_of(write(str(tmp_path / "tuned"), data, tmp_path / "one", unseen="sky, cup"))
    expected = masks_of(write(model, data, tmp_path / "two", unseen="sky, cup"))
    assert all(np.array_equal(mask, expected[name]) for name, mask in masks.items())
    # The probabilities are over all categories of the dataset: of sky and cup alone, one would always reach 0.5.
    config = PseudoLabelConfig(min_confidence=0.5)
    unsure = write_pseudo_labels(str(tmp_path / "tuned"), data, tmp_path / "half", config, unseen="sky, cup", cpu=True)
    assert any((mask == 255).any() for mask in masks_of(unsure).values())


def test_smoothing_is_the_models_unless_given(model, data, tmp_path):
    def smoothing_in(folder: Path) -> list[int]:
        settings = json.loads((folder / "dataset.json").read_text())["pseudo_labels"]
        return [settings["smoothing_neighbors"], settings["smoothing_iterations"]]

    assert smoothing_in(write(model, data, tmp_path / "one")) == [3, 25]
    loaded, processor = load_tuned(model)
    processor.image_processor.smoothing_iterations = 0
    for part in (loaded, processor):
        part.save_pretrained(tmp_path / "trained")
    unsmoothed = write(str(tmp_path / "trained"), data, tmp_path / "two")
    assert smoothing_in(unsmoothed) == [3, 0]
    config = PseudoLabelConfig(smoothing_neighbors=3, smoothing_iterations=0)
    given = write_pseudo_labels(model, data, tmp_path / "three", config, cpu=True)
    assert all(np.array_equal(mask, masks_of(given)[name]) for name, mask in masks_of(unsmoothed).items())


def test_given_labels_stay_and_only_unseen_ones_are_predicted(model, data, tmp_path):
    folder = write(model, data, tmp_path / "out", keep_labels=True, unseen="sea, cup")
    again, given = load_segmentation_dataset(str(folder)), masks_of(folder, "given")
    hidden = [NAMES.index(name) for name in ("sea", "cup")]
    for old, new in zip(data.samples, again.samples, strict=True):
        labels, predicted = data.read(old)[1], again.read(new)[1]
        kept = (labels != -100) & ~np.isin(labels, hidden)
        assert 0 < kept.sum() < kept.size
        assert np.array_equal(given[new["id"]], kept * 255)
        assert np.array_equal(predicted[kept], labels[kept])
        assert set(np.unique(predicted[~kept])) <= set(hidden)


def test_given_labels_of_unseen_categories_change_nothing(model, data, tmp_path):
    first = masks_of(write(model, data, tmp_path / "one", keep_labels=True, unseen="sea, cup"))
    for sample in data.samples:
        path = sample["mask"]["path"]
        mask = np.array(Image.open(path))
        mask[mask == NAMES.index("sea")] = NAMES.index("cup")
        Image.fromarray(mask).save(path)
    second = masks_of(write(model, data, tmp_path / "two", keep_labels=True, unseen="sea, cup"))
    assert all(np.array_equal(mask, second[name]) for name, mask in first.items())


def test_pixels_of_low_confidence_get_no_label(model, data, tmp_path, capsys):
    masks = masks_of(write(model, data, tmp_path / "out", min_confidence=0.999))
    assert all((mask == 255).all() for mask in masks.values())
    assert "predicted 0.0 %, none 100.0 %" in capsys.readouterr().out


def test_images_without_masks(model, data, tmp_path):
    images = load_images(tmp_path / "images" / "train" / "images", NAMES)
    one, two = write(model, images, tmp_path / "one"), write(model, data, tmp_path / "two")
    assert all(np.array_equal(mask, masks_of(two)[name]) for name, mask in masks_of(one).items())
    (tmp_path / "one" / "given").mkdir()
    with pytest.raises(ValueError, match="There is no image in"):
        load_images(tmp_path / "one" / "given", NAMES)


def test_masks_without_names_get_one_label_each(model, tmp_path):
    """Id maps of 16 bits, whose numbers mean nothing, and pixels of no mask; the result is an ordinary dataset."""
    images = Path(save_masked_images(tmp_path / "images", count=3, height=64, width=80)) / "train"
    (tmp_path / "ids").mkdir()
    for file in sorted((images / "masks").glob("*.png")):
        ids = np.asarray(Image.open(file)).astype(np.uint16) * 300 + 7
        Image.fromarray(ids).save(tmp_path / "ids" / file.name)
    data = load_unnamed_masks(images / "images", tmp_path / "ids", NAMES, ignore_index=9 * 300 + 7)
    folder = write(model, data, tmp_path / "out")
    segmenter, processor = load_tuned(model)
    again = load_segmentation_dataset(str(folder))
    given = set()
    for sample in again.samples:
        image, labels = again.read(sample)
        with torch.no_grad():
            outputs = segmenter(**processor(images=image, return_tensors="pt"))
        (scores,) = processor.post_process_semantic_segmentation(
            outputs, [image.shape[:2]], return_segmentation_scores=True
        )
        ids = np.asarray(Image.open(images / "masks" / f"{sample['id']}.png"))
        for number in np.unique(ids):
            means = scores["segmentation_scores"][:, torch.from_numpy(ids == number)].mean(1)
            expected = -100 if number == 9 else means.argmax().item()
            assert (labels[ids == number] == expected).all()
            given.add(expected)
    assert len(given) > 1
    metadata = json.loads((folder / "dataset.json").read_text())["pseudo_labels"]
    assert metadata["masks"] is True
    with pytest.raises(ValueError, match="other settings"):  # labels of pixels do not continue labels of masks
        write(model, load_images(images / "images", NAMES), folder)
    whole = load_unnamed_masks(images / "images", images / "masks", NAMES)
    assert (whole.read(whole.samples[0])[1] == 9).any()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"No image in .* has a mask"):
        load_unnamed_masks(images / "images", tmp_path / "empty", NAMES)
    (tmp_path / "ids" / "1.png").unlink()
    with pytest.raises(SampleError, match=r"no mask .*1\.png"):
        write(model, data, tmp_path / "missing")


def test_a_stopped_run_resumes_and_a_complete_one_stays(model, data, tmp_path, monkeypatch, capsys):
    whole = masks_of(write(model, data, tmp_path / "whole"))

    def stop_at_the_second(*arguments):
        if (tmp_path / "out" / "masks" / "0.png").exists():
            raise KeyboardInterrupt
        return predict_labels(*arguments)

    predict_labels = pseudo_labels.predict_labels
    monkeypatch.setattr(pseudo_labels, "predict_labels", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write(model, data, tmp_path / "out")
    assert list(masks_of(tmp_path / "out")) == ["0"]
    with pytest.raises(ValueError, match=r"dataset\.json"):  # half of it is no data set
        load_segmentation_dataset(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="other settings or another model"):
        write(model, data, tmp_path / "out", min_confidence=0.5)
    monkeypatch.undo()
    write(model, data, tmp_path / "out")
    assert "2 images in" in capsys.readouterr().out
    assert all(np.array_equal(mask, whole[name]) for name, mask in masks_of(tmp_path / "out").items())
    write(model, data, tmp_path / "out")
    assert "is complete already" in capsys.readouterr().out


def test_wrong_arguments_are_named(model, data, tmp_path):
    for arguments, message in [
        ({"smoothing_neighbors": 0}, "smoothing_neighbors=0"),
        ({"smoothing_iterations": -1}, "smoothing_iterations=-1"),
        ({"min_confidence": 1.0}, "min_confidence=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            PseudoLabelConfig(**arguments)
    with pytest.raises(ValueError, match='no category "dog"'):
        write(model, data, tmp_path / "out", unseen="dog")
    with pytest.raises(FileNotFoundError, match='no model folder "nowhere"'):
        write("nowhere", data, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("somebody's")
    with pytest.raises(ValueError, match="holds other files"):
        write(model, data, tmp_path / "full")
    data.names = [f"name {number}" for number in range(255)]
    with pytest.raises(ValueError, match="255 categories do not fit"):
        write(model, data, tmp_path / "many")


def test_a_damaged_image_is_named(model, data, tmp_path):
    (tmp_path / "images" / "train" / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(SampleError, match=r"1\.png"):
        write(model, data, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json.incomplete").read_text())["categories"] == NAMES


def test_a_damaged_image_can_be_skipped(model, data, tmp_path, capsys):
    (tmp_path / "images" / "train" / "images" / "1.png").write_bytes(b"no image")
    folder = write(model, data, tmp_path / "out", on_error="skip")
    assert list(masks_of(folder)) == ["0", "2"]
    captured = capsys.readouterr()
    assert "2 images in" in captured.out
    assert ", 1 were skipped: labels given" in captured.out
    assert "1.png" in captured.err
    with pytest.raises(ValueError, match="choose fail or skip"):
        write(model, data, tmp_path / "other", on_error="maybe")


def test_images_of_sub_folders_are_labelled_and_doubles_refused(model, tmp_path):
    photos = tmp_path / "photos"
    for name in ("a.jpg", "town/a.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 48)).save(photos / name)
    (photos / "._a.jpg").write_bytes(b"resource fork")
    folder = write(model, load_images(photos, NAMES), tmp_path / "out")
    assert load_segmentation_dataset(str(folder)).samples["id"] == ["a", "town/a"]
    assert (folder / "masks" / "town" / "a.png").is_file()
    Image.new("RGB", (48, 48)).save(photos / "a.png")
    with pytest.raises(ValueError, match=r"two images called a: a\.jpg and a\.png"):
        load_images(photos, NAMES)


@pytest.mark.slow
def test_a_late_process_leaves_no_image_out(model, tmp_path):
    images, out = save_masked_images(tmp_path / "images", count=6), tmp_path / "out"
    program = Path(__file__).parents[2] / "helpers" / "label_in_two_processes.py"
    done = subprocess.run([sys.executable, program, model, images, out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(masks_of(out)) == 6
