"""Cross-entropy of bilinearly resized logits that never holds the resized logits of a whole image in memory."""

import torch
from torch import nn


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Mean cross-entropy of logits (batch, categories, h, w), resized bilinearly to labels (batch, H, W).

    Pixels labelled -100 do not count. Computed in float32, or in float64 if the logits are.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.to(logits.device).long()
    with torch.autocast(logits.device.type, enabled=False):
        return _ResizedCrossEntropy.apply(logits, labels) / (labels != -100).sum()


class _ResizedCrossEntropy(torch.autograd.Function):
    """
    Cross-entropy summed over the pixels of resized logits, and its gradient, computed a few rows of pixels at a time.

    A whole (batch, categories, H, W) tensor would take gigabytes for 171 categories. Bilinear resizing is two matrix
    products, and so is its gradient.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        categories, h, w = logits.shape[1:]
        height, width = labels.shape[1:]
        to_rows, to_columns = _linear_weights(h, height), _linear_weights(w, width).T.to(logits)
        # on a CPU a block should stay in the cache, on a GPU it should fill the device
        limit = 2**19 if logits.device.type == "cpu" else 2**24
        blocks = []
        for rows in to_rows.split(max(1, limit // (categories * width))):
            used = rows.any(0).nonzero()
            source = slice(int(used[0]), int(used[-1]) + 1)  # the rows of logits with non-zero weights
            blocks.append((source, rows[:, source].to(logits)))

        loss = logits.new_zeros(())
        gradient = torch.zeros_like(logits)
        for i in range(len(logits)):
            wide = (logits[i] @ to_columns).transpose(0, 1).flatten(1)  # (h, categories * width)
            wide_gradient = torch.zeros_like(wide)
            pixels = labels[i].split([len(rows) for _, rows in blocks])
            for (source, rows), target in zip(blocks, pixels, strict=True):
                known = (target != -100)[:, None]
                target = target[:, None].where(known, 0)
                scores = (rows @ wide[source]).unflatten(1, (categories, width)).log_softmax(1)
                loss -= scores.gather(1, target).where(known, 0).sum()
                if ctx.needs_input_grad[0]:
                    scores.exp_().scatter_add_(1, target, scores.new_full((), -1).expand(target.shape))
                    wide_gradient[source] += rows.T @ (scores * known).flatten(1)
            gradient[i] = wide_gradient.unflatten(1, (categories, width)).transpose(0, 1) @ to_columns.T
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None


def _linear_weights(size: int, new_size: int) -> torch.Tensor:
    """Weights of linear resizing from `size` to `new_size` values, (new_size, size), float64."""
    basis = torch.eye(size, dtype=torch.float64, device="cpu")
    return nn.functional.interpolate(basis[None], size=new_size, mode="linear", align_corners=False)[0].T


__all__ = ["segmentation_loss"]
