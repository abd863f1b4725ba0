"""Configuration of OFA: sizes of the published checkpoints, image trunk, positions."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .configuration_checks import check_values

# The published sizes of OFA: (d_model, encoder layers, decoder layers, heads, FFN width, blocks of the trunk's stages).
_SIZES = {
    "tiny": (256, 4, 4, 4, 1024, (3, 4, 6)),
    "medium": (512, 4, 4, 8, 2048, (3, 4, 23)),
    "base": (768, 6, 6, 12, 3072, (3, 4, 23)),
    "large": (1024, 12, 12, 16, 4096, (3, 8, 36)),
    "huge": (1280, 24, 12, 16, 5120, (3, 8, 36)),
}
TRUNK_TYPES = ("resnet", "efficientnet_lite")
# `config.json` of a published OFA names its ResNet; blocks of the three stages that it has.
_PUBLISHED_TRUNKS = {"resnet50": (3, 4, 6), "resnet101": (3, 4, 23), "resnet152": (3, 8, 36)}
# Choices that `config.json` of a published OFA may make, with the only value that this implementation has.
_PUBLISHED_CHOICES = {
    "add_type_embedding": True,
    "code_layernorm_embedding": True,
    "decoder_normalize_before": True,
    "encoder_normalize_before": True,
    "entangle_position_embedding": False,
    "layernorm_embedding": True,
    "normformer": True,
    "patch_layernorm_embedding": True,
    "scale_embedding": False,
    "share_attn_bias": False,
    "share_decoder_input_output_embed": True,
    "use_gamma_feature": False,
    "use_ofasys": False,
}
# Entries of the published `config.json` that this implementation does not need: paths, rates of training, generation.
_PUBLISHED_UNUSED = (
    "classifier_dropout",
    "code_image_size",
    "decoder_drop_path_rate",
    "decoder_layerdrop",
    "encoder_drop_path_rate",
    "encoder_layerdrop",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "resnet_drop_path_rate",
    "resnet_model_path",
)
# The classes that load a saved OFA, all from one file: importing it registers OFA as a backbone of segmentation.
AUTO_MAP = {
    "AutoConfig": "backbone_ofa.OFAConfig",
    "AutoModel": "backbone_ofa.OFAModel",
    "AutoModelForImageTextToText": "backbone_ofa.OFAForConditionalGeneration",
    "AutoModelForSemanticSegmentation": "backbone_ofa.IFSegForSemanticSegmentation",
}
# Tensors of published weights that are copies of the token embedding, or buffers that the model computes.
PUBLISHED_COPIES = (
    r"^(model\.)?encoder\.embed_images\..*\.num_batches_tracked$",
    r"^(model\.)?(encoder|decoder)\.(version|(token|image)_rp_bucket|image_position_idx)$",
    r"^(model\.)?decoder\.output_projection\.weight$",
)


class OFAConfig(PreTrainedConfig):
    r"""
    Sizes of an OFA encoder-decoder.

    The defaults are OFA-base; [`OFAConfig.preset`] gives every published size. `config.json` of a published OFA, which
    names its trunk (`resnet_type`), is read, too.

    Args:
        vocab_size (`int`, defaults to 59457): byte-pair tokens, image codes and location bins.
        d_model (`int`, defaults to 768): width of encoder and decoder, a multiple of the number of heads.
        encoder_layers, decoder_layers (`int`, default to 6): number of layers.
        encoder_attention_heads, decoder_attention_heads (`int`, default to 12): attention heads of each layer.
        encoder_ffn_dim, decoder_ffn_dim (`int`, default to 3072): inner width of the feed-forward blocks.
        max_position_embeddings (`int`, defaults to 1024): longest text in tokens.
        token_bucket_size (`int`, defaults to 256): relative text distances up to half of this value have a bucket each,
            longer distances share logarithmic buckets.
        image_bucket_size (`int`, defaults to 42): side of the largest patch grid with position embeddings.
        image_size (`int`, defaults to 512): side of a square image. The segmentation positions are for its patch grid,
            `image_size // patch_size` patches a side, which word maps have, too; for other grids they are interpolated.
        trunk_type (`"resnet"` or `"efficientnet_lite"`, defaults to `"resnet"`): the image trunk, with frozen batch
            norm. `"resnet"` is the published one: a ResNet v1.5 without its last stage. `"efficientnet_lite"` is an
            EfficientNet-Lite, whose last outputs at strides 16 and 32 are joined.
        trunk_embedding_size (`int`, defaults to 64): channels of the trunk's stem; EfficientNet-Lite2: 32.
        trunk_hidden_sizes (`tuple[int, ...]`, defaults to `(256, 512, 1024)`): output channels of the trunk's stages.
            ResNet: each is a multiple of 4, since a bottleneck is a quarter as wide. EfficientNet-Lite has seven
            stages; Lite2: `(16, 24, 48, 88, 120, 208, 352)`.
        trunk_depths (`tuple[int, ...]`, defaults to `(3, 4, 23)`): blocks of the trunk's stages; EfficientNet-Lite2:
            `(1, 3, 3, 4, 4, 5, 1)`.
        dropout, attention_dropout, activation_dropout (`float`): dropout rates of encoder and decoder.
        drop_path_rate (`float`, defaults to 0.1): stochastic depth of the last layer of encoder and decoder. The rate
            rises linearly from 0 at the first layer.
        attn_scale_factor (`float`, defaults to 2): attention logits are divided by `sqrt(attn_scale_factor *
            head_dim)`.
        decoder_positions (`"segmentation"` or `"image"`, defaults to `"segmentation"`): positions of the patches in the
            segmentation decoder. `"segmentation"`: separate embeddings and relative biases, as in the published
            implementation; `"image"`: the encoder's image positions, as in the paper (section 2.2, footnote 4), without
            parameters beyond OFA's.
        decoder_cross_attention (`bool`, defaults to `True`): whether the segmentation decoder attends to the encoder's
            output. Without, it reads `<s>` and the encoded patches before each patch only (Appendix B).
        tuning (`dict`, *optional*): settings with which the model is best tuned on words, such as `{"steps": 2000}`.
            The published ones if there are none.
    """

    model_type = "ofa"
    base_config_key = "backbone_config"
    # Names of the published weights -> names in a model that has an OFA as its backbone.
    published_names: ClassVar[dict[str, str]] = {r"^encoder\.": "model.encoder.", r"^decoder\.": "model.decoder."}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
    }

    vocab_size: int = 59457
    d_model: int = 768
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 12
    decoder_attention_heads: int = 12
    encoder_ffn_dim: int = 3072
    decoder_ffn_dim: int = 3072
    max_position_embeddings: int = 1024
    token_bucket_size: int = 256
    image_bucket_size: int = 42
    image_size: int = 512
    trunk_type: str = "resnet"
    trunk_embedding_size: int = 64
    trunk_hidden_sizes: tuple[int, ...] | list[int] = (256, 512, 1024)
    trunk_depths: tuple[int, ...] | list[int] = (3, 4, 23)
    activation_function: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path_rate: float = 0.1
    attn_scale_factor: float = 2.0
    init_std: float = 0.02
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 0
    tie_word_embeddings: bool = True
    decoder_positions: str = "segmentation"
    decoder_cross_attention: bool = True
    tuning: dict | None = None

    def __post_init__(self, **kwargs):
        check_values(self, kwargs)
        if "resnet_type" in kwargs:
            self._read_published(kwargs)
        self.trunk_hidden_sizes = tuple(self.trunk_hidden_sizes)
        self.trunk_depths = tuple(self.trunk_depths)
        super().__post_init__(**kwargs)
        self._check()

    def _read_published(self, values: dict[str, Any]):
        """Moves the entries that only `config.json` of a published OFA has from `values` to this configuration."""
        resnet = values.pop("resnet_type")
        if not isinstance(resnet, str) or resnet not in _PUBLISHED_TRUNKS:
            raise ValueError(f'resnet_type="{resnet}": choose {", ".join(_PUBLISHED_TRUNKS)}.')
        self.trunk_depths = _PUBLISHED_TRUNKS[resnet]
        # The largest images of segmentation, up to 512 pixels, for which there are positions.
        self.image_size = min(512, self.image_bucket_size * self.patch_size)
        for name, value in _PUBLISHED_CHOICES.items():
            if values.pop(name, value) != value:
                raise ValueError(f"{name}={not value}: there is no such OFA here, only {name}={value}.")
        for name in _PUBLISHED_UNUSED:
            values.pop(name, None)

    def _check(self):
        for stack in ("encoder", "decoder"):
            heads = getattr(self, f"{stack}_attention_heads")
            if self.d_model % heads:
                raise ValueError(f"d_model={self.d_model} is not a multiple of {stack}_attention_heads={heads}.")
        if self.attn_scale_factor <= 0:
            raise ValueError(f"attn_scale_factor={self.attn_scale_factor}: must be above 0.")
        if self.trunk_type not in TRUNK_TYPES:
            raise ValueError(f'trunk_type="{self.trunk_type}": choose {" or ".join(TRUNK_TYPES)}.')
        if len(self.trunk_hidden_sizes) != len(self.trunk_depths):
            raise ValueError(
                f"trunk_hidden_sizes={self.trunk_hidden_sizes} and trunk_depths={self.trunk_depths} differ in length."
            )
        if not 0 < len(self.trunk_depths) <= 16:
            raise ValueError(f"trunk_depths={self.trunk_depths}: a trunk has a stage, and at most 16.")
        if self.trunk_type == "efficientnet_lite" and len(self.trunk_depths) != 7:
            raise ValueError(f"trunk_depths={self.trunk_depths}: an EfficientNet-Lite has seven stages.")
        if self.trunk_type == "resnet" and any(size % 4 for size in self.trunk_hidden_sizes):
            raise ValueError(f"trunk_hidden_sizes={self.trunk_hidden_sizes}: every size must be a multiple of 4.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of {self.patch_size}.")
        if self.grid_size > self.image_bucket_size:
            raise ValueError(
                f"image_size={self.image_size} makes {self.grid_size} patches a side, more than "
                f"image_bucket_size={self.image_bucket_size} has positions for."
            )
        if self.decoder_positions not in ("segmentation", "image"):
            raise ValueError(f'decoder_positions="{self.decoder_positions}": choose "segmentation" or "image".')

    @property
    def patch_size(self) -> int:
        """
        Side of a patch in pixels.

        EfficientNet-Lite: 16. ResNet: the stem divides the size of the image by 4, every stage but the first by 2.
        """
        if self.trunk_type == "efficientnet_lite":
            return 16
        return 4 * 2 ** (len(self.trunk_depths) - 1)

    @property
    def grid_size(self) -> int:
        """Side of the patch grid of a square image of `image_size` pixels."""
        return self.image_size // self.patch_size

    @classmethod
    def preset(cls, size: str, **kwargs) -> "OFAConfig":
        """
        The configuration of a published OFA size: "tiny", "medium", "base", "large" or "huge".

        Keyword arguments replace single attributes. Raises `ValueError` for another name.
        """
        if size not in _SIZES:
            raise ValueError(f'There is no OFA of size "{size}"; choose one of {", ".join(_SIZES)}.')
        d_model, encoder_layers, decoder_layers, heads, ffn_dim, trunk_depths = _SIZES[size]
        attributes = {
            "d_model": d_model,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": ffn_dim,
            "decoder_ffn_dim": ffn_dim,
            "trunk_depths": trunk_depths,
        }
        return cls(**{**attributes, **kwargs})


__all__ = ["OFAConfig"]
