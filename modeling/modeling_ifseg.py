"""IFSeg: words as an artificial image, and the one-pass decoder of a vision-language model as a segmentation head."""

import copy
import os
import re
from dataclasses import dataclass
from functools import partial

import torch
from transformers import CONFIG_MAPPING, AutoBackbone, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .adapters_ifseg import AdaptablePreTrainedModel
from .backbone import IFSegBackbone
from .configuration_ifseg import IFSegConfig
from .image_batches import group_by_image_size
from .loss_ifseg import LabelCheck, check_labels, segmentation_loss
from .merged_labels import merge_logits, one_hot_labels


@dataclass
class IFSegSegmentationOutput(ModelOutput):
    """
    Args:
        loss: mean cross-entropy over the labelled pixels, 0 where there is none; with `labels` only.
        logits: (batch, categories, h, w), one prediction per patch.
        image_features: (batch, channels, h, w), compared by the smoothing of post-processing; `None` for word maps.
        patch_mask: bool (batch, h, w), the patches of each image; the others are padding, zero in every output.
        encoder_last_hidden_state: (batch, h * w + tokens, d).
        encoder_hidden_states, encoder_attentions, decoder_hidden_states, decoder_attentions, cross_attentions: on
            request, one tensor per layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    patch_mask: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class IFSegForSemanticSegmentation(AdaptablePreTrainedModel):
    """
    Segments an image, or an artificial image made of words, into categories that are named by words.

    The backbone encodes image and prompt and decodes all patches in one pass (section 2.2 of the paper); the output of
    each patch is compared with the embedding of every category.
    """

    config: IFSegConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean, so Trainer must average it over accumulated batches
    _supports_sdpa = True

    def __init__(self, config: IFSegConfig):
        super().__init__(config)
        config.check_words()
        self.backbone: IFSegBackbone = AutoBackbone.from_config(config.backbone_config)
        self.post_init()
        if not config.is_tuned:  # tuning starts from random values of these, so that their list would say nothing
            new = {rf"^backbone\.{re.escape(name)}" for name in self.backbone.new_parameters}
            self._keys_to_ignore_on_load_missing.update(new)
        self._freeze_unused()

    # Words ------------------------------------------------------------------------------------------------------------

    def set_words(
        self,
        id2label: dict[int, str],
        category_ids: list[list[int]],
        prompt_ids: list[int],
        prompt: str | None = None,
        word_ids: list[list[int]] | None = None,
        word_categories: list[int] | None = None,
        background: list[str] | None = None,
        category_labels: list[int] | None = None,
    ):
        """
        Stores words in the configuration; the model uses them when none are passed and saves them with its weights.

        Args:
            id2label: names of the labels by index.
            category_ids: sub-words of each category; prompt_ids: the whole prompt; prompt: its wording.
            word_ids, word_categories: sub-words of each word that word maps are made of, and the index of its label,
                where they are not the categories: the fine words of a hierarchical vocabulary, or with a background.
            background, category_labels: words that are merged into one label, and the label of each category.

        Raises `ValueError` where the arguments contradict each other.
        """
        config = copy.copy(self.config)
        config.id2label = {int(i): name for i, name in id2label.items()}
        config.label2id = {name: i for i, name in config.id2label.items()}
        config.category_ids, config.prompt, config.prompt_ids = category_ids, prompt, prompt_ids
        config.word_ids, config.word_categories = word_ids, word_categories
        config.background, config.category_labels = background, category_labels
        config.check_words()
        self.config.__dict__.update(config.__dict__)

    def pad_words(self, rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sub-words of N words as int64 (1, N, K), padded to the longest word, and their mask of the same shape."""
        longest = max(map(len, rows))
        pad_token_id = self.config.backbone_config.pad_token_id
        ids = [row + [pad_token_id] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return torch.tensor([ids], device=device), torch.tensor([mask], device=device)

    def _prompt_and_categories(self, input_ids, category_ids, category_mask, device):
        """Prompt, sub-words of the categories and their mask, with the configuration's in place of missing ones."""
        config = self.config
        if input_ids is None:
            if config.prompt_ids is None:
                raise ValueError(
                    "This model carries no words. Pass input_ids, category_ids and category_mask, which "
                    "IFSegProcessor makes from categories=[...], or tune it on words first."
                )
            input_ids = torch.tensor([config.prompt_ids], device=device)
        if category_ids is None:
            if config.category_ids is None:
                raise ValueError("Pass category_ids and category_mask beside input_ids: this model carries no words.")
            config.check_words()
            category_ids, category_mask = self.pad_words(config.category_ids, device)
        elif category_mask is None:
            category_mask = category_ids != config.backbone_config.pad_token_id
        return input_ids, category_ids, category_mask

    # Training ---------------------------------------------------------------------------------------------------------

    def freeze_for_word_maps(self):
        """Freezes all parameters except the backbone's `image_free_parameters`, which image-free training updates."""
        trained = {id(parameter) for parameter in self.backbone.image_free_parameters()}
        for parameter in self.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)

    def _freeze_unused(self):
        """Freezes what takes no part in segmentation, for whose gradients distributed training would wait."""
        used = {id(parameter) for parameter in self.backbone.segmentation_parameters()}
        for parameter in self.parameters():
            if id(parameter) not in used:
                parameter.requires_grad_(False)

    @classmethod
    def can_generate(cls) -> bool:
        """False: the model has [`prepare_inputs_for_generation`] for PEFT alone."""
        return False

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """Raises `ValueError`. PEFT looks this method up when it wraps a model for a task of text."""
        raise ValueError(
            "IFSegForSemanticSegmentation segments images and generates no text: load the model as "
            "OFAForConditionalGeneration to generate."
        )

    def _own_category_groups(self, device: torch.device) -> torch.Tensor | None:
        """`category_groups` of [`forward`] for the categories of the configuration; `None` without a background."""
        config = self.config
        if config.category_labels is None:
            return None
        return one_hot_labels(config.category_labels, len(config.id2label), device)

    def _artificial_image(self, word_map: torch.Tensor, word_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Image tokens (batch, h, w, d) of a word map (batch, h, w): the embeddings of its words (section 2.1)."""
        words = self.backbone.embed_words(word_ids, mask)
        word_map = word_map.to(words.device).long()
        if words.shape[0] == 1:
            return words[0][word_map]
        return torch.stack([row[places] for row, places in zip(words, word_map, strict=True)])

    # Forward ----------------------------------------------------------------------------------------------------------

    @partial(group_by_image_size, one_by_one=True)
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        word_map: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        category_ids: torch.Tensor | None = None,
        category_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        category_groups: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> IFSegSegmentationOutput:
        r"""
        Args:
            pixel_values: (batch, 3, H, W), normalised RGB.
            pixel_mask: (batch, H, W), 1 inside each image of a padded batch.
            word_map: (batch, h, w), the word of each patch of an artificial image, in place of `pixel_values`: an
                index into the categories or, where the configuration has `word_ids`, into these words.
            input_ids: (1 or batch, tokens), the prompt; attention_mask: the same shape, 0 where it is padding.
            category_ids: (1 or batch, categories, sub-words) and category_mask of the same shape. Categories without
                sub-words are never predicted. Without prompt and categories, the configuration's words are used.
            labels: (batch, H, W), integers, the category (or its label) of each pixel, -100 ignored; of any size.
            category_groups: (1 or batch, labels, categories), beside `category_ids`: 1 where a category has the label.
                The logits are then those of the labels, whose probabilities are the sums over their categories.

        Raises `ValueError` where image and word map are both passed or both missing, where there are no words, and for
        labels that are no integers, no category, or not one map for each image.
        """
        if (pixel_values is None) == (word_map is None):
            raise ValueError("Pass either pixel_values (images) or word_map (artificial images).")
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes those of a task
        device = (pixel_values if word_map is None else word_map).device
        hierarchical = category_ids is None and self.config.word_ids is not None
        if category_ids is None:
            category_groups = self._own_category_groups(device)
        input_ids, category_ids, category_mask = self._prompt_and_categories(
            input_ids, category_ids, category_mask, device
        )
        if labels is not None:
            images = len(pixel_values if word_map is None else word_map)
            categories = (category_ids if category_groups is None else category_groups).shape[1]
            check = LabelCheck(check_labels(labels, images), categories)
        image_tokens = None
        if word_map is not None:
            words = self.pad_words(self.config.word_ids, device) if hierarchical else (category_ids, category_mask)
            image_tokens = self._artificial_image(word_map, *words)

        encoded = self.backbone.encode(input_ids, attention_mask, pixel_values, image_tokens, **kwargs)
        decoded = self.backbone.decode_patches(encoded, **kwargs)
        categories = self.backbone.embed_categories(category_ids, category_mask).to(decoded.last_hidden_state.device)

        grid = image_tokens.shape[1:3] if encoded.image_features is None else encoded.image_features.shape[2:]
        logits = (decoded.last_hidden_state @ categories.transpose(1, 2)).transpose(1, 2).unflatten(2, grid)
        absent = ~category_mask.to(logits.device).bool().any(2)
        logits = logits.masked_fill(absent[:, :, None, None], torch.finfo(logits.dtype).min)
        if category_groups is not None:
            logits = merge_logits(logits, category_groups)
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, check.labels)
            check.raise_for_wrong()
        return IFSegSegmentationOutput(
            loss=loss,
            logits=logits,
            image_features=encoded.image_features,
            patch_mask=torch.ones(logits.shape[0], *grid, dtype=torch.bool, device=logits.device),
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
        )

    # Loading and saving -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """
        Loads an IFSeg checkpoint, or the checkpoint of a backbone, such as an OFA.

        The weights are loaded in float32 unless `dtype` says otherwise; "auto" is the dtype of the saved weights.
        Parameters that only other tasks use, such as text generation, are frozen.
        """
        if not isinstance(config, PreTrainedConfig):
            backbone = cls._backbone_class(config or pretrained_model_name_or_path, kwargs)
        else:
            backbone = type(getattr(config, "backbone_config", config))
            if config.model_type != cls.config_class.model_type:
                config = cls.config_class.from_backbone_config(config)
        if names := getattr(backbone, "published_names", None):
            kwargs.setdefault("key_mapping", names)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model._freeze_unused()  # again, since loading replaces the parameters
        return loaded

    @classmethod
    def _backbone_class(cls, path, kwargs: dict) -> type[PreTrainedConfig] | None:
        """The class of the backbone's configuration; `None` for an adapter, whose folder has no configuration."""
        hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        try:
            values, _ = cls.config_class.get_config_dict(path, **{name: kwargs[name] for name in hub if name in kwargs})
        except OSError:
            return None
        model_type = (values.get("backbone_config") or values).get("model_type")
        if model_type not in CONFIG_MAPPING:  # lazy, so that its `get` knows no class that was not yet imported
            return None
        return CONFIG_MAPPING[model_type]

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """
        Saves weights, configuration and code: the file of the backbone and all files that it imports.

        Of a model with an adapter, saves the active adapter and its words alone.
        """
        module = type(self.backbone).__module__.rpartition(".")[2]
        classes = {"AutoConfig": self.config_class, "AutoModelForSemanticSegmentation": type(self)}
        self.config.auto_map = {name: f"{module}.{cls.__name__}" for name, cls in classes.items()}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        if not getattr(self, "peft_config", None):
            custom_object_save(self.backbone, save_directory)
        elif self.config.category_ids is not None:
            self.save_words(save_directory)


__all__ = ["IFSegForSemanticSegmentation", "IFSegSegmentationOutput"]
