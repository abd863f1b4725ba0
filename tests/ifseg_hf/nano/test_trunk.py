"""Pooling of boxes, and batch norms of the trunk."""

import torch
from nano_scenes import SMALL

from ifseg_hf.modeling.trunk_ofa import OFAResNetTrunk
from ifseg_hf.nano.configuration import nano_config
from ifseg_hf.nano.trunk import initialize_trunk, pool_boxes
from ifseg_hf.training.batch_norm import train_batch_norm, trunk_state


def test_boxes_pool_the_patches_inside():
    features = torch.arange(16.0).view(1, 1, 4, 4)
    boxes = torch.tensor([[[0, 0, 1, 1], [0.5, 0, 1, 0.5], [0.125, 0, 0.375, 0.25]]])
    pooled = pool_boxes(features, boxes)[0, :, 0]
    # all patches; the upper right quarter; the adjacent halves of the first two patches
    assert torch.allclose(pooled, torch.tensor([7.5, 4.5, 0.5]))


def test_batch_norm_learns_and_freezes_again():
    config = nano_config(**SMALL)
    trunk = train_batch_norm(initialize_trunk(OFAResNetTrunk(config)))
    trunk.train()(torch.randn(4, 3, 32, 32))
    frozen = OFAResNetTrunk(config)
    frozen.load_state_dict(trunk_state(trunk))
    assert not frozen.bn1.running_mean.eq(0).all()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(frozen(pixels), trunk.eval()(pixels), atol=1e-5)
