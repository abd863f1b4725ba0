"""ClipCap as a backbone of IFSeg: CLIP encodes, a mapping network and GPT-2 decode each patch (Appendix D)."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoBackbone, AutoConfig, CLIPModel, GPT2LMHeadModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from .backbone import IFSegBackbone, mean_of_subwords
from .configuration_clipcap import ClipCapConfig
from .configuration_ifseg import IFSegConfig
from .modeling_ifseg import IFSegForSemanticSegmentation
from .subwords_clip import CLIPSubwords

TEXTS_AT_ONCE = 1024  # sentences in one pass of CLIP's text tower


class ClipCapMLP(nn.Module):
    """ClipCap's mapping by a perceptron: CLIP features (n, d_clip) -> embeddings of GPT-2 (n, prefix_length * d)."""

    def __init__(self, config: ClipCapConfig):
        super().__init__()
        size = config.prefix_length * config.gpt_config.n_embd
        hidden = nn.Linear(config.clip_config.projection_dim, size // 2)
        self.model = nn.Sequential(hidden, nn.Tanh(), nn.Linear(size // 2, size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.model(features)


class ClipCapMultiHead(nn.Module):
    """Multi-head attention of the mapping transformer, whose queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        keys, values = self.to_keys_values(hidden_states).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (self.to_queries(hidden_states), keys, values)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.project(attended.transpose(1, 2).flatten(2))


class ClipCapFeedForward(nn.Module):
    """Feed-forward block of the mapping transformer."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(hidden_states).relu())


class ClipCapLayer(nn.Module):
    """Layer of the mapping transformer, with layer norms before attention and feed-forward block."""

    def __init__(self, config: ClipCapConfig):
        super().__init__()
        width = config.gpt_config.n_embd
        self.norm1 = nn.LayerNorm(width)
        self.attn = ClipCapMultiHead(width, config.mapping_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = ClipCapFeedForward(width, int(width * config.mapping_mlp_ratio))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class ClipCapTransformer(nn.Module):
    """ClipCap's mapping by a transformer: CLIP features (n, d_clip) -> embeddings of GPT-2 (n, prefix_length * d).

    A feature becomes `mapping_length` embeddings, beside which `prefix_length` learned ones read; their outputs are the
    result.
    """

    def __init__(self, config: ClipCapConfig):
        super().__init__()
        width = config.gpt_config.n_embd
        self.length = config.mapping_length
        self.linear = nn.Linear(config.clip_config.projection_dim, self.length * width)
        self.prefix_const = nn.Parameter(torch.randn(config.prefix_length, width))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(ClipCapLayer(config) for _ in range(config.mapping_layers))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        mapped = self.linear(features).unflatten(1, (self.length, -1))
        hidden_states = torch.cat([mapped, self.prefix_const.expand(features.shape[0], -1, -1)], dim=1)
        for layer in self.transformer.layers:
            hidden_states = layer(hidden_states)
        return hidden_states[:, self.length :].flatten(1)


@dataclass
class ClipCapEncoderOutput(BaseModelOutput):
    """
    Args:
        last_hidden_state: (batch, h * w, d_clip), CLIP's features of the patches, row by row.
        image_features: (batch, d_clip, h, w), the same; `None` for an artificial image.
        hidden_states, attentions: of CLIP's image tower, whose first position is the class token.
    """

    image_features: torch.Tensor | None = None


class ClipCapBackbone(IFSegBackbone):
    """
    CLIP, ClipCap's mapping network and GPT-2, which decodes each patch by itself.

    A word on an artificial image is CLIP's text feature, averaged over the prompt templates; a patch of an image is its
    feature in the same space. GPT-2 reads `prefix_length` embeddings of one patch, and its last output is compared with
    the rows of its token embedding. CLIP has no encoder of image and text together, so the prompt is not read.
    """

    config: ClipCapConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: ClipCapConfig):
        super().__init__(config)
        gpt_config = copy.deepcopy(config.gpt_config)
        gpt_config.vocab_size = config.vocab_size
        gpt_config.attn_pdrop = gpt_config.embd_pdrop = gpt_config.resid_pdrop = config.dropout
        self.gpt = GPT2LMHeadModel(gpt_config)
        self.clip_project = (ClipCapMLP if config.mapping_type == "mlp" else ClipCapTransformer)(config)
        self.clip = CLIPModel(config.clip_config)
        self.subwords = CLIPSubwords(config.gpt_config.vocab_size, config.clip_config.text_config.vocab_size)
        self.word_features = _WordFeatures()
        self.post_init()

    # Words ------------------------------------------------------------------------------------------------------------

    def embed_words(self, word_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """CLIP's text feature of each word, (batch, N, d_clip), averaged over the prompt templates, without gradient.

        The direction is MaskCLIP's: features of unit length are averaged. The length is the mean length of the averaged
        features, or 1 if `normalize_features`. Raises `ValueError` for a word that is too long for CLIP.
        """
        rows = [
            [tuple(i for i, kept in zip(ids, keep, strict=True) if kept) for ids, keep in zip(*batch, strict=True)]
            for batch in zip(word_ids.tolist(), mask.tolist(), strict=True)
        ]
        known = self.word_features.of([*self.clip.text_model.parameters(), *self.clip.text_projection.parameters()])
        missing = [word for word in dict.fromkeys(word for row in rows for word in row) if word and word not in known]
        known |= dict(zip(missing, self._text_features(missing), strict=True))
        zero = self.clip.text_projection.weight.new_zeros(self.config.clip_config.projection_dim)
        return torch.stack([torch.stack([known[word] if word else zero for word in row]) for row in rows])

    @torch.inference_mode(False)  # training may use features that were cached in inference
    @torch.no_grad()
    def _text_features(self, words: list[tuple[int, ...]]) -> list[torch.Tensor]:
        """The text feature (d_clip,) of each word, which is given as token ids of GPT-2."""
        texts = self.subwords.texts(words)
        ids = self.subwords.encode(template.format(text) for text in texts for template in self.config.templates)
        limit = self.config.clip_config.text_config.max_position_embeddings
        count = len(self.config.templates)
        for index, row in enumerate(ids):
            if len(row) > limit:
                text = texts[index // count]
                raise ValueError(
                    f'"{text}" makes a sentence of {len(row)} tokens; CLIP reads {limit}: use fewer words.'
                )
        features = []
        device = self.clip.device
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(ids), TEXTS_AT_ONCE):
                rows = ids[start : start + TEXTS_AT_ONCE]
                longest = max(map(len, rows))
                # CLIP reads from left to right up to the token that ends a text, so that padding changes nothing
                padded = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=device)
                features.append(self.clip.get_text_features(padded).pooler_output)
        if not features:
            return []
        sentences = torch.cat(features).unflatten(0, (-1, count))
        directions = normalize(normalize(sentences, dim=-1).mean(1), dim=-1)
        return list(
            directions if self.config.normalize_features else directions * sentences.norm(dim=-1).mean(1)[:, None]
        )

    def embed_categories(self, category_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean row of each category in GPT-2's token embedding, (batch, N, d)."""
        return mean_of_subwords(self.get_input_embeddings()(category_ids), mask)

    # Forward ----------------------------------------------------------------------------------------------------------

    def encode(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        **kwargs,
    ) -> ClipCapEncoderOutput:
        """See [`IFSegBackbone.encode`]. The prompt is not read; images are padded with zeros to whole patches."""
        if image_tokens is not None:
            return ClipCapEncoderOutput(last_hidden_state=image_tokens.flatten(1, 2))
        height, width = (-side % self.patch_size for side in pixel_values.shape[2:])
        pixel_values = nn.functional.pad(pixel_values, (0, width, 0, height))
        tower = self.clip.vision_model
        values = self.config.patch_features == "maskclip"
        wanted = self._wanted_outputs(kwargs)
        by_layer = {**wanted, "output_hidden_states": True} if values else wanted
        outputs = tower(pixel_values, interpolate_pos_encoding=True, **by_layer)
        patches = (self._last_layer_of_values(outputs.hidden_states[-2]) if values else outputs.last_hidden_state)[
            :, 1:
        ]
        features = self.clip.visual_projection(tower.post_layernorm(patches))
        if self.config.normalize_features:
            features = normalize(features, dim=-1)
        grid = [side // self.patch_size for side in pixel_values.shape[2:]]
        return ClipCapEncoderOutput(
            last_hidden_state=features,
            hidden_states=outputs.hidden_states if wanted["output_hidden_states"] else None,
            attentions=outputs.attentions,
            image_features=features.transpose(1, 2).unflatten(2, grid),
        )

    def _wanted_outputs(self, kwargs: dict) -> dict[str, bool]:
        """Whether to return hidden states and attentions, from the arguments of a call or else the configuration."""
        given = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
        return {name: getattr(self.config, name) if value is None else value for name, value in given.items()}

    def _last_layer_of_values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The last layer of the image tower, in which each position attends to itself alone, as in MaskCLIP."""
        layer = self.clip.vision_model.encoder.layers[-1]
        attention = layer.self_attn
        hidden_states = hidden_states + attention.out_proj(attention.v_proj(layer.layer_norm1(hidden_states)))
        return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))

    def decode_patches(self, encoded: ClipCapEncoderOutput, **kwargs) -> BaseModelOutputWithPastAndCrossAttentions:
        """See [`IFSegBackbone.decode_patches`]. Outputs of GPT-2's layers are (batch, h * w, ..., ...)."""
        batch = encoded.last_hidden_state.shape[0]
        prefix = self.clip_project(encoded.last_hidden_state.flatten(0, 1)).unflatten(
            1, (self.config.prefix_length, -1)
        )
        decoded = self.gpt.transformer(inputs_embeds=prefix, use_cache=False, **self._wanted_outputs(kwargs))

        def by_image(outputs: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...] | None:
            return None if outputs is None else tuple(output.unflatten(0, (batch, -1)) for output in outputs)

        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=decoded.last_hidden_state[:, -1].unflatten(0, (batch, -1)),
            hidden_states=by_image(decoded.hidden_states),
            attentions=by_image(decoded.attentions),
        )

    # Parameters -------------------------------------------------------------------------------------------------------

    def image_free_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the mapping network and of GPT-2 except its token embedding."""
        words = {id(parameter) for parameter in self.get_input_embeddings().parameters()}
        trained = [*self.clip_project.parameters(), *self.gpt.parameters()]
        return (parameter for parameter in trained if id(parameter) not in words)

    def segmentation_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters except CLIP's text tower, its scale, and what patch features leave out."""
        unused = [self.clip.text_model, self.clip.text_projection]
        if self.config.patch_features == "maskclip":
            attention = self.clip.vision_model.encoder.layers[-1].self_attn
            unused += [attention.q_proj, attention.k_proj]
        excluded = {id(parameter) for module in unused for parameter in module.parameters()}
        excluded.add(id(self.clip.logit_scale))
        return (parameter for parameter in self.parameters() if id(parameter) not in excluded)

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.gpt.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "ClipCapBackbone":
        """Sets the mode of all modules but CLIP's text tower, which is never trained."""
        super().train(mode)
        self.clip.text_model.eval()
        return self

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ClipCapTransformer):
            init.normal_(module.prefix_const)
        elif isinstance(module, CLIPSubwords):
            module.reset()


class _WordFeatures:
    """Cache of words' text features, emptied when a weight of the text tower changes. Neither saved nor copied."""

    def __init__(self):
        self.state: list[tuple] = []
        self.features: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, parameters: list[nn.Parameter]) -> dict[tuple[int, ...], torch.Tensor]:
        """The cached features for these parameters of the text tower, token ids of GPT-2 -> (d_clip,)."""
        state = [(x.data_ptr(), None if x.is_inference() else x._version, x.dtype, x.device) for x in parameters]
        if state != self.state:
            self.state, self.features = state, {}
        return self.features

    def __deepcopy__(self, memo) -> "_WordFeatures":
        return type(self)()

    def __reduce__(self):
        return type(self), ()


AutoConfig.register(ClipCapConfig.model_type, ClipCapConfig, exist_ok=True)
AutoBackbone.register(ClipCapConfig, ClipCapBackbone, exist_ok=True)

__all__ = [
    "ClipCapBackbone",
    "ClipCapConfig",
    "ClipCapMLP",
    "ClipCapTransformer",
    "IFSegConfig",
    "IFSegForSemanticSegmentation",
]
