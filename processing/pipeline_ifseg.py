"""`pipeline("image-segmentation", ...)` for IFSeg, with other words at call time, smoothing, and mask scores."""

import copy
import difflib
import os

import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import ImageSegmentationPipeline
from transformers.utils import ModelOutput

from .background_ifseg import BACKGROUND_WORDS
from .image_reading_ifseg import read_image
from .post_processing_ifseg import NO_CATEGORY, check_threshold, patch_labels, resize_scores
from .prompt_ifseg import PROMPT_TEMPLATE
from .segmenter_ifseg import IFSegSegmenter

PREPROCESS = ("do_rescale", "timeout")
POSTPROCESS = ("smoothing_neighbors", "smoothing_iterations", "threshold")
ARGUMENTS = (
    *PREPROCESS,
    *POSTPROCESS,
    "categories",
    "prompt",
    "background",
    "inference",
    "untuned",
    "adapter",
    "subtask",
)


class IFSegImageSegmentationPipeline(ImageSegmentationPipeline):
    r"""
    Image segmentation with words.

    ```python
    pipe = pipeline("image-segmentation", model="path/or/name")
    pipe("image.jpg")                                   # the words that the model was tuned on
    pipe("image.jpg", categories=["cat", "sofa"])       # other words
    ```

    This class is registered for the task. For models other than IFSeg it creates an [`ImageSegmentationPipeline`].
    """

    _load_processor = None  # optional; it has the prompt template

    def __new__(cls, model=None, *args, **kwargs):
        if getattr(getattr(model, "config", None), "model_type", "ifseg") != "ifseg":
            return ImageSegmentationPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def check_model_type(self, supported_models):
        """Skips transformers' check, which accepts only model classes of transformers itself."""

    def __call__(self, inputs=None, **kwargs):
        """
        Args:
            inputs: an image or a list of images: paths, URLs, PIL images, arrays or tensors of any sizes. A dataset or
                generator is read lazily, `batch_size` images at a time.
            categories (`list[str]` or `dict[str, list[str]]`, *optional*): the words to choose from, instead of those
                in the model's configuration.
            prompt (`str`, *optional*): a template with `{categories}` or the question before the words, instead of the
                prompt in the configuration.
            background (`str` or `list[str]`, *optional*): words that are merged into one label, "background"; see
                [`IFSegProcessor`]. Default: those that the model was tuned on, or none for other `categories`.
            smoothing_neighbors (`int`, *optional*), smoothing_iterations (`int`, *optional*): see
                [`IFSegImageProcessor.post_process_semantic_segmentation`]. 0 iterations do not smooth.
            threshold (`float`, *optional*): a probability from 0 to 1; pixels whose category has a lower one are in no
                mask. Default: every pixel is in a mask.
            inference (`str`, *optional*): "whole" images or "slide" for overlapping square crops; see
                [`IFSegSegmenter`].
            do_rescale (`bool`, *optional*): `False` for an image whose values are floats from 0 to 1.
            untuned (`bool`, *optional*): also segment with a model that was never tuned, which is refused otherwise.
            adapter (`str`, *optional*): name of the adapter to use, with its words; see [`load_adapter`].
            subtask (`str`, *optional*): only "semantic" is supported.
            timeout (`float`, *optional*): seconds to wait for a URL.

        Returns:
            `list[dict]`, or a list of such lists for several images: one dict for each category that wins a pixel,

            - **label** (`str`): the category.
            - **score** (`float`): mean probability of the category over its mask.
            - **mask** (`PIL.Image.Image` of the image's size, mode "L"): 255 where the category wins.

        Raises:
            `TypeError`: an argument is unknown.
        """
        inputs = kwargs.pop("images", inputs)
        if isinstance(inputs, list) and not inputs:  # of which transformers reads the first
            return []
        return super().__call__(inputs, **kwargs)

    @property
    def prompt_template(self) -> str:
        """The processor's template for models whose configuration has no prompt."""
        return getattr(self.processor, "prompt_template", PROMPT_TEMPLATE)

    @property
    def background_words(self) -> list[str]:
        """The processor's words of `background="default"`."""
        return getattr(self.processor, "background_words", list(BACKGROUND_WORDS))

    def load_adapter(self, adapter: str, name: str = "default") -> None:
        """
        Loads an adapter, such as one of `ifseg tune --lora`, with its words; see [`IFSegSegmenter.load_adapter`].

        ```python
        pipe.load_adapter("me/street-words", "street")
        pipe("image.jpg", adapter="street")
        ```
        """
        self._segmenter().load_adapter(adapter, name)

    def _segmenter(self, inference: str | None = None, untuned: bool = False) -> IFSegSegmenter:
        """Returns a new segmenter, because `model` and `image_processor` may have been replaced since the last call."""
        return IFSegSegmenter(self.model, self, inference, self.device, untuned)

    def _sanitize_parameters(self, **kwargs):
        for name in kwargs.keys() - set(ARGUMENTS):
            close = difflib.get_close_matches(name, ARGUMENTS, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"The arguments are {', '.join(ARGUMENTS)}."
            raise TypeError(f"The IFSeg pipeline got an unexpected keyword argument '{name}'. {hint}")
        check_threshold(kwargs.get("threshold"))
        preprocess = {name: kwargs[name] for name in PREPROCESS if name in kwargs}
        forward = {}
        postprocess = {name: kwargs[name] for name in POSTPROCESS if name in kwargs}
        if kwargs.get("subtask") not in (None, "semantic"):
            raise ValueError(f'subtask="{kwargs["subtask"]}": IFSeg predicts semantic masks only.')
        if kwargs.get("inference") is not None:
            forward["inference"] = self._segmenter(kwargs["inference"]).inference
        untuned = kwargs.get("untuned")
        if untuned is not None:
            forward["untuned"] = untuned
        else:  # as it was given when the pipeline was created
            untuned = getattr(self, "_forward_params", {}).get("untuned", False)
        adapter = kwargs.get("adapter", getattr(self, "_forward_params", {}).get("adapter"))
        given = {name: kwargs.get(name) for name in ("categories", "prompt", "background")}
        segmenter = self._segmenter(untuned=untuned)
        with segmenter.using_adapter(adapter):
            if any(value is not None for value in given.values()):
                words = segmenter.encode_words(**given)
                forward["words"], postprocess["labels"] = segmenter.word_inputs(words), words["id2label"]
            elif kwargs.get("adapter") is not None:
                forward["words"], postprocess["labels"] = None, dict(self.model.config.id2label)
        if adapter is not None:
            forward["adapter"] = adapter
        return preprocess, forward, postprocess

    def preprocess(self, image, timeout: float | None = None, do_rescale: bool | None = None) -> dict:
        if isinstance(image, (str, os.PathLike)):
            image = read_image(image, timeout)
        image = self.image_processor.process_image(image)
        rescale = {} if do_rescale is None else {"do_rescale": do_rescale}
        inputs = self.image_processor(image, input_data_format="channels_first", return_tensors="pt", **rescale)
        inputs = inputs.to(self.dtype)
        # In a list, because transformers cannot collate images of several sizes; _forward pads them.
        return {"images": [inputs], "target_size": [image.shape[1:]]}

    def _forward(
        self,
        model_inputs: dict,
        words: dict[str, torch.Tensor] | None = None,
        inference: str | None = None,
        untuned: bool = False,
        adapter: str | None = None,
    ) -> ModelOutput:
        outputs = self._segmenter(inference, untuned)(_pad_batch(model_inputs["images"]), words, adapter)
        needed = {name: outputs[name] for name in ("logits", "image_features", "patch_mask")}
        return ModelOutput({**needed, "target_size": model_inputs["target_size"]})

    def postprocess(
        self,
        model_outputs: ModelOutput,
        labels: dict[int, str] | None = None,
        smoothing_neighbors: int | None = None,
        smoothing_iterations: int | None = None,
        threshold: float | None = None,
    ) -> list[dict]:
        (size,) = model_outputs.target_size
        labels = self.model.config.id2label if labels is None else labels
        neighbors, iterations = self.image_processor.smoothing(smoothing_neighbors, smoothing_iterations)
        (scores,) = self._segmenter().patch_scores(model_outputs, neighbors, iterations)
        segmentation = patch_labels(scores, size, bool(iterations), threshold)
        probabilities = scores if iterations else scores.softmax(0)
        segments = []
        for category in segmentation.unique().tolist():
            if category == NO_CATEGORY:
                continue
            mask = segmentation == category
            score = resize_scores(probabilities[category, None], size)[0, mask].mean().item()
            image = Image.fromarray(mask.to(torch.uint8).mul(255).numpy())
            segments.append({"score": score, "label": labels[category], "mask": image})
        return segments

    def save_pretrained(self, save_directory, **kwargs):
        """Saves model, processor and the code of this pipeline."""
        super().save_pretrained(save_directory, **kwargs)
        if self.processor is not None:
            processor = copy.copy(self.processor)
            processor.image_processor, processor.tokenizer = self.image_processor, self.tokenizer
            processor.save_pretrained(save_directory)


def _pad_batch(images: list) -> dict[str, torch.Tensor]:
    """Joins one-image batches into one batch, padded at the right and bottom; lists may be nested once."""
    images = [image for item in images for image in (item if isinstance(item, list) else [item])]
    height, width = (max(image["pixel_mask"].shape[axis] for image in images) for axis in (1, 2))

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]))

    return {name: torch.cat([padded(image[name]) for image in images]) for name in ("pixel_values", "pixel_mask")}


__all__ = ["IFSegImageSegmentationPipeline"]
