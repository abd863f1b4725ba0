"""Evaluation before and after tuning, and the ablations, with a small random model."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import save_tiny_model

from ifseg_hf.modeling import IFSegForSemanticSegmentation, OFAForConditionalGeneration
from ifseg_hf.nano import scene_evaluation, scenes
from ifseg_hf.nano.scene_evaluation import Variant
from ifseg_hf.processing import IFSegProcessor

WORDS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def images() -> scenes.NamedImages:
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    pixels = rng.integers(0, 120, (30, 64, 64, 3), dtype=np.uint8)
    pixels[np.arange(30), :, :, labels] += 120
    return scenes.NamedImages(pixels, labels, WORDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, OFAForConditionalGeneration)
    return scene_evaluation.at_size(folder, 64, 64, tmp_path_factory.mktemp("small"))


def test_mosaics_are_images_with_masks(images):
    data = scenes.mosaic_data(images, WORDS[:2], 4, seed=1, size=64)
    assert data.names == WORDS[:2]
    expected = scenes.evaluation_scenes(images, WORDS[:2], 4, seed=1, size=64)
    for row, (image, target) in zip(data.samples, expected, strict=True):
        read, truth = data.read(row)
        assert (read == image).all()
        assert (truth == target).all()


def test_a_copy_at_another_size_changes_both_grids(model):
    processor = IFSegProcessor.from_pretrained(model)
    assert processor(images=Image.new("RGB", (90, 60)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 96)
    assert OFAForConditionalGeneration.from_pretrained(model).config.image_size == 64


def tuner(folder):
    """Replaces tuning by a copy of the model with other weights for each seed; records its calls."""
    calls = []

    def tune(start, words, seed, **settings):
        calls.append((str(start), words, seed, settings))
        output = folder / f"tuned-{len(calls)}"
        shutil.copytree(start, output)
        torch.manual_seed(seed)
        tuned = IFSegForSemanticSegmentation.from_pretrained(start)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        tuned.save_pretrained(output)
        return output

    tune.calls = calls
    return tune


def test_scenes_are_evaluated_before_and_after_tuning(images, model, tmp_path):
    data = scenes.mosaic_data(images, WORDS, 6, seed=0, size=64)
    tune = tuner(tmp_path)
    result = scene_evaluation.evaluate_scenes(model, data, tune, seeds=[4, 5], smoothing=[(1, 0), (3, 2)])
    assert [(words, seed) for _, words, seed, _ in tune.calls] == [(WORDS, 4), (WORDS, 5)]
    assert result["words"] == WORDS
    assert list(result["after"]) == ["none", "k=3, n=2"]
    for seed in range(2):
        evaluation = scene_evaluation.evaluate_folder(tmp_path / f"tuned-{seed + 1}", data, [(3, 2)])
        assert result["after"]["k=3, n=2"][seed] == pytest.approx(
            100 * np.array(evaluation.scores((3, 2))["per_category_iou"])
        )
    assert result["after"]["none"][0] != result["before"]["none"] != result["cosine"]["none"]
    table = scene_evaluation.scene_table({"six mosaics": result})
    means = [np.mean(run) for run in result["after"]["none"]]
    assert f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}" in table
    assert f"| six mosaics | {np.mean(result['cosine']['none']):.1f} / " in table
    assert f"| red | {result['cosine']['none'][0]:.1f} |" in scene_evaluation.word_table(result)


def test_ablations_tune_once_per_variant_and_seed(images, model, tmp_path):
    data = scenes.mosaic_data(images, WORDS, 4, seed=0, size=64)
    tune, lines = tuner(tmp_path), []
    tunings = scene_evaluation.variants(usual=3, largest=4)
    assert list(tunings)[:3] == ["S = 3", "S = 2", "S = 4"]
    tunings = {name: tunings[name] for name in ("S = 2", "the paper's decoder positions")}
    tunings["fine words"] = Variant(words={"red": ["rose", "brick"], "green": ["leaf"], "blue": ["sky"]})
    results = scene_evaluation.ablate(model, data, tune, tunings, [7], tmp_path, [(1, 0), (2, 1)], lines.append)
    assert list(results) == ["before tuning, 3 words", *tunings]
    assert [settings for *_, settings in tune.calls] == [{"max_cells": 2}, {}, {}]
    assert tune.calls[2][1] == tunings["fine words"].words
    assert tune.calls[0][0] == tune.calls[2][0] == str(model)
    positions = IFSegForSemanticSegmentation.from_pretrained(tune.calls[1][0])
    assert positions.config.backbone_config.decoder_positions == "image"
    evaluation = scene_evaluation.evaluate_folder(tmp_path / "tuned-1", data, [(2, 1)])
    assert results["S = 2"]["k=2, n=1"] == [100 * evaluation.scores((2, 1))["mean_iou"]]
    assert len(lines) == 3
    assert "| S = 2 |" in lines[0]


def test_silenced_cross_attention_stays_constant_under_training(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "silent")
    scene_evaluation.silence_cross_attention(folder)
    for start, silent in [(model, False), (folder, True)]:
        torch.manual_seed(0)
        segmenter = IFSegForSemanticSegmentation.from_pretrained(start)
        segmenter.set_words(**IFSegProcessor.from_pretrained(model).encode_categories(WORDS))
        segmenter.freeze_for_word_maps()
        outputs: list[torch.Tensor] = []
        decoder_layers = segmenter.backbone.model.decoder.layers
        for layer in decoder_layers:
            layer.cross_attn_mid_layer_norm.register_forward_hook(lambda *args, into=outputs: into.append(args[2]))
        maps = torch.tensor([[[0, 1], [2, 1]]]).repeat_interleave(2, 1).repeat_interleave(2, 2)
        optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            segmenter(word_map=maps, labels=maps.repeat_interleave(16, 1).repeat_interleave(16, 2)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        same_everywhere = all(torch.equal(x, x[:, :1].expand_as(x)) for x in outputs)
        assert same_everywhere == silent
        assert all(x.eq(0).all() for x in outputs[: len(decoder_layers)]) == silent


def test_each_dataset_has_a_row(images, model, tmp_path, monkeypatch, capsys):
    tune = tuner(tmp_path)
    results = scene_evaluation.compare_on_mosaics(model, images, [2, 3], 2, tune, [0])
    assert list(results) == ["2 mosaics, 2 words", "2 mosaics, 3 words"]
    data = scenes.mosaic_data(images, WORDS, 2, seed=0)
    data = data.select({"sky": ["red"], "road": ["green"], "car": ["blue"]})
    monkeypatch.setattr(scene_evaluation, "LARGE_STREET_NAMES", ("sky", "road"))
    results = scene_evaluation.compare_on_streets(model, data, tune, [0])
    assert list(results) == ["2 street images, 3 words", "2 street images, 2 words"]
    assert "| road |" in capsys.readouterr().out
