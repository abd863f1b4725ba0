"""The cosine baseline, which measures how well pre-training alone aligns patches and words."""

from collections.abc import Mapping

import torch
from torch.nn.functional import normalize

from ifseg_hf.modeling.merged_labels import merge_logits, one_hot_labels
from ifseg_hf.modeling.modeling_ifseg import IFSegSegmentationOutput
from ifseg_hf.processing.segmenter_ifseg import IFSegSegmenter

__all__ = ["COSINE", "TEMPERATURE", "CosineSegmenter"]

COSINE = "cosine"
TEMPERATURE = 0.1  # changes predictions only with smoothing, which averages probabilities


class CosineSegmenter(IFSegSegmenter):
    """Cosine similarity of each projected patch and each word, without encoder, decoder and tuning."""

    @torch.no_grad()
    def __call__(
        self, inputs: Mapping[str, torch.Tensor], words: Mapping[str, torch.Tensor] | None = None
    ) -> IFSegSegmentationOutput:
        """Returns logits (cosine divided by [`TEMPERATURE`]), image features and patch mask."""
        outputs = super().__call__(inputs, words)
        backbone = self.model.backbone
        patches = normalize(backbone.project_image_features(outputs.image_features), dim=-1)
        ids, mask = self.model.pad_words(self.model.config.category_ids, patches.device)
        embeddings = normalize(backbone.embed_words(ids, mask)[0], dim=-1)
        logits = (patches @ embeddings.T).permute(0, 3, 1, 2) / TEMPERATURE
        config = self.model.config
        if config.category_labels is not None:
            mask = one_hot_labels(config.category_labels, len(config.id2label), logits.device)
            logits = merge_logits(logits, mask)
        return IFSegSegmentationOutput(
            logits=logits, image_features=outputs.image_features, patch_mask=outputs.patch_mask
        )
