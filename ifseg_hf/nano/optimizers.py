"""Optimizers of the vision-language stage."""

import torch
from torch import nn

from ifseg_hf.modeling.modeling_ofa import OFAForConditionalGeneration


def convolution_muon(weights: list[nn.Parameter], learning_rate: float, weight_decay: float) -> "torch.optim.Muon":
    """Muon, an optimizer for matrices, on convolutions (out, in, h, w) viewed as matrices (out, h * w * in).

    Updates are scaled to the size of AdamW's. The weights must stay at the same address in memory.
    """
    orders = [(0, 1, 2, 3) if weight.is_contiguous() else (0, 2, 3, 1) for weight in weights]  # or channels last
    views = [w.detach().permute(order).view(len(w), -1) for w, order in zip(weights, orders, strict=True)]
    optimizer = torch.optim.Muon(views, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")

    def copy_gradients(*_) -> None:
        for view, weight, order in zip(views, weights, orders, strict=True):
            view.grad = None if weight.grad is None else weight.grad.permute(order).reshape(view.shape)

    optimizer.register_step_pre_hook(copy_gradients)
    return optimizer


def vision_language_optimizers(
    model: OFAForConditionalGeneration,
    learning_rate: float,
    trunk_learning_rate: float,
    weight_decay: float,
    muon: bool = False,
) -> list[torch.optim.Optimizer]:
    """AdamW, without weight decay for vectors outside the trunk.

    With `muon` there is a second optimizer, Muon, for all convolutions of the trunk except the first.
    """
    trunk = list(model.model.encoder.embed_images.parameters())
    others = [p for name, p in model.named_parameters() if "embed_images." not in name]
    kernels = [p for p in trunk if p.ndim > 1 and p.shape[1] > 3] if muon else []
    kernel_ids = {id(kernel) for kernel in kernels}
    rest = [p for p in trunk if id(p) not in kernel_ids]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
        {"params": rest, "lr": trunk_learning_rate, "weight_decay": weight_decay},
    ]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    return [adamw, convolution_muon(kernels, trunk_learning_rate, weight_decay)] if muon else [adamw]
