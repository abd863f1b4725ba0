"""Export of a trained model to ONNX, to run it without torch and transformers."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from ifseg_hf.modeling import IFSegForSemanticSegmentation
from ifseg_hf.modeling.backbone_ofa import OFABackbone
from ifseg_hf.modeling.trunk_ofa import OFASameConv2d


class ImageToLogits(torch.nn.Module):
    """Wraps a model with categories: from `pixel_values` to the two outputs that post-processing needs."""

    def __init__(self, model: IFSegForSemanticSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.image_features


class OnnxSameConv2d(OFASameConv2d):
    """The convolution as ONNX's, which pads images of every size itself; in torch it returns no values."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = [hidden_states, self.weight] + ([] if self.bias is None else [self.bias])
        attributes = {
            "auto_pad": "SAME_UPPER",
            "kernel_shape": list(self.kernel_size),
            "strides": list(self.stride),
            "dilations": list(self.dilation),
            "group": self.groups,
        }
        sizes = [(side - 1) // stride + 1 for side, stride in zip(hidden_states.shape[2:], self.stride, strict=True)]
        shape = (hidden_states.shape[0], self.out_channels, *sizes)
        return torch.onnx.ops.symbolic("Conv", inputs, attributes, dtype=hidden_states.dtype, shape=shape)


@contextmanager
def exportable(model: IFSegForSemanticSegmentation) -> Iterator[ImageToLogits]:
    """Context in which the model has only operations that ONNX has, and is in evaluation mode."""
    training, kernel = model.training, model.config._attn_implementation
    convolutions = [module for module in model.modules() if type(module) is OFASameConv2d]
    model.set_attn_implementation("eager")  # ONNX has no sdpa, and torch's decomposition of it cannot be exported
    for convolution in convolutions:
        convolution.__class__ = OnnxSameConv2d
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter about its own code
            yield ImageToLogits(model).eval()
    finally:
        for convolution in convolutions:
            convolution.__class__ = OFASameConv2d
        model.set_attn_implementation(kernel)
        model.train(training)


def export_onnx(
    model: IFSegForSemanticSegmentation, path: str | Path, height: int | None = None, width: int | None = None
) -> None:
    """Writes an ONNX file of `model` with its categories, for batches of images of any size.

    The input is `pixel_values` of shape `(batch, 3, height, width)`, as the processor returns it. The outputs are
    `logits` of shape `(batch, categories, h, w)` and `image_features` of shape `(batch, channels, h, w)`, where `h` and
    `w` count patches. The file's metadata has, in JSON, the names of the labels as `id2label` and, if there are any,
    the words that are merged into the label "background" as `background`. Weights of more than 2 GB are written to
    `<path>.data`.

    Args:
        height, width: the size in pixels, for a file for images of one size, which is faster to write and to run. Other
            backbones than OFA need it.

    Raises:
        `ValueError`: the model has no categories, height or width is less than 1, or only one of them is given, or none
            for another backbone than OFA.
        `ImportError`: onnxscript is not installed (`pip install "ifseg-hf[onnx]"`).
    """
    if model.config.category_ids is None:
        raise ValueError("The model has no categories: train it on some, or call model.set_words(...) first.")
    sides = (height, width)
    if (height is None) != (width is None):
        raise ValueError(
            f"height={height}, width={width}: give both, for images of one size, or neither, for any size."
        )
    if height is None and not isinstance(model.backbone, OFABackbone):
        raise ValueError(
            f"height=None, width=None: give both. A model with the backbone {model.backbone.config.model_type} can be "
            "exported for images of one size only."
        )
    if any(side is not None and side < 1 for side in sides):
        raise ValueError(f"height={height}, width={width}: both must be at least 1.")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('Writing ONNX files needs the package onnxscript: pip install "ifseg-hf[onnx]"') from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    names: dict[int, str] = {0: "batch"}
    dimensions: dict[int, Any] = {0: Dim("batch")}
    if height is None:
        patch = model.config.patch_size
        sides = (4 * patch + 1, 6 * patch - 1)
        names |= {2: "height", 3: "width"}
        # of a side of one patch, and of a batch of one image, torch would make constants
        dimensions |= {axis: Dim(names[axis], min=patch + 1) for axis in (2, 3)}
    images = torch.zeros(2, 3, *sides, dtype=model.dtype, device=model.device)
    with exportable(model) as module:
        # Given a module, torch.onnx.export would try several slow exporters where this one fails. Without the last
        # argument, torch refuses sizes where it cannot derive that the shapes of all operations fit.
        exported = torch.export.export(
            module,
            (images,),
            dynamic_shapes={"pixel_values": dimensions},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            dynamic_shapes={"pixel_values": names},
            verbose=False,
            input_names=["pixel_values"],
            output_names=["logits", "image_features"],
        )
    program.model.metadata_props["id2label"] = json.dumps(model.config.id2label, ensure_ascii=False)
    if model.config.background is not None:
        program.model.metadata_props["background"] = json.dumps(model.config.background, ensure_ascii=False)
    program.save(str(path))


__all__ = ["ImageToLogits", "OnnxSameConv2d", "export_onnx"]
