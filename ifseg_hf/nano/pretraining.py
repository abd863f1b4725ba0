"""Pre-training of a nano OFA: a trunk that tells things apart, then vision-language on scenes and their names.

Stage 1, `train_trunk`: classification of named boxes by pooled features. Stage 2, `train_vision_language`: captions,
text denoising and alignment through `IFSegForConditionalGeneration`. Both see scenes (`ifseg_hf.nano.scenes`): photos,
names and boxes, never a segmentation target.
"""

import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import distributed, multiprocessing, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import BartTokenizer

from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.modeling.modeling_ofa import IFSegForConditionalGeneration, IFSegTrunk
from ifseg_hf.nano.scenes import HELD_OUT, Photos, Scene, SceneMaker, cells, load_photos, load_streets, reading_order
from ifseg_hf.pretrained import resolve_model
from ifseg_hf.processing.image_processing_ifseg import IFSegImageProcessor
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.processing.prompt_ifseg import PROMPT_TEMPLATE
from ifseg_hf.training.batch_norm import (
    calibrate_batch_norm,
    freeze_batch_norm,
    train_batch_norm,
    trunk_state,
    use_batch_statistics,
)
from ifseg_hf.training.loop import cpu_gains_from_bfloat16

CAPTION_PROMPT = "what does the image describe?"
INFILLING_PROMPT = 'what is the complete text of "{}"?'
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def nano_config(vocab_size: int = 1000, **kwargs) -> IFSegConfig:
    """OFA with under 6 million parameters: the same architecture, only smaller, for photos of 256 x 256."""
    sizes = {
        "vocab_size": vocab_size,
        "d_model": 192,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 768,
        "decoder_ffn_dim": 768,
        "max_position_embeddings": 512,
        "token_bucket_size": 64,
        "image_bucket_size": 32,
        "image_size": 256,
        "trunk_embedding_size": 32,
        "trunk_hidden_sizes": (128, 256, 640),
        "trunk_depths": (1, 2, 3),
    }
    return IFSegConfig(**{**sizes, **kwargs})


# Tokenizer ------------------------------------------------------------------------------------------------------------


def train_tokenizer(names: list[str], max_length: int = 512) -> BartTokenizer:
    """A byte-level BPE tokenizer that has one token for every word of the names and of the prompts.

    It encodes any text; words it was not made for fall into pieces, at worst into bytes. Texts of up to `max_length`
    tokens fit the model.
    """
    before, _, after = PROMPT_TEMPLATE.partition("{categories}")
    prompts = [before, after.strip(), CAPTION_PROMPT, INFILLING_PROMPT.format("a")]
    sentences = [*prompts, "a photo of a", "there is a in the image"]
    texts = [f" {text}" for text in names + sentences] + ['"', "?", ".", ","]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,  # more than there is to merge
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return BartTokenizer(vocab=model["vocab"], merges=merges, model_max_length=max_length)


# Batches of scenes ----------------------------------------------------------------------------------------------------


@dataclass
class Phase:
    """`steps` of `batch` scenes of `size` pixels.

    Of several sizes, each step draws one, and `batch` is for the first: larger scenes are fewer, so that the steps have
    alike many pixels. `single`: only one photo or street crop a scene.

    In stage 2, `train_trunk`: whether the trunk learns; `train_norms`: whether its batch norms use the statistics of
    the batch; `language_every`: captions and texts are read and written in one of so many steps, the others only align
    the trunk, which is what takes long. 0: in none, and the words stay as they are.

    `photo_share` of the steps have single photos of one of `photo_sizes` instead, every patch of which is to say the
    photo's name ([`patch_loss`]). A size is that of all sides, or (height, width), to which photos are then distorted.
    """

    steps: int
    batch: int
    size: int | tuple[int, ...]
    single: bool = False
    train_trunk: bool = True
    train_norms: bool = False
    language_every: int = 1
    photo_share: float = 0.0
    photo_sizes: tuple[int | tuple[int, int], ...] = ()

    def draw(self, rng: random.Random) -> tuple[int | tuple[int, int], int, bool]:
        """Size and number of scenes of a step, and whether they are single photos for [`patch_loss`]."""
        sizes = (self.size,) if isinstance(self.size, int) else self.size
        photos = rng.random() < self.photo_share
        size = rng.choice(self.photo_sizes if photos else sizes)
        pixels = size**2 if isinstance(size, int) else size[0] * size[1]
        return size, max(1, round(self.batch * sizes[0] ** 2 / pixels)), photos

    def reads(self, step: int) -> bool:
        """Whether captions and texts are part of a step."""
        return self.language_every > 0 and step % self.language_every == 0


def collate(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """images (B, H, W, 3) uint8, boxes (B, R, 4) float32, labels (B, R) int64, -100 where a scene has fewer boxes."""
    most = max(1, *(len(scene.labels) for scene in scenes))
    boxes = torch.zeros(len(scenes), most, 4)
    labels = torch.full((len(scenes), most), -100)
    for row, scene in enumerate(scenes):
        boxes[row, : len(scene.labels)] = torch.from_numpy(scene.boxes.reshape(-1, 4))
        labels[row, : len(scene.labels)] = torch.tensor(scene.labels, dtype=torch.long)
    return {"images": torch.from_numpy(np.stack([s.image for s in scenes])), "boxes": boxes, "labels": labels}


class SceneBatches(IterableDataset):
    """Batches of scenes, phase after phase; each is a function of (seed, step) alone. Starts at step `start`.

    Besides what [`collate`] makes, `whole_photos` says whether every patch shows what the photo's name says.

    Of several processes each takes its share of every batch: scenes `rank`, `rank + world`, ...
    """

    def __init__(
        self, maker: SceneMaker, phases: list[Phase], seed: int, start: int = 0, rank: int = 0, world: int = 1
    ):
        self.maker, self.phases, self.seed, self.start = maker, phases, seed, start
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        step = 0
        for phase in self.phases:
            for _ in range(phase.steps):
                if step >= self.start:
                    size, count, photos = phase.draw(random.Random(f"{self.seed}:{step}"))
                    seeds = (f"{self.seed}:{step}:{i}" for i in range(self.rank, count, self.world))
                    scenes = [self._scene(random.Random(seed), size, phase.single, photos) for seed in seeds]
                    yield {**collate(scenes), "whole_photos": photos}
                step += 1

    def _scene(self, rng: random.Random, size: int | tuple[int, int], single: bool, photos: bool) -> Scene:
        if photos or not isinstance(size, int):
            return self.maker.mosaic(rng, size, cells(1), street_share=0)
        return self.maker.mosaic(rng, size, cells(1)) if single else self.maker.draw(rng, size)


def to_pixels(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """uint8 (B, H, W, 3) to pixel_values (B, 3, H, W) in [-1, 1]; a generator adds colour jitter."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory
    if generator is None:
        return pixels
    light, contrast, saturation = torch.empty(3, len(pixels), 1, 1, 1).uniform_(-0.3, 0.3, generator=generator)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * (1 + saturation)
    centre = grey.mean((2, 3), keepdim=True)
    return (centre + (pixels - centre) * (1 + contrast) + light).clamp_(-1, 1)


def autocast() -> torch.autocast:
    """bfloat16 where the processor is faster in it; emulated, it would be many times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_gains_from_bfloat16())


def _load(file: Path, parts: dict) -> int:
    """Gives the parts (model, optimizer, ...) the state in `file`, if there is one; returns the steps done."""
    if not file.exists():
        return 0
    saved = torch.load(file, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def _save(file: Path, step: int, parts: dict) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, "step": step}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)  # whole or not at all


def processes() -> tuple[int, int]:
    """This process' number and how many train together."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def average_gradients(parameters) -> None:
    """The mean over all processes of every gradient, in place."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


# Stage 1: the trunk ---------------------------------------------------------------------------------------------------


def initialize_trunk(trunk: nn.Module) -> nn.Module:
    """He initialisation; the last batch norm of a block starts at zero, so that the block starts as its shortcut."""
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif name.endswith("bn3"):
            nn.init.zeros_(module.weight)
    return trunk


def box_weights(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Share of each patch inside each box: boxes (B, R, 4) -> (B, R, height * width)."""

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
def trunk_accuracy(trunk: nn.Module, head: nn.Linear, photos: Photos, size: int, batch: int = 128) -> float:
    """Top-1 accuracy on whole photos at size x size, among the photos' names."""
    trunk.eval()
    right = 0
    for start in range(0, len(photos), batch):
        images = torch.from_numpy(np.array(photos.pixels[start : start + batch]))
        pixels = nn.functional.interpolate(to_pixels(images), size=(size, size), mode="bilinear")
        with autocast():
            scores = head(trunk(pixels).float().mean((2, 3)))
        guess = scores[:, : len(photos.names)].argmax(1)
        right += (guess == torch.from_numpy(photos.labels[start : start + batch])).sum().item()
    trunk.train()
    return right / len(photos)


def calibrate(trunk: nn.Module, maker: SceneMaker, phase: Phase, seed: int) -> nn.Module:
    """[`calibrate_batch_norm`] with the scenes of a phase."""
    with autocast():
        return calibrate_batch_norm(trunk, (to_pixels(batch["images"]) for batch in SceneBatches(maker, [phase], seed)))


def train_trunk(
    maker: SceneMaker,
    held_out: Photos,
    config: IFSegConfig,
    phases: list[Phase],
    output: Path,
    calibration: Phase | None = None,
    start: dict[str, torch.Tensor] | None = None,
    learning_rate: float = 0.2,
    weight_decay: float = 5e-4,
    seed: int = 0,
    log=print,
) -> dict[str, torch.Tensor]:
    """Train a trunk to name boxes by the mean of their features; returns the state that `IFSegTrunk` loads.

    SGD with a one-cycle schedule, label smoothing 0.1, batch norm in training mode; at the end its statistics are taken
    anew from the scenes of `calibration`. `output` (a .pt file) is rewritten every 500 steps; a run that finds it goes
    on from there. `start`: the state of a trunk to begin with, in the place of random weights.
    """
    rank, world = processes()
    torch.manual_seed(seed)
    trunk = initialize_trunk(IFSegTrunk(config))
    if start is not None:
        trunk.load_state_dict(start)
    trunk = train_batch_norm(trunk).to(memory_format=trunk.memory_format)
    head = nn.Linear(config.trunk_hidden_sizes[-1], len(maker.names))
    both = nn.ModuleDict({"trunk": trunk, "head": head})
    matrices = [p for p in both.parameters() if p.ndim > 1]
    vectors = [p for p in both.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}],
        lr=learning_rate,
        momentum=0.9,
        nesterov=True,
    )
    total = sum(phase.steps for phase in phases)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total, pct_start=0.15)
    parts = {"model": both, "optimizer": optimizer, "schedule": schedule}
    step = _load(output, parts)
    scenes = SceneBatches(maker, phases, seed, step, rank, world)
    batches = DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=4)
    generator = torch.Generator().manual_seed(seed + step + rank)
    loss_sum = right = count = 0.0
    started = time.time()
    bar = tqdm(batches, total=total, initial=step, desc="trunk", mininterval=5, disable=rank > 0)
    for batch in bar:
        pixels = to_pixels(batch["images"], generator)
        with autocast():
            features = trunk(pixels)
        named = batch["labels"] >= 0
        scores = head(pool_boxes(features, batch["boxes"])[named])
        loss = nn.functional.cross_entropy(scores, batch["labels"][named], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(both.parameters())
        optimizer.step()
        schedule.step()
        step += 1
        loss_sum, count = loss_sum + loss.item(), count + 1
        right += (scores.argmax(1) == batch["labels"][named]).float().mean().item()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss_sum / count:.3f}", accuracy=f"{right / count:.3f}")
        if rank == 0 and (step % 500 == 0 or step == total):
            accuracy = trunk_accuracy(trunk, head, held_out.part(slice(0, 1000)), 128)
            log(
                f"trunk step {step}/{total} {time.time() - started:.0f} s loss {loss_sum / count:.3f} "
                f"box accuracy {right / count:.3f} held-out photos at 128: {accuracy:.3f}"
            )
            loss_sum = right = count = 0.0
            _save(output, step, parts)
    if calibration is not None and rank == 0:
        calibrate(trunk, maker, calibration, seed + 1)
        accuracy = [
            f"{trunk_accuracy(trunk, head, held_out.part(slice(0, 1000)), size):.3f}" for size in (64, 128, 192)
        ]
        log(f"trunk calibrated: held-out photos at 64, 128 and 192: {', '.join(accuracy)}")
    return trunk_state(trunk)


# Stage 2: vision and language -----------------------------------------------------------------------------------------


class Texts:
    """Token ids of captions and of texts with holes, for the names of a `SceneMaker`."""

    def __init__(self, tokenizer: BartTokenizer, names: list[str]):
        self.tokenizer, self.names = tokenizer, names
        self.ids = [self._ids(name) for name in names]
        self.prompt = torch.tensor([[0, *self._ids(CAPTION_PROMPT), 2]])
        longest = max(map(len, self.ids))
        self.name_ids = torch.tensor([ids + [1] * (longest - len(ids)) for ids in self.ids])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]

    def embed_names(self, embedding: nn.Embedding) -> torch.Tensor:
        """Mean sub-word embedding of every name, (names, d_model)."""
        mask = (self.name_ids != 1)[..., None].float()
        return (embedding(self.name_ids) * mask).sum(1) / mask.sum(1)

    def captions(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The names of a batch's boxes in reading order, each name once, (B, S) with -100 as padding."""
        rows = []
        for boxes, labels in zip(batch["boxes"].numpy(), batch["labels"].tolist(), strict=True):
            named = [labels[i] for i in reading_order(boxes) if labels[i] >= 0]
            rows.append([token for name in dict.fromkeys(named) for token in self.ids[name]] + [2])
        return _padded(rows, -100)

    def infilling(self, rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists of names of which some are hidden behind `<mask>`: prompts (count, T) padded with 1, and the complete
        lists (count, S) padded with -100."""
        before, after = (self._ids(part) for part in INFILLING_PROMPT.split("{}"))
        mask = self.tokenizer.mask_token_id
        prompts, targets = [], []
        for _ in range(count):
            names = [self.ids[rng.randrange(len(self.ids))] for _ in range(rng.randint(1, 10))]
            shown = [[mask] if rng.random() < 0.15 else ids for ids in names]
            prompts.append([0, *before, *(token for ids in shown for token in ids), *after, 2])
            targets.append([token for ids in names for token in ids] + [2])
        return _padded(prompts, 1), _padded(targets, -100)


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def word_logits(patches: torch.Tensor, words: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """cosine / temperature of patches (..., d) with words (names, d), (..., names)."""
    cosine = nn.functional.normalize(patches.float(), dim=-1) @ nn.functional.normalize(words.float(), dim=-1).T
    return cosine / temperature


def patch_loss(
    patches: torch.Tensor, labels: torch.Tensor, words: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """How far every projected patch of a photo is from the photo's name: cross-entropy, label smoothing 0.1.

    Where [`alignment_loss`] is content with a few patches that say the name clearly, this asks all of them, which so
    have to look further around. It knows no more of a photo than its name.

    Args:
        patches: (B, h, w, d), `image_proj` of the trunk's features; labels: (B, 1); words: (names, d).
    """
    logits = word_logits(patches, words, temperature).permute(0, 3, 1, 2)
    return nn.functional.cross_entropy(logits, labels[:, :, None].expand(-1, *patches.shape[1:3]), label_smoothing=0.1)


def alignment_loss(
    patches: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, words: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """How far the projected patches are from the names of the boxes they lie in.

    Every patch is a distribution over all names, softmax(cosine / temperature); a box's is the mean of its patches'.
    Returns the mean of -log of the probabilities of the boxes' names: patches that show something else count little.

    Args:
        patches: (B, h, w, d), `image_proj` of the trunk's features.
        boxes: (B, R, 4); labels: (B, R), -100 for none.
        words: (names, d), mean sub-word embeddings.
    """
    probabilities = word_logits(patches, words, temperature).softmax(-1).permute(0, 3, 1, 2)
    named = labels >= 0
    chosen = pool_boxes(probabilities, boxes)[named].gather(1, labels[named][:, None])
    return -chosen.clamp(min=1e-6).log().mean()


def convolution_muon(weights: list[nn.Parameter], learning_rate: float, weight_decay: float) -> "torch.optim.Muon":
    """Muon, which knows matrices, for convolutions (out, in, h, w): it trains their views (out, h * w * in).

    Its steps are scaled to be as large as AdamW's. The weights must stay where they are in memory.
    """
    orders = [(0, 1, 2, 3) if weight.is_contiguous() else (0, 2, 3, 1) for weight in weights]  # or channels last
    views = [w.detach().permute(order).view(len(w), -1) for w, order in zip(weights, orders, strict=True)]
    optimizer = torch.optim.Muon(views, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")

    def hand_gradients(*_) -> None:
        for view, weight, order in zip(views, weights, orders, strict=True):
            view.grad = None if weight.grad is None else weight.grad.permute(order).reshape(view.shape)

    optimizer.register_step_pre_hook(hand_gradients)
    return optimizer


def vision_language_optimizers(
    model: IFSegForConditionalGeneration,
    learning_rate: float,
    trunk_learning_rate: float,
    weight_decay: float,
    muon: bool = False,
) -> list[torch.optim.Optimizer]:
    """AdamW, no decay for vectors outside the trunk; `muon`: Muon for the trunk's kernels, other than the first."""
    trunk = list(model.model.encoder.embed_images.parameters())
    others = [p for name, p in model.named_parameters() if "embed_images." not in name]
    kernels = [p for p in trunk if p.ndim > 1 and p.shape[1] > 3] if muon else []
    chosen = {id(kernel) for kernel in kernels}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
            {
                "params": [p for p in trunk if id(p) not in chosen],
                "lr": trunk_learning_rate,
                "weight_decay": weight_decay,
            },
        ],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    return [adamw, convolution_muon(kernels, trunk_learning_rate, weight_decay)] if muon else [adamw]


def train_vision_language(
    maker: SceneMaker,
    model: IFSegForConditionalGeneration,
    tokenizer: BartTokenizer,
    phases: list[Phase],
    output: Path,
    learning_rate: float = 1e-3,
    trunk_learning_rate: float = 4e-4,
    weight_decay: float = 0.05,
    text_weight: float = 0.5,
    alignment_weight: float = 1.0,
    warmup: int = 100,
    muon: bool = False,
    seed: int = 1,
    save_every: int = 200,
    log=print,
) -> IFSegForConditionalGeneration:
    """Train `model` (its trunk already can tell things apart) to write the names in scenes; returns it.

    Loss: captions + text_weight * text infilling + alignment_weight * `alignment_loss` (in steps of single photos
    `patch_loss`). AdamW with a cosine schedule; `muon`: Muon for the trunk's convolutions, other than the first.
    After a phase with `train_norms` the statistics of batch norm are taken anew from scenes of the phase that follows.
    `output` (a .pt file) is rewritten every `save_every` steps; a run that finds it goes on from there.
    """
    rank, world = processes()
    torch.manual_seed(seed + rank)
    texts = Texts(tokenizer, maker.names)
    encoder = model.model.encoder
    train_batch_norm(encoder.embed_images)
    model.train().to(memory_format=encoder.embed_images.memory_format)
    total = sum(phase.steps for phase in phases)

    def factor(step: int) -> float:
        return min(1, (step + 1) / warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / total)) / 2)

    optimizers = vision_language_optimizers(model, learning_rate, trunk_learning_rate, weight_decay, muon)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    parts = {"model": model}
    for number, (optimizer, schedule) in enumerate(zip(optimizers, schedules, strict=True)):
        parts |= {f"optimizer_{number}": optimizer, f"schedule_{number}": schedule}
    step = _load(output, parts)
    phase_of = [phase for phase in phases for _ in range(phase.steps)]
    scenes = SceneBatches(maker, phases, seed, step, rank, world)
    batches = DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=4)
    generator = torch.Generator().manual_seed(seed + step + rank)
    losses, start = {"caption": [], "text": [], "alignment": [], "patches": []}, time.time()
    bar = tqdm(batches, total=total, initial=step, desc="vision-language", mininterval=5, disable=rank > 0)
    for batch in bar:
        phase = phase_of[step]
        if step and phase_of[step - 1].train_norms and not phase.train_norms:
            calibration = replace(phase, steps=60)
            calibrate(encoder.embed_images, maker, calibration, seed + 1)
            model.train()
        use_batch_statistics(encoder.embed_images, phase.train_norms)
        encoder.embed_images.requires_grad_(phase.train_trunk)
        pixels = to_pixels(batch["images"], generator)
        loss = 0.0
        with autocast():
            if phase.reads(step):
                # Positions mostly as segmentation takes them, sometimes as generation; equal for the largest scenes.
                interpolate = random.Random(f"positions:{seed}:{step}").random() < 0.75
                encoded = encoder(input_ids=texts.prompt, pixel_values=pixels, interpolate_pos_encoding=interpolate)
                features = encoded.image_features
                caption = model(encoder_outputs=encoded, labels=texts.captions(batch)).loss
                prompts, targets = texts.infilling(random.Random(f"text:{seed}:{step}:{rank}"), 32 // world)
                text = model(input_ids=prompts, attention_mask=(prompts != 1).long(), labels=targets).loss
                loss = caption + text_weight * text
                losses["caption"].append(caption.item())
                losses["text"].append(text.item())
            else:
                features = encoder.embed_images(pixels)
            patches = encoder.image_proj(features.permute(0, 2, 3, 1))
            words = texts.embed_names(encoder.embed_tokens)
            if not phase.language_every:
                words = words.detach()  # nothing would tell the transformer where they went
            if batch["whole_photos"]:
                alignment = patch_loss(patches, batch["labels"], words)
            else:
                alignment = alignment_loss(patches, batch["boxes"], batch["labels"], words)
        losses["patches" if batch["whole_photos"] else "alignment"].append(alignment.item())
        loss = loss + alignment_weight * alignment
        model.zero_grad()
        loss.backward()
        average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        step += 1
        if step % 50 == 0 or step == total:
            means = {name: f"{np.mean(values[-50:]):.3f}" for name, values in losses.items() if values}
            bar.set_postfix(means)
        if rank == 0 and (step % save_every == 0 or step == total):
            log(f"vision-language step {step}/{total} {time.time() - start:.0f} s {means}")
            _save(output, step, parts)
    freeze_batch_norm(encoder.embed_images)
    return model.eval()


def average(model: nn.Module, other: dict[str, torch.Tensor]) -> None:
    """Half-way from a model to the state of another of its kind, in place; batch norms then need new statistics."""
    model.load_state_dict({name: (value + other[name]) / 2 for name, value in model.state_dict().items()})


def save_checkpoint(model: IFSegForConditionalGeneration, tokenizer: BartTokenizer, folder: str | Path) -> None:
    """Save the model in float16 with its processor, for photos and word maps three quarters as large as `image_size`.

    Tuning has to learn where each patch of the grid is before it can tell the patches apart. On half as many patches it
    does in minutes; on street photos the cosine of patches and words then loses half a point, 2 to 5 once smoothed.
    Word maps on a coarser grid than the photos' would be learnt sooner still, but not what is needed: places between
    theirs are mistaken for their neighbours.
    """
    size = model.config.image_size * 3 // 4
    image_processor = IFSegImageProcessor(size={"shortest_edge": size, "longest_edge": 4 * size})
    # A copy: the model itself stays in float32, and in the memory layout that convolutions like.
    config = copy.deepcopy(model.config)
    config.image_size = size
    small = IFSegForConditionalGeneration(config)
    small.load_state_dict({name: value.contiguous() for name, value in model.state_dict().items()})
    small.half().save_pretrained(folder)
    IFSegProcessor(image_processor, tokenizer).save_pretrained(folder)


# The whole recipe ----------------------------------------------------------------------------------------------------

TRUNK_PHASES = [Phase(2400, 128, 64, single=True), Phase(2600, 48, 128), Phase(2000, 48, (128, 192))]
CALIBRATION = Phase(60, 48, (128, 192, 256))
LANGUAGE_PHASES = [
    Phase(200, 48, 128, train_trunk=False),
    Phase(1400, 48, (128, 192, 256)),
    Phase(6000, 48, (128, 128, 192, 256), train_norms=True, language_every=4),
    Phase(800, 48, (128, 128, 192, 256), language_every=2),
]
SECOND_LANGUAGE_PHASES = [
    Phase(3100, 64, (96, 128, 96, 128, 256), train_norms=True, language_every=4),
    Phase(400, 64, (96, 128, 192, 256), language_every=2),
]
_PATCHES = Phase(0, 56, (96, 128, 128, 192), train_norms=True, language_every=0)
_PATCHES = replace(_PATCHES, photo_share=0.55, photo_sizes=(64, 96, 128))
PATCH_PHASES = [replace(_PATCHES, steps=6700), replace(_PATCHES, steps=400, train_norms=False)]
SECOND_PATCH_PHASES = [replace(_PATCHES, steps=15200), replace(_PATCHES, steps=800, train_norms=False)]
THIRD_PATCH_PHASES = [
    replace(_PATCHES, steps=9500, batch=64),
    replace(_PATCHES, steps=500, batch=64, train_norms=False),
]
PATCHES_IN_WORDS = [Phase(900, 48, (128, 96, 128, 192), train_trunk=False)]
SCENE_PHASES = [
    Phase(900, 40, (128, 192, 256), train_norms=True, language_every=4),
    Phase(100, 40, (128, 192, 256), language_every=2),
]
SECOND_SCENE_PHASES = [
    Phase(500, 48, (128, 96, 128, 192), train_trunk=False),
    Phase(1900, 40, (128, 192, 256), train_norms=True),
    Phase(150, 40, (128, 192, 256)),
]
_SETTLING = replace(_PATCHES, language_every=4, photo_share=0.45)
SETTLING_PHASES = [replace(_SETTLING, steps=1500), replace(_SETTLING, steps=120, train_norms=False)]
_IN_WORDS = Phase(500, 32, (128, 96, 128, 192), train_trunk=False, photo_share=0.3, photo_sizes=(96, 128))
# As flat and as tall as photos in mosaics are.
_DISTORTED = (64, 96, 128, 128, (48, 128), (128, 48), (80, 128), (128, 80), (64, 96), (96, 64))
_ALL_TOGETHER = replace(_PATCHES, language_every=4, photo_sizes=_DISTORTED)
FOURTH_PATCH_PHASES = [
    replace(_ALL_TOGETHER, steps=11200),
    replace(_ALL_TOGETHER, steps=500, train_norms=False),
]
LAST_WORDS = [replace(_IN_WORDS, steps=700, batch=48)]
MEAN_CALIBRATION = Phase(15, 32, (128, 128, 192))


@dataclass
class Pretraining:
    """What the stages share. Each leaves its work in `output_dir/stages`, where a second run goes on.

    Raises ImportError with a torch older than 2.9.

    Args:
        photos, street: folders of named photos and of street photos (or `None`).
        output_dir: where the checkpoint goes.
        scale: multiplies the steps of every phase.
        model: a checkpoint that this function made earlier, to go on from; its names must be the same.
    """

    photos: str | Path
    street: str | Path | None
    output_dir: str | Path
    scale: float = 1.0
    model: str | Path | None = None

    def __post_init__(self):
        if not hasattr(torch.optim, "Muon"):  # before hours of work
            raise ImportError(f"Pre-training needs torch 2.9 or later, for its Muon; this is {torch.__version__}.")
        self.stages = Path(self.output_dir) / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)
        photos = load_photos(self.photos, self.stages)
        count = len(photos) - min(HELD_OUT, len(photos) // 10)
        self.held_out = photos.part(slice(count, len(photos)))
        streets = load_streets(self.street, "train") if self.street else None
        self.maker = SceneMaker(photos.part(slice(0, count)), streets)
        self.tokenizer = train_tokenizer(self.maker.names)
        self.config = nano_config(len(self.tokenizer))

    def scaled(self, phases: list[Phase]) -> list[Phase]:
        return [replace(phase, steps=max(1, round(phase.steps * self.scale))) for phase in phases]

    def start(self) -> IFSegForConditionalGeneration:
        """The model that training begins with: new, or `model`."""
        torch.manual_seed(0)
        model = IFSegForConditionalGeneration(self.config)
        if self.model is not None:
            folder = resolve_model(self.model)
            if IFSegProcessor.from_pretrained(folder).tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(f'"{self.model}" was trained with other names: it has another tokenizer.')
            before = IFSegForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            model.load_state_dict(before.state_dict())
        return model

    def half_way_back(self, model: IFSegForConditionalGeneration, before: dict[str, torch.Tensor]) -> None:
        """The mean of the weights and those before, in place, with batch norms measured anew."""
        average(model, before)
        trunk = train_batch_norm(model.model.encoder.embed_images)
        calibrate(trunk, self.maker, self.scaled([MEAN_CALIBRATION])[0], seed=5)
        freeze_batch_norm(trunk)

    def run(self, log=print) -> None:
        """Both stages, in each of the processes that train together."""
        first, model = processes()[0] == 0, self.start()
        trunk = model.model.encoder.embed_images
        trunk_file = self.stages / "trunk_state.pt"
        if not trunk_file.exists():
            calibration, start = self.scaled([CALIBRATION])[0], trunk.state_dict() if self.model else None
            phases, file = self.scaled(TRUNK_PHASES), self.stages / "trunk.pt"
            state = train_trunk(self.maker, self.held_out, self.config, phases, file, calibration, start, log=log)
            if first:
                torch.save(state, trunk_file)
        if distributed.is_initialized():
            distributed.barrier()
        trunk.load_state_dict(torch.load(trunk_file, weights_only=True))
        self.maker.antialias = False  # as the image processor shrinks photos
        self.maker.crop = 0.6
        run = partial(train_vision_language, self.maker, model, self.tokenizer, log=log)
        run(self.scaled(LANGUAGE_PHASES), self.stages / "language.pt")
        phases, file = self.scaled(SECOND_LANGUAGE_PHASES), self.stages / "language_2.pt"
        run(phases, file, learning_rate=6e-4, trunk_learning_rate=4e-4, seed=2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run(self.scaled(PATCH_PHASES), self.stages / "patches.pt", trunk_learning_rate=1e-3, seed=3)
        run(self.scaled(PATCHES_IN_WORDS), self.stages / "patches_in_words.pt", learning_rate=6e-4, seed=4)
        # Patches that all say the photo's name say it of what stands around the thing, too. Half-way back, things have
        # their outlines again, and much of the gain stays; of the second, longer round, larger scenes do that.
        self.half_way_back(model, before)
        run(self.scaled(SECOND_PATCH_PHASES), self.stages / "patches_2.pt", trunk_learning_rate=1e-3, seed=31)
        run(self.scaled(PATCHES_IN_WORDS), self.stages / "patches_2_in_words.pt", learning_rate=6e-4, seed=41)
        self.maker.street_share = 0.25
        phases, file = self.scaled(SCENE_PHASES), self.stages / "scenes.pt"
        run(phases, file, learning_rate=4e-4, trunk_learning_rate=4e-4, warmup=50, seed=51)
        phases, file = self.scaled(THIRD_PATCH_PHASES), self.stages / "patches_3.pt"
        run(phases, file, trunk_learning_rate=1e-3, muon=True, seed=61)
        # The longer the transformer lives with patches as they now are, the more it adds to comparing them with words.
        phases, file = self.scaled(SECOND_SCENE_PHASES), self.stages / "scenes_2.pt"
        run(phases, file, learning_rate=8e-4, trunk_learning_rate=4e-4, seed=71)
        # Scenes took some of the patches' names away again; this time the transformer is there when they come back.
        phases, file = self.scaled(SETTLING_PHASES), self.stages / "settling.pt"
        run(phases, file, learning_rate=4e-4, trunk_learning_rate=5e-4, muon=True, warmup=50, seed=81)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run(self.scaled([_IN_WORDS]), self.stages / "settled_in_words.pt", learning_rate=6e-4, seed=5)
        phases, file = self.scaled(FOURTH_PATCH_PHASES), self.stages / "patches_4.pt"
        run(phases, file, learning_rate=6e-4, trunk_learning_rate=1e-3, muon=True, seed=91)
        run(self.scaled(LAST_WORDS), self.stages / "patches_4_in_words.pt", learning_rate=6e-4, seed=95)
        # Half-way back, natural pictures have more of their outlines again, and mosaics lose nothing.
        self.half_way_back(model, before)
        if first:
            save_checkpoint(model, self.tokenizer, self.output_dir)


def _process(rank: int, world: int, arguments: tuple) -> None:
    rendezvous = Path(arguments[2]).resolve() / "stages" / "rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=world)
    torch.set_num_threads(1)
    Pretraining(*arguments).run(tqdm.write)
    distributed.destroy_process_group()


def pretrain(
    photos: str | Path,
    street: str | Path | None,
    output_dir: str | Path,
    scale: float = 1.0,
    model: str | Path | None = None,
    workers: int = 1,
    log=tqdm.write,
) -> Path:
    """Both stages, see [`Pretraining`]; returns `output_dir`, where the checkpoint is.

    `workers` processes of one thread each train together: on a CPU they are faster than as many threads, which wait for
    one another at every layer.
    """
    arguments = (photos, street, output_dir, scale, model)
    run = Pretraining(*arguments)  # decodes the photos once, before there are several processes
    if workers == 1:
        run.run(log)
    else:
        (run.stages / "rendezvous").unlink(missing_ok=True)
        multiprocessing.spawn(_process, (workers, arguments), nprocs=workers)
    return Path(output_dir)
