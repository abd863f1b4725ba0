"""Supervised training and self-training on images, with a tiny model."""

import json
import shutil

import numpy as np
import pytest
import torch
from image_folders import NAMES, save_masked_images, save_tiny_segmenter
from PIL import Image
from safetensors.torch import load_file
from tiny_model import is_key_bias

from ifseg_hf.data.crops import load_training_dataset, load_validation_dataset
from ifseg_hf.evaluation.evaluate import evaluate_segmenter, load_segmenter
from ifseg_hf.modeling import trunk_ofa
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training import setup
from ifseg_hf.training.batches import batch_loss, crop_dataset
from ifseg_hf.training.config import SETTINGS_FILE, checkpoints
from ifseg_hf.training.log import LOG_FILE, read_log
from ifseg_hf.training.loop import SettingError, TrainingConfig, TrainingError, train
from ifseg_hf.training.pseudo_labels import PseudoLabelConfig, write_pseudo_labels
from ifseg_hf.training.setup import freeze, load_model, measure_batch_norm, samples_per_batch

pytest.importorskip("kornia")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_segmenter(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_masked_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pseudo_labels(tiny_model, images, tmp_path_factory):
    """Images with pseudo-labels of two categories, in stripes that no model would predict, and given labels of two."""
    folder = tmp_path_factory.mktemp("labels") / "out"
    data = load_training_dataset(images)
    write_pseudo_labels(tiny_model, data, folder, PseudoLabelConfig(), keep_labels=True, unseen="sky, sea", cpu=True)
    for file in (folder / "masks").glob("*.png"):
        mask, given = np.array(Image.open(file)), np.asarray(Image.open(folder / "given" / file.name))
        stripes = np.broadcast_to(2 + np.arange(mask.shape[1]) // 8 % 2, mask.shape)
        Image.fromarray(np.where(given > 0, mask, stripes).astype(np.uint8)).save(file)
    return str(folder)


def settings(model, dataset, folder, **changes):
    quick = {"stage": "supervised", "steps": 3, "batch_size": 4, "learning_rate": 1e-2, "cpu": True, "crop_size": 32}
    return TrainingConfig(None, str(folder), model, dataset=dataset, **{**quick, **changes})


def relabel(masks, labels):
    for file in masks.glob("*.png"):
        Image.open(file).point([*labels, *range(len(labels), 256)]).save(file)


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def moved(before, folder):
    after = weights(folder)
    return {name for name in after if not torch.equal(after[name], before[name])}


def assert_equal_weights(one, other):
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({}, ()),
        ({"stage": "self-training"}, ("embed_tokens",)),
        ({"freeze": "trunk"}, ("embed_tokens", "embed_images.", "image_proj")),
    ],
)
def test_all_parameters_but_the_frozen_ones_are_trained(changes, frozen, tiny_model, images, tmp_path):
    train(settings(tiny_model, images, tmp_path / "out", drop_path=0.0, **changes))
    model = IFSegForSemanticSegmentation.from_pretrained(tiny_model)
    freeze(model, "nothing")
    used = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name in used if not any(part in name for part in frozen)}
    found = moved(weights(tiny_model), tmp_path / "out")
    assert {name for name in found ^ expected if not is_key_bias(name)} == set()
    assert any("embed_images.bn1.weight" in name for name in used)
    assert not any("running" in name for name in found)  # the statistics of batch norm


def test_training_on_images_lowers_the_loss(tiny_model, images, tmp_path):
    """Three of four categories share one label, which is learnt in seconds."""
    easy = shutil.copytree(images, tmp_path / "easy")
    relabel(easy / "train" / "masks", [0, 2, 2, 2])
    first = train(settings(tiny_model, str(easy), tmp_path / "one", steps=1))
    last = train(settings(tiny_model, str(easy), tmp_path / "out", steps=25))
    assert last.loss < 0.7 * first.loss


@pytest.mark.parametrize(("stage", "window"), [("supervised", 32), ("self-training", None)])
def test_the_result_carries_its_words_and_image_processing(stage, window, tiny_model, images, tmp_path):
    changes = {"categories": {"pet": ["cat"], "blue": ["sky", "sea"]}, "short_side": 40}
    config = settings(tiny_model, images, tmp_path / "out", steps=1, stage=stage)
    train(TrainingConfig(**{**config.to_dict(), **changes}))
    model = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "pet", 1: "blue"}
    assert model.config.word_ids is None
    image_processor = IFSegProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (image_processor.smoothing_iterations, image_processor.sliding_window) == (0, window)
    assert dict(image_processor.size) == {"shortest_edge": 40, "longest_edge": 160}
    saved = json.loads((tmp_path / "out" / SETTINGS_FILE).read_text())
    assert TrainingConfig(**saved) == TrainingConfig(**{**config.to_dict(), **changes})
    pipe = IFSegProcessor.from_pretrained(tmp_path / "out").pipeline(model.eval())
    assert {mask["label"] for mask in pipe(Image.new("RGB", (90, 50)))} <= {"pet", "blue"}


def test_word_maps_of_the_categories_of_a_dataset(tiny_model, images, tmp_path):
    train(settings(tiny_model, images, tmp_path / "out", stage="word-maps", crop_size=None))
    assert list(IFSegForSemanticSegmentation.from_pretrained(tmp_path / "out").config.id2label.values()) == NAMES
    image_processor = IFSegProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (image_processor.smoothing_iterations, image_processor.sliding_window) == (25, None)


def test_training_from_scratch_starts_with_random_weights(tiny_model, images, tmp_path):
    quick = {"steps": 1, "from_scratch": True, "learning_rate": 1e-9}
    train(settings(tiny_model, images, tmp_path / "one", seed=1, **quick))
    train(settings(tiny_model, images, tmp_path / "two", seed=1, **quick))
    train(settings(tiny_model, images, tmp_path / "three", seed=2, **quick))
    assert_equal_weights(tmp_path / "one", tmp_path / "two")
    name = "backbone.model.encoder.layers.0.fc1.weight"
    for other in (weights(tiny_model), weights(tmp_path / "three")):
        assert (weights(tmp_path / "one")[name] - other[name]).abs().mean() > 0.01


def test_training_from_scratch_calibrates_batch_norm(tiny_model, images, tmp_path, monkeypatch):
    """Outputs of the trunk's norms get mean 0 and deviation 1; the random number generator is not advanced."""
    config = settings(tiny_model, images, tmp_path / "out", from_scratch=True)
    data = load_training_dataset(images)
    processor, model = load_model(config, data)
    crops = crop_dataset(config, model.config, processor, data)
    trunk = model.backbone.image_trunk
    before = torch.get_rng_state()
    measure_batch_norm(trunk, crops, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())

    outputs, conv_norm = [], trunk_ofa.conv_norm

    def recorded(*inputs: object) -> torch.Tensor:
        output = conv_norm(*inputs)
        outputs.append(output.clone())  # ReLU works in place
        return output

    monkeypatch.setattr(trunk_ofa, "conv_norm", recorded)
    trunk(torch.stack([crops[index]["pixel_values"] for index in range(128)]))
    assert len(outputs) == sum(isinstance(module, torch.nn.Conv2d) for module in trunk.modules())
    for output in outputs:
        torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(output.shape[1]), rtol=0, atol=0.1)
        torch.testing.assert_close(output.std((0, 2, 3)), torch.ones(output.shape[1]), rtol=0, atol=0.25)


def test_a_run_from_scratch_resumes_with_its_batch_norm(tiny_model, images, tmp_path):
    common = {"from_scratch": True, "steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 9}
    train(settings(tiny_model, images, tmp_path / "complete", **common))
    resume = str(tmp_path / "complete" / "checkpoint-2")
    train(settings(tiny_model, images, tmp_path / "out", resume=resume, **common))
    assert_equal_weights(tmp_path / "complete", tmp_path / "out")
    assert weights(tmp_path / "out")["backbone.model.encoder.embed_images.bn1.running_mean"].any()


def test_labels_of_unseen_categories_are_ignored(tiny_model, images, tmp_path):
    other = shutil.copytree(images, tmp_path / "other")
    relabel(other / "train" / "masks", [0, 1, 2, 2])
    for name, folder in (("one", images), ("two", str(other))):
        train(settings(tiny_model, folder, tmp_path / name, unseen="sky, sea"))
    assert_equal_weights(tmp_path / "one", tmp_path / "two")
    train(settings(tiny_model, str(other), tmp_path / "three", unseen="cat"))
    assert moved(weights(tmp_path / "one"), tmp_path / "three")


# The loss of a batch --------------------------------------------------------------------------------------------------


def test_gradient_accumulation_leads_to_the_same_weights(tiny_model, images, tmp_path):
    """With word maps among images, and different numbers of labelled pixels: the loss is a mean over samples."""
    quiet = {"dropout": 0.0, "drop_path": 0.0, "learning_rate": 1e-4, "word_map_ratio": 0.3, "unseen": "cat, cup"}
    quiet["loss_mean"] = "all"  # a mean over labelled pixels is one of each accumulated batch
    train(settings(tiny_model, images, tmp_path / "one", **quiet))
    train(settings(tiny_model, images, tmp_path / "two", gradient_accumulation_steps=2, **quiet))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        if not is_key_bias(name):  # Adam scales their rounding noise to whole steps
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_unlabelled_pixels_do_not_count_or_count_as_zero(tiny_model):
    model = IFSegForSemanticSegmentation.from_pretrained(tiny_model).eval()
    processor = IFSegProcessor.from_pretrained(tiny_model)
    model.set_words(**processor.encode_categories(NAMES))
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 64, 64, generator=random)
    labels = torch.randint(0, 4, (3, 64, 64), generator=random)
    labels[1, :40], labels[2] = -100, -100
    word_map, sizes = torch.randint(0, 4, (1, 4, 4), generator=random), torch.tensor([[4, 4]])
    batch = {"pixel_values": pixels, "labels": labels, "word_map": word_map, "grid_size": sizes}
    loss, published = (batch_loss(model, batch, model.config, mean) for mean in ("all", "labelled"))

    logits = model(pixel_values=pixels).logits
    logits = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear")
    image_loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean((1, 2))
    word_logits = torch.nn.functional.interpolate(model(word_map=word_map).logits, size=(64, 64), mode="bilinear")
    word_labels = word_map.repeat_interleave(16, 1).repeat_interleave(16, 2)
    word_loss = torch.nn.functional.cross_entropy(word_logits, word_labels)
    torch.testing.assert_close(loss, (image_loss.sum() + word_loss) / 4)
    torch.testing.assert_close(published, (3 * torch.nn.functional.cross_entropy(logits, labels) + word_loss) / 4)

    unlabelled = {"pixel_values": pixels, "labels": labels * 0 - 100}
    losses = [batch_loss(model, unlabelled, model.config, mean) for mean in ("all", "labelled")]
    sum(losses).backward()
    assert losses == [0, 0]
    assert all(not x.grad.any() for x in model.parameters() if x.grad is not None)


# Refreshed pseudo-labels ----------------------------------------------------------------------------------------------


def test_a_resumed_run_refreshes_to_the_same_weights(tiny_model, pseudo_labels, tmp_path):
    """Resumed at a refresh and between two, in another folder."""
    common = {"stage": "self-training", "steps": 5, "refresh_every": 2, "word_map_ratio": 0.25}
    common |= {"checkpointing_steps": 1, "checkpoints_total_limit": 9}
    train(settings(tiny_model, pseudo_labels, tmp_path / "complete", **common))
    assert {path.name for path in (tmp_path / "complete").glob("pseudo-labels-*")} == {
        "pseudo-labels-2",
        "pseudo-labels-4",
    }
    for step in (2, 3):
        resume = str(tmp_path / "complete" / f"checkpoint-{step}")
        train(settings(tiny_model, pseudo_labels, tmp_path / f"from-{step}", resume=resume, **common))
        assert_equal_weights(tmp_path / "complete", tmp_path / f"from-{step}")
    train(settings(tiny_model, pseudo_labels, tmp_path / "never", **{**common, "refresh_every": 0}))
    assert moved(weights(tmp_path / "complete"), tmp_path / "never")

    shutil.rmtree(tmp_path / "complete" / "pseudo-labels-2")
    resume = str(tmp_path / "complete" / "checkpoint-3")
    with pytest.raises(SettingError, match="needs the pseudo-labels of step 2"):
        train(settings(tiny_model, pseudo_labels, tmp_path / "lost", resume=resume, **common))


def test_a_refresh_after_the_resumed_checkpoint_is_deleted(tiny_model, pseudo_labels, tmp_path):
    common = {"stage": "self-training", "steps": 5, "refresh_every": 4, "checkpointing_steps": 1}
    train(settings(tiny_model, pseudo_labels, tmp_path / "complete", checkpoints_total_limit=9, **common))
    shutil.copytree(tmp_path / "complete" / "checkpoint-1", tmp_path / "out" / "checkpoint-1")
    shutil.copy(tmp_path / "complete" / SETTINGS_FILE, tmp_path / "out")
    train(settings(tiny_model, pseudo_labels, tmp_path / "out", resume="latest", checkpoints_total_limit=1, **common))
    assert list(checkpoints(tmp_path / "out")) == [5]
    assert_equal_weights(tmp_path / "complete", tmp_path / "out")


def test_a_refresh_keeps_the_given_labels(tiny_model, pseudo_labels, tmp_path):
    train(settings(tiny_model, pseudo_labels, tmp_path / "out", stage="self-training", refresh_every=2))
    data = load_training_dataset(pseudo_labels)
    for sample in data.samples:
        before = data.read(sample)[1]
        kept = np.asarray(Image.open(f"{pseudo_labels}/given/{sample['id']}.png")) > 0
        after = np.asarray(Image.open(tmp_path / "out" / "pseudo-labels-2" / f"{sample['id']}.png"))
        assert 0 < kept.sum() < kept.size
        assert (after[kept] == before[kept]).all()
        assert set(after[~kept].tolist()) <= {2, 3}
        assert (after != before).any()


def test_pseudo_labels_without_a_checkpoint_are_deleted(tiny_model, pseudo_labels, tmp_path):
    changes = {"stage": "self-training", "refresh_every": 2, "steps": 7, "checkpointing_steps": 1}
    train(settings(tiny_model, pseudo_labels, tmp_path / "out", checkpoints_total_limit=2, **changes))
    assert list(checkpoints(tmp_path / "out")) == [6, 7]
    assert [path.name for path in (tmp_path / "out").glob("pseudo-labels-*")] == ["pseudo-labels-6"]
    for path in checkpoints(tmp_path / "out").values():
        shutil.rmtree(path)
    # A new run uses none of them.
    train(settings(tiny_model, pseudo_labels, tmp_path / "out", **{**changes, "steps": 1}))
    assert not list((tmp_path / "out").glob("pseudo-labels-*"))


# Evaluations during training ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits(images, tmp_path_factory):
    """A dataset with splits for training and validation."""
    folder = tmp_path_factory.mktemp("splits") / "images"
    shutil.copytree(images, folder)
    save_masked_images(folder, count=3, split="val")
    return str(folder)


def test_evaluations_during_training_do_not_change_the_weights(tiny_model, splits, tmp_path, capsys):
    """The last one equals an evaluation of the result; the log of a resumed run equals that of an uninterrupted one."""
    common = {"steps": 5, "checkpointing_steps": 3, "unseen": "sky", "checkpoints_total_limit": 9}
    train(settings(tiny_model, splits, tmp_path / "never", **common))
    train(settings(tiny_model, splits, tmp_path / "complete", eval_steps=2, **common))
    assert_equal_weights(tmp_path / "never", tmp_path / "complete")
    log = read_log(tmp_path / "complete")
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4, 5]
    names = {"mean_iou", "mean_iou_seen", "mean_iou_unseen", "harmonic_mean_iou"}
    assert [names <= set(line) for line in log] == [True, False, True, False, True, True]
    assert "loss" not in log[0]
    assert [line.get("loss") for line in log[1:]] == [line["loss"] for line in read_log(tmp_path / "never")]
    assert f"Step 5: mean IoU {100 * log[-1]['mean_iou']:.1f}, mean IoU seen" in capsys.readouterr().out

    segmenter = load_segmenter(tmp_path / "complete")
    assert segmenter.inference == "slide"
    (result,) = evaluate_segmenter(segmenter, load_validation_dataset(splits)).results()
    assert result["mean_iou"] == log[-1]["mean_iou"]

    file = tmp_path / "complete" / LOG_FILE
    text = file.read_text()
    train(settings(tiny_model, splits, tmp_path / "complete", eval_steps=2, resume="latest", **common))
    assert file.read_text() == text
    assert_equal_weights(tmp_path / "never", tmp_path / "complete")


def test_self_training_is_evaluated_on_another_dataset(tiny_model, pseudo_labels, splits, tmp_path):
    changes = {"stage": "self-training", "steps": 1, "eval_steps": 1}
    train(settings(tiny_model, pseudo_labels, tmp_path / "out", eval_dataset=splits, **changes))
    assert [set(line) for line in read_log(tmp_path / "out")] == [
        {"step", "mean_iou"},
        {"step", "loss", "learning_rate", "mean_iou"},
    ]
    with pytest.raises(SettingError, match=r"eval_steps=1.* no validation split.* eval_dataset"):
        train(settings(tiny_model, pseudo_labels, tmp_path / "none", **changes))


def test_an_evaluation_names_an_unusable_image(tiny_model, splits, tmp_path):
    damaged = shutil.copytree(splits, tmp_path / "damaged")
    (damaged / "val" / "masks" / "1.png").unlink()
    with pytest.raises(TrainingError, match=r"evaluation after step 0 failed: There is no mask .*1\.png"):
        train(settings(tiny_model, str(damaged), tmp_path / "out", eval_steps=2))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": "nowhere"}, "is no folder"),
        ({"dataset": "coco-stuff"}, "data_dir"),
        ({"split": "test"}, 'no split "test"'),
        ({"unseen": "dog"}, 'no category "dog"'),
        ({"categories": ["cat", "dog"]}, 'no category "dog"'),
        ({"categories": {"a": ["cat"], "b": ["cat"]}}, "choose one"),
        ({"word_map_ratio": 0.8}, "leaves no image in a batch of 4"),
        ({"eval_steps": 1}, "eval_steps=1: .* no validation split"),
        ({"eval_steps": 1, "eval_dataset": "nowhere"}, "eval_steps=1: .*is no folder"),
        ({"eval_steps": 1, "eval_dataset": "dogs"}, "eval_steps=1: .*no category"),
    ],
)
def test_settings_are_checked_against_the_data_before_loading_weights(
    changes, expected, tiny_model, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(IFSegForSemanticSegmentation, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    if changes.get("eval_dataset") == "dogs":
        save_masked_images(tmp_path / "dogs", count=1, split=None)
        (tmp_path / "dogs" / "dataset.json").write_text('{"categories": ["dog", "bone"]}')
        changes = {**changes, "eval_dataset": str(tmp_path / "dogs")}
    with pytest.raises(SettingError, match=expected) as caught:
        train(TrainingConfig(**{**settings(tiny_model, images, tmp_path / "out").to_dict(), **changes}))
    assert "\n" not in str(caught.value)


def test_a_missing_kornia_is_reported(tiny_model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install .ifseg-hf\[train\]"):
        train(settings(tiny_model, images, tmp_path / "out"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unusable_image_is_named(workers, tiny_model, images, tmp_path):
    damaged = shutil.copytree(images, tmp_path / "damaged")
    (damaged / "train" / "masks" / "3.png").unlink()
    with pytest.raises(TrainingError, match=r"There is no mask .*3\.png") as caught:
        train(settings(tiny_model, str(damaged), tmp_path / "out", dataloader_workers=workers))
    assert "\n" not in str(caught.value)
    assert "Error" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_images_are_left_out_on_request(workers, tiny_model, images, tmp_path, capfd):
    """In training and in evaluation."""
    damaged = shutil.copytree(images, tmp_path / "damaged")
    shutil.copytree(damaged / "train", damaged / "val")
    for split in ("train", "val"):
        (damaged / split / "masks" / "3.png").unlink()
    skip = {"on_error": "skip", "steps": 2, "eval_steps": 2}
    train(settings(tiny_model, str(damaged), tmp_path / "out", dataloader_workers=workers, **skip))
    assert capfd.readouterr().err.count("Skipped: There is no mask") == 1
    assert read_log(tmp_path / "out")[-1]["mean_iou"] >= 0


def test_every_batch_needs_an_image():
    config = TrainingConfig(None, "", stage="supervised", dataset="d", batch_size=16, word_map_ratio=0.75)
    assert samples_per_batch(config, 4) == 4
    with pytest.raises(SettingError, match="batch of 2 samples"):
        samples_per_batch(config, 8)
