"""The EfficientNet-Lite trunk: SAME padding, folded batch norms, and an OFA with it."""

import math

import pytest
import torch
from checkpoints import SMALL, padded_images, small_model
from torch import nn

from ifseg_hf.modeling import IFSegForSemanticSegmentation, OFAConfig
from ifseg_hf.modeling import trunk_ofa as trunks
from ifseg_hf.training.batch_norm import train_batch_norm
from ifseg_hf.training.config import patch_size

LITE = {
    "trunk_type": "efficientnet_lite",
    "trunk_embedding_size": 6,
    "trunk_hidden_sizes": (4, 6, 6, 8, 8, 10, 12),
    "trunk_depths": (1, 2, 2, 1, 2, 1, 1),
}


@pytest.fixture
def trunk():
    """A trunk whose batch norms have random statistics and weights."""
    torch.manual_seed(0)
    trunk = trunks.OFAEfficientNetLiteTrunk(OFAConfig(**{**SMALL, **LITE}))
    for module in trunk.modules():
        if isinstance(module, trunks.OFAFrozenBatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(1e-3, 0.2)  # small: eps matters
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return trunk.double()  # its layers amplify rounding


@pytest.mark.parametrize("size", [(64, 80), (33, 50), (97, 130), (16, 16), (1, 7)])
def test_grid_is_a_sixteenth_rounded_up(trunk, size):
    features = trunk(torch.randn(2, 3, *size))
    assert features.shape == (2, trunk.out_channels, math.ceil(size[0] / 16), math.ceil(size[1] / 16))
    assert trunk.out_channels == 8 + 12


def test_output_joins_stages_five_and_seven(trunk):
    outputs = []
    for stage in trunk.stages:
        stage.register_forward_hook(lambda module, inputs, output: outputs.append(output.clone()))
    features = trunk(torch.randn(1, 3, 80, 64))
    assert [output.shape[2] for output in outputs] == [40, 20, 10, 5, 5, 3, 3]
    assert torch.equal(features[:, :8], outputs[4])
    coarse = nn.functional.interpolate(outputs[6], size=(5, 4), mode="bilinear", align_corners=False)
    assert torch.equal(features[:, 8:], coarse)


def test_images_of_another_shape_are_refused(trunk):
    with pytest.raises(ValueError, match=r"\(batch, 3, H, W\)"):
        trunk(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 8), (8, 7), (9, 9), (2, 1)])
def test_same_padding_matches_explicit_windows(kernel_size, stride, size):
    """Each output is a sum over its window, as in TensorFlow: half of the padding, rounded down, comes first."""
    conv = trunks.OFASameConv2d(1, 1, kernel_size, stride, bias=False)
    image = torch.randn(1, 1, *size)
    found = conv(image)
    outputs = [math.ceil(n / stride) for n in size]
    total = [max((out - 1) * stride + kernel_size - n, 0) for out, n in zip(outputs, size, strict=True)]
    expected = torch.zeros(outputs)
    for y in range(outputs[0]):
        for x in range(outputs[1]):
            for i in range(kernel_size):
                for j in range(kernel_size):
                    row, column = y * stride - total[0] // 2 + i, x * stride - total[1] // 2 + j
                    if 0 <= row < size[0] and 0 <= column < size[1]:
                        expected[y, x] += conv.weight[0, 0, i, j] * image[0, 0, row, column]
    torch.testing.assert_close(found[0, 0], expected)


def test_folded_norms_equal_unfolded_ones(trunk, monkeypatch):
    pixel_values = torch.randn(2, 3, 50, 64)
    folded = trunk(pixel_values)
    monkeypatch.setattr(trunks, "conv_norm", lambda conv, norm, hidden_states: norm(conv(hidden_states)))
    torch.testing.assert_close(folded, trunk(pixel_values))


def test_trainable_norms_equal_frozen_ones(trunk):
    pixel_values = torch.randn(2, 3, 50, 64)
    frozen = trunk(pixel_values)
    trainable = train_batch_norm(trunk).double().eval()
    assert trainable.stem_norm.eps == 1e-3
    torch.testing.assert_close(trainable(pixel_values), frozen)


def test_memory_format_does_not_change_the_output(trunk):
    pixel_values = torch.randn(2, 3, 50, 64)
    assert trunk.memory_format == torch.channels_last
    expected = trunk(pixel_values)
    trunk.channels_last = False
    torch.testing.assert_close(trunk(pixel_values), expected)


def test_model_trains_saves_and_loads(tmp_path):
    model = small_model(**LITE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: x.clone() for name, x in model.backbone.image_trunk.named_parameters()}
    labels = torch.randint(0, 3, (2, 64, 64))
    loss = model(pixel_values=torch.randn(2, 3, 64, 64), labels=labels).loss
    loss.backward()
    optimizer.step()
    changed = [name for name, x in model.backbone.image_trunk.named_parameters() if not torch.equal(x, before[name])]
    assert {"stem_conv.weight", "stages.3.0.depthwise_conv.weight", "stages.6.0.project_norm.bias"} <= set(changed)

    model.eval().save_pretrained(tmp_path)
    loaded, report = IFSegForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixel_values = torch.randn(1, 3, 40, 64)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)


@torch.no_grad()
def test_images_of_a_mixed_batch_get_what_they_get_alone():
    model = small_model(**LITE)
    images, pixel_values, pixel_mask = padded_images()
    together = model(pixel_values=pixel_values, pixel_mask=pixel_mask)
    for image, logits in zip(images, together.logits, strict=True):
        alone = model(pixel_values=image[None]).logits[0]
        torch.testing.assert_close(logits[:, : alone.shape[1], : alone.shape[2]], alone, rtol=1e-4, atol=1e-5)


def test_depthwise_convolutions_start_as_wide_as_their_outputs_need():
    trunk = small_model(**{**LITE, "trunk_hidden_sizes": (64, 64, 64, 64, 64, 64, 64)}).backbone.image_trunk
    weight = trunk.stages[4][0].depthwise_conv.weight
    assert weight.std().item() == pytest.approx((2 / 25) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "attributes", [{}, {"trunk_depths": (1, 1), "trunk_hidden_sizes": (8, 8)}, LITE], ids=["resnet", "short", "lite"]
)
def test_training_reads_the_patch_size_of_a_configuration(attributes):
    config = OFAConfig(**{**SMALL, **attributes})
    assert patch_size(config.to_dict()) == config.patch_size


def test_training_reads_the_default_patch_size():
    assert patch_size({}) == OFAConfig().patch_size
