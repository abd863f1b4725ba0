"""OFA: an encoder over image and text, a decoder over text, and the head for text generation."""

import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_ofa import OFAAttention
from .bias_cache_ofa import BiasCache
from .blockwise_bias_ofa import BlockwiseBias, is_large, trains_on_gpu
from .configuration_ofa import AUTO_MAP, PUBLISHED_COPIES, OFAConfig
from .image_batches import group_by_image_size
from .layers_ofa import OFADecoderLayer, OFAEncoderLayer, dropout
from .loading import Float32PreTrainedModel
from .outputs_ofa import CACHE, OFAEncoderOutput
from .positions_ofa import (
    GridBias,
    OFAPatchPositions,
    OFATable,
    add_blocks,
    cat_sequences,
    is_symbolic,
    masked_bias,
    positions_of_any_grid,
    project_positions,
    resize_grid,
    start_token_blocks,
    text_relative_bias,
)
from .trunk_ofa import TRUNKS, OFAFrozenBatchNorm2d


class OFAPreTrainedModel(Float32PreTrainedModel):
    config: OFAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean, so Trainer must average it over accumulated batches
    _no_split_modules = ["OFAResNetTrunk", "OFAEfficientNetLiteTrunk", "OFAEncoderLayer", "OFADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = PUBLISHED_COPIES

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """Saves weights, configuration, and the code of all classes that load them, segmentation among them."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            custom_object_save(importlib.import_module(f"{__package__}.backbone_ofa").OFABackbone, save_directory)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, OFAAttention):
            init.ones_(module.c_attn)
        elif isinstance(module, OFAFrozenBatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
        elif isinstance(module, nn.Conv2d):
            # He initialisation, also for depthwise convolutions, whose outputs depend on one channel each. Activations
            # would vanish over 30 blocks with the transformer's 0.02.
            fan_out = module.weight[:, 0].numel() // module.groups
            init.normal_(module.weight, std=math.sqrt(2.0) / math.sqrt(fan_out))


class _OFAStack(OFAPreTrainedModel):
    """Base of encoder and decoder: embeddings, positions, relative tables."""

    def __init__(self, config: OFAConfig, layers: int, heads: int):
        super().__init__(config)
        d_model = config.d_model
        self.embed_tokens = nn.Embedding(config.vocab_size, d_model, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        # the published checkpoints have two rows more than there are positions
        self.embed_positions = OFATable(config.max_position_embeddings + 2, d_model)
        self.embed_image_positions = OFATable(config.image_bucket_size**2 + 1, d_model)
        self.pos_ln = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        self.image_pos_ln = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        self.layer_norm = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        text_rows = 2 * config.token_bucket_size - 1
        image_rows = (2 * config.image_bucket_size - 1) ** 2 + 3
        self.token_rel_pos_table_list = nn.ModuleList(OFATable(text_rows, heads) for _ in range(layers))
        self.image_rel_pos_table_list = nn.ModuleList(OFATable(image_rows, heads) for _ in range(layers))
        self.bias_cache = BiasCache()

    def train(self, mode: bool = True):
        self.bias_cache.clear()  # training does not use it
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self.bias_cache.clear()  # the weights move or change their dtype
        return super()._apply(fn, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.embed_tokens = value

    def text_positions(self, start: int, stop: int) -> torch.Tensor:
        """Normalised positions start..stop-1 of text tokens, (1, stop - start, d_model)."""
        limit = self.config.max_position_embeddings
        if stop > limit:
            raise ValueError(f"The text has {stop} tokens; this model has positions for {limit}.")
        return self.pos_ln(self.embed_positions()[start:stop])[None]

    def image_positions(self, height: int, width: int, interpolate: bool) -> torch.Tensor:
        """Positions of a height x width patch grid, (height * width, d_model), before their layer norm.

        With `interpolate`, a grid with more patches than the grid of an `image_size` image gets the positions of that
        grid, resized. Without it, raises `ValueError` for a side above `image_bucket_size`.
        """
        config = self.config
        side, base = config.image_bucket_size, config.grid_size
        grid = self.embed_image_positions()[1:].view(side, side, -1)
        if interpolate and is_symbolic(height, width):
            return positions_of_any_grid(grid, base, height, width)
        if max(height, width) <= side and (height * width <= base**2 or not interpolate):
            return grid[:height, :width].flatten(0, 1)
        if not interpolate:
            raise ValueError(
                f"The image has {height} x {width} patches; without interpolate_pos_encoding this model has positions "
                f"for {side} x {side}, an image of at most {side * config.patch_size} pixels a side."
            )
        return resize_grid(grid[:base, :base].permute(2, 0, 1), height, width).flatten(1).T

    def image_relative_bias(self, layer: int, height: int, width: int, interpolate: bool) -> GridBias:
        """Relative biases between patches."""
        table = self.image_rel_pos_table_list[layer]()[:-3]
        return GridBias.from_table(table, height, width, self.config.grid_size if interpolate else None)


class OFAEncoder(_OFAStack):
    """OFA's encoder over [image ; text]; either may be absent."""

    _can_record_outputs = {"hidden_states": OFAEncoderLayer, "attentions": OFAAttention}

    def __init__(self, config: OFAConfig):
        super().__init__(config, config.encoder_layers, config.encoder_attention_heads)
        d_model = config.d_model
        self.type_embedding = OFATable(2, d_model)
        self.embed_images = TRUNKS[config.trunk_type](config)
        self.image_proj = nn.Linear(self.embed_images.out_channels, d_model)
        self.patch_layernorm_embedding = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        self.pos_q_linear = nn.Linear(d_model, d_model)
        self.pos_k_linear = nn.Linear(d_model, d_model)
        rates = torch.linspace(0, config.drop_path_rate, config.encoder_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(OFAEncoderLayer(config, i, rate) for i, rate in enumerate(rates))
        self.post_init()

    def _embed(self, tokens: torch.Tensor, token_type: int, norm: nn.LayerNorm) -> torch.Tensor:
        tokens = norm(tokens + self.type_embedding()[token_type].to(tokens.device))
        return dropout(tokens, self.config.dropout, self.training)

    def _embed_text(self, embeds: torch.Tensor, attention_mask: torch.Tensor | None):
        """Text tokens (1 or batch, T, d_model), zero where they are padding, and their mask, bool (1 or batch, T)."""
        text = self._embed(embeds, 0, self.layernorm_embedding)
        if attention_mask is None:
            return text, torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return text * attention_mask[:, :, None].to(text), attention_mask.bool()

    def positions(self, grid: tuple[int, int] | None, text_length: int, interpolate: bool) -> torch.Tensor:
        """Normalised positions of [image ; text], (1, L + T, d_model)."""
        parts = []
        if grid is not None:
            parts.append(self.image_pos_ln(self.image_positions(*grid, interpolate))[None])
        if text_length:
            parts.append(self.text_positions(0, text_length))
        return cat_sequences(parts)

    def _layer_biases(
        self, positions: torch.Tensor, mask: torch.Tensor | None, grid, text_length: int, interpolate: bool
    ) -> Callable[[int], torch.Tensor | BlockwiseBias]:
        """
        A function that returns the bias of a layer, (1 or batch, heads, L + T, L + T), in blocks for a large grid.

        It is the sum of the absolute bias, which all layers share, and the relative biases of the layer, between
        patches and between text tokens.
        """
        heads, factor = self.config.encoder_attention_heads, self.config.attn_scale_factor
        q, k = project_positions(self.pos_q_linear, self.pos_k_linear, positions, positions, heads, factor)
        allowed = None if mask is None else mask[:, None, None]

        def text_blocks(layer: int) -> list:  # of BiasBlock; torch.compile cannot trace list[...]
            if not text_length:
                return []
            text = slice(-text_length, None)
            return [(text, text, text_relative_bias(self.token_rel_pos_table_list[layer](), 0, text_length))]

        def blockwise_bias(layer: int) -> BlockwiseBias:
            height, width = grid
            relative = self.image_relative_bias(layer, height, width, interpolate)
            return BlockwiseBias(q, k, height, width, grid=relative, blocks=text_blocks(layer), allowed=allowed)

        if grid is not None and interpolate and is_large(self.config, q, k):
            return blockwise_bias

        absolute: list[torch.Tensor] = []

        def layer_bias(layer: int) -> torch.Tensor:
            if not absolute:
                absolute.append(masked_bias(q @ k.transpose(2, 3), allowed))
            blocks = text_blocks(layer)
            if grid is not None:
                height, width = grid
                image = slice(height * width)
                blocks.insert(0, (image, image, self.image_relative_bias(layer, height, width, interpolate)))
            last = layer == len(self.layers) - 1
            return add_blocks(absolute.pop() if last else absolute[0], blocks, reuse=last)

        if grid is None:
            return layer_bias
        tables = [*self.image_rel_pos_table_list, *self.token_rel_pos_table_list]
        inputs = [q, k, *(table() for table in tables), *([] if mask is None else [mask])]
        return self.bias_cache.cached((tuple(grid), interpolate), inputs, layer_bias, len(self.layers))

    @group_by_image_size
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OFAEncoderOutput:
        r"""
        Args:
            input_ids: (1 or batch, T) text tokens, or `inputs_embeds` (1 or batch, T, d_model).
            attention_mask: (1 or batch, T), 0 where the text is padding.
            pixel_values: (batch, 3, H, W) images; pixel_mask: (batch, H, W), 0 where they are padding.
            image_embeds: (batch, h, w, d_model) image tokens in place of the projected features of an image.
            interpolate_pos_encoding: resize the relative biases (and for larger images the positions) from the grid of
                an `image_size` image, as segmentation does. By default they are looked up directly, as in OFA.
        """
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Pass input_ids or inputs_embeds, not both.")
        if pixel_values is not None and image_embeds is not None:
            raise ValueError("Pass pixel_values or image_embeds, not both.")
        if input_ids is not None:
            inputs_embeds = self.embed_tokens(input_ids)
        image_features = None
        if pixel_values is not None:
            image_features = self.embed_images(pixel_values)
            image_embeds = self.image_proj(image_features.permute(0, 2, 3, 1))

        parts, masks, patch_mask, grid, text_length = [], [], None, None, 0
        # .shape[0] stays symbolic in torch.export, len() becomes a constant
        batch = (inputs_embeds if image_embeds is None else image_embeds).shape[0]
        if image_embeds is not None:
            grid = image_embeds.shape[1:3]
            patch_mask = torch.ones(image_embeds.shape[:3], dtype=torch.bool, device=image_embeds.device)
            parts.append(self._embed(image_embeds.flatten(1, 2), 1, self.patch_layernorm_embedding))
            masks.append(patch_mask.flatten(1))
        if inputs_embeds is not None:
            text_length = inputs_embeds.shape[1]
            text, text_mask = self._embed_text(inputs_embeds, attention_mask)
            parts.append(text.expand(batch, -1, -1))
            masks.append(text_mask)
        hidden_states = cat_sequences(parts)
        mask = None
        if attention_mask is not None or pixel_mask is not None:
            # one row, and so one bias, if all images share the mask
            rows = masks[-1].shape[0] if pixel_mask is None else batch
            mask = cat_sequences([part[:rows].expand(rows, -1) for part in masks])

        positions = self.positions(grid, text_length, interpolate_pos_encoding)
        bias_mask = None if attention_mask is None else mask
        layer_bias = self._layer_biases(positions, bias_mask, grid, text_length, interpolate_pos_encoding)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, layer_bias(i), **kwargs)

        return OFAEncoderOutput(
            last_hidden_state=self.layer_norm(hidden_states),
            image_features=image_features,
            patch_mask=patch_mask,
            attention_mask=mask,
            position_embeddings=positions if pixel_mask is None else positions.expand(batch, -1, -1),
        )


class OFADecoder(_OFAStack):
    """OFA's decoder: causal over its input, with cross-attention to all of the encoder's output."""

    _can_record_outputs = {
        "hidden_states": OFADecoderLayer,
        "attentions": OutputRecorder(OFAAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(OFAAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: OFAConfig):
        super().__init__(config, config.decoder_layers, config.decoder_attention_heads)
        d_model = config.d_model
        self.self_pos_q_linear = nn.Linear(d_model, d_model)
        self.self_pos_k_linear = nn.Linear(d_model, d_model)
        self.cross_pos_q_linear = nn.Linear(d_model, d_model)
        self.cross_pos_k_linear = nn.Linear(d_model, d_model)
        # for image codes, which this project does not generate; kept so that conversion loses no weights
        self.code_layernorm_embedding = nn.LayerNorm(d_model, eps=config.layer_norm_eps)
        rates = torch.linspace(0, config.drop_path_rate, config.decoder_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(OFADecoderLayer(config, i, rate) for i, rate in enumerate(rates))
        self.post_init()

    def _layer_biases(
        self, positions, start, encoder_positions, attention_mask, encoder_attention_mask, patch_positions
    ) -> Callable[[Any], torch.Tensor | BlockwiseBias]:
        """A function that returns the bias of a layer's self-attention or, for "cross", of every cross-attention.

        For a large grid of patches it returns biases in blocks.
        """
        heads, factor = self.config.decoder_attention_heads, self.config.attn_scale_factor
        queries, stop = positions[:, start:], positions.shape[1]
        self_q, self_k = project_positions(
            self.self_pos_q_linear, self.self_pos_k_linear, queries, positions, heads, factor
        )
        cross_q, cross_k = project_positions(
            self.cross_pos_q_linear, self.cross_pos_k_linear, queries, encoder_positions, heads, factor
        )

        cross_allowed = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None].bool()

        def blockwise_bias(layer: Any) -> BlockwiseBias:
            height, width = patch_positions.grid
            if layer == "cross":
                return BlockwiseBias(cross_q, cross_k, height, width, start=1, allowed=cross_allowed)
            table = patch_positions.tables[layer]
            relative = GridBias.from_table(table[:-3], height, width, patch_positions.side)
            blocks = start_token_blocks(table[-3:])
            return BlockwiseBias(self_q, self_k, height, width, grid=relative, start=1, blocks=blocks, causal=True)

        if patch_positions is not None and attention_mask is None and is_large(self.config, cross_q, cross_k):
            return blockwise_bias

        causal: list[torch.Tensor] = []

        def compute_bias(layer: Any) -> torch.Tensor:
            if layer == "cross":
                absolute = patch_positions is not None and cross_allowed is None
                # with use_reentrant=True, a checkpointed layer has gradients of tensors among its arguments alone
                if absolute and trains_on_gpu(self.config, cross_q) and not self.layers[0].gradient_checkpointing:
                    height, width = patch_positions.grid
                    return BlockwiseBias(cross_q, cross_k, height, width, start=1)
                return masked_bias(cross_q @ cross_k.transpose(2, 3), cross_allowed)
            if not causal:
                steps = torch.arange(stop, device=self_q.device)
                allowed = steps[start:, None] >= steps
                if attention_mask is not None:
                    allowed = allowed & attention_mask[:, None, None].to(allowed.device).bool()
                causal.append(masked_bias(self_q @ self_k.transpose(2, 3), allowed))
            if patch_positions is not None:
                last = layer == len(self.layers) - 1
                return add_blocks(causal.pop() if last else causal[0], patch_positions.relative_bias(layer), reuse=last)
            relative = text_relative_bias(self.token_rel_pos_table_list[layer](), start, stop)
            return causal[0] + relative.to(self_q.device)

        if patch_positions is None:
            return compute_bias
        masks = [mask for mask in (attention_mask, encoder_attention_mask) if mask is not None]
        inputs = [self_q, self_k, cross_q, cross_k, *patch_positions.tables, *masks]
        key = (tuple(patch_positions.grid), attention_mask is None)
        return self.bias_cache.cached(key, inputs, compute_bias, len(self.layers) + 1)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_position_embeddings: torch.Tensor | None = None,
        patch_positions: OFAPatchPositions | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            input_ids: (batch, S) tokens, or `inputs_embeds` (batch, S, d_model).
            attention_mask: (batch, past + S), 0 where the decoder's input is padding.
            encoder_hidden_states: (batch, K, d_model), or `None` for no cross-attention; encoder_attention_mask: bool
                (1 or batch, K); encoder_position_embeddings: (1 or batch, K, d_model).
            patch_positions: positions of the input where it is `<s>` and the patches of an image, instead of text.
            past_key_values: keys and values of earlier tokens; also as `cache`, the name since transformers 5.24.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds to the decoder.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))

        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        stop = start + inputs_embeds.shape[1]
        positions = self.text_positions(0, stop) if patch_positions is None else patch_positions.embeddings
        layer_bias = self._layer_biases(
            positions, start, encoder_position_embeddings, attention_mask, encoder_attention_mask, patch_positions
        )
        hidden_states = self.layernorm_embedding(inputs_embeds)
        hidden_states = dropout(hidden_states, self.config.dropout, self.training)
        cross_bias = None if encoder_hidden_states is None else layer_bias("cross")
        for i, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                layer_bias(i),
                encoder_hidden_states,
                cross_bias,
                past_key_values=past_key_values,
                causal=patch_positions is not None and attention_mask is None,
                **kwargs,
            )

        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.layer_norm(hidden_states), **{CACHE: past_key_values}
        )


class OFAModel(OFAPreTrainedModel):
    """OFA's encoder and decoder without a head."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: OFAConfig):
        super().__init__(config)
        self.encoder = OFAEncoder(config)
        self.decoder = OFADecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.encoder.embed_tokens = value
        self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: OFAEncoderOutput | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds, pixel_values, pixel_mask, image_embeds,
                interpolate_pos_encoding: as for [`OFAEncoder`].
            decoder_input_ids: (batch, S), or `decoder_inputs_embeds` (batch, S, d_model); `<s>` alone if neither.
            decoder_attention_mask: (batch, past + S).
            past_key_values, cache: as for [`OFADecoder`].
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                pixel_mask=pixel_mask,
                image_embeds=image_embeds,
                interpolate_pos_encoding=interpolate_pos_encoding,
                **kwargs,
            )
        hidden_states = encoder_outputs.last_hidden_state
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.full((hidden_states.shape[0], 1), start, device=hidden_states.device)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=hidden_states,
            encoder_attention_mask=encoder_outputs.attention_mask,
            encoder_position_embeddings=encoder_outputs.position_embeddings,
            past_key_values=cache if past_key_values is None else past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE: getattr(decoder_outputs, CACHE)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class OFAForConditionalGeneration(OFAPreTrainedModel, GenerationMixin):
    """OFA with its token-prediction head: writes captions and answers to questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: OFAConfig):
        super().__init__(config)
        self.model = OFAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: OFAEncoderOutput | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        r"""
        Args:
            labels: (batch, S) tokens to predict, -100 ignored, for the mean cross-entropy. Shifted by one, they are
                the decoder's input unless one is passed.

        Other arguments: see [`OFAModel`]. The logits are (batch, S, vocab_size).
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            past_key_values=cache if past_key_values is None else past_key_values,
            use_cache=use_cache,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.to(logits.device).flatten())
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """`labels` (batch, S) shifted right by one behind the start token, -100 replaced by padding."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def _expand_inputs_for_generation(self, *args, encoder_outputs: OFAEncoderOutput | None = None, **kwargs):
        if encoder_outputs is not None:
            # beam search repeats every tensor of the encoder's output, so each needs a row for every image
            batch = encoder_outputs.last_hidden_state.shape[0]
            encoder_outputs["position_embeddings"] = encoder_outputs.position_embeddings.expand(batch, -1, -1)
            if encoder_outputs.attention_mask is not None:
                encoder_outputs["attention_mask"] = encoder_outputs.attention_mask.expand(batch, -1)
            kwargs["encoder_outputs"] = encoder_outputs
        return super()._expand_inputs_for_generation(*args, **kwargs)


# The names that `pipeline("image-text-to-text")` accepts without logging an error, with this file alone, too.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[OFAConfig.model_type] = OFAForConditionalGeneration.__name__

__all__ = [
    "OFADecoder",
    "OFAEncoder",
    "OFAEncoderOutput",
    "OFAForConditionalGeneration",
    "OFAModel",
    "OFAPreTrainedModel",
]
