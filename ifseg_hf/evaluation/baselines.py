"""CLIP and MaskCLIP, the paper's baselines (section 3), with the interface of [`IFSegSegmenter`].

Patch features of CLIP's image tower, a vision transformer or a ResNet, are compared with the embeddings of the words.
Neither baseline is tuned. The outputs have the same fields as an IFSeg model's, so smoothing, resizing and argmax are
the same code.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.evaluation.clip_resnet import CLIPResNet, load_clip_resnet
from ifseg_hf.modeling.image_batches import group_by_image_size
from ifseg_hf.modeling.merged_labels import merge_logits, one_hot_labels
from ifseg_hf.modeling.modeling_ifseg import IFSegSegmentationOutput
from ifseg_hf.modeling.templates_clip import PROMPT_TEMPLATES
from ifseg_hf.pretrained import resolve_model
from ifseg_hf.processing.background_ifseg import BACKGROUND, background_words
from ifseg_hf.processing.image_processing_ifseg import IFSegImageProcessor, output_size
from ifseg_hf.processing.text_ifseg import normalize_text

__all__ = ["BASELINES", "CLIPSegmenter", "load_baseline"]

BASELINES = ("clip", "maskclip")
_RESNET = re.compile(r"(clip[-_])?(rn|resnet)[-_]?\d+.*", re.IGNORECASE)
_EXAMPLE = "openai/clip-vit-base-patch16"


class CLIPSegmenter:
    """Segmenter that compares CLIP's patch features with word embeddings; see [`load_baseline`].

    Args:
        model (`CLIPModel`): is put into evaluation mode and used without gradients, on its device.
        processor (`CLIPProcessor`): gives the tokenizer, and mean and standard deviation of images.
    """

    inference = "whole"

    def __init__(self, model: CLIPModel, processor: CLIPProcessor):
        self.model = model.eval().requires_grad_(False)
        self.config = model.config  # whose `return_dict` is read by `group_by_image_size`
        self.tokenizer = processor.tokenizer
        self.image_processor = _WholePatches(
            image_mean=processor.image_processor.image_mean, image_std=processor.image_processor.image_std
        )
        self.image_processor.patch_size = self.patch_size
        self.word_embeddings: Tensor | None = None
        self.background: list[str] | None = None
        self.labels: Tensor | None = None  # the label of each word, where several have one

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.vision_config.patch_size

    @property
    def max_tokens(self) -> int:
        """Number of tokens that the text tower has positions for."""
        return self.config.text_config.max_position_embeddings

    @property
    def smoothing(self) -> tuple[int, int]:
        """Neighbours and iterations of the smoothing, as for an IFSeg model that was tuned on words."""
        return self.image_processor.smoothing()

    @torch.no_grad()
    def set_words(self, categories: list[str] | dict[str, list[str]], *, background=None) -> None:
        """
        Sets the categories, whose embeddings the patches are compared with.

        The embedding of a name is the mean of its unit-length text features over MaskCLIP's 85 prompt templates
        ([`PROMPT_TEMPLATES`]), scaled to unit length.

        Args:
            categories (`list[str]` or `dict[str, list[str]]`): names; or the fine names of each category. The
                category's embedding is then the mean of its fine names' embeddings, scaled to unit length; the
                category's name is used only if it is among them.
            background (`str` or `list[str]`, *optional*): words that are merged into one label; see
                [`background_words`].

        Raises:
            `ValueError` for an empty list, for an empty or repeated name, and for a name that the tokenizer does not
            know or that is too long for the model.
        """
        categories = read_categories(categories)
        fine = list(categories.values()) if isinstance(categories, Mapping) else [[name] for name in categories]
        coarse = [normalize_text(name) for name in categories]
        self.background = background_words(background, [*categories, *(name for group in fine for name in group)])
        self.labels = None
        if self.background is not None:
            label = coarse.index(BACKGROUND) if BACKGROUND in coarse else len(coarse)
            labels = [*range(len(coarse)), *[label] * len(self.background)]
            self.labels = one_hot_labels(labels, max(labels) + 1, self.model.device)
            fine += [[word] for word in self.background]
        names = {name: self._embed_name(name) for name in dict.fromkeys(name for group in fine for name in group)}
        means = [torch.stack([names[name] for name in group]).mean(0) for group in fine]
        self.word_embeddings = normalize(torch.stack(means), dim=-1)

    def preprocess(self, images: list[np.ndarray]) -> BatchFeature:
        """
        Returns images as inputs of the model: whole, never cropped.

        The short side becomes 512 pixels unless the long side would exceed 2048; then each side is rounded to the
        nearest multiple of the patch size, at least one patch, which changes the ratio by half a patch at most. The
        resize is [`IFSegImageProcessor`]'s; mean and standard deviation are the checkpoint's.

        Args:
            images (list of `np.ndarray` of shape `(H, W, 3)`, uint8): RGB, of any sizes.

        Returns:
            [`BatchFeature`] with **pixel_values** (batch, 3, H, W), float32, padded with 0 at the right and bottom,
            and **pixel_mask** (batch, H, W), int64: 1 inside the image.
        """
        return self.image_processor(images, input_data_format="channels_last", return_tensors="pt")

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> IFSegSegmentationOutput:
        """
        Args:
            inputs: result of [`preprocess`], on any device.

        Returns:
            [`IFSegSegmentationOutput`] with

            - **logits** (batch, categories, h, w), float32: cosine of patch and word, times CLIP's learned scale.
            - **image_features** (batch, C, h, w), float32: for smoothing, the patch features at unit length; of a
              ResNet, the output of its last stage, as the paper compares features of the image backbone (Appendix E).
            - **patch_mask** (batch, h, w), bool: the patches of each image. Outputs of other patches are 0.

            Images of one size run as a batch, so that padding changes no output.
        """
        if self.word_embeddings is None:
            raise ValueError("There are no words to compare the images with: call set_words first.")
        device = self.model.device
        return self._segment(inputs["pixel_values"].to(device), inputs["pixel_mask"].to(device))

    @group_by_image_size
    def _segment(self, pixel_values: Tensor, pixel_mask=None, return_dict=None) -> IFSegSegmentationOutput:
        image_features, features = self._patch_features(pixel_values)
        features = normalize(features, dim=1)
        logits = self.model.logit_scale.exp() * torch.einsum("bchw,nc->bnhw", features, self.word_embeddings)
        logits = logits if self.labels is None else merge_logits(logits, self.labels)
        mask = torch.ones_like(logits[:, 0], dtype=torch.bool)
        return IFSegSegmentationOutput(logits=logits, image_features=image_features, patch_mask=mask)

    def _patch_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the patches' features for smoothing (batch, D, h, w), and in the space of the texts (batch, C, h, w).

        Images are (batch, 3, H, W), of whole patches.
        """
        tower = self.model.vision_model
        patches = tower(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 1:]  # without the class token
        features = normalize(self.model.visual_projection(tower.post_layernorm(patches)), dim=-1)
        height, width = (side // self.patch_size for side in pixel_values.shape[2:])
        features = features.transpose(1, 2).unflatten(2, (height, width))
        return features, features

    def _text_features(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Returns the features of tokenized texts, (texts, C)."""
        return self.model.get_text_features(**tokens).pooler_output

    def _embed_name(self, name: str) -> Tensor:
        """Returns the embedding of a name, (C,), at unit length."""
        ids = self.tokenizer(name, add_special_tokens=False)["input_ids"]
        if not ids or self.tokenizer.unk_token_id in ids:
            raise ValueError(f'The tokenizer has no tokens for "{name}": use another word.')
        tokens = self.tokenizer(
            [template.format(name) for template in PROMPT_TEMPLATES], padding=True, return_tensors="pt"
        )
        length, limit = tokens["input_ids"].shape[1], self.max_tokens
        if length > limit:
            raise ValueError(f'"{name}" makes a sentence of {length} tokens; the model reads {limit}: use fewer words.')
        features = self._text_features(tokens.to(self.model.device))
        return normalize(normalize(features, dim=-1).mean(0), dim=-1)


class CLIPResNetSegmenter(CLIPSegmenter):
    """[`CLIPSegmenter`] for a [`CLIPResNet`], whose patches are of 32 pixels."""

    patch_size = 32

    @property
    def max_tokens(self) -> int:
        return self.config.max_position_embeddings

    def _patch_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.visual(pixel_values)

    def _text_features(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return self.model.text(**tokens).text_embeds


class _WholePatches(IFSegImageProcessor):
    """Resizes images to multiples of `patch_size`, because CLIP's patch embedding ignores incomplete patches."""

    patch_size: int

    def resize(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        patch = self.patch_size
        height, width = (
            max(1, int(side / patch + 0.5)) * patch for side in output_size(image.shape[1], image.shape[2], size)
        )
        return super().resize(image, SizeDict(height=height, width=width))


class _ValueAttention(nn.Module):
    """MaskCLIP's attention, without queries and keys: each position attends to itself. (batch, L, d) -> same."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        return self.out_proj(self.v_proj(hidden_states)), None


def load_baseline(kind: str, model_name_or_path: str | Path, device: str | torch.device = "cpu") -> CLIPSegmenter:
    """
    Loads CLIP or MaskCLIP as a segmenter; `set_words` sets its words.

    - `"clip"`: the last hidden states of the patches, normalised (`post_layernorm`) and projected (`visual_projection`)
      as CLIP does with its class token. With a ResNet: the attention pooling's output for each patch, where MaskCLIP's
      published code gives patches no positions.
    - `"maskclip"`: the same, but the last layer's attention is its value path alone, `out_proj(v_proj(x))`, so that a
      patch is not mixed with other patches there. MaskCLIP defines this for the attention pooling at the end of CLIP's
      ResNet, which has neither residual nor MLP. MaskCLIP's published implementation for vision transformers keeps the
      residual and the MLP of the last layer, without which the features would leave the space that `post_layernorm` and
      the projection were trained on; this implementation keeps them, too. MaskCLIP's two refinements of the result (key
      smoothing, prompt denoising) are left out, as the paper's smoothing takes their place.

    The paper's tables have ResNet-101 (Tables 1, 2, 3, 6 and 11) and ViT-B/16 (Table 13).

    Args:
        kind (`str`): `"clip"` or `"maskclip"`.
        model_name_or_path (`str` or `Path`): folder or Hub id of a `CLIPModel` with its processor; or OpenAI's file of
            a CLIP with a ResNet (`RN50.pt`, `RN101.pt`; see [`load_clip_resnet`]). The tokenizer is then that of the
            files beside it (`tokenizer.json`, or `vocab.json` and `merges.txt`), or else that of
            `openai/clip-vit-base-patch16`, as all published CLIPs share one.
        device (`str` or `torch.device`, defaults to `"cpu"`): where the model computes, in float32.

    Raises:
        `ValueError` for another kind, or for an incomplete or other model; `FileNotFoundError` for a missing folder.
    """
    if kind not in BASELINES:
        raise ValueError(f'There is no baseline "{kind}": choose from {", ".join(BASELINES)}.')
    name = str(model_name_or_path)
    source = _find(name)
    try:
        if isinstance(source, Path) and source.is_file():
            model, processor = _load_resnet(source, kind)
            return CLIPResNetSegmenter(model.to(device), processor)
        model, processor = _load_clip(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f'"{name}" is no CLIP that can be loaded: {" ".join(str(error).split())}'[:500]) from error
    if kind == "maskclip":
        last = model.vision_model.encoder.layers[-1]
        last.self_attn = _ValueAttention(last.self_attn)
    return CLIPSegmenter(model.to(device), processor)


def _find(name: str) -> str | Path:
    """The file of a CLIP with a ResNet, or the folder or Hub id of another CLIP. Raises as [`load_baseline`] does."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if _RESNET.fullmatch(path.name) and not path.is_dir():
        raise ValueError(
            f'"{name}" is no file: give the path of a CLIP with a ResNet as OpenAI published it (RN50.pt, RN101.pt), '
            f"or a vision transformer, such as {_EXAMPLE}."
        )
    try:
        return resolve_model(name)
    except FileNotFoundError:
        message = (
            f'There is no model folder "{name}". Give the folder of a saved CLIP, or a name on the Hub: {_EXAMPLE}.'
        )
        raise FileNotFoundError(message) from None


def _load_clip(source: str | Path) -> tuple[CLIPModel, CLIPProcessor]:
    """CLIP with a vision transformer, and its processor, from a folder or the Hub."""
    model_type = CLIPConfig.get_config_dict(source)[0].get("model_type")
    if model_type != "clip":
        raise ValueError(f"its model type is {model_type}. Take a CLIP, such as {_EXAMPLE}.")
    processor = CLIPProcessor.from_pretrained(source)
    model, report = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{len(report['missing_keys'])} of its weights are missing. Take a whole CLIPModel.")
    return model, processor


def _load_resnet(file: Path, kind: str) -> tuple[CLIPResNet, CLIPProcessor]:
    """CLIP with a ResNet, and a processor with the tokenizer beside its file, or else that of all published CLIPs."""
    model = load_clip_resnet(file, value_path=kind == "maskclip")
    beside = any((file.parent / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    source = file.parent if beside else _EXAMPLE
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded ({' '.join(str(error).split())[:150]}): put vocab.json and "
            "merges.txt of a CLIP beside the file."
        ) from error
    vocabulary = model.config.vocab_size
    if len(tokenizer) != vocabulary or tokenizer.eos_token_id != vocabulary - 1:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, and the model {vocabulary}: it is another's."
        )
    return model, CLIPProcessor(CLIPImageProcessorPil(), tokenizer)
