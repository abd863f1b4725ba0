"""Segmenter: a model and its processor, from images and words to label maps."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import BatchFeature

from .post_processing_ifseg import patch_scores
from .prompt_ifseg import PromptEncoder, complete_template
from .sliding_window_ifseg import sliding_window_outputs

INFERENCE = ("whole", "slide")


class IFSegSegmenter:
    """
    Wraps a model and its processor, and segments images into the categories named by words.

    ```python
    segmenter = IFSegSegmenter(model, processor)
    segmenter.set_words(["cat", "grass"])
    (labels,) = segmenter.segment([image])
    ```

    Args:
        model ([`IFSegForSemanticSegmentation`]): is put into evaluation mode.
        processor ([`IFSegProcessor`]): or another object with its `image_processor`, `tokenizer` and
            `prompt_template`, such as [`IFSegImageSegmentationPipeline`].
        inference (`str`, *optional*): "whole" segments an image in one pass, "slide" in overlapping square crops whose
            outputs are averaged. Default: "slide" if the image processor has a `sliding_window`, as for models trained
            on crops.
        device (`torch.device`, *optional*): device of the inputs. Default: the model's device.
        untuned (`bool`, defaults to `False`): also segment with a model that was never tuned, such as the paper's
            baseline OFA. Otherwise such a model is refused: its masks look as if they meant something.
    """

    def __init__(
        self,
        model,
        processor,
        inference: str | None = None,
        device: str | torch.device | None = None,
        untuned: bool = False,
    ):
        if inference not in (None, *INFERENCE):
            raise ValueError(f'inference="{inference}": choose "whole" or "slide".')
        if model.training:
            model.eval()
        self.model, self.processor, self.image_processor = model, processor, processor.image_processor
        self.inference = inference or ("slide" if self.image_processor.sliding_window else "whole")
        self._device, self.untuned = device, untuned

    @property
    def device(self) -> torch.device:
        return self.model.device if self._device is None else torch.device(self._device)

    @property
    def smoothing(self) -> tuple[int, int]:
        """The image processor's neighbours and iterations of the smoothing; 0 iterations for none."""
        return self.image_processor.smoothing()

    @property
    def background(self) -> list[str] | None:
        """The model's background words, which have one label; `None` without any."""
        return self.model.config.background

    @property
    def _encoder(self) -> PromptEncoder:
        template = complete_template(self.model.config.prompt, self.processor.prompt_template)
        return PromptEncoder(self.processor.tokenizer, template, self.processor.background_words)

    # Words ------------------------------------------------------------------------------------------------------------

    def check_tuned(self) -> None:
        """Raises `ValueError` if the model was never tuned, unless the segmenter was created with `untuned`."""
        # An adapter's configuration is that of the model before tuning.
        if not (self.untuned or self.model.config.is_tuned or getattr(self.model, "peft_config", None)):
            raise ValueError(
                "This model was never tuned on words, so its masks would mean nothing. Tune it first, for example "
                'with `ifseg tune "cat, grass" --model MODEL --output-dir tuned`, or pass untuned=True (--untuned) to '
                "segment without tuning."
            )

    def load_adapter(self, adapter: str, name: str = "default") -> None:
        """
        Loads an adapter with its words and makes it the active one; the weights of the model are not copied.

        Args:
            adapter: folder or Hub id of an adapter of this model.
            name: for the argument `adapter` of a call.

        Raises:
            `ImportError` without peft; `ValueError` for an adapter of another model, or a name that is taken.
        """
        self.model.load_adapter(str(adapter), name)

    def using_adapter(self, name: str | None) -> AbstractContextManager:
        """Makes an adapter the active one inside of a `with` block; `None` changes nothing."""
        return nullcontext() if name is None else self.model.use_adapter(name)

    def check_words(self) -> None:
        """Raises `ValueError` if the model has no words from tuning or [`set_words`], or as [`check_tuned`] does."""
        self.check_tuned()
        if self.model.config.category_ids is None:
            raise ValueError('This model has no words yet: pass some, as in categories=["cat", "grass"].')

    def encode_words(self, categories=None, prompt: str | None = None, background=None) -> dict:
        """
        Returns the arguments of the model's `set_words`; see [`IFSegProcessor.encode_categories`].

        Args:
            categories (`list[str]` or `dict[str, list[str]]`, *optional*): names, or fine names by coarse category.
                Default: the model's own categories.
            prompt (`str`, *optional*): a template with `{categories}`, or a question before the names. Default: the
                prompt in the model's configuration, or else the processor's template.
            background (`str` or `list[str]`, *optional*): words that are merged into one label; see [`IFSegProcessor`].
                Default: the model's own with its own categories, or none with other `categories`.

        Raises:
            `ValueError` without a tokenizer, if neither the model nor the caller has categories, and for a model that
            was never tuned; see [`check_tuned`].
        """
        self.check_tuned()
        if self.processor.tokenizer is None:
            raise ValueError("Other words need a tokenizer, and there is none: pass tokenizer=...")
        config = self.model.config
        if categories is None:
            self.check_words()
            count = len(config.category_ids) - len(config.background or [])
            categories = [config.id2label[index] for index in range(count)]
            background = config.background if background is None else background
        return self._encoder.encode(categories, prompt, background)

    def set_words(self, categories=None, prompt: str | None = None, background=None) -> None:
        """Stores words in the model's configuration; arguments and defaults as in [`encode_words`]."""
        self.model.set_words(**self.encode_words(categories, prompt, background))

    def word_inputs(self, words: dict) -> dict[str, Tensor]:
        """Returns the result of [`encode_words`] as inputs of the model, tensors with a first dimension of 1."""
        padded = self._encoder.pad([words])
        return dict(BatchFeature(padded, tensor_type="pt"))

    # Images -----------------------------------------------------------------------------------------------------------

    def preprocess(self, images: list[np.ndarray]) -> BatchFeature:
        """Returns `pixel_values` and `pixel_mask` of RGB images, uint8 arrays (H, W, 3) of any sizes."""
        return self.image_processor(images, input_data_format="channels_last", return_tensors="pt")

    @torch.no_grad()
    def __call__(
        self, inputs: Mapping[str, Tensor], words: Mapping[str, Tensor] | None = None, adapter: str | None = None
    ):
        """
        Returns the model's outputs: `logits`, `image_features` and `patch_mask`.

        Args:
            inputs: `pixel_values` (batch, 3, H, W) and `pixel_mask` (batch, H, W), on any device.
            words (*optional*): result of [`word_inputs`], in place of the model's own words.
            adapter (`str`, *optional*): name of the adapter to use for this call, with its words. Default: the active
                one. One model must not be called by several threads at once.
        """
        with self.using_adapter(adapter):
            if words is None:
                self.check_words()
            self.check_tuned()
            inputs = {name: tensor.to(self.device) for name, tensor in {**inputs, **(words or {})}.items()}
            if self.inference == "whole":
                return self.model(**inputs)
            return sliding_window_outputs(self.model, **inputs, crop=self.image_processor.sliding_window)

    def patch_scores(self, outputs, neighbors: int | None = None, iterations: int | None = None) -> Iterator[Tensor]:
        """
        Yields the scores of each image's patches, (categories, h, w): probabilities, or logits without smoothing.

        Args:
            outputs: result of calling the segmenter.
            neighbors, iterations (`int`, *optional*): of the smoothing. Default: [`smoothing`].
        """
        return patch_scores(outputs, *self.image_processor.smoothing(neighbors, iterations))

    def segment(
        self,
        images: list[np.ndarray],
        neighbors: int | None = None,
        iterations: int | None = None,
        crf: bool = False,
        threshold: float | None = None,
        adapter: str | None = None,
    ) -> list[Tensor]:
        """
        Returns label maps, int64 tensors (H, W) of indices of categories.

        Args:
            images: uint8 RGB arrays (H, W, 3) of any sizes.
            neighbors, iterations (`int`, *optional*): of the smoothing. Default: [`smoothing`].
            crf (`bool`, defaults to `False`): fit the label maps to the colours of the images; see [`dense_crf`].
            threshold (`float`, *optional*): pixels whose category has a lower probability get -1; see
                [`IFSegImageProcessor.post_process_semantic_segmentation`].
            adapter (`str`, *optional*): name of the adapter to use for this call, with its words.
        """
        outputs = self(self.preprocess(images), adapter=adapter)
        sizes = [image.shape[:2] for image in images]
        fitted = {"crf": True, "images": images} if crf else {}
        return self.image_processor.post_process_semantic_segmentation(
            outputs, sizes, neighbors, iterations, threshold=threshold, **fitted
        )


__all__ = ["INFERENCE", "IFSegSegmenter"]
