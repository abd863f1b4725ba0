"""Losses and optimizers of the vision-language stage."""

import pytest
import torch
from nano_scenes import NAMES, SMALL, make_scenes

from ifseg_hf.modeling.modeling_ofa import OFAForConditionalGeneration
from ifseg_hf.nano.batches import Phase
from ifseg_hf.nano.configuration import nano_config
from ifseg_hf.nano.optimizers import convolution_muon, vision_language_optimizers
from ifseg_hf.nano.texts import train_tokenizer
from ifseg_hf.nano.vision_language import alignment_loss, patch_loss, train_vision_language


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(NAMES)


def test_alignment_loss_is_zero_where_patches_match_names():
    words = torch.eye(4)
    labels = torch.tensor([[2, 0]])
    boxes = torch.tensor([[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]])
    patches = words[torch.tensor([[2, 0], [2, 0]])][None]
    assert alignment_loss(patches, boxes, labels, words, temperature=0.05) < 1e-6
    assert alignment_loss(patches.flip(2), boxes, labels, words, temperature=0.05) > 5


def test_patch_loss_depends_on_every_patch():
    words, labels = torch.eye(4), torch.tensor([[2], [0]])
    patches = words[labels][:, :, None].repeat(1, 2, 3, 1)
    # Cross-entropy of a cosine of 1 and three of 0, with label smoothing.
    logs = torch.tensor([10.0, 0, 0, 0]).log_softmax(0)
    perfect = -(0.9 * logs[0] + 0.1 * logs.mean())
    assert torch.allclose(patch_loss(patches, labels, words), perfect)
    patches[0, 1, 2] = words[3]
    wrong = -(0.9 * logs[1] + 0.1 * logs.mean())
    assert torch.allclose(patch_loss(patches, labels, words), (11 * perfect + wrong) / 12)
    # One patch of six changes the alignment loss little.
    boxes = torch.tensor([[[0.0, 0, 1, 1]]])
    assert alignment_loss(patches[:1], boxes, labels[:1], words) < 0.2


def test_steps_without_language_train_trunk_and_projection_only(tokenizer, tmp_path):
    config = nano_config(len(tokenizer), **SMALL)
    model = OFAForConditionalGeneration(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phases = [Phase(3, 4, 32, language_every=0, whole_image_share=0.5, whole_image_sizes=(32,))]
    train_vision_language(make_scenes(), model, tokenizer, phases, tmp_path / "patches.pt")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"model.encoder.image_proj.weight", "model.encoder.embed_images.conv1.weight"} <= changed
    assert all("image_proj" in name or "embed_images" in name for name in changed)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_trains_convolutions_as_matrices(memory_format):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 6, side, side).to(memory_format=memory_format)) for side in (1, 3)]
    order = (0, 2, 3, 1) if memory_format == torch.channels_last else (0, 1, 2, 3)
    matrices = [torch.nn.Parameter(w.detach().permute(order).reshape(8, -1).clone()) for w in weights]
    places = [weight.data_ptr() for weight in weights]
    expected = torch.optim.Muon(matrices, 0.1, 0.05, adjust_lr_fn="match_rms_adamw")
    optimizer = convolution_muon(weights, 0.1, 0.05)
    for _ in range(2):
        for weight, matrix in zip(weights, matrices, strict=True):
            weight.grad = torch.randn(weight.shape)
            matrix.grad = weight.grad.permute(order).reshape(matrix.shape)
        optimizer.step()
        expected.step()
    assert places == [weight.data_ptr() for weight in weights]
    for weight, matrix in zip(weights, matrices, strict=True):
        torch.testing.assert_close(weight.detach().permute(order).reshape(8, -1), matrix.detach())
    before = weights[0].detach().clone()
    weights[0].grad = None  # a frozen trunk
    optimizer.step()
    assert torch.equal(weights[0], before)


def test_every_parameter_has_one_optimizer(tokenizer, tmp_path):
    model = OFAForConditionalGeneration(nano_config(len(tokenizer), **SMALL))
    adamw, muon = vision_language_optimizers(model, 1e-3, 1e-3, 0.05, muon=True)
    counts = [sum(p.numel() for group in o.param_groups for p in group["params"]) for o in (adamw, muon)]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    assert len(vision_language_optimizers(model, 1e-3, 1e-3, 0.05)) == 1

    trunk = model.model.encoder.embed_images
    before = {name: value.clone() for name, value in trunk.named_parameters()}
    phases = [Phase(3, 4, 32, language_every=0, whole_image_share=0.5, whole_image_sizes=(32,))]
    arguments = (make_scenes(), model, tokenizer, phases, tmp_path / "patches.pt")
    train_vision_language(*arguments, muon=True)
    assert not any(torch.equal(value, before[name]) for name, value in trunk.named_parameters() if value.ndim == 4)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    train_vision_language(*arguments, muon=True)  # complete already
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
