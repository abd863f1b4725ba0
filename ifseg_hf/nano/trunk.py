"""First stage of pre-training: the image trunk learns to classify named boxes by the mean of their features."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ifseg_hf.modeling.configuration_ofa import OFAConfig
from ifseg_hf.modeling.trunk_ofa import OFAResNetTrunk
from ifseg_hf.nano.batches import Phase, SceneBatches, to_pixels
from ifseg_hf.nano.scenes import NamedImages, SceneMaker
from ifseg_hf.nano.stages import autocast, average_gradients, load_state, processes, save_state
from ifseg_hf.training.batch_norm import calibrate_batch_norm, train_batch_norm, trunk_state


def initialize_trunk(trunk: nn.Module) -> nn.Module:
    """He initialisation; the last batch norm of each block is zero, so that the block starts as its shortcut."""
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif name.endswith("bn3"):
            nn.init.zeros_(module.weight)
    return trunk


def box_weights(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Share of each patch that lies inside each box: boxes (B, R, 4) -> (B, R, height * width)."""

    def overlap(low, high, count):
        start = torch.arange(count, device=boxes.device) / count
        inside = torch.minimum(high[..., None], start + 1 / count) - torch.maximum(low[..., None], start)
        return inside.clamp(min=0) * count

    left, top, right, bottom = boxes.unbind(-1)
    return (overlap(top, bottom, height)[..., None] * overlap(left, right, width)[..., None, :]).flatten(2)


def pool_boxes(features: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Mean feature inside each box: features (B, C, h, w), boxes (B, R, 4) -> (B, R, C)."""
    weights = box_weights(boxes, *features.shape[2:])
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-6)
    return weights @ features.flatten(2).transpose(1, 2).float()


@torch.no_grad()
def trunk_accuracy(trunk: nn.Module, head: nn.Linear, images: NamedImages, size: int, batch: int = 128) -> float:
    """Top-1 accuracy on whole images at size x size, among the images' names."""
    trunk.eval()
    right = 0
    for start in range(0, len(images), batch):
        pixels = to_pixels(torch.from_numpy(np.array(images.pixels[start : start + batch])))
        pixels = nn.functional.interpolate(pixels, size=(size, size), mode="bilinear")
        with autocast():
            scores = head(trunk(pixels).float().mean((2, 3)))
        predictions = scores[:, : len(images.names)].argmax(1)
        right += (predictions == torch.from_numpy(images.labels[start : start + batch])).sum().item()
    trunk.train()
    return right / len(images)


def calibrate(trunk: nn.Module, maker: SceneMaker, phase: Phase, seed: int) -> nn.Module:
    """[`calibrate_batch_norm`] on the scenes of a phase."""
    with autocast():
        return calibrate_batch_norm(trunk, (to_pixels(batch["images"]) for batch in SceneBatches(maker, [phase], seed)))


def trunk_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD, with weight decay for matrices and convolutions only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def classify_boxes(
    trunk: nn.Module, head: nn.Linear, batch: dict[str, torch.Tensor], generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Cross-entropy with label smoothing 0.1, and accuracy, of the boxes of a batch."""
    pixels = to_pixels(batch["images"], generator)
    with autocast():
        features = trunk(pixels)
    named = batch["labels"] >= 0
    scores, labels = head(pool_boxes(features, batch["boxes"])[named]), batch["labels"][named]
    loss = nn.functional.cross_entropy(scores, labels, label_smoothing=0.1)
    return loss, (scores.argmax(1) == labels).float().mean().item()


def train_trunk(
    maker: SceneMaker,
    held_out: NamedImages,
    config: OFAConfig,
    phases: list[Phase],
    output: Path,
    calibration: Phase | None = None,
    start: dict[str, torch.Tensor] | None = None,
    learning_rate: float = 0.2,
    weight_decay: float = 5e-4,
    seed: int = 0,
    log=print,
) -> dict[str, torch.Tensor]:
    """Trains a trunk to classify boxes; returns the state that `OFAResNetTrunk` loads.

    SGD with a one-cycle schedule, batch norm in training mode.

    Args:
        held_out: images for the accuracy in the log.
        output: .pt file that is rewritten every 500 steps. If it exists, training resumes from it.
        calibration: phase whose scenes give the statistics of the batch norms at the end.
        start: state of a trunk to start from instead of random weights.
    """
    rank, world = processes()
    torch.manual_seed(seed)
    trunk = initialize_trunk(OFAResNetTrunk(config))
    if start is not None:
        trunk.load_state_dict(start)
    trunk = train_batch_norm(trunk).to(memory_format=trunk.memory_format)
    head = nn.Linear(config.trunk_hidden_sizes[-1], len(maker.names))
    both = nn.ModuleDict({"trunk": trunk, "head": head})
    total = sum(phase.steps for phase in phases)
    optimizer = trunk_optimizer(both, learning_rate, weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total, pct_start=0.15)
    parts = {"model": both, "optimizer": optimizer, "schedule": schedule}
    step = load_state(output, parts)
    batches = SceneBatches(maker, phases, seed, step, rank, world).loader()
    generator = torch.Generator().manual_seed(seed + step + rank)
    losses, accuracies, started = [], [], time.time()
    bar = tqdm(batches, total=total, initial=step, desc="trunk", mininterval=5, disable=rank > 0)
    for batch in bar:
        loss, accuracy = classify_boxes(trunk, head, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(both.parameters())
        optimizer.step()
        schedule.step()
        step += 1
        losses.append(loss.item())
        accuracies.append(accuracy)
        if step % 100 == 0:
            bar.set_postfix(loss=f"{np.mean(losses):.3f}", accuracy=f"{np.mean(accuracies):.3f}")
        if rank == 0 and (step % 500 == 0 or step == total):
            log(
                f"trunk step {step}/{total} {time.time() - started:.0f} s loss {np.mean(losses):.3f} "
                f"box accuracy {np.mean(accuracies):.3f} {_held_out_accuracy(trunk, head, held_out, (128,))}"
            )
            losses, accuracies = [], []
            save_state(output, step, parts)
    if calibration is not None and rank == 0:
        calibrate(trunk, maker, calibration, seed + 1)
        log(f"trunk calibrated: {_held_out_accuracy(trunk, head, held_out, (64, 128, 192))}")
    return trunk_state(trunk)


def _held_out_accuracy(trunk: nn.Module, head: nn.Linear, images: NamedImages, sizes: tuple[int, ...]) -> str:
    """[`trunk_accuracy`] on the first 1000 images at several sizes, for the log."""
    images = images.part(slice(0, 1000))
    accuracies = ", ".join(f"{trunk_accuracy(trunk, head, images, size):.3f} at {size}" for size in sizes)
    return f"held-out accuracy {accuracies}"
