"""Processor: words and images to the inputs of the model, by a tokenizer and an image processor."""

from collections.abc import Mapping, Sequence

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .background_ifseg import BACKGROUND_WORDS

# The relative import of the pipeline also makes transformers save the pipeline's file with a processor: it copies the
# file of the class and all files that are imported there relatively.
from .image_processing_ifseg import IFSegImageProcessor
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

    With `text` in place of categories it prepares the inputs of text generation:

    ```python
    inputs = processor(images=image, text="what does the image describe?", return_tensors="pt")
    texts = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    ```

    Args:
        image_processor ([`IFSegImageProcessor`]).
        tokenizer ([`PreTrainedTokenizerBase`]): OFA's (BART's byte-level byte-pair encoding) or another with the
            tokens `<s>`, `</s>` and `<pad>`.
        prompt_template (`str`, *optional*): text with `{categories}` in place of the names, saved with the processor.
            Default: the published prompt, which ends with the word "unknown"; that word is never a category.
        background_words (`list[str]`, *optional*): the words of `background="default"`, saved with the processor.
            Default: everyday surfaces and surroundings, such as sky, grass, wall and floor.
    """

    _auto_class = "AutoProcessor"  # `save_pretrained` always saves the code, too

    def __init__(
        self,
        image_processor,
        tokenizer,
        prompt_template: str = PROMPT_TEMPLATE,
        background_words: Sequence[str] = BACKGROUND_WORDS,
    ):
        super().__init__(image_processor, tokenizer)
        self.background_words = list(background_words)
        self.prompt_template = complete_template(None, prompt_template)
        # `save_pretrained` sets this. Set here as well, so that a processor equals its saved and reloaded copy.
        self.auto_map = {"AutoProcessor": f"{__name__.rpartition('.')[2]}.{type(self).__name__}"}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Loads a saved processor, or makes the processor of a published OFA.

        A published OFA has no file for it: the image sizes follow from `config.json`.
        """
        hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        hub_kwargs = {name: kwargs[name] for name in hub if name in kwargs}
        if not cls.get_processor_dict(pretrained_model_name_or_path, **hub_kwargs)[0]:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
            if config.get("model_type") == "ofa" and "resnet_type" in config:
                image_size = min(512, 16 * config.get("image_bucket_size", 42))
                image_processor = IFSegImageProcessor.for_ofa(image_size, config.get("d_model", 768))
                limit = {"model_max_length": config.get("max_position_embeddings", 1024)}
                tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **limit, **hub_kwargs)
                return cls(image_processor, tokenizer)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def __call__(
        self,
        images=None,
        categories=None,
        prompt: str | None = None,
        segmentation_maps=None,
        text=None,
        background=None,
        **kwargs,
    ):
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
            text (`str` or `list[str]`, *optional*): what the model writes a text about the images for, in place of
                categories: a question, or "what does the image describe?" for a caption. One for all images, or one
                per image, or several for one image. Images become squares ([`IFSegImageProcessor.square`]).
            background (`str` or `list[str]`, *optional*): words, for each list of categories, that are merged into one
                label, "background", after the categories: "default" for `background_words`, or a list. Words that are
                categories are left out; if "background" is a category, the words are merged into it. Default: none.
            return_tensors (`str`, *optional*): "pt" for torch tensors, "np" for NumPy arrays; lists by default.
            **kwargs: arguments of the image processor for this call, also as `images_kwargs={...}`.

        Returns:
            [`BatchFeature`] with `pixel_values`, `pixel_mask` and `labels` as the image processor returns them, and
            for categories, with rows = 1 for one list and rows = images for a list of lists:

            - **input_ids**, **attention_mask** (rows, tokens): the prompt, padded at the right.
            - **category_ids**, **category_mask** (rows, categories, sub-words): the sub-words of every category,
              padded. Lists with fewer categories than others of the batch are padded with empty categories (mask 0).
            - **category_groups** (rows, labels, categories), with `background` only: 1 where a category has the label.

            For texts: `pixel_values`, and the texts as **input_ids**, **attention_mask** (rows, tokens), padded.

            Fine names are not returned: word maps take them from the model's configuration ([`encode_categories`]).

        Raises:
            `ValueError` for neither images nor categories nor text, for an empty list, for a name that is empty,
            repeated (also after [`normalize_text`]) or unknown to the tokenizer, for a text, or a prompt with its first
            category, with more tokens than the model has positions, and if the number of lists or texts differs from
            the number of images.
        """
        images_kwargs = kwargs.pop("images_kwargs", {})
        for name in images_kwargs.keys() & kwargs.keys():
            raise ValueError(f"{name} is passed twice: by itself and in images_kwargs.")
        kwargs.update(images_kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        if text is not None:
            given = {"categories": categories, "prompt": prompt, "segmentation_maps": segmentation_maps}
            given["background"] = background
            if extra := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"text is for generation, {', '.join(extra)} for segmentation: give one of them.")
            return BatchFeature(self._text_inputs(images, text, kwargs), tensor_type=return_tensors)
        _check_given(images, categories, background, segmentation_maps, kwargs)
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
            encoder = self._encoder()
            lists = categories if several else [categories]
            data |= encoder.pad([encoder.encode(names, prompt, background) for names in lists])
        return BatchFeature(data, tensor_type=return_tensors)

    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.prompt_template, self.background_words)

    def _text_inputs(self, images, text, kwargs: dict) -> dict:
        """Returns the inputs of text generation, without tensors; see [`__call__`]."""
        kwargs.pop("padding", None)  # rows are always padded to the longest
        if not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text should be a string or a list of strings, not {text!r}.")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("The list of texts is empty: give one text for all images, or one per image.")
        encoder = self._encoder()
        if images is None:
            if kwargs:
                raise ValueError(f"There are no images for {', '.join(kwargs)}.")
            return encoder.pad_texts(texts)
        if sizes := kwargs.keys() & {"do_resize", "size"}:
            raise ValueError(
                f"{', '.join(sorted(sizes))}: images become squares for text generation; set their side in pixels with "
                "processor.image_processor.generation_size."
            )
        squares = self.image_processor.square(images, kwargs.pop("input_data_format", None))
        squares = squares * len(texts) if len(squares) == 1 else squares
        texts = texts * len(squares) if len(texts) == 1 else texts
        if len(squares) != len(texts):
            raise ValueError(
                f"{len(texts)} texts for {len(squares)} images: give one text for all of them, or one text per image."
            )
        pixels = self.image_processor(squares, do_resize=False, input_data_format="channels_last", **kwargs)
        return {"pixel_values": pixels["pixel_values"], **encoder.pad_texts(texts)}

    def encode_categories(
        self, categories, prompt: str | None = None, append_unknown: bool = True, background=None
    ) -> dict:
        """
        Returns the arguments of `set_words`: `model.set_words(**processor.encode_categories(names))`.

        Args:
            categories (`list[str]` or `dict[str, list[str]]`), prompt (`str`, *optional*): as in [`__call__`], one
                list.
            append_unknown (`bool`, defaults to `True`): `False` leaves out the template's text after `{categories}`.
            background (`str` or `list[str]`, *optional*): as in [`__call__`].

        Returns:
            `dict` of lists without padding:

            - **prompt** (`str`): the template. **prompt_ids** (`list[int]`): its tokens with the names of the
              categories filled in (in a hierarchical vocabulary the coarse categories).
            - **category_ids** (`list[list[int]]`): the sub-words of each category.
            - **word_ids** (`list[list[int]]`), **word_categories** (`list[int]`): the sub-words of each fine name and
              the index of its category; `None` unless the vocabulary is hierarchical. With a background: the words
              that word maps are made of, and the index of their labels.
            - **id2label** (`dict[int, str]`): the names.
            - **background** (`list[str]`), **category_labels** (`list[int]`), with a background only: its words, which
              are the last categories, and the label of each category.
        """
        if not append_unknown:
            before, placeholder, _ = complete_template(prompt, self.prompt_template).partition(CATEGORIES)
            prompt = before + placeholder
        return self._encoder().encode(categories, prompt, background)

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


def _check_given(images, categories, background, segmentation_maps, kwargs: dict) -> None:
    """Raises `ValueError` for arguments of [`IFSegProcessor.__call__`] without those that they belong to."""
    if images is None and categories is None:
        raise ValueError("There is nothing to process: give images, categories or both, or images and text.")
    if images is None and (segmentation_maps is not None or kwargs):
        without = ["segmentation_maps"] * (segmentation_maps is not None) + list(kwargs)
        raise ValueError(f"There are no images for {', '.join(without)}.")
    if categories is None and background is not None:
        raise ValueError("background joins words to categories: give categories, too.")


__all__ = ["IFSegProcessor"]
