"""Texts of pre-training: the tokenizer, captions, and lists of names with masked entries."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import BartTokenizer

from ifseg_hf.nano.scenes import reading_order
from ifseg_hf.processing.prompt_ifseg import CATEGORIES, PROMPT_TEMPLATE

CAPTION_PROMPT = "what does the image describe?"
INFILLING_PROMPT = 'what is the complete text of "{}"?'
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
START, PADDING, END = 0, 1, 2  # ids of the first three


def train_tokenizer(names: list[str], max_length: int = 512) -> BartTokenizer:
    """Trains a byte-level BPE tokenizer that has one token for every word of the names and of the prompts.

    It encodes any text: other words become several tokens, at most one per byte. `max_length` is the number of tokens
    that the model accepts.
    """
    prompts = [part.strip() for part in PROMPT_TEMPLATE.split(CATEGORIES)]
    prompts += [CAPTION_PROMPT, INFILLING_PROMPT.format("a")]
    sentences = [*prompts, "a photo of a", "there is a in the image"]
    texts = [f" {text}" for text in names + sentences] + ['"', "?", ".", ","]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,  # larger than the result: every word gets its token
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return BartTokenizer(vocab=model["vocab"], merges=merges, model_max_length=max_length)


class Texts:
    """Token ids of captions and of infilling tasks, made of the names of a `SceneMaker`."""

    def __init__(self, tokenizer: BartTokenizer, names: list[str]):
        self.tokenizer, self.names = tokenizer, names
        self.ids = [self._ids(name) for name in names]
        self.prompt = torch.tensor([[START, *self._ids(CAPTION_PROMPT), END]])
        self.name_ids = _padded(self.ids, PADDING)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]

    def embed_names(self, embedding: nn.Embedding) -> torch.Tensor:
        """Mean sub-word embedding of every name, (names, d_model)."""
        mask = (self.name_ids != PADDING)[..., None].float()
        return (embedding(self.name_ids) * mask).sum(1) / mask.sum(1)

    def captions(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The names of a batch's boxes in reading order, each name once: (B, S), padded with -100."""
        rows = []
        for boxes, labels in zip(batch["boxes"].numpy(), batch["labels"].tolist(), strict=True):
            named = [labels[i] for i in reading_order(boxes) if labels[i] >= 0]
            rows.append([token for name in dict.fromkeys(named) for token in self.ids[name]] + [END])
        return _padded(rows, -100)

    def infilling(self, rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random lists of names, of which some are replaced by `<mask>`.

        Returns:
            prompts (count, T), padded with 1, and the complete lists (count, S), padded with -100.
        """
        before, after = (self._ids(part) for part in INFILLING_PROMPT.split("{}"))
        mask = self.tokenizer.mask_token_id
        prompts, targets = [], []
        for _ in range(count):
            names = [self.ids[rng.randrange(len(self.ids))] for _ in range(rng.randint(1, 10))]
            shown = [[mask] if rng.random() < 0.15 else ids for ids in names]
            prompts.append([START, *before, *(token for ids in shown for token in ids), *after, END])
            targets.append([token for ids in names for token in ids] + [END])
        return _padded(prompts, PADDING), _padded(targets, -100)


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """Lists of ids as one tensor, padded at the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
