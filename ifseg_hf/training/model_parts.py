"""Parts of an OFA that training freezes, initialises and regularises, by their names in the model."""

from torch import nn

from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation

__all__ = ["freeze", "image_trunk", "rates"]


def image_trunk(model: IFSegForSemanticSegmentation) -> nn.Module:
    """The module from pixels to image features."""
    return model.model.encoder.embed_images


def freeze(model: IFSegForSemanticSegmentation, part: str) -> None:
    """Freezes a part of what segmentation uses, and everything that segmentation does not use.

    Args:
        part: "nothing", "words" (their embeddings) or "trunk" (the words, the image trunk and its projection).
    """
    model.freeze_for_word_maps()
    if part != "trunk":
        image_trunk(model).requires_grad_(True)  # its batch norms still use their stored statistics
        model.model.encoder.image_proj.requires_grad_(True)
    if part == "nothing":
        model.get_input_embeddings().requires_grad_(True)


def rates(dropout: float, drop_path: float, word_noise: float) -> dict[str, float]:
    """The configuration of dropout, stochastic depth and noise on word maps, as arguments for `from_pretrained`."""
    return {
        "dropout": dropout,
        "word_noise": word_noise,
        "encoder_drop_path_rate": drop_path,
        "decoder_drop_path_rate": drop_path,
    }
