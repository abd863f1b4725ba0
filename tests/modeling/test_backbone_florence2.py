"""Florence-2 with small random weights, against transformers' own model; training, evaluation, publishing."""

import numpy as np
import pytest
import torch
from hub_client import run_without_package
from image_folders import save_masked_images
from PIL import Image
from tiny_model import save_tiny_model
from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Model

from ifseg_hf.hub.publish import files_to_publish
from ifseg_hf.modeling import Florence2SegmentationConfig, IFSegForSemanticSegmentation
from ifseg_hf.processing import IFSegProcessor
from ifseg_hf.training.config import TrainingConfig
from ifseg_hf.training.loop import train
from scripts import evaluate

WORDS = ["cat", "cup", "sky", "sea"]
IMAGE_TOKEN, PATCH, WIDTH = 259, 32, 16
VISION = {
    "depths": (1, 1, 1, 1),
    "embed_dim": (8, 8, 16, 24),
    "num_heads": (2, 2, 2, 2),
    "num_groups": (2, 2, 2, 2),
    "window_size": 3,
    "projection_dim": WIDTH,
    "max_position_embeddings": 8,
}
TEXT = {
    "model_type": "bart",
    "vocab_size": 260,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 150,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a Florence-2 in the published layout."""
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(
        Florence2Config(vision_config=VISION, text_config=TEXT, image_token_id=IMAGE_TOKEN)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(published, tmp_path_factory):
    """The folder of the same model for segmentation, with a processor of images of 64 pixels."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny_model(folder)
    processor = IFSegProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 256}
    (folder / "model.safetensors").unlink()
    config = Florence2SegmentationConfig.from_pretrained(published, image_size=96)
    IFSegForSemanticSegmentation.from_pretrained(published, config=config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """The folder of a model tuned on words by the training entry."""
    folder = tmp_path_factory.mktemp("tuned") / "out"
    settings = {"steps": 150, "batch_size": 8, "learning_rate": 1e-2, "cpu": True, "dropout": 0.0, "max_cells": 1}
    train(TrainingConfig(WORDS, str(folder), str(checkpoint), **settings))
    return folder


def load(folder) -> tuple[IFSegForSemanticSegmentation, IFSegProcessor]:
    """Model in evaluation mode, with words, and processor."""
    model, processor = IFSegForSemanticSegmentation.from_pretrained(folder), IFSegProcessor.from_pretrained(folder)
    model.set_words(**processor.encode_categories(WORDS))
    return model.eval(), processor


def decoded(florence: Florence2Model, encoded: torch.Tensor, patches: slice) -> torch.Tensor:
    """BART's outputs for the start token and the encoded patches but the last, all of which attend to everything."""
    bart = florence.language_model
    start = bart.shared(torch.full((len(encoded), 1), bart.config.decoder_start_token_id))
    inputs = torch.cat([start, encoded[:, patches][:, :-1]], dim=1)
    outputs = bart(encoder_outputs=(encoded,), decoder_inputs_embeds=inputs, use_cache=False)
    return outputs.last_hidden_state


def category_vectors(florence: Florence2Model, category_ids: list[list[int]]) -> torch.Tensor:
    return torch.stack([florence.language_model.shared.weight[ids].mean(0) for ids in category_ids])


@torch.no_grad()
def test_images_agree_with_transformers_own_model(published, checkpoint):
    model, _ = load(checkpoint)
    florence = Florence2Model.from_pretrained(published).eval()
    for height, width in [(96, 96), (64, 150)]:
        pixels = torch.randn(2, 3, height, width)
        outputs = model(pixel_values=pixels)
        grid = (-(-height // PATCH), -(-width // PATCH))
        count = grid[0] * grid[1]
        assert outputs.logits.shape[2:] == grid
        prompt = [IMAGE_TOKEN] * (count + 1) + model.config.prompt_ids
        own = florence(input_ids=torch.tensor([prompt, prompt]), pixel_values=pixels)
        encoded = own.encoder_last_hidden_state
        torch.testing.assert_close(outputs.encoder_last_hidden_state[:, :count], encoded[:, 1 : count + 1])
        rows = decoded(florence, encoded, slice(1, count + 1))
        expected = rows @ category_vectors(florence, model.config.category_ids).T
        assert expected.std() > 0.1
        torch.testing.assert_close(outputs.logits.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_word_maps_agree_with_transformers_own_model(published, checkpoint):
    model, _ = load(checkpoint)
    florence = Florence2Model.from_pretrained(published).eval()
    vectors = category_vectors(florence, model.config.category_ids)
    word_map = torch.tensor([[[0, 1, 2], [3, 3, 0]]])
    patches = vectors[word_map.flatten()][None]
    prompt = florence.language_model.shared(torch.tensor([model.config.prompt_ids]))
    inputs = torch.cat([patches.mean(1, keepdim=True), patches, prompt], dim=1)
    encoded = florence.language_model.encoder(inputs_embeds=inputs).last_hidden_state
    expected = decoded(florence, encoded, slice(1, 7)) @ vectors.T
    logits = model(word_map=word_map).logits
    torch.testing.assert_close(logits.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_of_prompts_changes_nothing(checkpoint):
    model, processor = load(checkpoint)
    pixels = torch.randn(2, 3, 64, 64)
    lists = [WORDS, ["cat", "sky"]]
    words = processor(categories=lists, return_tensors="pt")
    together = model(pixel_values=pixels, **words).logits
    alone = model(pixel_values=pixels[1:], **processor(categories=[lists[1]], return_tensors="pt")).logits
    torch.testing.assert_close(together[1:, :2], alone, rtol=1e-4, atol=1e-4)


def test_training_on_word_maps_moves_bart_alone(checkpoint, tuned):
    word_map = torch.arange(len(WORDS))[:, None, None].expand(-1, 3, 3)
    losses = [load(folder)[0](word_map=word_map, labels=word_map).loss.item() for folder in (checkpoint, tuned)]
    assert losses[1] < 0.7 * losses[0]
    before, after = (load(folder)[0].backbone.model.state_dict() for folder in (checkpoint, tuned))
    moved = {".".join(name.split(".")[:2]) for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"language_model.encoder", "language_model.decoder"}
    shared = "language_model.shared.weight"
    assert torch.equal(before[shared], after[shared])


def test_supervised_training_uses_every_parameter(checkpoint):
    model, _ = load(checkpoint)
    model(pixel_values=torch.randn(1, 3, 64, 64), labels=torch.zeros(1, 64, 64, dtype=torch.long)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_images_and_prompts_beyond_the_positions_are_refused(checkpoint):
    model, processor = load(checkpoint)
    with pytest.raises(ValueError, match="image of 2 x 9 patches of 32 pixels: Florence-2 has positions for 8 a side"):
        model(pixel_values=torch.zeros(1, 3, 64, 257))
    model.set_words(**processor.encode_categories(["x" * 25, "y" * 25]))
    with pytest.raises(ValueError, match=r"make 1\d\d tokens; Florence-2's encoder has 150 positions"):
        model(pixel_values=torch.zeros(1, 3, 256, 256))
    for size, message in [(100, "image_size=100 is not a multiple"), (512, "An image of 16 x 16 patches")]:
        config = Florence2SegmentationConfig(vision_config=VISION, text_config=TEXT, image_size=size)
        with pytest.raises(ValueError, match=message):
            IFSegForSemanticSegmentation(IFSegForSemanticSegmentation.config_class(backbone_config=config))


def test_settings_of_training_reach_bart_and_davit(checkpoint):
    config = load(checkpoint)[0].config
    config.backbone_config.dropout, config.backbone_config.drop_path_rate = 0.25, 0.4
    model = IFSegForSemanticSegmentation(config).backbone.model
    assert model.language_model.encoder.dropout == 0.25
    last = [module.drop_prob for module in model.vision_tower.modules() if hasattr(module, "drop_prob")][-1]
    assert last == pytest.approx(0.4)
    assert config.to_dict()["backbone_config"]["text_config"]["dropout"] == 0.25


@torch.no_grad()
def test_smoothing_and_cosine_baseline(tuned):
    model, processor = load(tuned)
    images = [np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(64, 80), (100, 64)]]
    outputs = model(**processor(images=images, return_tensors="pt"))
    sizes = [(64, 80), (100, 64)]
    smoothing = {"smoothing_iterations": 5, "smoothing_neighbors": 2}
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes, **smoothing)
    assert [tuple(labels.shape) for labels in maps] == sizes
    features = model.backbone.project_image_features(outputs.image_features)
    assert features.shape == (2, *outputs.logits.shape[2:], WIDTH)


def test_evaluation_and_publishing(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = save_masked_images(tmp_path / "data", split="val")
    assert evaluate(tuned, data, tmp_path / "results")["images"] == 6
    names = {file.name for file in files_to_publish(tuned)}
    assert {"backbone_florence2.py", "backbone.py", "modeling_ifseg.py", "processing_ifseg.py"} <= names
    assert not [name for name in names if "ofa" in name or "clip" in name]


REMOTE = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, AutoProcessor
folder, image = sys.argv[1:]
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    print(model(**processor(images=Image.open(image), return_tensors="pt")).logits.sum().item())
assert "ifseg_hf" not in sys.modules
"""


def test_loads_with_remote_code_alone(tuned, tmp_path):
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(image)
    model, processor = load(tuned)
    with torch.no_grad():
        expected = model(**processor(images=Image.open(image), return_tensors="pt")).logits.sum().item()
    assert float(run_without_package(REMOTE, tuned, image, home=tmp_path / "home")) == pytest.approx(expected, rel=1e-4)
