"""Labels that the trained model predicts at every step (IFSeg+), with a tiny model."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from image_folders import NAMES, save_masked_images, save_tiny_segmenter
from PIL import Image
from safetensors.torch import load_file

from ifseg_hf.data.crops import CropDataset, load_training_dataset
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.processing.post_processing_ifseg import resize_scores
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training import loop
from ifseg_hf.training.loop import TrainingConfig, train
from ifseg_hf.training.online_labels import GivenLabels, OnlineCrops, label_online
from ifseg_hf.training.pseudo_labels import PseudoLabelConfig, write_pseudo_labels

pytest.importorskip("kornia")

PREDICTED = [NAMES.index("sky"), NAMES.index("sea")]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_segmenter(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def labels(tiny_model, tmp_path_factory):
    """Images with given labels of cat and cup, and stripes of sky and sea, which no model would predict, elsewhere."""
    folder = tmp_path_factory.mktemp("labels")
    data = load_training_dataset(save_masked_images(folder / "images"))
    write_pseudo_labels(tiny_model, data, folder / "out", keep_labels=True, unseen="sky, sea", cpu=True)
    relabel(folder / "out", lambda mask: np.array(PREDICTED)[np.arange(mask.shape[1]) // 8 % 2])
    return folder / "out"


def relabel(folder, predict):
    """Replaces the predicted labels of a folder."""
    for file in (folder / "masks").glob("*.png"):
        mask, kept = np.array(Image.open(file)), np.asarray(Image.open(folder / "given" / file.name)) > 0
        Image.fromarray(np.where(kept, mask, predict(mask)).astype(np.uint8)).save(file)


@pytest.fixture
def given(labels):
    return GivenLabels(load_training_dataset(str(labels)), labels)


@pytest.fixture
def model(tiny_model):
    model, processor = (kind.from_pretrained(tiny_model) for kind in (IFSegForSemanticSegmentation, IFSegProcessor))
    model.set_words(**processor.encode_categories(NAMES))
    model.config.backbone_config.dropout = 0.5
    return model


def config(model, labels, folder, **changes):
    quick = {"stage": "self-training", "steps": 5, "batch_size": 4, "learning_rate": 1e-2, "cpu": True, "crop_size": 32}
    quick["dataset"] = str(labels)
    return TrainingConfig(None, str(folder), model, **{**quick, **changes})


def assert_equal_weights(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_given_labels_stay_and_all_others_are_open(labels, given):
    for sample in given.samples:
        image, found = given.read(sample)
        kept = np.asarray(Image.open(labels / "given" / f"{sample['id']}.png")) > 0
        mask = np.asarray(Image.open(labels / "masks" / f"{sample['id']}.png"))
        assert image.shape[:2] == found.shape
        assert 0 < kept.sum() < kept.size
        assert np.array_equal(found, np.where(kept, mask, len(NAMES)))
    assert given.config.predicted == ["sky", "sea"]


def test_samples_hold_the_crop_before_augmentation(given):
    """The crop is that of the augmented image; without a change of colours the two differ by the flip alone."""
    crops, plain = OnlineCrops(given, 32, 48), CropDataset(given, 32, 48)
    flips, changed = set(), 0
    for index in range(12):
        sample, expected = crops[index], plain[index]
        assert all(torch.equal(sample[name], expected[name]) for name in expected)
        changed += not torch.equal(sample["original"], sample["pixel_values"])
    crops.augment.distort = torch.nn.Identity()
    for index in range(12):
        sample = crops[index]
        pixels = sample["pixel_values"].flip(2) if sample["flipped"] else sample["pixel_values"]
        assert torch.equal(sample["original"], pixels)
        assert sample["original"].shape == (3, 32, 32)
        flips.add(sample["flipped"].item())
    assert flips == {True, False}
    assert changed > 6


@pytest.mark.parametrize("min_confidence", [0.0, 0.6])
def test_the_model_labels_the_original_crop(min_confidence, model, given):
    """In evaluation mode, among the categories to predict, where no label is given and it is confident."""
    crops = OnlineCrops(given, 32, 48)
    batch = torch.utils.data.default_collate([crops[index] for index in range(8)])
    model.train()
    state = torch.get_rng_state()
    settings = PseudoLabelConfig(min_confidence=min_confidence, predicted=["sky", "sea"])
    labelled = label_online(model, batch, NAMES, settings)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert set(labelled) == {"pixel_values", "labels"}
    with torch.no_grad():
        logits = model.eval()(pixel_values=batch["original"]).logits
    for row, scores in enumerate(logits):
        probabilities = resize_scores(scores.softmax(0), (32, 32))[PREDICTED]
        values, best = probabilities.max(0)
        expected = torch.tensor(PREDICTED)[best].masked_fill(values < min_confidence, -100)
        expected = expected.flip(1) if batch["flipped"][row] else expected
        was_open = batch["labels"][row] == len(NAMES)
        assert torch.equal(labelled["labels"][row], torch.where(was_open, expected, batch["labels"][row]))
        assert not torch.equal(labelled["labels"][row], batch["labels"][row])


def test_labels_follow_the_weights_of_their_step(tiny_model, labels, tmp_path, monkeypatch):
    """The folder's pseudo-labels up to the step, the model's of each step after it."""
    seen = []

    def recorded(model, batch, names, settings):
        labelled = label_online(model, batch, names, settings)
        seen.append({name: x.clone() for name, x in model.state_dict().items()})
        assert set(labelled["labels"].unique().tolist()) <= {-100, *range(len(NAMES))}
        return labelled

    monkeypatch.setattr(loop, "label_online", recorded)
    train(config(tiny_model, labels, tmp_path / "out", online_after=2, word_map_ratio=0.25))
    assert len(seen) == 3  # of 5 steps
    for one, two in itertools.pairwise(seen):
        assert any(not torch.equal(x, two[name]) for name, x in one.items())
    monkeypatch.undo()
    train(config(tiny_model, labels, tmp_path / "never", word_map_ratio=0.25))
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "out", tmp_path / "never")


def test_pseudo_labels_are_not_read_after_the_step(tiny_model, labels, tmp_path):
    """Other pseudo-labels in the folder change a run before the step only."""
    other = shutil.copytree(labels, tmp_path / "other")
    relabel(other, lambda mask: PREDICTED[0])
    resume = tmp_path / "one" / "checkpoint-2"
    common = {"online_after": 2, "checkpointing_steps": 2, "checkpoints_total_limit": 9}
    train(config(tiny_model, labels, tmp_path / "one", **common))
    settings = json.loads((resume / "checkpoint.json").read_text())
    settings["settings"]["dataset"] = str(other)
    (resume / "checkpoint.json").write_text(json.dumps(settings))
    train(config(tiny_model, other, tmp_path / "two", resume=str(resume), **common))
    assert_equal_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_weights(step, tiny_model, labels, tmp_path):
    """Resumed before, at and after the step from which the model labels its crops."""
    common = {"online_after": 2, "word_map_ratio": 0.25, "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    train(config(tiny_model, labels, tmp_path / "complete", **common))
    resume = str(tmp_path / "complete" / f"checkpoint-{step}")
    train(config(tiny_model, labels, tmp_path / "resumed", resume=resume, **common))
    assert_equal_weights(tmp_path / "complete", tmp_path / "resumed")


def test_workers_and_accumulation_do_not_change_the_labels(tiny_model, labels, tmp_path):
    quiet = {"online_after": 1, "steps": 3, "dropout": 0.0, "drop_path": 0.0}
    train(config(tiny_model, labels, tmp_path / "one", **quiet))
    train(config(tiny_model, labels, tmp_path / "two", dataloader_workers=1, **quiet))
    assert_equal_weights(tmp_path / "one", tmp_path / "two")


def test_images_without_given_labels(tiny_model, labels, tmp_path):
    images = labels.parent / "images"
    write_pseudo_labels(tiny_model, load_training_dataset(str(images)), tmp_path / "all", cpu=True)
    result = train(config(tiny_model, tmp_path / "all", tmp_path / "out", online_after=1, steps=3))
    assert np.isfinite(result.loss)
    given = GivenLabels(load_training_dataset(str(tmp_path / "all")), tmp_path / "all")
    assert (given.read(given.samples[0])[1] == len(NAMES)).all()


def test_settings_that_contradict_each_other(tiny_model, labels, tmp_path):
    for changes, message in [
        ({"online_after": -1}, "online_after=-1: must be at least 0"),
        ({"online_after": 5}, "online_after=5: must be fewer than steps=5"),
        ({"online_after": 2, "refresh_every": 2}, "refresh_every=2 and online_after=2 .*choose one"),
        ({"online_after": 2, "dataset": "images"}, '"images" is no folder of `ifseg pseudo-label`'),
        ({"online_after": 2, "stage": "supervised"}, "online_after belongs to stage=self-training"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            config(tiny_model, labels, tmp_path / "out", **changes).check()
        assert "\n" not in str(caught.value)
    masks = json.loads((labels / "dataset.json").read_text())
    masks["pseudo_labels"]["masks"] = True
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "dataset.json").write_text(json.dumps(masks))
    for name in ("online_after", "refresh_every"):
        with pytest.raises(ValueError, match=f"{name}=2 predicts pixels, .* of whole masks"):
            config(tiny_model, tmp_path / "masks", tmp_path / "out", **{name: 2}).check()
