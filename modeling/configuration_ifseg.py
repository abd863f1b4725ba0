"""Configuration of OFA backbones and of IFSeg models built on them."""

import copy

from transformers import PreTrainedConfig

# The published sizes of OFA: (d_model, encoder layers, decoder layers, heads, FFN width, blocks of the trunk's stages).
_SIZES = {
    "tiny": (256, 4, 4, 4, 1024, (3, 4, 6)),
    "medium": (512, 4, 4, 8, 2048, (3, 4, 23)),
    "base": (768, 6, 6, 12, 3072, (3, 4, 23)),
    "large": (1024, 12, 12, 16, 4096, (3, 8, 36)),
    "huge": (1280, 24, 12, 16, 5120, (3, 8, 36)),
}

# What `pipeline()` reads in a saved model: the class that comes with it, in a file of `processing/`.
_PIPELINES = {
    "image-segmentation": {
        "impl": "pipeline_ifseg.IFSegImageSegmentationPipeline",
        "pt": ["AutoModelForSemanticSegmentation"],
    }
}


class IFSegConfig(PreTrainedConfig):
    r"""
    Sizes of an OFA encoder-decoder, plus the words that an IFSeg model was tuned for.

    The defaults are OFA-base; [`IFSegConfig.preset`] gives every published size.

    Args:
        vocab_size (`int`, defaults to 59457): byte-pair tokens, image codes and location bins.
        d_model (`int`, defaults to 768): width of both stacks. A multiple of the number of heads.
        encoder_layers, decoder_layers (`int`, default to 6): depth of the two stacks.
        encoder_attention_heads, decoder_attention_heads (`int`, default to 12): heads of the two stacks.
        encoder_ffn_dim, decoder_ffn_dim (`int`, default to 3072): inner width of the feed-forward blocks.
        max_position_embeddings (`int`, defaults to 1024): longest text, in tokens.
        token_bucket_size (`int`, defaults to 256): relative text distances up to half of it get a bucket of their own,
            longer ones share logarithmic buckets.
        image_bucket_size (`int`, defaults to 42): side of the largest patch grid with positions of its own.
        image_size (`int`, defaults to 512): side of the photo whose patch grid the segmentation positions are made
            for; other grids interpolate. Word maps have `image_size // 16` cells a side.
        trunk_embedding_size (`int`, defaults to 64): channels of the ResNet stem.
        trunk_hidden_sizes (`tuple[int, int, int]`, defaults to `(256, 512, 1024)`): output channels of the three
            stages; a bottleneck is a quarter as wide.
        trunk_depths (`tuple[int, int, int]`, defaults to `(3, 4, 23)`): bottleneck blocks of the three stages.
        dropout, attention_dropout, activation_dropout (`float`): rates inside both stacks.
        encoder_drop_path_rate, decoder_drop_path_rate (`float`, default to 0.1): stochastic depth of the last layer;
            it rises linearly from 0 at the first.
        word_noise (`float`, defaults to 0): in training, the standard deviation of Gaussian noise on every patch of a
            word map, along any direction, as a share of the root mean square distance between two of its words. Not in
            the paper.
        attn_scale_factor (`float`, defaults to 2): attention logits are divided by `sqrt(factor * head_dim)`.
        decoder_positions (`"segmentation"` or `"image"`, defaults to `"segmentation"`): what tells the segmentation
            decoder where a patch lies. `"segmentation"`: positions of its own, as in the published implementation;
            `"image"`: the encoder's image positions, as in the paper (section 2.2, footnote 4). The second has no
            parameters beyond OFA's.
        prompt (`str`, *optional*), prompt_ids (`list[int]`, *optional*): text that the model reads beside the photo.
        category_ids (`list[list[int]]`, *optional*): sub-words of each category; their names are in `id2label`.
        word_ids (`list[list[int]]`, *optional*), word_categories (`list[int]`, *optional*): in a hierarchical
            vocabulary (Appendix A.1), the sub-words of each fine name and the category that it belongs to.
    """

    model_type = "ifseg"
    # beside the logits, which are all that Trainer's evaluation is to gather
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state", "image_features", "patch_mask"]
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
    trunk_embedding_size: int = 64
    trunk_hidden_sizes: tuple[int, ...] | list[int] = (256, 512, 1024)
    trunk_depths: tuple[int, ...] | list[int] = (3, 4, 23)
    activation_function: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_drop_path_rate: float = 0.1
    decoder_drop_path_rate: float = 0.1
    word_noise: float = 0.0
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
    prompt: str | None = None
    prompt_ids: list[int] | None = None
    category_ids: list[list[int]] | None = None
    word_ids: list[list[int]] | None = None
    word_categories: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.trunk_hidden_sizes = tuple(self.trunk_hidden_sizes)
        self.trunk_depths = tuple(self.trunk_depths)
        super().__post_init__(**kwargs)
        self._check()

    def __setattr__(self, key, value):
        """New names are new both ways round, wherever they come from."""
        if key == "id2label" and value is not None:
            value = {int(i): name for i, name in value.items()}
            super().__setattr__("label2id", {name: i for i, name in value.items()})
        super().__setattr__(key, value)

    def _check(self):
        for stack in ("encoder", "decoder"):
            heads = getattr(self, f"{stack}_attention_heads")
            if self.d_model % heads:
                raise ValueError(f"d_model={self.d_model} is not a multiple of {stack}_attention_heads={heads}.")
        if len(self.trunk_hidden_sizes) != len(self.trunk_depths):
            raise ValueError(
                f"trunk_hidden_sizes={self.trunk_hidden_sizes} and trunk_depths={self.trunk_depths} differ in length."
            )
        if any(size % 4 for size in self.trunk_hidden_sizes):
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

    def check_words(self):
        """Raises `ValueError` where the words that the model carries contradict each other."""
        if self.category_ids is None:
            return
        categories = len(self.category_ids)
        if len(self.id2label) != categories:
            raise ValueError(
                f"There are {len(self.id2label)} names but sub-words for {categories} categories: num_labels, id2label "
                "and category_ids change together, by model.set_words(**processor.encode_categories([...]))."
            )
        if sorted(self.id2label) != list(range(categories)):
            raise ValueError(f"id2label numbers the categories {sorted(self.id2label)}: count them from 0.")
        if self.label2id != {name: i for i, name in self.id2label.items()}:
            raise ValueError("label2id is not id2label the other way round: give id2label alone.")
        if (self.word_ids is None) != (self.word_categories is None) or (
            len(self.word_ids or []) != len(self.word_categories or [])
        ):
            raise ValueError("word_ids and word_categories must be given together and have equal lengths.")
        if self.word_categories is not None and set(self.word_categories) != set(range(categories)):
            raise ValueError("word_categories must name every category at least once and no other.")

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels: the stem divides by 4, every stage but the first by 2."""
        return 4 * 2 ** (len(self.trunk_depths) - 1)

    @property
    def grid_size(self) -> int:
        """Side of the patch grid of an `image_size` photo, which is also the side of a word map."""
        return self.image_size // self.patch_size

    @property
    def custom_pipelines(self) -> dict:
        """The pipeline class that every saved model names, for places where the package is not installed.

        Empty in the package itself, which registers that class: `pipeline()` then asks nobody to trust any code.
        """
        return {} if __name__.startswith("ifseg_hf.") else copy.deepcopy(_PIPELINES)

    @custom_pipelines.setter
    def custom_pipelines(self, value):
        """The same for every model, whatever its file says; transformers sets what it reads or is about to save."""

    def to_dict(self) -> dict:
        return {**super().to_dict(), "custom_pipelines": copy.deepcopy(_PIPELINES)}

    @classmethod
    def preset(cls, size: str, **kwargs) -> "IFSegConfig":
        """The configuration of a published OFA size: "tiny", "medium", "base", "large" or "huge".

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


__all__ = ["IFSegConfig"]
