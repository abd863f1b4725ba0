"""Florence-2 as a backbone of IFSeg: DaViT sees the image, BART reads image and prompt and decodes the patches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, Florence2Config, Florence2Model
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from .backbone import IFSegBackbone
from .configuration_ifseg import IFSegConfig
from .modeling_ifseg import IFSegForSemanticSegmentation


class Florence2SegmentationConfig(Florence2Config):
    r"""
    Configuration of Florence-2 with the attributes of a backbone; `from_pretrained` reads a published Florence-2, too.

    Args:
        image_size (`int`, defaults to 512): side of a square image; word maps have its patch grid.
        patch_size (`int`, *optional*): side of a patch in pixels, the product of the strides of `vision_config`.
        **kwargs: of [`Florence2Config`].

    `vocab_size`, `pad_token_id` and `dropout` are those of `text_config`, `drop_path_rate` is that of `vision_config`.
    """

    model_type = "florence2_segmentation"
    base_config_key = "backbone_config"

    image_size: int = 512
    patch_size: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.patch_size = math.prod(self.vision_config.patch_stride)
        self.pad_token_id = self.text_config.pad_token_id

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Reads the configuration of this class, or of a published Florence-2."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == Florence2Config.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int):
        self.text_config.vocab_size = value

    @property
    def dropout(self) -> float:
        """Dropout rate of BART's encoder and decoder."""
        return self.text_config.dropout

    @dropout.setter
    def dropout(self, value: float):
        self.text_config.dropout = value

    @property
    def drop_path_rate(self) -> float:
        """Stochastic depth of DaViT."""
        return self.vision_config.drop_path_rate

    @drop_path_rate.setter
    def drop_path_rate(self, value: float):
        self.vision_config.drop_path_rate = value


@dataclass
class Florence2EncoderOutput(BaseModelOutput):
    """
    Args:
        last_hidden_state: (batch, h * w + 1 + tokens, d): the patches row by row, the mean of the image, the prompt.
        image_features: (batch, channels, h, w), outputs of DaViT; `None` for an artificial image.
        attention_mask: (batch, h * w + 1 + tokens), 1 where the decoder attends to, or `None` for everywhere.
        num_patches: h * w.
    """

    image_features: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    num_patches: int | None = None


class Florence2Backbone(IFSegBackbone):
    """
    Florence-2, whose encoder reads image and prompt and whose decoder reads `</s>` and the encoded patches in one pass.

    Differences from OFA: an image is followed by one token more, the mean of its patches; the positions of patches are
    added before the projection to BART's width, so that words on an artificial image have the positions of a sequence
    alone; and the decoder has no positions but those.
    """

    config: Florence2SegmentationConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: Florence2SegmentationConfig):
        super().__init__(config)
        grid, rest = divmod(config.image_size, config.patch_size)
        if rest:
            raise ValueError(f"image_size={config.image_size} is not a multiple of the patch size {config.patch_size}.")
        self._check_grid(grid, grid)
        self.model = Florence2Model(config)
        self.post_init()

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        **kwargs,
    ) -> Florence2EncoderOutput:
        """See [`IFSegBackbone.encode`]. Raises `ValueError` for an image with more patches than there are positions."""
        features = None
        if image_tokens is None:
            self._check_grid(*(math.ceil(side / self.patch_size) for side in pixel_values.shape[2:]))
            features = self.model.vision_tower(pixel_values).last_hidden_state
            image = self.model.multi_modal_projector(features)  # the mean of the image, then its patches
        else:
            patches = image_tokens.flatten(1, 2)
            image = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
        batch, length = image.shape[:2]
        prompt = self.get_input_embeddings()(input_ids).expand(batch, -1, -1)
        inputs = torch.cat([image.to(prompt.dtype), prompt], dim=1)
        self._check_length(inputs.shape[1])
        if attention_mask is not None:
            attention_mask = attention_mask.expand(batch, -1)
            attention_mask = torch.cat([attention_mask.new_ones(batch, length), attention_mask], dim=1)
        encoder = self.model.language_model.encoder
        encoded = encoder(inputs_embeds=inputs, attention_mask=attention_mask, **kwargs)
        hidden_states = encoded.last_hidden_state
        # the mean moves behind the patches; its mask is 1 like theirs
        hidden_states = torch.cat([hidden_states[:, 1:length], hidden_states[:, :1], hidden_states[:, length:]], dim=1)
        return Florence2EncoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            image_features=features,
            attention_mask=attention_mask,
            num_patches=length - 1,
        )

    def decode_patches(self, encoded: Florence2EncoderOutput, **kwargs) -> BaseModelOutputWithPastAndCrossAttentions:
        """See [`IFSegBackbone.decode_patches`]."""
        patches = encoded.last_hidden_state[:, : encoded.num_patches]
        token = self.config.text_config.decoder_start_token_id
        start = self.get_input_embeddings()(torch.full((patches.shape[0], 1), token, device=patches.device))
        # output i, which has read the start token and the patches before i, predicts patch i
        return self.model.language_model.decoder(
            inputs_embeds=torch.cat([start.to(patches.dtype), patches[:, :-1]], dim=1),
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=encoded.attention_mask,
            use_cache=False,
            **kwargs,
        )

    def image_free_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters except those of DaViT, the projection of its outputs, and the token embeddings."""
        frozen = [self.model.vision_tower, self.model.multi_modal_projector, self.get_input_embeddings()]
        excluded = {id(parameter) for module in frozen for parameter in module.parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in excluded)

    def project_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """Projected patches (batch, h, w, d) of DaViT's outputs (batch, channels, h, w)."""
        return self.model.multi_modal_projector(image_features)[:, 1:].unflatten(1, image_features.shape[2:])

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.language_model.set_input_embeddings(value)

    def _check_grid(self, height: int, width: int):
        limit = self.config.vision_config.max_position_embeddings
        if max(height, width) > limit:
            raise ValueError(
                f"An image of {height} x {width} patches of {self.patch_size} pixels: Florence-2 has positions for "
                f"{limit} a side. Resize the image, or segment it in crops."
            )

    def _check_length(self, length: int):
        limit = self.config.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"Patches and prompt make {length} tokens; Florence-2's encoder has {limit} positions: use a smaller "
                "image or fewer words."
            )


AutoConfig.register(Florence2SegmentationConfig.model_type, Florence2SegmentationConfig, exist_ok=True)
AutoBackbone.register(Florence2SegmentationConfig, Florence2Backbone, exist_ok=True)

__all__ = ["Florence2Backbone", "Florence2SegmentationConfig", "IFSegConfig", "IFSegForSemanticSegmentation"]
