"""Tokenizer and texts of pre-training."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from ifseg_hf.nano.texts import (
    CAPTION_PROMPT,
    INFILLING_PROMPT,
    MASKED_SHARE,
    SPECIAL_TOKENS,
    Texts,
    train_tokenizer,
)

NAMES = ["cat", "ice cream", "go-kart", "road"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(NAMES)


def test_every_word_of_the_names_is_one_token(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    for name in NAMES:
        ids = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        assert len(ids) == len(name.replace("-", " - ").split())
    assert tokenizer(" cat")["input_ids"][::2] == [0, 2]


@pytest.mark.parametrize("text", ["zebra crossing", "naïve café", "猫と犬 🐈", "a\tb\nc", 'x"y\\z'])
def test_any_text_can_be_encoded(tokenizer, text, tmp_path):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 3 not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == ids


@pytest.fixture(scope="module")
def texts(tokenizer):
    return Texts(tokenizer)


def test_words_of_names_are_padded_with_a_mask(tokenizer, texts):
    ids, mask = texts.words(["road", "ice cream"])
    ice, cream, road = (tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in ("ice", "cream", "road"))
    assert ids.tolist() == [[road, 1], [ice, cream]]
    assert mask.tolist() == [[1, 0], [1, 1]]


def test_captions_are_lower_case_and_end_with_the_end_token(tokenizer, texts):
    labels = texts.captions(["A Cat on ice . \n", "a road"])
    assert tokenizer.decode(labels[0]) == " a cat on ice</s>"
    second = labels[1][labels[1] != -100]
    assert tokenizer.decode(second) == " a road</s>"
    assert (labels[1][len(second) :] == -100).all()
    assert len(second) < labels.shape[1]


def test_infilling_masks_words_and_asks_for_all(tokenizer, texts):
    sentence = "a cat on the ice of the road"
    prompts, labels = texts.infilling([f"{sentence.capitalize()}."] * 40 + ["a cat"], random.Random(0))
    assert tokenizer.decode(labels[0]) == f" {sentence}</s>"
    before, after = INFILLING_PROMPT.split("{}")
    shares = []
    for row in prompts[:40]:
        text = tokenizer.decode(row[row != texts.padding], clean_up_tokenization_spaces=False)
        assert text.startswith(f"<s> {before}".rstrip())
        assert text.endswith(f"{after}</s>")
        words = text.removeprefix(f"<s> {before}".rstrip()).removesuffix(f"{after}</s>")
        words = words.replace("<mask>", " <mask>").split()
        assert all(word in ("<mask>", right) for word, right in zip(words, sentence.split(), strict=True))
        shares.append(words.count("<mask>") / len(words))
    assert abs(sum(shares) / 40 - MASKED_SHARE) < 0.08
    assert prompts[40, -1] == texts.padding
    assert labels[40, -1] == -100


def test_infilling_is_determined_by_the_random_generator(texts):
    first, second, other = (texts.infilling(["a cat on the ice"] * 5, random.Random(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_caption_prompt_has_one_token_a_word(tokenizer, texts):
    assert tokenizer.decode(texts.caption_prompt[0]) == f"<s> {CAPTION_PROMPT}</s>"
    assert texts.caption_prompt.shape == (1, len(CAPTION_PROMPT.split()) + 3)  # and the question mark
