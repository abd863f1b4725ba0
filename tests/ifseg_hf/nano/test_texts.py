"""Tokenizer, captions and infilling of pre-training."""

import random

import pytest
import torch
from nano_scenes import NAMES
from transformers import AutoTokenizer

from ifseg_hf.nano.texts import SPECIAL_TOKENS, Texts, train_tokenizer


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


def test_captions_and_infilling_contain_the_names(tokenizer):
    texts = Texts(tokenizer, NAMES)
    boxes = torch.tensor([[[0.5, 0, 1, 1], [0, 0, 0.5, 1]], [[0, 0, 1, 1], [0, 0, 0, 0]]], dtype=torch.float)
    captions = texts.captions({"boxes": boxes, "labels": torch.tensor([[0, 1], [3, -100]])})
    assert tokenizer.decode(captions[0], skip_special_tokens=True) == " ice cream cat"
    assert captions[1].tolist()[2:] == [-100] * (captions.shape[1] - 2)
    prompts, targets = texts.infilling(random.Random(0), 50)
    assert (prompts == tokenizer.mask_token_id).any()
    assert (targets == 2).sum() == 50
    assert not (targets == tokenizer.mask_token_id).any()
