"""Texts of pre-training: the tokenizer, captions, and sentences with masked words."""

import json
import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BartTokenizer

from ifseg_hf.processing.prompt_ifseg import CATEGORIES, PROMPT_TEMPLATE

CAPTION_PROMPT = "what does the image describe?"
INFILLING_PROMPT = 'what is the complete text of "{}"?'
MASKED_SHARE = 0.3  # of the words of a sentence
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


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
        vocab_size=100_000,  # larger than the result: every word gets its token
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
    """Token ids of names, captions and masked sentences."""

    def __init__(self, tokenizer: BartTokenizer):
        self.tokenizer = tokenizer
        self.start, self.padding, self.end = (
            tokenizer.bos_token_id,
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
        self.caption_prompt = torch.tensor([[self.start, *self.ids(CAPTION_PROMPT), self.end]])

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""
        return self.tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]

    def words(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sub-words of names, (names, sub-words), and their mask."""
        ids = pad([self.ids(name) for name in names], self.padding)
        return ids, (ids != self.padding).long()

    def captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Labels of captions, (captions, tokens), padded with -100."""
        return pad([[*self.ids(clean(caption)), self.end] for caption in captions], -100)

    def infilling(self, captions: Sequence[str], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Sentences of which some words are replaced by `<mask>`.

        Returns:
            prompts (captions, tokens), padded with `<pad>`, and the complete sentences as labels, padded with -100.
        """
        before, after = (self.ids(part) for part in INFILLING_PROMPT.split("{}"))
        prompts = []
        for caption in captions:
            words = [self.ids(word) for word in clean(caption).split()]
            masked = [[self.tokenizer.mask_token_id] if rng.random() < MASKED_SHARE else ids for ids in words]
            prompts.append([self.start, *before, *(token for ids in masked for token in ids), *after, self.end])
        return pad(prompts, self.padding), self.captions(captions)


def clean(caption: str) -> str:
    """A caption in lower case without punctuation at its end."""
    return caption.lower().strip(" .\n")


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Lists of ids as one tensor, padded at the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
