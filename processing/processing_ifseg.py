"""Words and photos to what the model reads: the tokenizer and the image processor behind one call."""

from collections.abc import Mapping

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .sliding_window_ifseg import sliding_window_outputs

PROMPT = "what is the segmentation map of the image? object:"
UNKNOWN = "unknown"
MAX_TOKENS = 1024  # text positions of every OFA, for tokenizers that don't know their model's limit


class IFSegProcessor(ProcessorMixin):
    r"""
    A tokenizer and an [`IFSegImageProcessor`] in one.

    ```python
    inputs = processor(images=photo, categories=["cat", "grass"], return_tensors="pt")
    outputs = model(**inputs)
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(photo.height, photo.width)])
    ```

    Args:
        image_processor ([`IFSegImageProcessor`]).
        tokenizer ([`PreTrainedTokenizerBase`]): OFA's (BART's byte-level byte-pair encoding) or another with the
            tokens `<s>`, `</s>` and `<pad>`.
    """

    _auto_class = "AutoProcessor"  # saved with its code, wherever it was loaded from

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer)
        # Saving sets this; set here, a processor is the same before it is saved, after it and when it is loaded.
        self.auto_map = {"AutoProcessor": f"{__name__.rpartition('.')[2]}.{type(self).__name__}"}

    def __call__(
        self,
        images=None,
        categories=None,
        prompt: str | None = None,
        segmentation_maps=None,
        append_unknown: bool | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images (*optional*): a photo or a list of them; see [`IFSegImageProcessor.preprocess`].
            categories (`list[str]`, `dict[str, list[str]]`, or a list of either, one a photo; *optional*): the words to
                choose from. A dict is a hierarchical vocabulary (Appendix A.1 of the paper): coarse categories, which
                are predicted, each with the fine names that word maps are made of (a name may belong to several).
                White space in names is collapsed.
            prompt (`str`, *optional*): the question before the names; the published one by default.
            segmentation_maps (*optional*): one map of labels a photo.
            append_unknown (`bool`, defaults to `True`): whether the prompt ends with the word "unknown", as the
                published model was trained. It is never a category.
            return_tensors (`str`, *optional*): "pt" for torch tensors, "np" for NumPy arrays; lists by default.
            **kwargs: arguments of the image processor for this call, also as `images_kwargs={...}`.

        Returns:
            [`BatchFeature`] with `pixel_values`, `pixel_mask` and `labels` as the image processor returns them, and
            for categories, with rows = 1 for one list and rows = photos for a list of lists:

            - **input_ids**, **attention_mask** (rows, tokens): the prompt, padded at the right.
            - **category_ids**, **category_mask** (rows, categories, sub-words): the sub-words of every category,
              padded. A photo with fewer categories than its neighbours ends with empty ones (mask 0).

            Fine names are not among them: only word maps are made of these, from the configuration
            ([`encode_categories`]).

        Raises:
            `ValueError` for no or an empty list of categories, for one that is empty, double or unknown to the
            tokenizer, for a prompt longer than the model's positions, and for as many lists as there are no photos.
        """
        images_kwargs = kwargs.pop("images_kwargs", {})
        for name in images_kwargs.keys() & kwargs.keys():
            raise ValueError(f"{name} is passed twice: by itself and in images_kwargs.")
        kwargs.update(images_kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        append_unknown = True if append_unknown is None else append_unknown
        if images is None and categories is None:
            raise ValueError("There is nothing to process: give images, categories or both.")
        if images is None and (segmentation_maps is not None or kwargs):
            without = ["segmentation_maps"] * (segmentation_maps is not None) + list(kwargs)
            raise ValueError(f"There are no images for {', '.join(without)}.")
        data: dict = {}
        if images is not None:
            data |= self.image_processor(images, segmentation_maps, **kwargs)
        if categories is not None:
            several = isinstance(categories, (list, tuple)) and any(
                isinstance(names, (list, tuple, Mapping)) for names in categories
            )
            if several and images is not None and len(categories) != len(data["pixel_values"]):
                raise ValueError(
                    f"{len(categories)} lists of categories for {len(data['pixel_values'])} photos: give one list for "
                    "all of them, or one list a photo."
                )
            lists = categories if several else [categories]
            data |= self._pad_words([self.encode_categories(names, prompt, append_unknown) for names in lists])
        return BatchFeature(data, tensor_type=return_tensors)

    def encode_categories(self, categories, prompt: str | None = None, append_unknown: bool = True) -> dict:
        """
        What a configuration keeps of a vocabulary: `model.set_words(**processor.encode_categories(names))`.

        Args:
            categories (`list[str]` or `dict[str, list[str]]`), prompt, append_unknown: as in [`__call__`], one list.

        Returns:
            `dict` of lists without padding:

            - **prompt** (`str`), **prompt_ids** (`list[int]`): `<s>`, the prompt, the names (of a hierarchical
              vocabulary the coarse ones, which are predicted), "unknown", `</s>`.
            - **category_ids** (`list[list[int]]`): the sub-words of each category.
            - **word_ids** (`list[list[int]]`), **word_categories** (`list[int]`): the sub-words of each fine name and
              the index of its category; `None` unless the vocabulary is hierarchical.
            - **id2label** (`dict[int, str]`): the names.
        """
        prompt = PROMPT if prompt is None else " ".join(prompt.split())
        fine = None
        if isinstance(categories, Mapping):
            fine = [_clean_names(names, f'names of "{coarse}"') for coarse, names in categories.items()]
        names = _clean_names(list(categories) if isinstance(categories, Mapping) else categories, "categories")
        category_ids = [self._name_ids(name) for name in names]
        return {
            "prompt": prompt,
            "prompt_ids": self._prompt_ids(prompt, category_ids, append_unknown),
            "category_ids": category_ids,
            "word_ids": fine and [self._name_ids(name) for words in fine for name in words],
            "word_categories": fine and [index for index, words in enumerate(fine) for _ in words],
            "id2label": dict(enumerate(names)),
        }

    def ends_with_unknown(self, prompt_ids: list[int]) -> bool:
        """Whether a prompt was made with `append_unknown=True`."""
        unknown = self._tokenize(UNKNOWN)
        return prompt_ids[-1 - len(unknown) : -1] == unknown

    def post_process_semantic_segmentation(self, *args, **kwargs):
        """See [`IFSegImageProcessor.post_process_semantic_segmentation`]."""
        return self.image_processor.post_process_semantic_segmentation(*args, **kwargs)

    def sliding_window(self, model, **inputs):
        """What `model` says of `inputs`, of this processor, in crops: see [`sliding_window_outputs`]."""
        inputs.setdefault("crop", self.image_processor.sliding_window)
        return sliding_window_outputs(model, **inputs)

    def pipeline(self, model, **kwargs):
        """The [`IFSegImageSegmentationPipeline`] of this processor and `model`."""
        # Naming the file here is also what makes transformers copy it beside a saved processor.
        from .pipeline_ifseg import IFSegImageSegmentationPipeline

        return IFSegImageSegmentationPipeline(
            model=model,
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
            **{"task": "image-segmentation", **kwargs},
        )

    @property
    def model_input_names(self) -> list[str]:
        words = ["input_ids", "attention_mask", "category_ids", "category_mask"]
        return [*self.image_processor.model_input_names, *words]

    def _tokenize(self, text: str) -> list[int]:
        """Ids of " text", as in the middle of a sentence. `split_special_tokens`: "</s>" in it is only text."""
        return self.tokenizer(f" {text}", add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _name_ids(self, name: str) -> list[int]:
        ids = self._tokenize(name)
        if ids == self._tokenize("") or all(token == self.tokenizer.unk_token_id for token in ids):
            raise ValueError(f'The tokenizer has no tokens for the category "{name}": use another word.')
        return ids

    def _prompt_ids(self, prompt: str, category_ids: list[list[int]], append_unknown: bool) -> list[int]:
        special = {name: getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        if None in special.values():
            raise ValueError(f"The tokenizer needs a bos, an eos and a pad token; their ids are {special}.")
        start = [special["bos"], *(self._tokenize(prompt) if prompt else [])]
        end = [*(self._tokenize(UNKNOWN) if append_unknown else []), special["eos"]]
        limit = self.tokenizer.model_max_length
        limit = limit if limit < 1_000_000 else MAX_TOKENS  # a tokenizer without a limit says 1e30
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

    def _pad_words(self, rows: list[dict]) -> dict:
        """The vocabularies of [`encode_categories`], one a row, as the nested lists that tensors are made of."""
        pad = self.tokenizer.pad_token_id
        input_ids, attention_mask = _pad([row["prompt_ids"] for row in rows], pad)
        category_ids, category_mask = _pad_twice([row["category_ids"] for row in rows], pad)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "category_ids": category_ids,
            "category_mask": category_mask,
        }


def _clean_names(names, what: str) -> list[str]:
    """The names with white space collapsed, checked."""
    if isinstance(names, str) or not isinstance(names, (list, tuple)):
        raise ValueError(f'The {what} must be a list of words such as ["cat", "grass"], not {names!r}.')
    if not names:
        raise ValueError(f"The list of {what} is empty: give at least one word.")
    cleaned: list[str] = []
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"Number {index + 1} of the {what} is {name!r}, not a word.")
        name = " ".join(name.split())
        if not name:
            raise ValueError(f"Number {index + 1} of the {what} is empty.")
        if name in cleaned:
            raise ValueError(f'"{name}" is twice among the {what}: numbers {cleaned.index(name) + 1} and {index + 1}.')
        cleaned.append(name)
    return cleaned


def _pad(rows: list[list[int]], value: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows padded at the right to the longest, and their mask."""
    width = max(map(len, rows))
    padded = [row + [value] * (width - len(row)) for row in rows]
    return padded, [[1] * len(row) + [0] * (width - len(row)) for row in rows]


def _pad_twice(tables: list[list[list[int]]], value: int) -> tuple[list, list]:
    """Tables padded to the largest number of rows and the longest row, and their masks."""
    height = max(map(len, tables))
    padded, mask = _pad([row for table in tables for row in table + [[]] * (height - len(table))], value)
    starts = range(0, len(padded), height)
    return [padded[start : start + height] for start in starts], [mask[start : start + height] for start in starts]


__all__ = ["IFSegProcessor"]
