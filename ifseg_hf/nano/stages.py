"""Functions that both stages of pre-training use: state files, processes and precision."""

from pathlib import Path

import torch
from torch import distributed

from ifseg_hf.training.setup import cpu_gains_from_bfloat16


def autocast() -> torch.autocast:
    """Autocast to bfloat16, if this CPU is faster in it than in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_gains_from_bfloat16())


def load_state(file: Path, parts: dict) -> int:
    """Loads the state of each part (model, optimizer, ...) from `file`, if it exists; returns the completed steps."""
    if not file.exists():
        return 0
    saved = torch.load(file, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def save_state(file: Path, step: int, parts: dict) -> None:
    """Saves the state of each part and the number of completed steps, completely or not at all."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, "step": step}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def processes() -> tuple[int, int]:
    """Rank of this process and the number of processes that train together."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def average_gradients(parameters) -> None:
    """Replaces every gradient by its mean over all processes."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))
