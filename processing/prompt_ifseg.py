"""Prompts and categories as token ids."""

from collections.abc import Mapping

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
        _check_text(text, what)
    if template.count(CATEGORIES) != 1:
        raise ValueError(f'The prompt template "{template}" must contain {CATEGORIES} exactly once.')
    if prompt is None:
        prompt = template
    elif CATEGORIES not in prompt:
        prompt = f"{prompt.strip()}{CATEGORIES}{template.partition(CATEGORIES)[2]}"
    elif prompt.count(CATEGORIES) > 1:
        raise ValueError(f'The prompt "{prompt}" contains {CATEGORIES} more than once: leave one of them.')
    return " ".join(prompt.split())


def normalize_text(text: str, at_start: bool = True) -> str:
    """
    Returns a text as OFA's pre-processing leaves it: lower case, hyphens and slashes as spaces, white space collapsed.

    Args:
        text (`str`).
        at_start (`bool`, defaults to `True`): whether the text begins a question or is a name; punctuation at its
            start is then left out.
    """
    text = text.strip().lower()
    if at_start:
        text = text.lstrip(",.!?*#:;~")
    return " ".join(text.replace("-", " ").replace("/", " ").split())


class PromptEncoder:
    """
    Token ids of prompts and of the categories in them.

    A prompt is `<s>`, the template's text before `{categories}`, the names, the text after `{categories}`, and `</s>`.
    Each part is normalised ([`normalize_text`]) and tokenized by itself, with a space before it.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]).
        template (`str`): text with `{categories}`; by default the published one.
    """

    def __init__(self, tokenizer, template: str = PROMPT_TEMPLATE):
        self.tokenizer = tokenizer
        self.template = complete_template(None, template)

    def encode(self, categories, prompt: str | None = None) -> dict:
        """
        Returns the arguments of the model's `set_words`; see [`IFSegProcessor.encode_categories`].

        Args:
            categories (`list[str]` or `dict[str, list[str]]`): names, or fine names by coarse category.
            prompt (`str`, *optional*): a template or a question, as in [`complete_template`].
        """
        template = complete_template(prompt, self.template)
        fine = None
        if isinstance(categories, Mapping):
            fine = [_clean_names(names, f'names of "{coarse}"') for coarse, names in categories.items()]
        names = _clean_names(list(categories) if isinstance(categories, Mapping) else categories, "categories")
        category_ids = [self._name_ids(name) for name in names]
        return {
            "prompt": template,
            "prompt_ids": self._prompt_ids(template, category_ids),
            "category_ids": category_ids,
            "word_ids": fine and [self._name_ids(name) for words in fine for name in words],
            "word_categories": fine and [index for index, words in enumerate(fine) for _ in words],
            "id2label": dict(enumerate(names)),
        }

    def pad(self, rows: list[dict]) -> dict[str, list]:
        """Returns several results of [`encode`] as inputs of the model: nested lists, padded to equal lengths."""
        pad = self.tokenizer.pad_token_id
        input_ids, attention_mask = _pad([row["prompt_ids"] for row in rows], pad)
        category_ids, category_mask = _pad_twice([row["category_ids"] for row in rows], pad)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "category_ids": category_ids,
            "category_mask": category_mask,
        }

    def encode_text(self, text: str) -> list[int]:
        """Returns `<s>`, the tokens of a question or another text, normalised, and `</s>`."""
        if not isinstance(text, str):
            raise ValueError(f"The text must be a string, not {text!r}.")
        _check_text(text, "The text")
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
        length, fitting = len(start) + len(end), 0
        for ids in category_ids:
            length += len(ids)
            fitting += length <= limit
        if length > limit:
            raise ValueError(
                f"The prompt with its categories has {length} tokens, but the model has {limit} positions: the first "
                f"{fitting} of the {len(category_ids)} categories fit."
            )
        return start + [token for ids in category_ids for token in ids] + end


def _check_text(text: str, what: str):
    """Raises `ValueError` for halves of characters, which a name has that was read with a wrong encoding."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{what} is {text!r}, with halves of characters (surrogates): read it as UTF-8.")


def _clean_names(names, what: str) -> list[str]:
    """Returns the names with white space collapsed. Raises `ValueError` for an empty list or a wrong name."""
    if isinstance(names, str) or not isinstance(names, (list, tuple)):
        raise ValueError(f'The {what} must be a list of words such as ["cat", "grass"], not {names!r}.')
    if not names:
        raise ValueError(f"The list of {what} is empty: give at least one word.")
    cleaned: list[str] = []
    same_as: dict[str, str] = {}  # normalised name -> the name as it was typed
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"Number {index + 1} of the {what} is {name!r}, not a word.")
        name = " ".join(name.split())
        if not name:
            raise ValueError(f"Number {index + 1} of the {what} is empty.")
        _check_text(name, f"Number {index + 1} of the {what}")
        if name in cleaned:
            raise ValueError(f'"{name}" is twice among the {what}: numbers {cleaned.index(name) + 1} and {index + 1}.')
        other = same_as.setdefault(normalize_text(name), name)
        if other != name:
            raise ValueError(
                f'"{other}" and "{name}" are the same for the model, "{normalize_text(name)}" (numbers '
                f"{cleaned.index(other) + 1} and {index + 1} of the {what}): leave one of them out."
            )
        cleaned.append(name)
    return cleaned


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


__all__ = ["PROMPT_TEMPLATE", "PromptEncoder", "complete_template", "normalize_text"]
