"""Background words, which are joined to the prompt and merged into one label: what is in an image and not asked for."""

from .text_ifseg import clean_names, normalize_text

BACKGROUND = "background"  # the label
DEFAULT, NONE = "default", "none"
BACKGROUND_WORDS = (
    *("sky", "grass", "wall", "floor", "road", "tree", "building", "water", "mountain", "sand", "snow", "sea", "river"),
    *("field", "dirt", "rock", "plant", "flower", "leaf", "fence", "ceiling", "window", "door", "curtain", "carpet"),
    *("furniture", "table", "bed", "house", "bridge", "street", "forest", "cloud", "sign", "clothes", "pavement"),
    BACKGROUND,
)


def background_words(background, names: list[str], default=BACKGROUND_WORDS) -> list[str] | None:
    """
    Returns the background words without the categories' own words; `None` for no background.

    Args:
        background (`str` or `list[str]`, *optional*): "default", or a list of words; `None`, "none" or an empty list
            for no background.
        names (`list[str]`): the categories, and their fine names.
        default (`list[str]`): the words of "default".

    Raises:
        `ValueError` for another text, for a word that is empty or repeated, and if no word is left.
    """
    if background is None or background == NONE or (isinstance(background, (list, tuple)) and not background):
        return None
    if isinstance(background, str) and background != DEFAULT:
        raise ValueError(f'background="{background}": give "{DEFAULT}", "{NONE}" or a list of words.')
    words = clean_names(list(default) if background == DEFAULT else background, "background words")
    own = {normalize_text(name) for name in names}
    left = [word for word in words if normalize_text(word) not in own]
    if not left:
        raise ValueError("All background words are categories, too: give others, or leave out the background.")
    return left


__all__ = ["BACKGROUND", "BACKGROUND_WORDS", "DEFAULT", "NONE", "background_words"]
