"""Fonts for names in any script: one that has their glyphs, and escapes for characters that none has."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from os import PathLike

from PIL import ImageFont

VARIABLE = "IFSEG_FONT"
"""Environment variable with the file of a font, for drawings that are given none."""

# Fonts of many scripts on Linux, Windows and macOS. Pillow finds them by name in the system's folders.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "arial.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "PingFang.ttc",
    "arialuni.ttf",
    "Arial Unicode.ttf",
)
_NO_CHARACTER = "\U0010ffff"  # not a character: every font draws its placeholder for missing glyphs


def choose_font(
    texts: Iterable[str], size: int, font: str | PathLike | None = None
) -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    r"""
    Returns a font for some texts, and each text as it can be drawn with the font.

    The font is the first of these that has all characters, otherwise the one that lacks fewest: `font`, Pillow's own,
    and fonts of the system. Characters that it lacks become escapes, such as "\u732b", so that different texts look
    different.

    Args:
        texts: the texts to draw.
        size: height of the letters in pixels.
        font: file of a font to prefer. Default: the environment variable `IFSEG_FONT`, if it is set.

    Raises:
        `ValueError`: the file of the font cannot be read.
    """
    texts = list(dict.fromkeys(texts))
    characters = sorted(set("".join(texts)))
    best, fewest = None, characters
    for candidate in _candidates(size, font or os.environ.get(VARIABLE)):
        missing = missing_characters(candidate, characters)
        if best is None or len(missing) < len(fewest):
            best, fewest = candidate, missing
        if not missing:
            break
    assert best is not None  # Pillow's own font is always there
    escapes = str.maketrans({character: ascii(character)[1:-1] for character in fewest})
    return best, {text: text.translate(escapes) for text in texts}


def missing_characters(font: ImageFont.FreeTypeFont, characters: Sequence[str]) -> list[str]:
    """Returns the characters, except spaces, for which a font has no glyph."""
    absent = _drawn(font, _NO_CHARACTER)
    return [x for x in characters if x != " " and ("\ud800" <= x <= "\udfff" or _drawn(font, x) == absent)]


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _candidates(size: int, font: str | PathLike | None) -> Iterator[ImageFont.FreeTypeFont]:
    if font is not None:
        try:
            yield ImageFont.truetype(font, size)
        except OSError as error:
            raise ValueError(f"The font {os.fspath(font)} can't be read: {error}.") from None
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)  # since a size is given
    yield own
    for name in _SYSTEM_FONTS:
        path = _system_font(name)
        if path is not None:
            yield ImageFont.truetype(path, size)


@lru_cache
def _system_font(name: str) -> str | None:
    """Returns the path of a font of the system; `None` if it is not installed."""
    try:
        return str(ImageFont.truetype(name, 10).path)
    except OSError:
        return None


__all__ = ["VARIABLE", "choose_font", "missing_characters"]
