"""A second backbone, in one file: a small BART that reads patches of an image through one convolution."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, BartConfig, BartModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from .backbone import IFSegBackbone, mean_of_subwords
from .configuration_ifseg import IFSegConfig
from .modeling_ifseg import IFSegForSemanticSegmentation


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_bart"
    base_config_key = "backbone_config"

    vocab_size: int = 260
    d_model: int = 16
    image_size: int = 64
    patch_size: int = 16
    pad_token_id: int | None = 1
    dropout: float = 0.1
    drop_path_rate: float = 0.0


@dataclass
class TinyEncoded(BaseModelOutput):
    image_features: torch.Tensor | None = None
    num_patches: int | None = None


class TinyBackbone(IFSegBackbone):
    config: TinyConfig

    def __init__(self, config: TinyConfig):
        super().__init__(config)
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 512}
        dropout = {"dropout": config.dropout, "attention_dropout": 0.0}
        bart = BartConfig(vocab_size=config.vocab_size, d_model=config.d_model, **sizes, **dropout)
        self.bart = BartModel(bart)
        self.patches = nn.Conv2d(3, config.d_model, config.patch_size, config.patch_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.bart.shared

    def embed_words(self, word_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mean_of_subwords(self.bart.shared(word_ids), mask)

    def encode(self, input_ids, attention_mask=None, pixel_values=None, image_tokens=None, **kwargs) -> TinyEncoded:
        features = None
        if pixel_values is not None:
            height, width = (-side % self.patch_size for side in pixel_values.shape[2:])
            features = self.patches(nn.functional.pad(pixel_values, (0, width, 0, height)))
            image_tokens = features.permute(0, 2, 3, 1)
        image = image_tokens.flatten(1, 2)
        text = self.bart.shared(input_ids).expand(len(image), -1, -1)
        output = self.bart.encoder(inputs_embeds=torch.cat([image, text], dim=1))
        return TinyEncoded(output.last_hidden_state, image_features=features, num_patches=image.shape[1])

    def decode_patches(self, encoded: TinyEncoded, **kwargs) -> BaseModelOutputWithPastAndCrossAttentions:
        hidden_states = encoded.last_hidden_state
        return self.bart.decoder(
            inputs_embeds=hidden_states[:, : encoded.num_patches], encoder_hidden_states=hidden_states, use_cache=False
        )

    def image_free_parameters(self) -> Iterator[nn.Parameter]:
        frozen = {id(p) for module in (self.patches, self.bart.shared) for p in module.parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in frozen)


AutoConfig.register(TinyConfig.model_type, TinyConfig, exist_ok=True)
AutoBackbone.register(TinyConfig, TinyBackbone, exist_ok=True)

__all__ = ["IFSegConfig", "IFSegForSemanticSegmentation", "TinyBackbone", "TinyConfig"]
