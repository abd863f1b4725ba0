"""Colours that readers with colour vision deficiencies can tell apart, fixed by the word that they stand for."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

Color = tuple[int, ...]  # red, green, blue, 0 to 255

# Each colour with words that have it in every picture; words of one line rarely occur in one picture. The colours
# were optimised: the smallest CIELAB distance of two of them, for normal vision, protanopia and deuteranopia, is 16.
_WORDS = {
    "#4b52ff": "water, sea, ocean, river, lake, pool",
    "#bc8708": "building, house, skyscraper",
    "#006934": "tree, trees, vegetation, forest",
    "#c31e3c": "person, people, pedestrian, man, woman",
    "#623496": "road, street",
    "#70c3ff": "sky",
    "#9e5200": "floor, ground, earth, terrain",
    "#704bd2": "motorbike, motorcycle, elephant",
    "#c352ca": "pavement, sidewalk, bed",
    "#44d2ca": "bicycle, bike, curtain",
    "#acca00": "grass, field",
    "#c3ff69": "plant, potted plant, bush",
    "#449662": "fence, sheep",
    "#4416ff": "car",
    "#706269": "pole, mountain, hill, rock",
    "#5a16c3": "truck, tv, tv monitor",
    "#fff026": "sign, traffic sign, cat, lamp",
    "#bcc352": "horse, bridge",
    "#702d08": "bottle, giraffe",
    "#acb496": "cow, ceiling",
    "#78ffe8": "boat, window, cup, coffee, espresso",
    "#b4c380": "table, dining table, desk",
    "#ac8e44": "sand, beach, chair",
    "#69e8ff": "train, snow",
    "#4b344b": "bus, book",
    "#805287": "sofa, couch, bicyclist, rider",
    "#b4ff96": "bird, traffic light",
    "#d2e8bc": "wall",
    "#ca70bc": "flower",
    "#709eff": "airplane, aeroplane, door, cloud",
    "#4b2d69": "dog",
    "#969696": "background",  # grey is for no other word
}
_BASE: tuple[Color, ...] = tuple(tuple(bytes.fromhex(color[1:])) for color in _WORDS)
_FIXED = {word: i for i, words in enumerate(_WORDS.values()) for word in words.split(", ")}
_POSITIONS = {word: position for position, word in enumerate(_FIXED)}
_CHOSEN = len(_BASE) - 1  # words that are not in the table choose among all colours but grey; 31 is a prime number
_MOST = 1000

# Linear RGB as seen with protanopia and deuteranopia (Machado, Oliveira, Fernandes 2009, severity 1).
_VISIONS = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _RGB_TO_XYZ.sum(1)


@lru_cache
def palette(count: int) -> tuple[Color, ...]:
    """Returns `count` colours, the first 32 of which are the colours of words.

    Each further colour is as far as possible from those before it, for normal vision, protanopia and deuteranopia. The
    first colours do not depend on `count`. No colour is close to black or white. After 1000 the colours repeat.
    """
    colors = [*_BASE[:count]]
    if count > len(_BASE):
        levels = np.linspace(0, 255, 16)
        candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
        brightness = candidates @ (0.299, 0.587, 0.114)
        candidates = candidates[(brightness > 50) & (brightness < 225)]
        seen = _seen_lab(candidates)
        distance = np.min([_distance(seen, _seen_lab(np.array(color))) for color in colors], axis=0)
        while len(colors) < min(count, _MOST):
            farthest = distance.argmax()
            colors.append(tuple(int(level) for level in candidates[farthest]))
            distance = np.minimum(distance, _distance(seen, seen[farthest]))
    return tuple(colors[i % _MOST] for i in range(count))


def word_colors(words: Sequence[str]) -> tuple[Color, ...]:
    """
    Returns the colour of each word, which is the same in every picture.

    Frequent words, such as sky and road, have their colours in a table; every other word chooses one of 31 by its
    hash. Case and hyphens make no difference. Where words of one list choose the same colour, one keeps it: the first
    in the table, otherwise the first in alphabetical order. The others take the first free colour in an order given by
    their own hash, so that no two words of a list share a colour. The order of the list makes no difference. Words for
    which none of the 31 colours is left get further colours of [`palette`], which are closer to each other.
    """
    distinct = sorted(dict.fromkeys(words), key=lambda word: (_normalized(word), word))
    ranked = sorted(distinct, key=_rank)
    chosen: dict[str, int] = {}
    taken: set[int] = set()
    for word in ranked:
        first = next(_preferences(word))
        if first not in taken:
            chosen[word] = first
            taken.add(first)
    further = len(_BASE)
    for word in ranked:
        if word in chosen:
            continue
        free = next((i for i in _preferences(word) if i not in taken), None)
        if free is None:
            free, further = further, further + 1
        chosen[word] = free
        taken.add(free)
    colors = palette(max(further, len(_BASE)))
    return tuple(colors[chosen[word]] for word in words)


def _normalized(word: str) -> str:
    """The word in lower case, with single spaces in place of hyphens, slashes and underscores."""
    return " ".join(word.casefold().translate(str.maketrans("-/_", "   ")).split())


def _rank(word: str) -> int:
    """Position in the table; beyond its end for other words, which keep their order in a stable sort."""
    return _POSITIONS.get(_normalized(word), len(_POSITIONS))


def _preferences(word: str) -> Iterator[int]:
    """Indices of colours: the one in the table, if there is one, then all but grey in an order given by the hash."""
    normalized = _normalized(word)
    if normalized in _FIXED:
        yield _FIXED[normalized]
    digest = hashlib.sha256(normalized.encode("utf-8", "surrogatepass")).digest()
    start, step = digest[0] % _CHOSEN, 1 + digest[1] % (_CHOSEN - 1)
    yield from ((start + i * step) % _CHOSEN for i in range(_CHOSEN))


def _seen_lab(colors: np.ndarray) -> np.ndarray:
    """CIELAB coordinates (..., 3 visions, 3) of sRGB colours (..., 3): normal, protanopia, deuteranopia."""
    levels = colors / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.einsum("vij,...j->...vi", _VISIONS, linear), 0, 1)
    ratio = seen @ _RGB_TO_XYZ.T / _WHITE
    root = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def _distance(colors: np.ndarray, color: np.ndarray) -> np.ndarray:
    """The smallest distance (n,), over the visions, of each of the `colors` (n, 3, 3) from a colour (3, 3)."""
    return np.sqrt(((colors - color) ** 2).sum(-1)).min(-1)


__all__ = ["Color", "palette", "word_colors"]
