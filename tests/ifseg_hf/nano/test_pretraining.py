"""Pre-training in miniature: both stages, resuming, and a checkpoint that loads."""

import numpy as np
import torch
from nano_scenes import NAMES, SMALL, make_scenes

from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.modeling.modeling_ofa import OFAForConditionalGeneration
from ifseg_hf.modeling.trunk_ofa import OFAFrozenBatchNorm2d
from ifseg_hf.nano.batches import Phase
from ifseg_hf.nano.configuration import nano_config
from ifseg_hf.nano.pretraining import average_weights, save_pretrained_model
from ifseg_hf.nano.texts import train_tokenizer
from ifseg_hf.nano.trunk import train_trunk
from ifseg_hf.nano.vision_language import train_vision_language
from ifseg_hf.processing.processing_ifseg import IFSegProcessor


def test_the_nano_model_has_under_12_megabytes():
    with torch.device("meta"):
        model = OFAForConditionalGeneration(nano_config(800))
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 12e6


def test_weights_are_averaged_with_tied_weights():
    torch.manual_seed(0)
    model, other = (torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(2))
    for one in (model, other):
        one[1].weight = one[0].weight  # tied, as word embeddings and output layer are
    mean = {name: (value + other.state_dict()[name]) / 2 for name, value in model.state_dict().items()}
    average_weights(model, other.state_dict())
    assert all(torch.allclose(value, mean[name]) for name, value in model.state_dict().items())


def test_both_stages_run_resume_and_save(tmp_path):
    tokenizer = train_tokenizer(NAMES)
    config = nano_config(len(tokenizer), **SMALL)
    scene_maker, file = make_scenes(), tmp_path / "trunk.pt"
    phases = [Phase(2, 4, 32, single=True), Phase(1, 2, 64)]
    lines = []
    state = train_trunk(scene_maker, scene_maker.images, config, phases, file, log=lines.append)
    again = train_trunk(scene_maker, scene_maker.images, config, phases, file, log=lines.append)
    assert len(lines) == 1
    assert "held-out" in lines[0]
    assert all(torch.equal(state[name], again[name]) for name in state)

    model = OFAForConditionalGeneration(config)
    model.model.encoder.embed_images.load_state_dict(state)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phases = [Phase(2, 2, 32, train_trunk=False)]
    train_vision_language(scene_maker, model, tokenizer, phases, tmp_path / "language.pt")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "model.encoder.image_proj.weight" in changed
    assert not any("embed_images" in name for name in changed)

    phases = [Phase(3, 4, 32, train_norms=True, language_every=2), Phase(1, 2, 32)]
    train_vision_language(scene_maker, model, tokenizer, phases, tmp_path / "more.pt", log=lines.append)
    assert "caption" in lines[-1]
    norm = model.model.encoder.embed_images.bn1
    assert isinstance(norm, OFAFrozenBatchNorm2d)
    assert not torch.equal(norm.running_mean, state["bn1.running_mean"])

    save_pretrained_model(model, tokenizer, tmp_path / "nano")
    processor = IFSegProcessor.from_pretrained(tmp_path / "nano")
    segmenter = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "nano", dtype=torch.float32)
    image = np.zeros((40, 60, 3), np.uint8)
    inputs = processor(images=image, categories=["cat", "road"], return_tensors="pt")
    assert inputs["pixel_values"].shape[2:] == (48, 72)
    assert segmenter(**inputs).logits.shape == (1, 2, 3, 5)
    assert segmenter.config.grid_size == 3
