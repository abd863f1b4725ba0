"""
Pre-training of the nano OFA.

1. Features: the frozen trunk, EfficientNet-Lite2, runs over every image once.
2. Alignment: projected patches learn to be close to the embeddings of their names, which begin as word vectors.
3. Vision and language: encoder and decoder learn to name every patch among the words of a prompt, to write captions,
   and to complete sentences.
"""

import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import BartTokenizer

from ifseg_hf.experiments.plan import save_settings
from ifseg_hf.loading import no_progress_bars
from ifseg_hf.modeling.backbone import mean_of_subwords
from ifseg_hf.modeling.backbone_ofa import OFABackbone
from ifseg_hf.modeling.configuration_ofa import OFAConfig
from ifseg_hf.modeling.modeling_ofa import OFAForConditionalGeneration
from ifseg_hf.nano.configuration import ITERATIONS, LONG_SIDE, NEIGHBORS, SHORT_SIDE, nano_config
from ifseg_hf.nano.examples import Example, TrainingImages
from ifseg_hf.nano.features import FeatureCache, image_processor
from ifseg_hf.nano.initialization import begin_as_lookup
from ifseg_hf.nano.regions import RegionSampler, class_loss, region_loss, select_patches
from ifseg_hf.nano.texts import Texts, train_tokenizer
from ifseg_hf.nano.trunk_weights import load_efficientnet_lite
from ifseg_hf.nano.vocabulary import BACKGROUND, Vocabulary
from ifseg_hf.nano.word_vectors import WordVectors
from ifseg_hf.processing.post_processing_ifseg import smooth_probabilities
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.processing.prompt_ifseg import PromptEncoder

FREQUENT_WORDS = 6000  # of GloVe, that get a token beside the words of the vocabulary
ALIGNMENT_TEMPERATURE = 0.07
# Weights of the losses beside naming patches by the decoder, and sizes of their batches.
ALIGNMENT_WEIGHT, CAPTION_WEIGHT, INFILLING_WEIGHT = 0.5, 0.3, 0.2
CAPTIONED_IMAGES, SENTENCES = 3, 6
# Of the distillation of ImageNet's classifier, in both stages: weight, images of a step, and patches of an image.
CLASSES_WEIGHT, CLASSIFIED_IMAGES, CLASSIFIED_PATCHES = 1.0, 32, 24
# Predictions after smoothing with 8 neighbours are targets in the later steps, where their probability is above 0.5.
SMOOTHING_WEIGHT, SMOOTHING_START, SMOOTHING_NEIGHBORS, SURE = 0.5, 0.4, 8, 0.5
BACKGROUND_SHARE = 0.35  # of the steps in which surfaces are called "background"
# Grids of a batch; most images are wider than high. Large grids are those of images at their full size.
GRIDS = [(14, 18)] * 4 + [(18, 14)] * 2 + [(16, 16)] * 3 + [(18, 24)] * 2 + [(24, 18)]
LARGE_GRIDS, LARGE_SHARE = [(24, 32), (24, 32), (24, 24), (32, 24)], 0.4


@dataclass
class PretrainingConfig:
    """
    Settings of [`pretrain`].

    Args:
        alignment_steps, alignment_images, alignment_learning_rate: steps, images in a step, and learning rate of the
            second stage; steps, images, learning_rate: those of the third.
        patches: the most patches in a step of the third stage, which has fewer images on large grids.
        projection_scale: learning rate of projection and token embeddings in the third stage, as a share.
        weight_decay: of both stages; warmup: steps over which the learning rates rise; they fall as a cosine.
        save_every: steps between two files of the state, from which a stopped run resumes.
    """

    alignment_steps: int = 600
    alignment_images: int = 24
    alignment_learning_rate: float = 2e-3
    steps: int = 1200
    images: int = 10
    patches: int = 2600
    learning_rate: float = 5e-4
    projection_scale: float = 0.2
    weight_decay: float = 0.02
    warmup: int = 50
    seed: int = 0
    save_every: int = 100


def pretrain(
    world: Path,
    coco: Path | None,
    street: Path | None,
    output_dir: Path,
    workers: int = 2,
    held_out: Sequence[str] = (),
    on_error: str = "fail",
    log: Callable[[str], None] = tqdm.write,
    **settings,
) -> Path:
    """
    Pre-trains the nano OFA, and saves model and processor in `output_dir`.

    A run that was stopped resumes from the files in `output_dir / "stages"`.

    Args:
        world, coco, street: see [`TrainingImages`].
        workers: processes that compute features.
        held_out: names that no image gets, see [`Vocabulary`].
        on_error: for images that cannot be read, see [`TrainingImages`].
        settings: fields of [`PretrainingConfig`].
    """
    config = PretrainingConfig(**settings)
    vocabulary, vectors = Vocabulary(held_out), WordVectors()
    tokenizer = train_tokenizer([*vocabulary.names, *vectors.frequent(FREQUENT_WORDS)])
    images = TrainingImages(world, coco, street, vocabulary, on_error=on_error)
    stages = output_dir / "stages"
    data = {"world": str(world), "coco": str(coco), "street": str(street), "views": len(images.views)}
    save_settings(stages / "pretraining.json", {**data, "held_out": list(held_out), **asdict(config)})
    cache = FeatureCache(stages / "features", images.views)
    ofa = nano_config(vocab_size=len(tokenizer))
    cache.compute(ofa, images.image, workers)
    run = Pretraining(config, ofa, tokenizer, vectors.of_tokens(tokenizer), vocabulary, images, cache, output_dir, log)
    run.align()
    run.train()
    run.save()
    return output_dir


class TokenEmbedding(nn.Module):
    """Token embeddings as a projection of word vectors plus a residual: words that are never seen lie near others."""

    def __init__(self, vectors: torch.Tensor, d_model: int):
        super().__init__()
        self.register_buffer("vectors", vectors, persistent=False)
        self.projection = nn.Linear(vectors.shape[1], d_model, bias=False)
        nn.init.normal_(self.projection.weight, std=(vectors.shape[1] * d_model) ** -0.5)
        self.residual = nn.Parameter(torch.zeros(len(vectors), d_model))

    def forward(self) -> torch.Tensor:
        """All embeddings, (vocab_size, d_model)."""
        return self.projection(self.vectors) + self.residual


class NormalizedProjection(nn.Linear):
    """A linear layer that normalises its inputs to mean 0 and variance 1. Both fold into one `nn.Linear`."""

    def __init__(self, features: torch.Tensor, d_model: int):
        """features: (patches, channels), a sample."""
        super().__init__(features.shape[1], d_model)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", features.std(0) + 0.05)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward((features - self.mean) / self.deviation)

    @torch.no_grad()
    def folded(self) -> dict[str, torch.Tensor]:
        """State of the equivalent `nn.Linear` over features that are not normalised."""
        weight = self.weight / self.deviation
        return {"weight": weight, "bias": self.bias - weight @ self.mean}


class Pretraining:
    """The data, modules and state of a run; see [`pretrain`]."""

    def __init__(
        self,
        config: PretrainingConfig,
        model_config: OFAConfig,
        tokenizer: BartTokenizer,
        vectors: torch.Tensor,
        vocabulary: Vocabulary,
        images: TrainingImages,
        cache: FeatureCache,
        output_dir: Path,
        log: Callable[[str], None],
    ):
        self.config, self.vocabulary, self.cache, self.log = config, vocabulary, cache, log
        self.output_dir, self.stages = output_dir, output_dir / "stages"
        self.tokenizer, self.texts = tokenizer, Texts(tokenizer)
        self.prompts = PromptEncoder(tokenizer)
        self.related = torch.from_numpy(vocabulary.related)
        self.held_out = torch.from_numpy(vocabulary.held_out)
        self.classes = torch.from_numpy(vocabulary.classes)
        self.everyday_classes = torch.from_numpy(vocabulary.everyday_classes)
        self.word_ids, self.word_mask = self.texts.words(vocabulary.names)
        self.examples = images.examples()
        torch.manual_seed(config.seed)
        self.embedding = TokenEmbedding(vectors, model_config.d_model)
        self.projection = NormalizedProjection(self._sample_features(), model_config.d_model)
        self.temperature = nn.Parameter(torch.tensor(math.log(ALIGNMENT_TEMPERATURE)))
        self.sampler = RegionSampler(self.examples, cache, vocabulary, random.Random(config.seed))
        self.captioned = [example for example in self.examples if example.captions]
        self.model = OFAForConditionalGeneration(model_config)
        begin_as_lookup(self.model.model)
        self.backbone = OFABackbone(model_config)
        self.backbone.model = self.model.model

    def _sample_features(self) -> torch.Tensor:
        """Features of random patches, (patches, channels)."""
        rng = random.Random(self.config.seed)
        views = [example.view for example in rng.sample(self.examples, min(600, len(self.examples)))]
        return torch.cat([self.cache[view].joined().flatten(1)[:, ::7].T for view in views])

    def _sampler(self, stage: str, step: int) -> RegionSampler:
        """A sampler whose choices depend on the step alone, so that a resumed run draws the same regions."""
        seed = f"{self.config.seed} {stage} {step}"
        torch.manual_seed(zlib.crc32(seed.encode()))
        self.sampler.rng = random.Random(seed)
        return self.sampler

    # Alignment ----------------------------------------------------------------------------------------------------

    def align(self) -> None:
        """Trains projection and embeddings, so that patches lie near their names."""
        config = self.config
        modules = nn.ModuleList([self.embedding, self.projection])
        parameters = [*modules.parameters(), self.temperature]
        optimizer = torch.optim.AdamW(parameters, config.alignment_learning_rate, weight_decay=config.weight_decay)
        names = self.vocabulary.used

        def loss(step: int) -> dict[str, torch.Tensor]:
            sampler = self._sampler("alignment", step)
            grid = sampler.rng.choice(GRIDS)
            features, _, regions = sampler.batch(config.alignment_images, grid)
            selection = select_patches(regions, *grid, max_patches=40)
            patches = self.projection(features.flatten(0, 2)[selection.indices])
            scores = cosine(patches, self._names(self.embedding())[names]) / self.temperature.exp()
            losses = region_loss(scores, selection, names, self.related)
            classes = CLASSES_WEIGHT * self._class_loss(sampler, self.embedding(), self.temperature.exp())
            return losses | {"classes": classes}

        self._run("alignment", config.alignment_steps, modules, optimizer, parameters, loss)

    def _class_loss(
        self, sampler: RegionSampler, embedding: torch.Tensor, temperature: torch.Tensor | float
    ) -> torch.Tensor:
        """
        Distillation loss: cross-entropy with the predictions of ImageNet's classifier, by class or everyday name.

        It teaches words that are the name of few or no training images.
        """
        classes = self.classes if sampler.rng.random() < 0.5 else self.everyday_classes
        features, found, probabilities = sampler.class_patches(CLASSIFIED_IMAGES, CLASSIFIED_PATCHES)
        names, columns, counts = classes.unique(return_inverse=True, return_counts=True)
        scores = cosine(self.projection(features), self._names(embedding)[names]) / temperature
        # Divided by the square root of the number of classes with the same name: 121 of the 1000 classes are dogs, so
        # that uncertain predictions would add up to "dog".
        rare = counts[columns].float().rsqrt() * ~self.held_out[classes]
        probabilities = probabilities * rare[found]
        probabilities = probabilities / probabilities.sum(1, keepdim=True).clamp(min=1e-6)
        return class_loss(scores, columns[found], probabilities)

    def _names(self, embedding: torch.Tensor) -> torch.Tensor:
        """Embeddings of all names, (names, d_model), from those of all tokens."""
        return mean_of_subwords(embedding[self.word_ids][None], self.word_mask[None])[0]

    # Vision and language --------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains encoder, decoder, projection and embeddings."""
        config, encoder = self.config, self.model.model.encoder
        with torch.no_grad():
            embedding = self.embedding()
            scale = embedding.norm(dim=1).mean()
            encoder.embed_tokens.weight.copy_(embedding / scale)
        encoder.image_proj = self.projection
        slow = [encoder.embed_tokens.weight, *self.projection.parameters()]
        trunk = {id(parameter) for parameter in encoder.embed_images.parameters()}
        others = [
            parameter
            for parameter in self.model.parameters()
            if id(parameter) not in trunk and all(parameter is not other for other in slow)
        ]
        groups = [
            {"params": others, "lr": config.learning_rate},
            {"params": slow, "lr": config.learning_rate * config.projection_scale},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay)
        self.model.train()
        self._run("vision-language", config.steps, self.model, optimizer, [*others, *slow], self._losses)
        encoder.image_proj = nn.Linear(self.projection.in_features, self.projection.out_features)
        encoder.image_proj.load_state_dict(self.projection.folded())

    def _losses(self, step: int) -> dict[str, torch.Tensor]:
        """Losses of a step: naming patches by the decoder and by their projection, captions, infilling."""
        sampler = self._sampler("vision-language", step)
        rng = sampler.rng
        background = rng.random() < BACKGROUND_SHARE
        grid = rng.choice(LARGE_GRIDS if rng.random() < LARGE_SHARE else GRIDS)
        count = max(1, min(self.config.images, self.config.patches // math.prod(grid)))
        features, examples, regions = sampler.batch(count, grid, background)
        selection = select_patches(regions, *grid)
        names = list(dict.fromkeys(region.name for found in regions for region in found))
        if not background:
            names += sampler.distractors(names, rng.randint(0, 6))
        elif self.vocabulary.index[BACKGROUND] not in names:
            names.append(self.vocabulary.index[BACKGROUND])
        rng.shuffle(names)
        patches = self.projection(features)
        words = self._names(self.model.get_input_embeddings().weight)[names]

        prompt = self.prompts.encode([self.vocabulary.names[name] for name in names])["prompt_ids"]
        encoded = self.backbone.encode(torch.tensor([prompt]), image_tokens=patches)
        decoded = self.backbone.decode_patches(encoded).last_hidden_state
        logits = decoded @ words.T
        losses = region_loss(logits.flatten(0, 1)[selection.indices], selection, names, self.related)
        aligned = cosine(patches.flatten(0, 2)[selection.indices], words) / ALIGNMENT_TEMPERATURE
        for kind, loss in region_loss(aligned, selection, names, self.related).items():
            losses[f"aligned {kind}"] = ALIGNMENT_WEIGHT * loss
        if step >= SMOOTHING_START * self.config.steps:
            losses["smoothing"] = SMOOTHING_WEIGHT * smoothing_loss(logits, features)
        words = self.model.get_input_embeddings().weight
        losses["classes"] = CLASSES_WEIGHT * self._class_loss(sampler, words, ALIGNMENT_TEMPERATURE)
        return losses | self._text_losses(patches, examples, rng)

    def _text_losses(
        self, patches: torch.Tensor, examples: list[Example], rng: random.Random
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of captions of a few of the images, and of complete sentences."""
        described = [i for i, example in enumerate(examples) if example.captions or example.name is not None]
        chosen = rng.sample(described, min(CAPTIONED_IMAGES, len(described)))
        losses = {}
        if chosen:
            labels = self.texts.captions([self._caption(examples[i], rng) for i in chosen])
            prompt = self.texts.caption_prompt.expand(len(chosen), -1)
            output = self.model(
                input_ids=prompt, image_embeds=patches[chosen], labels=labels, interpolate_pos_encoding=True
            )
            losses["captions"] = CAPTION_WEIGHT * output.loss
        sentences = (
            [rng.choice(rng.choice(self.captioned).captions) for _ in range(SENTENCES)] if self.captioned else []
        )
        if sentences:
            prompts, labels = self.texts.infilling(sentences, rng)
            mask = (prompts != self.texts.padding).long()
            losses["infilling"] = INFILLING_WEIGHT * self.model(prompts, attention_mask=mask, labels=labels).loss
        return losses

    def _caption(self, example: Example, rng: random.Random) -> str:
        if example.captions:
            return rng.choice(example.captions)
        return self.vocabulary.names[example.name]

    # Steps and files ------------------------------------------------------------------------------------------------

    def _run(
        self,
        stage: str,
        steps: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        losses: Callable[[int], dict[str, torch.Tensor]],
    ) -> None:
        """Runs the remaining steps of a stage, and saves the state every `save_every` steps."""
        config, file = self.config, self.stages / f"{stage}.pt"
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (
                min(1, (step + 1) / config.warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
            ),
        )
        done = 0
        if file.exists():
            state = torch.load(file, weights_only=True)
            for name, part in (("module", module), ("optimizer", optimizer), ("schedule", schedule)):
                part.load_state_dict(state[name])
            with torch.no_grad():
                self.temperature.copy_(state["temperature"])
            done = state["step"]
        sums: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for step in tqdm(range(done, steps), initial=done, total=steps, desc=stage, mininterval=5):
            found = losses(step)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(found.values())).sum().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            for name, loss in found.items():
                sums[name] += loss.item()
                counts[name] += 1
            if (step + 1) % config.save_every == 0 or step + 1 == steps:
                means = " ".join(f"{name} {sums[name] / counts[name]:.3f}" for name in sums)
                self.log(f"{stage} {step + 1}/{steps}: {means}")
                sums.clear()
                counts.clear()
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"schedule": schedule.state_dict(), "temperature": self.temperature.detach(), "step": step + 1}
                torch.save(state, file.with_suffix(".tmp"))
                file.with_suffix(".tmp").replace(file)

    def save(self) -> None:
        """Saves the model in float16, to be loaded in float32, and its processor."""
        load_efficientnet_lite(self.model.model.encoder.embed_images)
        with no_progress_bars():
            self.model.to(torch.float16).save_pretrained(self.output_dir)
        self.model.config.dtype = torch.float32
        self.model.config.save_pretrained(self.output_dir)
        size = {"shortest_edge": SHORT_SIDE, "longest_edge": LONG_SIDE}
        images = image_processor(size=size, smoothing_neighbors=NEIGHBORS, smoothing_iterations=ITERATIONS)
        IFSegProcessor(images, self.tokenizer).save_pretrained(self.output_dir)


def smoothing_loss(logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy with the model's smoothed predictions (section 2.4 of the paper) as labels, where P > [`SURE`].

    Args:
        logits: (batch, h * w, names); features: (batch, h, w, channels), of the trunk.
    """
    losses = []
    for scores, patches in zip(logits.float(), features.flatten(1, 2), strict=True):
        with torch.no_grad():
            smoothed = smooth_probabilities(scores.softmax(-1), patches, SMOOTHING_NEIGHBORS)
            probability, target = smoothed.max(-1)
            target[probability < SURE] = -100
        losses.append(nn.functional.cross_entropy(scores, target, reduction="sum") / len(scores))
    return torch.stack(losses).mean()


def cosine(patches: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of patches (..., d) and words (names, d): (..., names)."""
    return normalize(patches, dim=-1) @ normalize(words, dim=-1).T
