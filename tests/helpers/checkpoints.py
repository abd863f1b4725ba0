"""The parity kit's weights under this project's names, and a model small enough for any test."""

import torch
from reference_outputs import fixture

from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation, OFAConfig

SMALL = {
    "vocab_size": 120,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "token_bucket_size": 16,
    "image_bucket_size": 8,
    "image_size": 64,
    "trunk_embedding_size": 4,
    "trunk_hidden_sizes": (8, 8, 16),
    "trunk_depths": (1, 1, 1),
}
WORDS = {
    "id2label": {0: "cat", 1: "wet grass", 2: "sky"},
    "category_ids": [[5], [6, 7], [8]],
    "prompt_ids": [0, 9, 10, 5, 6, 7, 8, 2],
    "prompt": "what is it?",
}


IMAGE_SIZES = [(64, 80), (32, 48), (64, 80), (48, 33)]


def our_name(row: dict) -> str | None:
    """What we call a fairseq parameter (a row of the inventory); `None` if it has no place in our models."""
    name = row["fairseq"]
    if "output_projection" in name or "seg_embed_tokens" in name or "seg_projection" in name or "_bag" in name:
        return None
    if name.startswith("decoder.embed_seg_positions"):
        return "backbone.segmentation_positions.embed_positions.weight"
    if name.startswith("decoder.seg_pos_ln"):
        return "backbone.segmentation_positions.layer_norm." + name.rsplit(".", 1)[1]
    if name.startswith("decoder.seg_rel_pos_table_list"):
        return f"backbone.segmentation_positions.rel_pos_tables.{name.split('.')[2]}.weight"
    return "backbone.model." + row["hf"]


def reference_weights(size: str) -> dict[str, torch.Tensor]:
    """The weights behind the segmentation cases."""
    tensors = fixture.checkpoint(size, "fairseq", segmentation=True)
    return {our_name(row): tensors[row["fairseq"]] for row in fixture.inventory(size) if our_name(row)}


def reference_model(size: str, **kwargs) -> IFSegForSemanticSegmentation:
    model = IFSegForSemanticSegmentation(IFSegConfig(backbone_config=OFAConfig.preset(size, **kwargs)))
    model.load_state_dict(reference_weights(size))
    return model.eval()


def small_config(**kwargs) -> IFSegConfig:
    """The configuration of [`small_model`]; keyword arguments replace attributes of the backbone's."""
    return IFSegConfig(backbone_config=OFAConfig(**{**SMALL, **kwargs}))


def small_model(**kwargs) -> IFSegForSemanticSegmentation:
    """A random model of some 24,000 parameters that carries three words."""
    torch.manual_seed(0)
    model = IFSegForSemanticSegmentation(small_config(**kwargs))
    model.set_words(**WORDS)
    return model.eval()


def padded_images() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random images of the sizes IMAGE_SIZES, and the same as a padded batch: pixel_values and pixel_mask."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator) for size in IMAGE_SIZES]
    pixel_values, pixel_mask = torch.zeros(4, 3, 64, 80), torch.zeros(4, 64, 80, dtype=torch.long)
    for i, (height, width) in enumerate(IMAGE_SIZES):
        pixel_values[i, :, :height, :width] = images[i]
        pixel_mask[i, :height, :width] = 1
    return images, pixel_values, pixel_mask
