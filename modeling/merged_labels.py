"""Several categories under one label, such as words for surroundings under "background"."""

import torch


def one_hot_labels(category_labels: list[int], labels: int, device: torch.device) -> torch.Tensor:
    """Int64 (1, labels, categories): 1 where a category has the label, from the label of each category."""
    return torch.nn.functional.one_hot(torch.tensor([category_labels], device=device), labels).transpose(1, 2)


def merge_logits(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Logits of labels (batch, labels, h, w) from those of categories (batch, categories, h, w).

    The probability of a label is the sum of the probabilities of its categories: its logit is their log-sum-exp. A
    label without categories gets the smallest number of the dtype, so that it is never predicted.

    Args:
        mask: integers (1 or batch, labels, categories), 1 where a category has the label. A category has at most one;
            without any, it must be absent, that is, have the smallest logit.
    """
    smallest = torch.finfo(logits.dtype).min
    index = mask.to(logits.device).argmax(1)[:, :, None, None].expand(logits.shape[0], -1, *logits.shape[2:])
    peaks = logits.new_full((logits.shape[0], mask.shape[1], *logits.shape[2:]), smallest)
    peaks = peaks.scatter_reduce(1, index, logits.detach(), "amax")
    sums = torch.zeros_like(peaks).scatter_add(1, index, (logits - peaks.gather(1, index)).exp())
    return peaks + sums.clamp(min=1).log()


__all__ = ["merge_logits", "one_hot_labels"]
