"""Conversion of the trunk's frozen batch norms to norms that learn their statistics, and calibration."""

from collections.abc import Iterable

import torch
from torch import nn

from ifseg_hf.modeling.trunk_ofa import OFAFrozenBatchNorm2d


def train_batch_norm(trunk: nn.Module) -> nn.Module:
    """Replaces frozen batch norms by `nn.BatchNorm2d`, which learns its statistics; parameter names stay the same."""
    for name, module in list(trunk.named_modules()):
        if isinstance(module, OFAFrozenBatchNorm2d):
            norm = nn.BatchNorm2d(len(module.weight), module.eps)
            norm.load_state_dict(module.state_dict(), strict=False)  # all but num_batches_tracked
            parent, _, child = name.rpartition(".")
            setattr(trunk.get_submodule(parent), child, norm)
    return trunk


def trunk_state(trunk: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a trunk with the norms of [`train_batch_norm`], for the same trunk with frozen norms."""
    return {name: value for name, value in trunk.state_dict().items() if "num_batches_tracked" not in name}


@torch.no_grad()
def calibrate_batch_norm(trunk: nn.Module, batches: Iterable[torch.Tensor]) -> nn.Module:
    """Sets the running statistics of the norms of [`train_batch_norm`] to their mean over batches of `pixel_values`."""
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over all batches
    trunk.train()
    for pixel_values in batches:
        trunk(pixel_values)
    return trunk.eval()
