"""Categories from a list separated by commas, from a file, or from the embedded vocabulary of a benchmark.

This module imports neither torch nor transformers, so that scripts report wrong categories at once.
"""

import csv
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

_FILES = (".txt", ".yaml", ".yml", ".json")
VOCABULARIES = {path.stem: str(path) for path in sorted((Path(__file__).parent / "words").iterdir())}
"""Paths of the embedded vocabularies by name: ade20k and coco-stuff; coco-stuff-unseen, its 15 unseen categories; and,
hierarchical, coco-stuff-coarse (Table 15 of the paper) and ade20k-hierarchy (synonyms; Appendix A.2, Table 8)."""


def read_categories(text: str | Iterable[str] | Mapping[str, Iterable[str]]) -> list[str] | dict[str, list[str]]:
    """Reads categories: a list of names or, for a hierarchical vocabulary, a mapping from categories to fine names.

    Args:
        text (`str`): names separated by commas (see [`split_names`]), the name of one of [`VOCABULARIES`], or the path
            of a file: one name per line (.txt or no known extension), or a list of names or a mapping `category: [fine
            name, ...]` (.yaml, .yml, .json). A list or a mapping in place of a string is only checked.

    Raises:
        `ValueError`: a file is missing or unreadable, or there is no name, an empty name, or a duplicate. A fine name
            may belong to two categories, as in Table 15 of the paper.
    """
    if not isinstance(text, str):
        return _check_categories(text)
    text = VOCABULARIES.get(text, text)
    if not (os.path.isfile(text) or text.lower().endswith(_FILES)):
        close = difflib.get_close_matches(text, VOCABULARIES, n=1, cutoff=0.8)
        if close:
            raise ValueError(f'There is no vocabulary "{text}". Did you mean {close[0]}?')
        return _check_categories(split_names(text))
    try:
        with open(text, encoding="utf-8-sig") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f'The file of categories "{text}" cannot be read: {error.strerror}.') from None
    except UnicodeDecodeError:
        raise ValueError(f'The file of categories "{text}" is not UTF-8 text.') from None
    try:
        if text.lower().endswith(_FILES[1:]):
            return _check_categories(_parse_yaml(content))
        return _check_categories(line for line in content.splitlines() if line.strip())
    except ValueError as error:
        raise ValueError(f'In "{text}": {error}') from None


def read_background(text: str | Iterable[str] | None) -> str | list[str] | None:
    """Reads background words: "default", "none", or names in any form that [`read_categories`] reads but a mapping.

    Raises `ValueError` as [`read_categories`] does, and for a mapping.
    """
    if text is None or text in ("default", "none"):
        return text  # type: ignore[return-value]
    if not isinstance(text, str):
        text = list(text)
        if not text:
            return "none"
    names = read_categories(text)
    if isinstance(names, Mapping):
        raise ValueError("The background words are a mapping: give a list of words.")
    return names


def split_names(text: str) -> list[str]:
    """
    Returns the names in a text with commas between them; a name with a comma stands in double quotes.

    Raises `ValueError` for a quotation mark without its other half.
    """
    text = " ".join(text.split()).replace('" ,', '",')
    try:
        return [name for line in csv.reader([text], skipinitialspace=True, strict=True) for name in line]
    except csv.Error as error:
        raise ValueError(f"{text}: a name with a comma stands in two quotation marks ({error}).") from None


def join_names(names: Iterable[str]) -> str:
    """Returns the text that [`split_names`] splits into the names."""
    quoted = {name: '"' + name.replace('"', '""') + '"' for name in names}
    return ", ".join(text if "," in name or name.startswith('"') else name for name, text in quoted.items())


def _check_categories(categories: Iterable[str] | Mapping[str, Iterable[str]]) -> list[str] | dict[str, list[str]]:
    """The categories with single spaces between words. Raises `ValueError` as [`read_categories`] does."""
    if not isinstance(categories, Mapping):
        return _check_names(categories, "category")
    names = _check_names(categories, "category")
    for category, words in categories.items():
        if not isinstance(words, (list, tuple)):
            raise ValueError(f'Category "{category}" needs a list of fine names, like [cat, dog].')
    fine = [
        _check_names(words, f'fine name of "{name}"') for name, words in zip(names, categories.values(), strict=True)
    ]
    return dict(zip(names, fine, strict=True))


def _check_names(names: Iterable[str], what: str) -> list[str]:
    """The names with single spaces between words. Raises `ValueError`, in which `what` describes the names."""
    seen: dict[str, None] = {}
    for position, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is not a name: write it in quotes.")
        name = " ".join(name.split())
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"The {what} {name!r} has bytes that are no text: save its file as UTF-8.")
        if not name:
            raise ValueError(f"The {what} at position {position} is empty.")
        if name in seen:
            raise ValueError(f'The {what} "{name}" is given twice.')
        seen[name] = None
    if not seen:
        raise ValueError(f"There is no {what}: give at least one.")
    return list(seen)


def _parse_yaml(content: str) -> list | dict:
    """The list or mapping in a YAML or JSON text. Raises `ValueError` for anything else."""
    import yaml

    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        parsed = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML or JSON ({' '.join(str(error).split())}).") from None
    if isinstance(node, yaml.MappingNode):
        _check_names((key.value for key, _ in node.value), "category")  # safe_load drops duplicate keys
    if not isinstance(parsed, (list, dict)):
        raise ValueError("expected a list of names, or a mapping from each category to its fine names.")
    return parsed
