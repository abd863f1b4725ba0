"""Category words as a person gives them: a comma list, a file, or the name of a vocabulary of a benchmark.

Only the standard library and PyYAML are imported here, so that a script can refuse wrong words before it imports torch.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

_FILES = (".txt", ".yaml", ".yml", ".json")
VOCABULARIES = {path.stem: str(path) for path in sorted((Path(__file__).parent / "words").iterdir())}
"""Files of the embedded vocabularies by name: ade20k, coco-stuff, coco-stuff-coarse (hierarchical) and -unseen."""


def read_categories(text: str | Iterable[str] | Mapping[str, Iterable[str]]) -> list[str] | dict[str, list[str]]:
    """The categories that `text` gives: a list of names or, for a hierarchical vocabulary, fine names by category.

    Args:
        text (`str`): names with commas between them, one of [`VOCABULARIES`] by name, or the path of a file: names one
            a line (.txt or anything else), a list of names or a mapping `category: [fine name, ...]` (.yaml, .yml,
            .json). Names already in a list or a mapping are only checked.

    Raises:
        `ValueError`: for a missing or unreadable file, no name, an empty name, or one given twice. A fine name may
            belong to two categories, as the table of the paper has it.
    """
    if not isinstance(text, str):
        return _check_categories(text)
    text = VOCABULARIES.get(text, text)
    if not (os.path.isfile(text) or text.lower().endswith(_FILES)):
        close = difflib.get_close_matches(text, VOCABULARIES, n=1, cutoff=0.8)
        if close:
            raise ValueError(f'There is no vocabulary "{text}": {close[0]}?')
        return _check_categories(text.split(",") if text.strip() else [])
    try:
        with open(text, encoding="utf-8-sig") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f'The categories\' file "{text}" cannot be read: {error.strerror}.') from None
    except UnicodeDecodeError:
        raise ValueError(f'The categories\' file "{text}" is not text in UTF-8.') from None
    try:
        if text.lower().endswith(_FILES[1:]):
            return _check_categories(_parse_yaml(content))
        return _check_categories(line for line in content.splitlines() if line.strip())
    except ValueError as error:
        raise ValueError(f'In "{text}": {error}') from None


def _check_categories(categories: Iterable[str] | Mapping[str, Iterable[str]]) -> list[str] | dict[str, list[str]]:
    """The same names with single spaces between their words. Raises `ValueError` as [`read_categories`] does."""
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
    seen: dict[str, None] = {}
    for position, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is not a name: write it in quotes.")
        name = " ".join(name.split())
        if not name:
            raise ValueError(f"The {what} at place {position} is empty.")
        if name in seen:
            raise ValueError(f'The {what} "{name}" is given twice.')
        seen[name] = None
    if not seen:
        raise ValueError(f"There is no {what}: give at least one.")
    return list(seen)


def _parse_yaml(content: str) -> list | dict:
    """A list or a mapping from YAML, of which JSON is a part. Raises `ValueError` for anything else."""
    import yaml

    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        parsed = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML or JSON ({' '.join(str(error).split())}).") from None
    if isinstance(node, yaml.MappingNode):
        _check_names((key.value for key, _ in node.value), "category")  # a dict would keep the last of two equal keys
    if not isinstance(parsed, (list, dict)):
        raise ValueError("expected a list of names, or a mapping from each category to its fine names.")
    return parsed
