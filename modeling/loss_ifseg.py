"""Cross-entropy of bilinearly resized logits that never holds the resized logits of a whole image in memory."""

import torch
from torch import nn

IGNORED = -100  # label of pixels that do not count, as in torch's cross-entropy


def check_labels(labels: torch.Tensor, images: int) -> torch.Tensor:
    """
    Labels (images, H, W) as int64.

    Args:
        labels: integers, the category of each pixel, or -100.
        images: number of images (or word maps) in the batch.

    Raises `ValueError` for another shape, and a dtype that is not of integers.
    """
    if labels.ndim != 3 or len(labels) != images:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, but it must be ({images}, height, width): one map for each image."
        )
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels has the dtype {labels.dtype}: give integers, the category of each pixel.")
    return labels.long()


class LabelCheck:
    """
    Checks that every label (batch, H, W) is a category or -100, as torch's cross-entropy does.

    On a GPU the result is copied in the background and read by [`raise_for_wrong`], after the kernels of the forward
    pass are queued, so that the check does not make them wait. Until then wrong labels count as -100.

    Args:
        labels: result of [`check_labels`]; categories: their number.
        in_background: default: on a CUDA device. Otherwise wrong labels raise `ValueError` at once.

    Attributes:
        labels: what the loss is computed from.
    """

    def __init__(self, labels: torch.Tensor, categories: int, in_background: bool | None = None):
        self.labels = self._given = labels
        self.categories = categories
        self._failed: torch.Tensor | bool = False
        self._copied = None
        if torch.compiler.is_compiling():  # a compiler cannot branch on values
            return
        self._wrong = (labels >= categories) | ((labels < 0) & (labels != IGNORED))
        if not (labels.is_cuda if in_background is None else in_background):
            self._failed = self._wrong.any()
            self.raise_for_wrong()
            return
        self.labels = labels.masked_fill(self._wrong, IGNORED)
        self._failed = self._wrong.any().to("cpu", non_blocking=True)
        if labels.is_cuda:
            self._copied = torch.cuda.current_stream(labels.device).record_event()

    def raise_for_wrong(self) -> None:
        """Raises `ValueError` with a wrong label, if there is one."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._failed:
            raise ValueError(
                f"labels holds {self._given[self._wrong][0].item()}, but there are {self.categories} categories: give "
                f"0 to {self.categories - 1}, or {IGNORED} for pixels without a label (ignore_index of the image "
                "processor)."
            )


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Mean cross-entropy of logits (batch, categories, h, w), resized bilinearly to labels (batch, H, W).

    Pixels labelled -100 do not count; where none counts, the loss is 0, and so is its gradient. Computed in float32,
    or in float64 if the logits are.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.to(logits.device).long()
    with torch.autocast(logits.device.type, enabled=False):
        return _ResizedCrossEntropy.apply(logits, labels) / (labels != IGNORED).sum().clamp(min=1)


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
                known = (target != IGNORED)[:, None]
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


__all__ = ["IGNORED", "LabelCheck", "check_labels", "segmentation_loss"]
