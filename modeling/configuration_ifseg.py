"""Configuration of an IFSeg model: its category words, and the configuration of its backbone."""

import copy
from dataclasses import fields
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .configuration_checks import check_values

# The pipeline class of a saved model. Its file, of `processing/`, is saved beside the weights.
PIPELINES = {
    "image-segmentation": {
        "impl": "pipeline_ifseg.IFSegImageSegmentationPipeline",
        "pt": ["AutoModelForSemanticSegmentation"],
    }
}


class IFSegConfig(PreTrainedConfig):
    r"""
    Words of an IFSeg model and the configuration of its backbone.

    The names of the categories are in `id2label`.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*, defaults to OFA-base): configuration of an
            [`IFSegBackbone`].
        prompt (`str`, *optional*), prompt_ids (`list[int]`, *optional*): wording and tokens of the prompt that the
            model reads with the image.
        category_ids (`list[list[int]]`, *optional*): sub-words of each category.
        word_ids (`list[list[int]]`, *optional*), word_categories (`list[int]`, *optional*): in a hierarchical
            vocabulary (Appendix A.1), the sub-words of each fine name and the index of its label.
        background (`list[str]`, *optional*), category_labels (`list[int]`, *optional*): words that are merged into one
            label, which are the last categories, and the label of each category, an index into `id2label`.
        tuned (`bool`, defaults to `False`): whether the weights were tuned for segmentation. Needed only for a
            checkpoint without words: see [`is_tuned`].
    """

    model_type = "ifseg"
    sub_configs = {"backbone_config": AutoConfig}
    # Trainer's evaluation gathers the logits alone
    keys_to_ignore_at_inference = ["encoder_last_hidden_state", "image_features", "patch_mask"]
    pipelines: ClassVar[dict] = PIPELINES

    backbone_config: Any = None
    prompt: str | None = None
    prompt_ids: list[int] | None = None
    category_ids: list[list[int]] | None = None
    word_ids: list[list[int]] | None = None
    word_categories: list[int] | None = None
    background: list[str] | None = None
    category_labels: list[int] | None = None
    tuned: bool = False
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        kwargs.pop("custom_pipelines", None)
        if self.backbone_config is None:
            self.backbone_config = _backbone_config({"model_type": "ofa"})
            misplaced = sorted({field.name for field in fields(self.backbone_config)} & kwargs.keys())
            if misplaced:
                more = ", ..." if len(misplaced) > 3 else ""
                raise ValueError(
                    f"{', '.join(misplaced[:3])}{more}: attributes of the backbone go into backbone_config, as in "
                    f"IFSegConfig(backbone_config=OFAConfig({misplaced[0]}=...))."
                )
        elif isinstance(self.backbone_config, dict):
            self.backbone_config = _backbone_config(self.backbone_config)
        elif not isinstance(self.backbone_config, PreTrainedConfig):
            raise ValueError(f"backbone_config={self.backbone_config!r} should be the configuration of a backbone.")
        check_values(self, kwargs)
        super().__post_init__(**kwargs)
        if self.id2label is not None:
            self.id2label = dict(sorted(self.id2label.items()))  # a file may have them in any order
        if self.category_ids is not None and self.id2label is not None:
            self.label2id = {name: i for i, name in self.id2label.items()}

    @classmethod
    def from_backbone_config(cls, backbone_config: PreTrainedConfig, **kwargs) -> "IFSegConfig":
        """A configuration without words around the configuration of a backbone, of the same `dtype`."""
        return cls(backbone_config=backbone_config, dtype=backbone_config.dtype, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Reads the configuration of an IFSeg model, or of a backbone, such as a converted OFA."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = cls.from_backbone_config(_backbone_config(config_dict)).to_dict()
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Makes a configuration from its dictionary; an `id2label` in `kwargs` also replaces `label2id`."""
        if kwargs.get("id2label") is not None:
            config_dict = {**config_dict, "id2label": kwargs.pop("id2label")}
        return super().from_dict(config_dict, **kwargs)

    def check_words(self):
        """Raises `ValueError` where the words of the configuration contradict each other."""
        if self.category_ids is None:
            return
        categories = labels = len(self.category_ids)
        if (self.background is None) != (self.category_labels is None):
            raise ValueError("background and category_labels must be given together.")
        if self.category_labels is not None:
            labels = len(set(self.category_labels))
            if len(self.category_labels) != categories or set(self.category_labels) != set(range(labels)):
                raise ValueError(
                    f"category_labels={self.category_labels} must have a label for each of the {categories} "
                    "categories, numbered from 0."
                )
            if len(self.background) > categories:
                raise ValueError(f"background has {len(self.background)} words, more than the {categories} categories.")
        if len(self.id2label) != labels:
            raise ValueError(
                f"There are {len(self.id2label)} names but sub-words for {labels} categories: num_labels, id2label "
                "and category_ids change together, by model.set_words(**processor.encode_categories([...]))."
            )
        if sorted(self.id2label) != list(range(labels)):
            raise ValueError(f"id2label has the indices {sorted(self.id2label)}: number the categories from 0.")
        if self.label2id != {name: i for i, name in self.id2label.items()}:
            raise ValueError(
                "label2id and id2label contradict each other: set both, or pass id2label alone to the constructor."
            )
        if (self.word_ids is None) != (self.word_categories is None) or (
            len(self.word_ids or []) != len(self.word_categories or [])
        ):
            raise ValueError("word_ids and word_categories must be given together and have equal lengths.")
        if self.word_categories is not None and set(self.word_categories) != set(range(labels)):
            raise ValueError("word_categories must name every category at least once and no other.")

    @property
    def is_tuned(self) -> bool:
        """Whether the model was tuned for segmentation: it says so, or it carries the words that it was tuned on."""
        return self.tuned or self.category_ids is not None

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the backbone's vocabulary."""
        return self.backbone_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int):
        self.backbone_config.vocab_size = value  # `resize_token_embeddings` sets it

    @property
    def tuning(self) -> dict:
        """Settings with which the model is best tuned on words, those of the backbone; {} for the published ones."""
        return getattr(self.backbone_config, "tuning", None) or {}

    @property
    def image_size(self) -> int:
        """Side in pixels of a square image; word maps have its patch grid."""
        return self.backbone_config.image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.backbone_config.patch_size

    @property
    def grid_size(self) -> int:
        """Side of a word map in patches."""
        return self.image_size // self.patch_size

    @property
    def custom_pipelines(self) -> dict:
        """Pipeline classes that `pipeline()` loads from the model's folder, with `trust_remote_code=True`.

        Empty once the package has registered its own class: `pipeline()` then does not ask for `trust_remote_code`.
        """
        return copy.deepcopy(self.pipelines)

    def to_dict(self) -> dict:
        return {**super().to_dict(), "custom_pipelines": copy.deepcopy(PIPELINES)}


def _backbone_config(values: dict) -> PreTrainedConfig:
    """The configuration of a backbone from its dictionary. Raises `ValueError` for an unknown `model_type`."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f'The backbone\'s model_type "{model_type}" is unknown: import the module that registers the backbone, or '
            "pass trust_remote_code=True to run the code saved with the model."
        )
    return CONFIG_MAPPING[model_type].from_dict(values)


__all__ = ["IFSegConfig"]
