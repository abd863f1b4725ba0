"""Batch norms of the trunk that learn their statistics, and frozen ones."""

import torch
from checkpoints import SMALL

from ifseg_hf.modeling import OFAConfig
from ifseg_hf.modeling.trunk_ofa import OFAResNetTrunk
from ifseg_hf.training.batch_norm import train_batch_norm, trunk_state


def test_batch_norm_learns_and_freezes_again():
    config = OFAConfig(**SMALL)
    torch.manual_seed(0)
    frozen = OFAResNetTrunk(config)
    trunk = train_batch_norm(OFAResNetTrunk(config))
    trunk.train()(torch.randn(4, 3, 32, 32))
    frozen.load_state_dict(trunk_state(trunk))
    assert not frozen.bn1.running_mean.eq(0).all()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(frozen(pixels), trunk.eval()(pixels), atol=1e-5)
