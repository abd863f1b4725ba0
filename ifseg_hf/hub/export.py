"""A tuned model as an ONNX file for photos of one size, to be run without torch and transformers."""

import json
import logging
from pathlib import Path

import torch

from ifseg_hf.modeling import IFSegForSemanticSegmentation


class PhotoPath(torch.nn.Module):
    """A model with its own words, photos in, and what post-processing needs out."""

    def __init__(self, model: IFSegForSemanticSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.image_features


def export_onnx(model: IFSegForSemanticSegmentation, path: str | Path, height: int = 512, width: int = 512) -> None:
    """Writes an ONNX file of `model` with its own words, for one photo of `height` x `width` at a time.

    Its input is `pixel_values` (1, 3, height, width), as the processor returns it; its outputs are `logits` (1, N, h,
    w) and `image_features` (1, channels, h, w), one column a patch. The names of the N categories are in its metadata,
    as `id2label` in JSON. Weights of more than 2 GB lie beside it in `<path>.data`.

    Raises:
        `ValueError`: the model carries no words, or the size is less than a pixel.
        `ImportError`: onnxscript is not installed (`pip install "ifseg-hf[onnx]"`).
    """
    if model.config.category_ids is None:
        raise ValueError("The model carries no words: tune it on some, or model.set_words(...) first.")
    if min(height, width) < 1:
        raise ValueError(f"A photo of {height} x {width} has no pixels.")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('Writing ONNX files needs another package: pip install "ifseg-hf[onnx]"') from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells that torchvision is not installed
    photo = torch.zeros(1, 3, height, width, dtype=model.dtype, device=model.device)
    training, kernel = model.training, model.config._attn_implementation
    model.set_attn_implementation("eager")  # ONNX has no sdpa, and torch's decomposition of it fails on what follows
    try:
        program = torch.onnx.export(
            PhotoPath(model).eval(),
            (photo,),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=["logits", "image_features"],
        )
    finally:
        model.set_attn_implementation(kernel)
        model.train(training)
    program.model.metadata_props["id2label"] = json.dumps(model.config.id2label, ensure_ascii=False)
    program.save(str(path))


__all__ = ["export_onnx"]
