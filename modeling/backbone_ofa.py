"""OFA as a backbone of IFSeg: segmentation positions and one-pass decoding (section 2.2 of the paper)."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, AutoBackbone, AutoConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .backbone import IFSegBackbone
from .configuration_ifseg import IFSegConfig
from .configuration_ofa import OFAConfig
from .modeling_ifseg import IFSegForSemanticSegmentation
from .modeling_ofa import OFAEncoderOutput, OFAForConditionalGeneration, OFAModel, OFAPreTrainedModel
from .positions_ofa import OFAPatchPositions, OFATable, cat_sequences, resize_grid


class OFASegmentationPositions(nn.Module):
    """Positions of the segmentation decoder: `<s>` in row 0, then a square grid, resized to other grids."""

    def __init__(self, config: OFAConfig):
        super().__init__()
        self.side = config.grid_size
        self.embed_positions = OFATable(self.side**2 + 1, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        rows = (2 * self.side - 1) ** 2 + 3
        self.rel_pos_tables = nn.ModuleList(
            OFATable(rows, config.decoder_attention_heads) for _ in range(config.decoder_layers)
        )

    def forward(self, height: int, width: int) -> OFAPatchPositions:
        """Positions of `<s>` and a height x width grid."""
        table = self.embed_positions()
        start, grid = table[:1], table[1:]
        grid = resize_grid(grid.T.unflatten(1, (self.side, self.side)), height, width).flatten(1).T
        embeddings = self.layer_norm(torch.cat([start, grid]))[None]
        return OFAPatchPositions((height, width), embeddings, [table() for table in self.rel_pos_tables], self.side)


class OFABackbone(OFAPreTrainedModel, IFSegBackbone):
    """OFA, whose encoder reads image and prompt and whose decoder reads `<s>` and the encoded patches in one pass."""

    main_input_name = "pixel_values"
    new_parameters = ("segmentation_positions.",)

    def __init__(self, config: OFAConfig):
        super().__init__(config)
        self.model = OFAModel(config)
        if config.decoder_positions == "segmentation":
            self.segmentation_positions = OFASegmentationPositions(config)
        self.post_init()

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        **kwargs,
    ) -> OFAEncoderOutput:
        """See [`IFSegBackbone.encode`]; positions as with `interpolate_pos_encoding` of [`OFAEncoder.forward`]."""
        return self.model.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_embeds=image_tokens,
            interpolate_pos_encoding=True,
            **kwargs,
        )

    def decode_patches(self, encoded: OFAEncoderOutput, **kwargs) -> BaseModelOutputWithPastAndCrossAttentions:
        """See [`IFSegBackbone.decode_patches`]."""
        height, width = encoded.patch_mask.shape[1:]
        patches = encoded.last_hidden_state[:, : height * width]
        start = torch.full((patches.shape[0], 1), self.config.decoder_start_token_id, device=patches.device)
        decoded = self.model.decoder(
            inputs_embeds=cat_sequences([self.get_input_embeddings()(start), patches]),
            patch_positions=self.patch_positions(height, width),
            encoder_hidden_states=encoded.last_hidden_state if self.config.decoder_cross_attention else None,
            encoder_attention_mask=encoded.attention_mask,
            encoder_position_embeddings=encoded.position_embeddings,
            use_cache=False,
            **kwargs,
        )
        # output i, which has read `<s>` and the patches before i, and all patches by cross-attention, predicts patch i
        decoded["last_hidden_state"] = decoded.last_hidden_state[:, :-1]
        return decoded

    def patch_positions(self, height: int, width: int) -> OFAPatchPositions:
        """Positions of `<s>` and the patches in the decoder, as `config.decoder_positions` says."""
        if self.config.decoder_positions == "segmentation":
            return self.segmentation_positions(height, width)
        encoder, decoder = self.model.encoder, self.model.decoder
        start = encoder.embed_image_positions()[:1]
        grid = encoder.image_positions(height, width, interpolate=True)
        embeddings = encoder.image_pos_ln(torch.cat([start, grid]))[None]
        tables = [table() for table in decoder.image_rel_pos_table_list]
        return OFAPatchPositions((height, width), embeddings, tables, self.config.grid_size)

    def image_free_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters used in segmentation except those of the trunk, `image_proj` and the token embeddings."""
        encoder = self.model.encoder
        frozen = [encoder.embed_images, encoder.image_proj, encoder.embed_tokens]
        excluded = {id(parameter) for module in frozen for parameter in module.parameters()}
        return (parameter for parameter in self.segmentation_parameters() if id(parameter) not in excluded)

    def segmentation_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters except those that only generation uses, such as the decoder's positions of text."""
        decoder = self.model.decoder
        unused = [
            decoder.embed_positions,
            decoder.embed_image_positions,
            decoder.pos_ln,
            decoder.image_pos_ln,
            decoder.code_layernorm_embedding,
            decoder.token_rel_pos_table_list,
        ]
        if self.config.decoder_positions == "segmentation":
            unused.append(decoder.image_rel_pos_table_list)
        if not self.config.decoder_cross_attention:
            unused += [decoder.cross_pos_q_linear, decoder.cross_pos_k_linear]
            for layer in decoder.layers:
                unused += [layer.cross_attn, layer.cross_attn_layer_norm, layer.cross_attn_mid_layer_norm]
        excluded = {id(parameter) for module in unused for parameter in module.parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in excluded)

    def project_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """Projected patches (batch, h, w, d_model) of the trunk's features (batch, channels, h, w)."""
        return self.model.encoder.image_proj(image_features.permute(0, 2, 3, 1))

    @property
    def image_trunk(self) -> nn.Module:
        return self.model.encoder.embed_images

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        self.model.set_input_embeddings(value)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, OFASegmentationPositions):
            for table in [module.embed_positions, *module.rel_pos_tables]:
                init.normal_(table.weight, std=0.02)


AutoConfig.register(OFAConfig.model_type, OFAConfig, exist_ok=True)
AutoBackbone.register(OFAConfig, OFABackbone, exist_ok=True)
# Segmentation models also load OFA checkpoints: `from_pretrained` converts the configuration. Registered in the
# mapping, because `AutoModelForSemanticSegmentation.register` refuses a class with another `config_class`.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING.register(OFAConfig, IFSegForSemanticSegmentation, exist_ok=True)

__all__ = [
    "IFSegConfig",
    "IFSegForSemanticSegmentation",
    "OFABackbone",
    "OFAConfig",
    "OFAForConditionalGeneration",
    "OFAModel",
    "OFASegmentationPositions",
]
