"""Export of a trained model to ONNX, to run it without torch and transformers.

The number of images is free, but their size is part of the file: the biases of the attention are computed from the
position tables for one grid of patches, with as many operations as the grid has rows.
"""

import json
import logging
from pathlib import Path

import torch

from ifseg_hf.modeling import IFSegForSemanticSegmentation


class ImageToLogits(torch.nn.Module):
    """Wraps a model with categories: from `pixel_values` to the two outputs that post-processing needs."""

    def __init__(self, model: IFSegForSemanticSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.image_features


def export_onnx(model: IFSegForSemanticSegmentation, path: str | Path, height: int = 512, width: int = 512) -> None:
    """Writes an ONNX file of `model` with its categories, for batches of images of `height` x `width` pixels.

    The input is `pixel_values` of shape `(batch, 3, height, width)`, as the processor returns it. The outputs are
    `logits` of shape `(batch, categories, h, w)` and `image_features` of shape `(batch, channels, h, w)`, where `h` and
    `w` count patches. Each size of images needs a file. The file's metadata has, in JSON, the names of the labels as
    `id2label` and, if there are any, the words that are merged into the label "background" as `background`. Weights of
    more than 2 GB are written to `<path>.data`.

    Raises:
        `ValueError`: the model has no categories, or height or width is less than 1.
        `ImportError`: onnxscript is not installed (`pip install "ifseg-hf[onnx]"`).
    """
    if model.config.category_ids is None:
        raise ValueError("The model has no categories: train it on some, or call model.set_words(...) first.")
    if min(height, width) < 1:
        raise ValueError(f"height={height}, width={width}: both must be at least 1.")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('Writing ONNX files needs the package onnxscript: pip install "ifseg-hf[onnx]"') from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    images = torch.zeros(2, 3, height, width, dtype=model.dtype, device=model.device)  # of 1, torch makes a constant
    training, kernel = model.training, model.config._attn_implementation
    model.set_attn_implementation("eager")  # ONNX has no sdpa, and torch's decomposition of it cannot be exported
    try:
        program = torch.onnx.export(
            ImageToLogits(model).eval(),
            (images,),
            dynamo=True,
            dynamic_shapes={"pixel_values": {0: "batch"}},
            verbose=False,
            input_names=["pixel_values"],
            output_names=["logits", "image_features"],
        )
    finally:
        model.set_attn_implementation(kernel)
        model.train(training)
    program.model.metadata_props["id2label"] = json.dumps(model.config.id2label, ensure_ascii=False)
    if model.config.background is not None:
        program.model.metadata_props["background"] = json.dumps(model.config.background, ensure_ascii=False)
    program.save(str(path))


__all__ = ["ImageToLogits", "export_onnx"]
