"""Model cards of saved models: descriptions, code that runs as printed, categories as plain text."""

import json
import shutil

import numpy as np
import pytest
import torch
from hub_client import code_blocks, save_supervised_model, save_tuned_model
from huggingface_hub import ModelCard
from PIL import Image

from ifseg_hf.evaluation.evaluate import load_segmenter
from ifseg_hf.hub.model_card import model_card
from ifseg_hf.hub.model_folder import CARD_IMAGE
from ifseg_hf.processing import segmentation_maps
from ifseg_hf.training.config import SETTINGS_FILE


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return save_tuned_model(tmp_path_factory.mktemp("saved") / "tuned", ["cat", "wet grass", "sky"])


def test_card_has_metadata_and_no_stray_blank_lines(tuned):
    card = model_card(tuned, "alice/tuned", revision="v1", base_model="ofa/base")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.base_model == "ofa/base"
    assert "\n\n\n" not in card.content
    assert 'from_pretrained("alice/tuned", revision="v1")' in card.text


def test_code_for_crop_models_matches_their_evaluation(tmp_path, monkeypatch):
    """Both code blocks, run on a model in a local folder."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    image.save(tmp_path / "image.jpg")
    folder = save_supervised_model(tmp_path / "supervised")
    monkeypatch.chdir(tmp_path)
    card = model_card(folder, str(folder))
    assert "trained on crops of 32 x 32 pixels" in card.text
    alone, package = code_blocks(card.content)
    names = {}
    exec(package, names)
    segmenter = load_segmenter(folder)
    assert segmenter.inference == "slide"
    outputs = segmenter(segmenter.preprocess([np.asarray(Image.open("image.jpg"))]))
    assert torch.equal(names["mask"], segmentation_maps(outputs, [(60, 90)], iterations=0)[0])
    whole = names["processor"].post_process_semantic_segmentation(names["model"](**names["inputs"]), [(60, 90)])
    assert not torch.equal(names["mask"], whole[0])
    used = {}
    exec(alone, used)
    for segment in used["segmenter"]("image.jpg"):
        category = names["model"].config.label2id[segment["label"]]
        assert (np.asarray(segment["mask"]) > 0).tolist() == (names["mask"] == category).tolist()


@pytest.mark.parametrize(
    ("stage", "description"), [("supervised", "images and their masks"), ("self-training", "predictions of a model")]
)
def test_models_trained_on_images_are_not_image_free(tuned, tmp_path, stage, description):
    folder = shutil.copytree(tuned, tmp_path / "images")
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    settings |= {"stage": stage, "dataset": str(tmp_path), "categories": {"cat": ["lion"], "wet grass": [], "sky": []}}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    card = model_card(folder, "alice/images")
    assert description in card.text
    assert "without any image" not in card.text
    assert "image-free" not in card.data.tags
    assert "finer-grained words" not in card.text
    assert str(tmp_path) not in card.text


def test_categories_are_shown_literally(tuned, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "a_b*", "1": "<i>", "2": "[x](y)", "3": "{{ name }}"}
    (folder / "config.json").write_text(json.dumps(config))
    assert r"a\_b\*, \<i\>, \[x\](y), {{ name }}" in model_card(folder, "alice/odd").text


def test_a_card_opens_with_the_picture_of_its_folder(tuned, tmp_path):
    assert "![" not in model_card(tuned, "alice/tuned").text
    folder = shutil.copytree(tuned, tmp_path / "pictured")
    Image.new("RGB", (8, 8)).save(folder / CARD_IMAGE)
    card = model_card(folder, "alice/tuned")
    assert "# tuned\n\n![An image beside its segmentation by this model](card_image.jpg)\n\nAn [IFSeg]" in card.text
    assert "\n\n\n" not in card.content
