"""Words that visitors type."""

import pytest

from ifseg_hf.app.images import PageError
from ifseg_hf.app.words import background_of, prompt_note, read_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sky, road", ["sky", "road"]),
        (" sky ,wet   grass,\ncar,, ", ["sky", "wet grass", "car"]),
        ('"salt, pepper", cup', ["salt, pepper", "cup"]),
        ("/etc/passwd", ["/etc/passwd"]),  # a word, and no file
        ("ade20k", ["ade20k"]),
    ],
)
def test_words_are_separated_by_commas_or_lines(text, words):
    assert read_words(text) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Type at least one word, such as: sky, road, car."),
        (None, "Type at least one word"),
        (" , ,\n", "Type at least one word"),
        ("cat, dog, cat", 'The category "cat" is given twice.'),
        ('"cat, dog', "quotation marks"),
        (", ".join(f"word {i}" for i in range(1001)), "These are 1001 words: type at most 1000."),
    ],
)
def test_wrong_words_are_one_sentence(text, message):
    with pytest.raises(PageError, match=message) as caught:
        read_words(text)
    assert "\n" not in str(caught.value)


def test_a_single_word_has_a_background():
    assert background_of(["cat"], False) == "default"
    assert background_of(["cat", "dog"], False) is None
    assert background_of(["cat", "dog"], True) == "default"


def test_words_beyond_the_prompt_are_counted(service):
    segmenter, _ = service.models.get(service.start)
    words = [f"word {i}" for i in range(500)]
    note = prompt_note(segmenter.encode_words, words)
    encoded = segmenter.encode_words(words)
    count = int(note.split("first ")[1].split()[0])
    around = len(encoded["prompt_ids"]) - sum(map(len, encoded["category_ids"][:count]))
    assert around == len(segmenter.encode_words(words[:1])["prompt_ids"]) - len(encoded["category_ids"][0])
    assert note.endswith("of these 500 words together; it looks for all of them in the image.")
    assert prompt_note(segmenter.encode_words, words[:30]) == ""
