"""Second stage of pre-training: captions, text infilling, and alignment of image patches with names."""

import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BartTokenizer

from ifseg_hf.modeling.modeling_ofa import OFAForConditionalGeneration
from ifseg_hf.nano.batches import Phase, SceneBatches, to_pixels
from ifseg_hf.nano.optimizers import vision_language_optimizers
from ifseg_hf.nano.scenes import SceneMaker
from ifseg_hf.nano.stages import autocast, average_gradients, load_state, processes, save_state
from ifseg_hf.nano.texts import PADDING, Texts
from ifseg_hf.nano.trunk import calibrate, pool_boxes
from ifseg_hf.training.batch_norm import freeze_batch_norm, train_batch_norm, use_batch_statistics


def word_logits(patches: torch.Tensor, words: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """cosine / temperature of patches (..., d) and words (names, d): (..., names)."""
    cosine = nn.functional.normalize(patches.float(), dim=-1) @ nn.functional.normalize(words.float(), dim=-1).T
    return cosine / temperature


def patch_loss(
    patches: torch.Tensor, labels: torch.Tensor, words: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """Cross-entropy of every projected patch with the name of its image; label smoothing 0.1.

    [`alignment_loss`] is low as soon as some patches of a box are close to its name. Here every patch must be, so that
    the trunk learns to use the surroundings of a patch.

    Args:
        patches: (B, h, w, d), `image_proj` of the trunk's features; labels: (B, 1); words: (names, d).
    """
    logits = word_logits(patches, words, temperature).permute(0, 3, 1, 2)
    return nn.functional.cross_entropy(logits, labels[:, :, None].expand(-1, *patches.shape[1:3]), label_smoothing=0.1)


def alignment_loss(
    patches: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, words: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """Mean of -log P(name of the box), where P is the mean of softmax(cosine / temperature) over the box's patches.

    Since probabilities are averaged, patches of a box that show something else have little influence.

    Args:
        patches: (B, h, w, d), `image_proj` of the trunk's features.
        boxes: (B, R, 4); labels: (B, R), -100 for none.
        words: (names, d), mean sub-word embeddings.
    """
    probabilities = word_logits(patches, words, temperature).softmax(-1).permute(0, 3, 1, 2)
    named = labels >= 0
    chosen = pool_boxes(probabilities, boxes)[named].gather(1, labels[named][:, None])
    return -chosen.clamp(min=1e-6).log().mean()


@dataclass
class VisionLanguageConfig:
    """Settings of [`train_vision_language`].

    The learning rate rises over `warmup` steps, then falls as a cosine. `muon`: Muon for the trunk's convolutions,
    except the first. `save_every`: steps between two state files.
    """

    learning_rate: float = 1e-3
    trunk_learning_rate: float = 4e-4
    weight_decay: float = 0.05
    text_weight: float = 0.5
    alignment_weight: float = 1.0
    warmup: int = 100
    muon: bool = False
    seed: int = 1
    save_every: int = 200


def train_vision_language(
    maker: SceneMaker,
    model: OFAForConditionalGeneration,
    tokenizer: BartTokenizer,
    phases: list[Phase],
    output: Path,
    log=print,
    **settings,
) -> OFAForConditionalGeneration:
    """Trains `model`, whose trunk comes from [`train_trunk`], to write the names in scenes; returns it.

    Loss: captions + `text_weight` * infilling + `alignment_weight` * [`alignment_loss`]. In steps of whole images,
    [`patch_loss`] replaces [`alignment_loss`].

    Args:
        output: .pt file that is rewritten every `save_every` steps. If it exists, training resumes from it.
        settings: fields of [`VisionLanguageConfig`].
    """
    return VisionLanguageTrainer(maker, model, tokenizer, phases, output, VisionLanguageConfig(**settings), log).train()


class VisionLanguageTrainer:
    """The state of one run of [`train_vision_language`], and its steps."""

    def __init__(
        self,
        maker: SceneMaker,
        model: OFAForConditionalGeneration,
        tokenizer: BartTokenizer,
        phases: list[Phase],
        output: Path,
        config: VisionLanguageConfig,
        log=print,
    ):
        self.maker, self.model, self.phases = maker, model, phases
        self.output, self.config, self.log = output, config, log
        self.rank, self.world = processes()
        torch.manual_seed(config.seed + self.rank)
        self.texts = Texts(tokenizer, maker.names)
        self.encoder, self.trunk = model.model.encoder, model.model.encoder.embed_images
        train_batch_norm(self.trunk)
        model.train().to(memory_format=self.trunk.memory_format)
        self.phase_of = [phase for phase in phases for _ in range(phase.steps)]
        self.total = len(self.phase_of)
        self.optimizers = vision_language_optimizers(
            model, config.learning_rate, config.trunk_learning_rate, config.weight_decay, config.muon
        )
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(x, self.learning_rate_factor) for x in self.optimizers]
        self.parts = {"model": model}
        for number, (optimizer, schedule) in enumerate(zip(self.optimizers, self.schedules, strict=True)):
            self.parts |= {f"optimizer_{number}": optimizer, f"schedule_{number}": schedule}
        self.step = load_state(output, self.parts)
        self.generator = torch.Generator().manual_seed(config.seed + self.step + self.rank)
        self.history: dict[str, list[float]] = {"caption": [], "text": [], "alignment": [], "patches": []}

    def learning_rate_factor(self, step: int) -> float:
        """Share of the learning rates at a step: linear warm-up, then a cosine from 1 to 0.01."""
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * step / self.total)) / 2
        return min(1, (step + 1) / self.config.warmup) * cosine

    def train(self) -> OFAForConditionalGeneration:
        """Runs the remaining steps; returns the model with frozen batch norms."""
        started = time.time()
        scenes = SceneBatches(self.maker, self.phases, self.config.seed, self.step, self.rank, self.world)
        bar = tqdm(
            scenes.loader(),
            total=self.total,
            initial=self.step,
            desc="vision-language",
            mininterval=5,
            disable=self.rank > 0,
        )
        for batch in bar:
            self.prepare_trunk()
            self.update(self.loss(batch))
            self.step += 1
            if self.step % 50 == 0 or self.step == self.total:
                bar.set_postfix(self.mean_losses())
            if self.rank == 0 and (self.step % self.config.save_every == 0 or self.step == self.total):
                seconds = time.time() - started
                self.log(f"vision-language step {self.step}/{self.total} {seconds:.0f} s {self.mean_losses()}")
                save_state(self.output, self.step, self.parts)
        freeze_batch_norm(self.trunk)
        return self.model.eval()

    def mean_losses(self) -> dict[str, str]:
        """Means of the last 50 values of each loss, for the log."""
        return {name: f"{np.mean(values[-50:]):.3f}" for name, values in self.history.items() if values}

    def prepare_trunk(self) -> None:
        """Sets whether the next step trains the trunk and its batch norms, as its phase says.

        After a phase with `train_norms`, measures the statistics of the batch norms on scenes of the next phase.
        """
        phase = self.phase_of[self.step]
        if self.step and self.phase_of[self.step - 1].train_norms and not phase.train_norms:
            calibrate(self.trunk, self.maker, replace(phase, steps=60), self.config.seed + 1)
            self.model.train()
        use_batch_statistics(self.trunk, phase.train_norms)
        self.trunk.requires_grad_(phase.train_trunk)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of the losses of a step."""
        phase = self.phase_of[self.step]
        pixels = to_pixels(batch["images"], self.generator)
        loss = 0.0
        with autocast():
            if phase.has_language(self.step):
                features, loss = self.language_loss(batch, pixels)
            else:
                features = self.trunk(pixels)
            patches = self.encoder.image_proj(features.permute(0, 2, 3, 1))
            words = self.texts.embed_names(self.encoder.embed_tokens)
            if not phase.language_every:
                words = words.detach()  # fixed, because the transformer is not trained on changed embeddings
            if batch["whole_images"]:
                alignment = patch_loss(patches, batch["labels"], words)
            else:
                alignment = alignment_loss(patches, batch["boxes"], batch["labels"], words)
        self.history["patches" if batch["whole_images"] else "alignment"].append(alignment.item())
        return loss + self.config.alignment_weight * alignment

    def language_loss(self, batch: dict[str, torch.Tensor], pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The trunk's features of a batch, and the loss of its captions and of infilling."""
        seed, model = self.config.seed, self.model
        # Mostly the interpolated image positions of segmentation, sometimes those of generation. For the largest scenes
        # both are the same.
        interpolate = random.Random(f"positions:{seed}:{self.step}").random() < 0.75
        encoded = self.encoder(input_ids=self.texts.prompt, pixel_values=pixels, interpolate_pos_encoding=interpolate)
        caption = model(encoder_outputs=encoded, labels=self.texts.captions(batch)).loss
        rng = random.Random(f"text:{seed}:{self.step}:{self.rank}")
        prompts, targets = self.texts.infilling(rng, 32 // self.world)
        text = model(input_ids=prompts, attention_mask=(prompts != PADDING).long(), labels=targets).loss
        self.history["caption"].append(caption.item())
        self.history["text"].append(text.item())
        return encoded.image_features, caption + self.config.text_weight * text

    def update(self, loss: torch.Tensor) -> None:
        """One step of all optimizers."""
        self.model.zero_grad()
        loss.backward()
        average_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
