"""Configuration of ClipCap as a backbone: CLIP, GPT-2 and the mapping network between them."""

from typing import Any

from transformers import CLIPConfig, GPT2Config, PreTrainedConfig

from .configuration_checks import check_values
from .templates_clip import PROMPT_TEMPLATES

MAPPING_TYPES = ("mlp", "transformer")
PATCH_FEATURES = ("clip", "maskclip")


class ClipCapConfig(PreTrainedConfig):
    r"""
    Sizes of a ClipCap: CLIP's two towers, a mapping network, and GPT-2 (Appendix D of the paper).

    Args:
        clip_config (`CLIPConfig` or `dict`, *optional*, defaults to ViT-B/32), gpt_config (`GPT2Config` or `dict`,
            *optional*, defaults to GPT-2 small): configurations of the pre-trained models.
        mapping_type (`"mlp"` or `"transformer"`, defaults to `"mlp"`): the mapping network, which turns a CLIP feature
            into `prefix_length` embeddings of GPT-2.
        prefix_length (`int`, defaults to 10): embeddings that GPT-2 reads for one patch.
        mapping_length, mapping_layers, mapping_heads (`int`, default to 10, 8 and 8), mapping_mlp_ratio (`float`,
            defaults to 2): of the mapping transformer: the embeddings that a CLIP feature is split into, its layers,
            attention heads, and the width of its feed-forward blocks as a multiple of GPT-2's.
        normalize_features (`bool`, defaults to `False`): whether the mapping network reads CLIP features of unit
            length. It is an option of ClipCap's training, off by default there, too.
        patch_features (`"clip"` or `"maskclip"`, defaults to `"clip"`): patch features of an image. `"clip"`: the last
            hidden states, normalised and projected as CLIP does with its class token. `"maskclip"`: the same, but the
            last layer's attention is its value path alone.
        templates (`list[str]`, *optional*, defaults to MaskCLIP's 85): sentences with `{}` for a word, over which
            CLIP's text features are averaged.
        image_size (`int`, defaults to 512): side of a square image; word maps have its patch grid.
        patch_size (`int`, *optional*): side of a patch in pixels, that of `clip_config`.
        vocab_size (`int`, *optional*, defaults to that of `gpt_config`): rows of GPT-2's token embedding.
        pad_token_id (`int`, *optional*, defaults to GPT-2's `<|endoftext|>`): pads sub-words of categories.
        dropout (`float`, defaults to 0.1): of embeddings, attention and residuals of GPT-2.
        drop_path_rate (`float`, defaults to 0): accepted for every backbone; neither CLIP nor GPT-2 drops layers.
    """

    model_type = "clipcap"
    base_config_key = "backbone_config"
    sub_configs = {"clip_config": CLIPConfig, "gpt_config": GPT2Config}

    clip_config: Any = None
    gpt_config: Any = None
    mapping_type: str = "mlp"
    prefix_length: int = 10
    mapping_length: int = 10
    mapping_layers: int = 8
    mapping_heads: int = 8
    mapping_mlp_ratio: float = 2.0
    normalize_features: bool = False
    patch_features: str = "clip"
    templates: list[str] | tuple[str, ...] = PROMPT_TEMPLATES
    image_size: int = 512
    patch_size: int | None = None
    vocab_size: int | None = None
    pad_token_id: int | None = None
    dropout: float = 0.1
    drop_path_rate: float = 0.0
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        check_values(self, kwargs)
        if self.clip_config is None:
            vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 32}
            self.clip_config = CLIPConfig(vision_config=vision)
        elif isinstance(self.clip_config, dict):
            self.clip_config = CLIPConfig(**self.clip_config)
        if self.gpt_config is None:
            self.gpt_config = GPT2Config()
        elif isinstance(self.gpt_config, dict):
            self.gpt_config = GPT2Config(**self.gpt_config)
        self.templates = list(self.templates)
        self.patch_size = self.clip_config.vision_config.patch_size
        if self.vocab_size is None:
            self.vocab_size = self.gpt_config.vocab_size
        if self.pad_token_id is None:
            self.pad_token_id = self.gpt_config.vocab_size - 1
        super().__post_init__(**kwargs)
        self._check()

    def _check(self):
        if self.mapping_type not in MAPPING_TYPES:
            raise ValueError(f'mapping_type="{self.mapping_type}": choose {" or ".join(MAPPING_TYPES)}.')
        if self.patch_features not in PATCH_FEATURES:
            raise ValueError(f'patch_features="{self.patch_features}": choose {" or ".join(PATCH_FEATURES)}.')
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of CLIP's patch size {self.patch_size}.")
        if not 0 < self.prefix_length <= self.gpt_config.n_positions:
            raise ValueError(f"prefix_length={self.prefix_length}: GPT-2 has {self.gpt_config.n_positions} positions.")
        if self.mapping_type == "transformer" and self.gpt_config.n_embd % self.mapping_heads:
            raise ValueError(
                f"mapping_heads={self.mapping_heads}: GPT-2's width {self.gpt_config.n_embd} is not a multiple of it."
            )
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            found = f'"{wrong[0]}" has not' if wrong else "templates is empty"
            raise ValueError(f"{found}: give sentences with exactly one {{}} each.")


__all__ = ["ClipCapConfig"]
