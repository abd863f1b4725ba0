"""`pipeline("image-segmentation", ...)` for IFSeg: any words at call time, smoothing, a score for every mask."""

import os

import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import ImageSegmentationPipeline
from transformers.utils import ModelOutput

from .image_processing_ifseg import read_image
from .post_processing_ifseg import patch_scores, resize_scores, resized_argmax
from .processing_ifseg import IFSegProcessor
from .sliding_window_ifseg import sliding_window_outputs


class IFSegImageSegmentationPipeline(ImageSegmentationPipeline):
    r"""
    Image segmentation with words.

    ```python
    pipe = pipeline("image-segmentation", model="path/or/name")
    pipe("photo.jpg")                                   # the words the model was tuned for
    pipe("photo.jpg", categories=["cat", "sofa"])       # any others
    ```

    Registered for the task in place of [`ImageSegmentationPipeline`] it leaves other models to that class.
    """

    def __new__(cls, model=None, *args, **kwargs):
        if getattr(getattr(model, "config", None), "model_type", "ifseg") != "ifseg":
            return ImageSegmentationPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def check_model_type(self, supported_models):
        """Nothing to check: transformers compares with the names of the classes in its own package."""

    def __call__(self, inputs=None, **kwargs):
        """
        Args:
            inputs: a photo or a list of them: paths, URLs, PIL images, arrays or tensors. A dataset or generator is
                consumed lazily, `batch_size` photos at a time, of any sizes.
            categories (`list[str]` or `dict[str, list[str]]`, *optional*): the words to choose from, instead of those
                in the model's configuration.
            prompt (`str`, *optional*): the question before the words, instead of the one in the configuration.
            smoothing_neighbors (`int`, *optional*), smoothing_iterations (`int`, *optional*): see
                [`IFSegImageProcessor.post_process_semantic_segmentation`]. 0 iterations do not smooth.
            inference (`str`, *optional*): "whole" takes a photo at once, "slide" in overlapping square crops, averaged.
                Default: "slide" for a model that was trained on crops, as its image processor knows.
            subtask (`str`, *optional*): only "semantic" exists.
            timeout (`float`, *optional*): seconds to wait for a URL.

        Returns:
            `list[dict]`, or a list of such lists for several photos: one dict for each category that wins a pixel,

            - **label** (`str`): the category.
            - **score** (`float`): mean probability of the category over its mask.
            - **mask** (`PIL.Image.Image` of the photo's size, mode "L"): 255 where the category wins.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        preprocess = {"timeout": kwargs["timeout"]} if "timeout" in kwargs else {}
        forward = {}
        postprocess = {key: kwargs[key] for key in ("smoothing_neighbors", "smoothing_iterations") if key in kwargs}
        if kwargs.get("subtask") not in (None, "semantic"):
            raise ValueError(f'subtask="{kwargs["subtask"]}": IFSeg predicts semantic masks only.')
        if kwargs.get("inference") is not None:
            if kwargs["inference"] not in ("whole", "slide"):
                raise ValueError(f'inference="{kwargs["inference"]}": choose "whole" or "slide".')
            forward["inference"] = kwargs["inference"]
        if kwargs.get("categories") is not None or kwargs.get("prompt") is not None:
            forward["words"], postprocess["labels"] = self._words(kwargs.get("categories"), kwargs.get("prompt"))
        return preprocess, forward, postprocess

    def _words(self, categories, prompt: str | None) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
        """The model's inputs for other words than those in its configuration, and the names of the categories."""
        if self.tokenizer is None:
            raise ValueError("Other words need a tokenizer, and this pipeline has none: pass it tokenizer=...")
        config, processor = self.model.config, IFSegProcessor(self.image_processor, self.tokenizer)
        if categories is None:
            self._check_words()
            categories = [config.id2label[index] for index in range(len(config.category_ids))]
        prompt = config.prompt if prompt is None else prompt
        append_unknown = config.prompt_ids is None or processor.ends_with_unknown(config.prompt_ids)
        inputs = processor(categories=categories, prompt=prompt, append_unknown=append_unknown, return_tensors="pt")
        return dict(inputs), processor.encode_categories(categories, prompt, append_unknown)["id2label"]

    def _check_words(self):
        if self.model.config.category_ids is None:
            raise ValueError('This model has no words of its own yet: pass some, as in categories=["cat", "grass"].')

    def preprocess(self, image, timeout: float | None = None) -> dict:
        if isinstance(image, (str, os.PathLike)):
            image = read_image(image, timeout)
        photo = self.image_processor.process_image(image)
        inputs = self.image_processor(photo, input_data_format="channels_first", return_tensors="pt").to(self.dtype)
        # In a list, because transformers' collation would refuse photos of several sizes; _forward pads them.
        return {"photos": [inputs], "target_size": [photo.shape[1:]]}

    def _forward(
        self, model_inputs: dict, words: dict[str, torch.Tensor] | None = None, inference: str | None = None
    ) -> ModelOutput:
        if words is None:
            self._check_words()
        words = {name: tensor.to(self.device) for name, tensor in (words or {}).items()}
        photos, crop = _join(model_inputs["photos"]), self.image_processor.sliding_window
        if inference == "slide" or (inference is None and crop):
            outputs = sliding_window_outputs(self.model, **photos, crop=crop, **words)
        else:
            outputs = self.model(**photos, **words)
        needed = {name: outputs[name] for name in ("logits", "image_features", "patch_mask")}
        return ModelOutput({**needed, "target_size": model_inputs["target_size"]})

    def postprocess(
        self,
        model_outputs: ModelOutput,
        labels: dict[int, str] | None = None,
        smoothing_neighbors: int | None = None,
        smoothing_iterations: int | None = None,
    ) -> list[dict]:
        (size,) = model_outputs.target_size
        labels = self.model.config.id2label if labels is None else labels
        own = self.image_processor
        neighbors = own.smoothing_neighbors if smoothing_neighbors is None else smoothing_neighbors
        iterations = own.smoothing_iterations if smoothing_iterations is None else smoothing_iterations
        (scores,) = patch_scores(model_outputs, neighbors, iterations)
        segmentation = resized_argmax(scores, size)
        probabilities = scores if iterations else scores.softmax(0)
        segments = []
        for category in segmentation.unique().tolist():
            mask = segmentation == category
            score = resize_scores(probabilities[category, None], size)[0, mask].mean().item()
            image = Image.fromarray(mask.to(torch.uint8).mul(255).numpy())
            segments.append({"score": score, "label": labels[category], "mask": image})
        return segments

    def save_pretrained(self, save_directory, **kwargs):
        """Saves model, processor and the code of this pipeline."""
        super().save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            IFSegProcessor(self.image_processor, self.tokenizer).save_pretrained(save_directory)


def _join(photos: list) -> dict[str, torch.Tensor]:
    """One batch from batches of one photo each, padded at the right and bottom; the list may be one of lists."""
    photos = [photo for item in photos for photo in (item if isinstance(item, list) else [item])]
    height, width = (max(photo["pixel_mask"].shape[axis] for photo in photos) for axis in (1, 2))

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]))

    return {name: torch.cat([padded(photo[name]) for photo in photos]) for name in ("pixel_values", "pixel_mask")}


__all__ = ["IFSegImageSegmentationPipeline"]
