"""Loading in float32 by default: the base of the models."""

import torch
from transformers import PreTrainedModel


class Float32PreTrainedModel(PreTrainedModel):
    """A model that `from_pretrained` loads in float32 unless another `dtype` is asked for.

    transformers' default is the dtype of the saved weights. Half precision there saves space; training in it, without
    autocast, gives NaN.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a checkpoint, in float32 by default; `dtype="auto"` is the dtype of the saved weights."""
        given = [kwargs.get(name) for name in ("dtype", "torch_dtype", "quantization_config")]
        if all(value is None for value in given):
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


__all__ = ["Float32PreTrainedModel"]
