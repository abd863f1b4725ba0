"""Words that visitors type."""

from ifseg_hf.app.images import PageError
from ifseg_hf.data.vocabularies import read_categories, split_names
from ifseg_hf.tuning import choose_background

__all__ = ["MAX_WORDS", "background_of", "prompt_note", "read_words"]

MAX_WORDS = 1000


def read_words(text: str | None) -> list[str]:
    """Returns the words in a text, separated by commas or line breaks.

    Unlike [`read_categories`], it never reads a file. Empty words, as after a last comma, are left out.

    Raises:
        [`PageError`]: there is no word, a word is given twice, a quotation mark has no other half, or there are more
            than [`MAX_WORDS`].
    """
    try:
        names = [name for line in (text or "").splitlines() for name in split_names(line) if name.strip()]
        if not names:
            raise ValueError("Type at least one word, such as: sky, road, car.")
        if len(names) > MAX_WORDS:
            raise ValueError(f"These are {len(names)} words: type at most {MAX_WORDS}.")
        return list(read_categories(names))
    except ValueError as error:
        raise PageError(" ".join(str(error).split())) from None


def background_of(words: list[str], rest_is_background: bool) -> str | list[str] | None:
    """Returns the background for the words: the default words if it is asked for, and always for a single word."""
    return choose_background(words, "default" if rest_is_background else None)


def prompt_note(encode, words: list[str]) -> str:
    """Returns a sentence if the prompt cannot hold all words; "" otherwise.

    Args:
        encode: function of a list of words that returns `prompt_ids` and `category_ids`, such as
            [`IFSegSegmenter.encode_words`].
    """
    encoded, first = encode(words), encode(words[:1])
    around = len(first["prompt_ids"]) - len(first["category_ids"][0])
    held = len(encoded["prompt_ids"]) - around
    lengths = [len(ids) for ids in encoded["category_ids"]]
    if held >= sum(lengths):
        return ""
    fitting = 0
    for length in lengths:
        held -= length
        if held < 0:
            break
        fitting += 1
    return (
        f"The model reads the first {fitting} of these {len(words)} words together; it looks for all of them in the "
        "image."
    )
