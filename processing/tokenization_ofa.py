"""Tokenizer of a published OFA: BART's, with tokens for image codes and coordinates."""

from transformers import BartTokenizer

# The tokens that OFA adds to BART's: codes of image patches and bins of coordinates.
OFA_TOKENS = [f"<code_{i}>" for i in range(8192)] + [f"<bin_{i}>" for i in range(1000)]
MAX_LENGTH = 1024  # of the published OFA models, in tokens


class OFATokenizer(BartTokenizer):
    """Loads the tokenizer of a published OFA, a [`BartTokenizer`], from `vocab.json` and `merges.txt`.

    These files have BART's tokens only; the model has embeddings for [`OFA_TOKENS`], too.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Returns a [`BartTokenizer`] with all of OFA's tokens, which loads without this package once it is saved."""
        kwargs = {"model_max_length": MAX_LENGTH, **kwargs}
        return with_ofa_tokens(BartTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs))


def with_ofa_tokens(tokenizer: BartTokenizer) -> BartTokenizer:
    """Adds those of [`OFA_TOKENS`] that the tokenizer lacks, and returns it."""
    tokenizer.add_tokens(OFA_TOKENS)
    return tokenizer


__all__ = ["OFA_TOKENS", "OFATokenizer", "with_ofa_tokens"]
