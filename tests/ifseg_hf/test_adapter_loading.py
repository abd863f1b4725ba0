"""Adapters as models: from_pretrained, segment, export, and errors in one sentence."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import save_untuned_backbone
from transformers import AutoModel, AutoModelForSemanticSegmentation

import ifseg_hf
from ifseg_hf import NANO, IFSegForSemanticSegmentation, registration
from ifseg_hf.adapters import add_lora, merge_adapter, save_adapter
from ifseg_hf.cache import cache_entries
from ifseg_hf.cli.app import CommandError
from ifseg_hf.cli.export import export
from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.loading import load_segmentation_model
from ifseg_hf.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WORDS, EMBEDDED
from ifseg_hf.tuning import is_tuned_for

WORDS = ["road", "car", "sky"]


def save_random_adapter(model: str, base: str, folder) -> str:
    """Saves an adapter of a model for [`WORDS`], whose weights are random. Returns the folder."""
    segmenter = load_segmenter(model, untuned=True)
    segmenter.set_words(WORDS, background="none")
    add_lora(segmenter.model, 2, base)
    save_adapter(segmenter.model, folder)
    weights = load_file(folder / ADAPTER_WEIGHTS)
    torch.manual_seed(0)
    weights = {name: (x.float() + 0.1 * torch.randn(x.shape)).half() for name, x in weights.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a backbone without segmentation positions."""
    return str(save_untuned_backbone(tmp_path_factory.mktemp("model"), {"steps": 2}))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return save_random_adapter(model, model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IFSEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def logits(model, processor, image):
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=inputs["pixel_values"]).logits


# from_pretrained ------------------------------------------------------------------------------------------------------


def test_from_pretrained_loads_base_model_adapter_and_words(adapter, image):
    expected = load_segmenter(adapter)
    wanted = logits(expected.model, expected.processor, image)
    for loaded in (
        IFSegForSemanticSegmentation.from_pretrained(adapter),
        AutoModelForSemanticSegmentation.from_pretrained(adapter, trust_remote_code=True),
        IFSegForSemanticSegmentation.from_pretrained(adapter, output_loading_info=True)[0],
    ):
        assert list(loaded.config.id2label.values()) == WORDS
        assert loaded.active_adapters() == ["default"]
        assert not loaded.training
        assert torch.equal(logits(loaded, expected.processor, image), wanted)
    named = IFSegForSemanticSegmentation.from_pretrained(adapter, adapter_name="street", dtype=torch.bfloat16)
    assert (named.active_adapters(), named.dtype) == (["street"], torch.bfloat16)


def test_from_pretrained_finds_the_embedded_model(tmp_path):
    save_random_adapter(EMBEDDED, EMBEDDED, tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == EMBEDDED
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.name_or_path == str(NANO)
    assert list(loaded.config.id2label.values()) == WORDS


def test_the_hub_is_asked_about_adapters_only_after_an_error(monkeypatch):
    asked = []
    monkeypatch.setattr(registration, "_is_adapter", lambda name, arguments: asked.append(name))
    assert registration._auto_model(lambda name: name, AutoModel, ("me/model",), {}) == "me/model"

    def missing(name):
        raise OSError(f"there is no {name}")

    with pytest.raises(OSError, match="there is no me/missing"):
        registration._auto_model(missing, AutoModel, ("me/missing",), {})
    assert asked == ["me/missing"]


def test_adapters_are_no_models_without_a_head(adapter):
    with pytest.raises(ValueError, match="an adapter for segmentation: load it with AutoModelForSemanticSegmentation"):
        AutoModel.from_pretrained(adapter)


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_adapters_without_a_base_model_are_refused(adapter, tmp_path, content):
    for name in (ADAPTER_WEIGHTS, ADAPTER_WORDS):
        (tmp_path / name).symlink_to(f"{adapter}/{name}")
    (tmp_path / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(ValueError, match="names no base model"):
        IFSegForSemanticSegmentation.from_pretrained(tmp_path)


# segment and export ---------------------------------------------------------------------------------------------------


def test_segment_uses_an_adapter_without_tuning(adapter, image):
    found = ifseg_hf.segment(image, model=adapter)
    assert ifseg_hf.segment(image, WORDS, model=adapter) == found
    assert ifseg_hf.segment(image, "sky, road, car", model=adapter) != []
    assert {x["label"] for x in ifseg_hf.segment(image, "cup, bed", model=adapter)} <= {"cup", "bed"}
    assert is_tuned_for(adapter, WORDS)
    assert not is_tuned_for(adapter, ["cup", "bed"])
    assert cache_entries() == []


def test_segment_without_words_needs_a_tuned_model(model, image):
    with pytest.raises(ValueError, match="was not tuned"):
        ifseg_hf.segment(image, model=model)


def test_adapters_are_not_tuned_further(adapter, model, image):
    message = f'"{adapter}" is an adapter, which cannot be tuned further: tune the model .* "{model}"'
    with pytest.raises(ValueError, match=message):
        ifseg_hf.tune(WORDS, adapter)
    with pytest.raises(ValueError, match=message):
        ifseg_hf.segment(image, WORDS, adapter, steps=2)


def test_a_merged_adapter_is_a_plain_model(adapter, model, image, tmp_path):
    segmenter = load_segmenter(adapter)
    wanted = logits(segmenter.model, segmenter.processor, image)
    merge_adapter(segmenter.model)
    plain = load_segmentation_model(model)
    assert [name for name, _ in segmenter.model.named_modules()] == [name for name, _ in plain.named_modules()]
    torch.testing.assert_close(logits(segmenter.model, segmenter.processor, image), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(segmenter.model, segmenter.processor, image), logits_of(plain, segmenter, image))
    segmenter.model.save_pretrained(tmp_path)
    again = IFSegForSemanticSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, segmenter.processor, image), wanted, atol=1e-4, rtol=1e-4)
    assert list(again.config.id2label.values()) == WORDS


def logits_of(plain, segmenter, image):
    """The logits of the model without the adapter, for the same words."""
    plain.set_words(**segmenter.model.words)
    return logits(plain.eval(), segmenter.processor, image)


def test_export_merges_an_adapter(adapter, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    assert export(adapter, tmp_path / "model.onnx", 64, 80) == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    pixels = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    found, _ = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        wanted = load_segmenter(adapter).model(pixel_values=pixels).logits
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    assert list(json.loads(session.get_modelmeta().custom_metadata_map["id2label"]).values()) == WORDS


def test_export_reports_a_damaged_adapter(adapter, tmp_path):
    for name in (ADAPTER_CONFIG, ADAPTER_WORDS):
        (tmp_path / name).symlink_to(f"{adapter}/{name}")
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(b"x")
    with pytest.raises(CommandError, match="cannot be loaded"):
        export(str(tmp_path), tmp_path / "model.onnx", 32, 32)
