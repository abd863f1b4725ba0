"""The words of pre-training: names of things and surfaces, how they are related, and where captions contain them."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

WORDS = Path(__file__).parent / "words"
BACKGROUND = "background"

_IRREGULAR = {
    "children": "child",
    "feet": "foot",
    "kids": "child",
    "leaves": "leaf",
    "men": "man",
    "people": "person",
    "women": "woman",
}
# Names of images that end with the name of something else.
_MISLEADING = ("madagascar cat", "yellow lady's slipper")
# Words of captions that name no region: colours, sizes, actions, and words about the image itself.
_NOT_REGIONS = frozenset(
    [
        "area",
        "back",
        "background",
        "big",
        "black",
        "blue",
        "bottom",
        "bright",
        "brown",
        "close",
        "dark",
        "front",
        "gray",
        "green",
        "grey",
        "group",
        "image",
        "large",
        "light",
        "orange",
        "photo",
        "picture",
        "pink",
        "purple",
        "red",
        "running",
        "side",
        "small",
        "standing",
        "top",
        "view",
        "white",
        "yellow",
    ]
)


class Vocabulary:
    """
    Names and their relations, from `words/imagenet.csv` and `words/words.csv`.

    Args:
        held_out: names that no image gets, with all names that they apply to, to measure what is known of new words.

    Attributes:
        names (`list[str]`): all names; index (`dict[str, int]`): the position of each.
        classes (`np.ndarray` of shape `(1000,)`): the name of each class of ImageNet-1k.
        everyday_classes (`np.ndarray` of shape `(1000,)`): an everyday name of each class, one step more general where
            that is not a broad group ("beagle": dog, "dog" stays, since its parent "animal" has no parent).
        things (`np.ndarray` of shape `(1000,)`, bool): the classes that are objects. The others are surfaces and whole
            places, for which a classifier's answer says little about a single patch.
        accepted (`np.ndarray` of shape `(names, names)`, bool): in row i, the names that apply to everything
            called name i: itself, its synonyms and its parents ("beagle": dog, animal).
        related (`np.ndarray` of shape `(names, names)`, bool): `accepted` in either direction. Related names are never
            compared with each other in a loss.
        held_out (`np.ndarray` of shape `(names,)`, bool): the names that no image gets.

    Raises:
        `ValueError`: a name to hold out is not in the vocabulary.
    """

    def __init__(self, held_out: Sequence[str] = ()):
        classes, words = _rows("imagenet.csv"), _rows("words.csv")
        parents: dict[str, set[str]] = {}
        for row in [*classes, *words]:
            # a list: the order of a set of strings, and so of the names, differs between processes
            others = [part for part in row["parents"].split(";") if part and part != row["name"]]
            parents.setdefault(row["name"], set()).update(others)
            for other in others:
                parents.setdefault(other, set())
        synonyms = [(row["name"], row["same_as"]) for row in words if row["same_as"]]
        for name, other in synonyms:
            parents.setdefault(name, set()).add(other)
            parents.setdefault(other, set()).add(name)
        parents.setdefault(BACKGROUND, set())
        self.names = list(parents)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.classes = np.array([self.index[row["name"]] for row in classes])
        everyday = [_everyday(row["name"], row["parents"].split(";")[0], parents) for row in classes]
        self.everyday_classes = np.array([self.index[name] for name in everyday])
        self.things = np.array([row["kind"] == "thing" for row in classes])
        self.accepted = np.zeros((len(self.names), len(self.names)), bool)
        for name, i in self.index.items():
            self.accepted[i, [self.index[other] for other in _reachable(name, parents)]] = True
        self.related = self.accepted | self.accepted.T
        missing = [name for name in held_out if name not in self.index]
        if missing:
            raise ValueError(f"These words are not among the names of pre-training: {', '.join(missing)}.")
        self.held_out = np.zeros(len(self.names), bool)
        for name in held_out:
            self.held_out |= self.accepted[:, self.index[name]]
        self.things &= ~self.held_out[self.classes]

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int | None:
        """The position of a name, whose plural is accepted too ("buses"); `None` for a name that no image gets."""
        name = _IRREGULAR.get(name, name)
        singulars = [name, name.removesuffix("s"), name.removesuffix("es"), re.sub("ies$", "y", name)]
        found = next((self.index[form] for form in singulars if form in self.index), None)
        return None if found is None or self.held_out[found] else found

    @property
    def used(self) -> list[int]:
        """The names that images may get."""
        return (~self.held_out).nonzero()[0].tolist()

    def find_label(self, name: str) -> int | None:
        """As [`find`], or the position of the last word of the name ("african crocodile": crocodile)."""
        found = self.find(name)
        return self.find(name.split()[-1]) if found is None and name not in _MISLEADING else found

    def in_captions(self, captions: Iterable[str], minimum: int = 2) -> list[int]:
        """The names that at least `minimum` of the captions of an image contain."""
        counts: dict[int, int] = {}
        for caption in captions:
            for name in self._in_caption(caption):
                counts[name] = counts.get(name, 0) + 1
        return [name for name, count in counts.items() if count >= minimum]

    def _in_caption(self, caption: str) -> set[int]:
        tokens, found, i = re.findall("[a-z]+", caption.lower()), set(), 0
        while i < len(tokens):
            pair = self.find(" ".join(tokens[i : i + 2])) if i + 1 < len(tokens) else None
            single = self.find(tokens[i]) if tokens[i] not in _NOT_REGIONS else None
            found |= {name for name in (single if pair is None else pair,) if name is not None}
            i += 1 if pair is None else 2
        return found


def _rows(file: str) -> list[dict[str, str]]:
    with (WORDS / file).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _everyday(name: str, parent: str, parents: dict[str, set[str]]) -> str:
    """`parent`, if it has a parent too; otherwise `name`."""
    return parent if parent and parents[parent] else name


def _reachable(name: str, parents: dict[str, set[str]]) -> set[str]:
    """`name`, and all names reached by parents and synonyms."""
    found, pending = {name}, [name]
    while pending:
        new = parents[pending.pop()] - found
        found |= new
        pending += new
    return found
