"""Processor: words and images to the inputs of the model, by a tokenizer and an image processor."""

from collections.abc import Mapping

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

# This relative import also makes transformers save the pipeline's file with a processor: it copies the file of the
# class and all files that are imported there relatively.
from .pipeline_ifseg import IFSegImageSegmentationPipeline
from .prompt_ifseg import CATEGORIES, PROMPT_TEMPLATE, PromptEncoder, complete_template


class IFSegProcessor(ProcessorMixin):
    r"""
    Wraps a tokenizer and an [`IFSegImageProcessor`] into one processor.

    ```python
    inputs = processor(images=image, categories=["cat", "grass"], return_tensors="pt")
    outputs = model(**inputs)
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])
    ```

    Args:
        image_processor ([`IFSegImageProcessor`]).
        tokenizer ([`PreTrainedTokenizerBase`]): OFA's (BART's byte-level byte-pair encoding) or another with the
            tokens `<s>`, `</s>` and `<pad>`.
        prompt_template (`str`, *optional*): text with `{categories}` in place of the names, saved with the processor.
            Default: the published prompt, which ends with the word "unknown"; that word is never a category.
    """

    _auto_class = "AutoProcessor"  # `save_pretrained` always saves the code, too

    def __init__(self, image_processor, tokenizer, prompt_template: str = PROMPT_TEMPLATE):
        super().__init__(image_processor, tokenizer)
        self.prompt_template = complete_template(None, prompt_template)
        # `save_pretrained` sets this. Set here as well, so that a processor equals its saved and reloaded copy.
        self.auto_map = {"AutoProcessor": f"{__name__.rpartition('.')[2]}.{type(self).__name__}"}

    def __call__(self, images=None, categories=None, prompt: str | None = None, segmentation_maps=None, **kwargs):
        """
        Args:
            images (*optional*): an image or a list of images; see [`IFSegImageProcessor.preprocess`].
            categories (`list[str]`, `dict[str, list[str]]`, or a list of either, one per image; *optional*): the words
                to choose from. A dict is a hierarchical vocabulary (Appendix A.1 of the paper): the coarse categories
                that the model predicts, each with the fine names that word maps are made of (a fine name may belong
                to several categories). White space in names is collapsed.
            prompt (`str`, *optional*): a template with `{categories}`; or a question without it, which replaces the
                text before `{categories}` in `prompt_template`. Default: `prompt_template`.
            segmentation_maps (*optional*): one map of labels per image.
            return_tensors (`str`, *optional*): "pt" for torch tensors, "np" for NumPy arrays; lists by default.
            **kwargs: arguments of the image processor for this call, also as `images_kwargs={...}`.

        Returns:
            [`BatchFeature`] with `pixel_values`, `pixel_mask` and `labels` as the image processor returns them, and
            for categories, with rows = 1 for one list and rows = images for a list of lists:

            - **input_ids**, **attention_mask** (rows, tokens): the prompt, padded at the right.
            - **category_ids**, **category_mask** (rows, categories, sub-words): the sub-words of every category,
              padded. Lists with fewer categories than others of the batch are padded with empty categories (mask 0).

            Fine names are not returned: word maps take them from the model's configuration ([`encode_categories`]).

        Raises:
            `ValueError` for neither images nor categories, for an empty list, for a name that is empty, repeated or
            unknown to the tokenizer, for a prompt with more tokens than the model has positions, and if the number of
            lists differs from the number of images.
        """
        images_kwargs = kwargs.pop("images_kwargs", {})
        for name in images_kwargs.keys() & kwargs.keys():
            raise ValueError(f"{name} is passed twice: by itself and in images_kwargs.")
        kwargs.update(images_kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
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
                    f"{len(categories)} lists of categories for {len(data['pixel_values'])} images: give one list for "
                    "all of them, or one list per image."
                )
            encoder = PromptEncoder(self.tokenizer, self.prompt_template)
            lists = categories if several else [categories]
            data |= encoder.pad([encoder.encode(names, prompt) for names in lists])
        return BatchFeature(data, tensor_type=return_tensors)

    def encode_categories(self, categories, prompt: str | None = None, append_unknown: bool = True) -> dict:
        """
        Returns the arguments of `set_words`: `model.set_words(**processor.encode_categories(names))`.

        Args:
            categories (`list[str]` or `dict[str, list[str]]`), prompt (`str`, *optional*): as in [`__call__`], one
                list.
            append_unknown (`bool`, defaults to `True`): `False` leaves out the template's text after `{categories}`.

        Returns:
            `dict` of lists without padding:

            - **prompt** (`str`): the template. **prompt_ids** (`list[int]`): its tokens with the names of the
              categories filled in (in a hierarchical vocabulary the coarse categories).
            - **category_ids** (`list[list[int]]`): the sub-words of each category.
            - **word_ids** (`list[list[int]]`), **word_categories** (`list[int]`): the sub-words of each fine name and
              the index of its category; `None` unless the vocabulary is hierarchical.
            - **id2label** (`dict[int, str]`): the names.
        """
        if not append_unknown:
            before, placeholder, _ = complete_template(prompt, self.prompt_template).partition(CATEGORIES)
            prompt = before + placeholder
        return PromptEncoder(self.tokenizer, self.prompt_template).encode(categories, prompt)

    def post_process_semantic_segmentation(self, *args, **kwargs):
        """See [`IFSegImageProcessor.post_process_semantic_segmentation`]."""
        return self.image_processor.post_process_semantic_segmentation(*args, **kwargs)

    def pipeline(self, model, **kwargs) -> IFSegImageSegmentationPipeline:
        """Returns the image-segmentation pipeline of this processor and `model`."""
        return IFSegImageSegmentationPipeline(
            model=model,
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
            processor=self,
            **{"task": "image-segmentation", **kwargs},
        )

    @property
    def model_input_names(self) -> list[str]:
        words = ["input_ids", "attention_mask", "category_ids", "category_mask"]
        return [*self.image_processor.model_input_names, *words]


__all__ = ["IFSegProcessor"]
