"""The tuned vocabularies that the page offers, and the model that fits given words."""

import json
from dataclasses import dataclass
from pathlib import Path

from ifseg_hf.cache import CONVERTED, cache_entries
from ifseg_hf.data.vocabularies import join_names
from ifseg_hf.training.config import SETTINGS_FILE
from ifseg_hf.tuning import is_tuned_for

__all__ = ["Choice", "Vocabulary", "choose_model", "read_vocabulary", "tuned_vocabularies"]


@dataclass(frozen=True)
class Vocabulary:
    """A tuned model in the cache.

    Attributes:
        folder: of the model. model: what it was tuned from.
        words: its categories. background: whether it was tuned with background words.
    """

    folder: Path
    model: str
    words: tuple[str, ...]
    background: bool

    @property
    def label(self) -> str:
        """The first words, for a list."""
        shown = join_names(self.words[:6])
        more = f", and {len(self.words) - 6} more" if len(self.words) > 6 else ""
        rest = " (and background)" if self.background else ""
        return f"{shown}{more}{rest}"


def tuned_vocabularies() -> list[Vocabulary]:
    """Returns the complete tuned models in the cache, last used first."""
    entries = [entry for entry in cache_entries() if entry.complete and entry.folder.parent.name != CONVERTED]
    found = [read_vocabulary(entry.folder) for entry in entries]
    return [vocabulary for vocabulary in found if vocabulary is not None]


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Returns the vocabulary of a tuned model in the cache; `None` if it is not there any more."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    words = tuple(settings.get("categories") or ())
    return Vocabulary(folder, str(settings.get("model")), words, settings.get("background") not in (None, "none"))


@dataclass(frozen=True)
class Choice:
    """A model for some words.

    Attributes:
        folder: of the model, or its Hub id.
        own_words: whether the model's own words, in its own order, are the words asked for.
        tuned: whether it was tuned on the words.
    """

    folder: str | Path
    own_words: bool
    tuned: bool


def choose_model(
    start: str | Path,
    start_name: str,
    words: list[str],
    background: str | list[str] | None,
    chosen: Vocabulary | None = None,
    trust_remote_code: bool = False,
) -> Choice:
    """Returns the model to segment with: one that was tuned on the words, or else the page's model.

    Args:
        start: folder or Hub id of the page's model. start_name: the name that it was given by.
        words, background: as [`ifseg_hf.tuning.choose_background`] returns them.
        chosen: the vocabulary that was chosen in the list; it is used if it has these words.

    Raises:
        `ValueError`: the tokenizer of a model does not know a word.
    """
    if chosen and list(chosen.words) == words and chosen.background == (background is not None):
        return Choice(chosen.folder, own_words=True, tuned=True)
    if is_tuned_for(start, words, trust_remote_code, background):
        return Choice(start, own_words=False, tuned=True)
    for vocabulary in tuned_vocabularies():
        same = vocabulary.model == start_name and sorted(vocabulary.words) == sorted(words)
        if same and is_tuned_for(str(vocabulary.folder), words, trust_remote_code, background):
            return Choice(vocabulary.folder, own_words=False, tuned=True)
    return Choice(start, own_words=False, tuned=False)
