"""The tokenizer of the nano OFA."""

import pytest
from transformers import AutoTokenizer

from ifseg_hf.nano.texts import SPECIAL_TOKENS, train_tokenizer

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
