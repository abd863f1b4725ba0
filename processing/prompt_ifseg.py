"""Prompts and categories as token ids."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, islice

from transformers.utils import logging

from .background_ifseg import BACKGROUND, BACKGROUND_WORDS, background_words
from .text_ifseg import check_text, clean_names, normalize_text

logger = logging.get_logger(__name__)

CATEGORIES = "{categories}"  # placeholder in a prompt template
PROMPT_TEMPLATE = f"what is the segmentation map of the image? object:{CATEGORIES} unknown"
MAX_TOKENS = 1024  # limit of the published OFA models, for tokenizers without `model_max_length`


def complete_template(prompt: str | None, template: str = PROMPT_TEMPLATE) -> str:
    """
    Returns the prompt template of a prompt, with white space collapsed.

    Args:
        prompt (`str`, *optional*): a template; or a question without `{categories}`, which then replaces the text
            before `{categories}` in `template`. By default `template` itself.
        template (`str`): text with `{categories}` where the names of the categories come.

    Raises:
        `ValueError` if `{categories}` occurs more than once in `prompt`, or not exactly once in `template`.
    """
    for text, what in ((template, "The prompt template"), ("" if prompt is None else prompt, "The prompt")):
        if not isinstance(text, str):
            raise ValueError(f"{what} should be a string, not {text!r}.")
        check_text(text, what)
    if template.count(CATEGORIES) != 1:
        raise ValueError(f'The prompt template "{template}" must contain {CATEGORIES} exactly once.')
    if prompt is None:
        prompt = template
    elif CATEGORIES not in prompt:
        prompt = f"{prompt.strip()}{CATEGORIES}{template.partition(CATEGORIES)[2]}"
    elif prompt.count(CATEGORIES) > 1:
        raise ValueError(f'The prompt "{prompt}" contains {CATEGORIES} more than once: leave one of them.')
    return " ".join(prompt.split())


class PromptEncoder:
    """
    Token ids of prompts and of the categories in them.

    A prompt is `<s>`, the template's text before `{categories}`, the names, the text after `{categories}`, and `</s>`.
    Where the names are more than the model has positions for, the prompt has the first names, as many as fit. The model
    classifies into all categories, also those that are not in its prompt.
    Each part is normalised ([`normalize_text`]) and tokenized by itself, with a space before it.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]).
        template (`str`): text with `{categories}`; by default the published one.
        default_background (`list[str]`): the words of `background="default"`.
    """

    def __init__(
        self, tokenizer, template: str = PROMPT_TEMPLATE, default_background: Sequence[str] = BACKGROUND_WORDS
    ):
        self.tokenizer, self.default_background = tokenizer, list(default_background)
        self.template = complete_template(None, template)

    def encode(self, categories, prompt: str | None = None, background=None) -> dict:
        """
        Returns the arguments of the model's `set_words`; see [`IFSegProcessor.encode_categories`].

        Args:
            categories (`list[str]` or `dict[str, list[str]]`): names, or fine names by coarse category.
            prompt (`str`, *optional*): a template or a question, as in [`complete_template`].
            background (`str` or `list[str]`, *optional*): see [`background_words`].
        """
        template = complete_template(prompt, self.template)
        fine = None
        if isinstance(categories, Mapping):
            fine = [clean_names(names, f'names of "{coarse}"') for coarse, names in categories.items()]
        names = clean_names(list(categories) if isinstance(categories, Mapping) else categories, "categories")
        own = [*names, *(name for words in fine or [] for name in words)]
        rest = background_words(background, own, self.default_background)
        category_ids = [self._name_ids(name) for name in [*names, *(rest or [])]]
        encoded: dict = {
            "prompt": template,
            "prompt_ids": self._prompt_ids(template, category_ids),
            "category_ids": category_ids,
            "word_ids": fine and [self._name_ids(name) for words in fine for name in words],
            "word_categories": fine and [index for index, words in enumerate(fine) for _ in words],
            "id2label": dict(enumerate(names)),
        }
        return encoded if rest is None else self._merge_background(encoded, rest)

    def _merge_background(self, encoded: dict, rest: list[str]) -> dict:
        """Returns a result of [`encode`] whose last categories, the words `rest`, have the label "background"."""
        labels = list(encoded["id2label"].values())
        count = len(labels)
        label = next((i for i, name in enumerate(labels) if normalize_text(name) == BACKGROUND), count)
        if label == count:
            labels.append(BACKGROUND)
        own = encoded["word_categories"] or list(range(count))
        own_ids = encoded["word_ids"] or encoded["category_ids"][:count]
        return {
            **encoded,
            "word_ids": [*own_ids, *encoded["category_ids"][count:]],
            "word_categories": [*own, *[label] * len(rest)],
            "id2label": dict(enumerate(labels)),
            "background": rest,
            "category_labels": [*range(count), *[label] * len(rest)],
        }

    def pad(self, rows: list[dict]) -> dict[str, list]:
        """Returns several results of [`encode`] as inputs of the model: nested lists, padded to equal lengths."""
        pad = self.tokenizer.pad_token_id
        input_ids, attention_mask = _pad([row["prompt_ids"] for row in rows], pad)
        category_ids, category_mask = _pad_twice([row["category_ids"] for row in rows], pad)
        padded = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "category_ids": category_ids,
            "category_mask": category_mask,
        }
        if any("category_labels" in row for row in rows):
            padded["category_groups"] = _category_groups(rows)
        return padded

    def encode_text(self, text: str) -> list[int]:
        """Returns `<s>`, the tokens of a question or another text, normalised, and `</s>`."""
        if not isinstance(text, str):
            raise ValueError(f"The text must be a string, not {text!r}.")
        check_text(text, "The text")
        special, limit = self._special_tokens(), self._limit()
        ids = [special["bos"], *self.tokenize(normalize_text(text)), special["eos"]]
        if len(ids) > limit:
            raise ValueError(f'The text "{text[:40]}..." has {len(ids)} tokens, but the model has {limit} positions.')
        return ids

    def pad_texts(self, texts: list[str]) -> dict[str, list]:
        """Returns `input_ids` and `attention_mask` of texts, nested lists padded at the right to equal lengths."""
        input_ids, attention_mask = _pad([self.encode_text(text) for text in texts], self.tokenizer.pad_token_id)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of `text` after a space; special tokens such as "</s>" in it are ordinary text."""
        return self.tokenizer(f" {text}", add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _name_ids(self, name: str) -> list[int]:
        ids = self.tokenize(normalize_text(name))
        if ids == self.tokenize("") or all(token == self.tokenizer.unk_token_id for token in ids):
            raise ValueError(f'The tokenizer has no tokens for the category "{name}": use another word.')
        return ids

    def _special_tokens(self) -> dict[str, int]:
        special = {name: getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        if None in special.values():
            raise ValueError(f"The tokenizer needs a bos, an eos and a pad token; their ids are {special}.")
        return special

    def _limit(self) -> int:
        """Number of tokens that the model has positions for."""
        limit = self.tokenizer.model_max_length
        return limit if limit < 1_000_000 else MAX_TOKENS  # without a limit, `model_max_length` is 1e30

    def _prompt_ids(self, template: str, category_ids: list[list[int]]) -> list[int]:
        special, limit = self._special_tokens(), self._limit()
        before, _, after = template.partition(CATEGORIES)
        before, after = normalize_text(before), normalize_text(after, at_start=False)
        start = [special["bos"], *(self.tokenize(before) if before else [])]
        end = [*(self.tokenize(after) if after else []), special["eos"]]
        lengths = accumulate((len(ids) for ids in category_ids), initial=len(start) + len(end))
        fitting = sum(length <= limit for length in islice(lengths, 1, None))
        names = [token for ids in category_ids[:fitting] for token in ids]
        if fitting == len(category_ids):
            return start + names + end
        if not fitting:
            length = len(start) + len(category_ids[0]) + len(end)
            raise ValueError(
                f"The prompt with its first category has {length} tokens, but the model has {limit} positions: use a "
                "shorter prompt or name."
            )
        logger.warning_once(
            f"The prompt holds the first {fitting} of the {len(category_ids)} categories: with all of them it would "
            f"have more tokens than the model has positions ({limit}). All categories can be predicted."
        )
        return start + names + end


def _category_groups(rows: list[dict]) -> list[list[list[int]]]:
    """Returns for each result of [`PromptEncoder.encode`] rows of labels: 1 where a category has the label."""
    categories, count = (max(len(row[name]) for row in rows) for name in ("category_ids", "id2label"))
    masks = [[[0] * categories for _ in range(count)] for _ in rows]
    for row, mask in zip(rows, masks, strict=True):
        for category, label in enumerate(row.get("category_labels", range(len(row["category_ids"])))):
            mask[label][category] = 1
    return masks


def _pad(rows: list[list[int]], value: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns rows padded at the right to the longest, and their mask."""
    width = max(map(len, rows))
    padded = [row + [value] * (width - len(row)) for row in rows]
    return padded, [[1] * len(row) + [0] * (width - len(row)) for row in rows]


def _pad_twice(tables: list[list[list[int]]], value: int) -> tuple[list, list]:
    """Returns tables padded to the largest number of rows and the longest row, and their masks."""
    height = max(map(len, tables))
    padded, mask = _pad([row for table in tables for row in table + [[]] * (height - len(table))], value)
    starts = range(0, len(padded), height)
    return [padded[start : start + height] for start in starts], [mask[start : start + height] for start in starts]


__all__ = ["PROMPT_TEMPLATE", "PromptEncoder", "complete_template"]
