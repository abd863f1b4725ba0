"""The interface between IFSeg and its vision-language model (section 2, footnote 1 of the paper).

Any encoder-decoder vision-language model can be a backbone. A backbone is one file `backbone_NAME.py` with a subclass
of [`IFSegBackbone`], registered for its configuration:

```python
AutoConfig.register(NameConfig.model_type, NameConfig, exist_ok=True)
AutoBackbone.register(NameConfig, NameBackbone, exist_ok=True)
```

The configuration has the attributes `patch_size` (pixels a side), `image_size` (side of a square image; word maps have
its patch grid), `vocab_size`, `pad_token_id`, `dropout` and `drop_path_rate`; it may have `tuning`, the settings with
which the model is best tuned on words.

The `auto_map` of a saved model points to this file for `IFSegConfig` and `IFSegForSemanticSegmentation`: loading them
from there registers the backbone. The file therefore imports both names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions


class IFSegBackbone(PreTrainedModel, ABC):
    """An encoder-decoder that reads an image and a prompt, and predicts an embedding for every patch.

    Attributes:
        new_parameters: beginnings of the names of parameters that only segmentation has, so that a checkpoint of the
            vision-language model lacks them: tuning starts from random values.
    """

    new_parameters: tuple[str, ...] = ()

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    def embed_words(self, word_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Image tokens that stand for words (section 2.1); an artificial image is made of them.

        Default: the mean token embedding of each word's sub-words.

        Args:
            word_ids, mask: (batch, N, sub-words), token ids, and 1 for a sub-word or 0 for padding.

        Returns:
            (batch, N, d_in); zero for a word without sub-words.
        """
        return mean_of_subwords(self.get_input_embeddings()(word_ids), mask)

    def embed_categories(self, category_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Category vectors that the decoder's outputs are compared with (section 2.2). Default: [`embed_words`].

        Args:
            category_ids, mask: as for [`embed_words`].

        Returns:
            (batch, N, d_out).
        """
        return self.embed_words(category_ids, mask)

    @abstractmethod
    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """
        Encodes the prompt with an image or an artificial image.

        Args:
            input_ids, attention_mask: (1 or batch, tokens), the prompt.
            pixel_values: (batch, 3, H, W), images of one size.
            image_tokens: (batch, h, w, d_in), an artificial image in place of `pixel_values`.
            **kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            An output with `last_hidden_state`, which begins with the h * w patches, row by row, and `image_features`
            (batch, channels, h, w), `None` for an artificial image. It is the argument of [`decode_patches`].
        """

    @abstractmethod
    def decode_patches(self, encoded: BaseModelOutput, **kwargs) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Decodes all patches in one pass.

        Args:
            encoded: the result of [`encode`].
            **kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            An output whose `last_hidden_state` is (batch, h * w, d_out), one row for each patch.
        """

    @abstractmethod
    def image_free_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training on word maps updates (section 3)."""

    def segmentation_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that take part in segmenting an image, which supervised training updates. Default: all."""
        return self.parameters()

    def project_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """
        Image tokens of an image, which the cosine baseline compares with the results of [`embed_words`].

        Args:
            image_features: (batch, channels, h, w) of [`encode`].

        Returns:
            (batch, h, w, d_in). Default: the features themselves.
        """
        return image_features.permute(0, 2, 3, 1)

    @property
    def image_trunk(self) -> nn.Module | None:
        """The module from `pixel_values` to `image_features`, if it has frozen batch norms; otherwise `None`."""
        return None


def mean_of_subwords(embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The mean embedding of each word's sub-words, E_c of section 2.1.

    Args:
        embeds: (batch, N, sub-words, d); mask: (batch, N, sub-words), 1 where there is a sub-word.

    Returns:
        (batch, N, d); zero for a word without sub-words.
    """
    mask = mask[..., None].to(embeds)
    return (embeds * mask).sum(2) / mask.sum(2).clamp(min=1)


__all__ = ["IFSegBackbone", "mean_of_subwords"]
