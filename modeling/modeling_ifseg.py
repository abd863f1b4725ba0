"""IFSeg: words as an artificial image, and an encoder-decoder's one-pass decoder as a segmentation head.

Everything here speaks to the backbone through its encoder and decoder alone: image tokens and text go in, the
decoder's output at every patch comes out, and the words' own embeddings classify it.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_ifseg import IFSegConfig
from .modeling_ofa import (
    BiasBlock,
    IFSegModel,
    IFSegPreTrainedModel,
    IFSegTable,
    cat_sequences,
    one_photo_size_at_a_time,
    resize_grid,
    resized_grid_relative_bias,
)


@dataclass
class IFSegSegmentationOutput(ModelOutput):
    """
    Args:
        loss: mean cross-entropy over the labelled pixels, with `labels` only.
        logits: (batch, categories, h, w), one prediction per patch.
        image_features: (batch, channels, h, w), what post-processing compares; `None` for word maps.
        patch_mask: bool (batch, h, w), the patches of each photo; the others are padding, zero in every output.
        encoder_last_hidden_state: (batch, h * w + tokens, d_model).
        encoder_hidden_states, encoder_attentions, decoder_hidden_states, decoder_attentions, cross_attentions: on
            request, one tensor a layer; the decoder sees `<s>` and the patches, h * w + 1 positions.
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


class IFSegSegmentationPositions(nn.Module):
    """Where the decoder's inputs lie: `<s>` in row 0, then a grid_size x grid_size grid, resized to other grids."""

    def __init__(self, config: IFSegConfig):
        super().__init__()
        self.side = config.grid_size
        self.embed_positions = IFSegTable(self.side**2 + 1, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        rows = (2 * self.side - 1) ** 2 + 3
        self.rel_pos_tables = nn.ModuleList(
            IFSegTable(rows, config.decoder_attention_heads) for _ in range(config.decoder_layers)
        )

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Normalised positions of `<s>` and a height x width grid, (1, height * width + 1, d_model)."""
        table = self.embed_positions()
        start, grid = table[:1], table[1:]
        grid = resize_grid(grid.T.unflatten(1, (self.side, self.side)), height, width).flatten(1).T
        return self.layer_norm(torch.cat([start, grid]))[None]

    def relative_bias(self, layer: int, height: int, width: int) -> list[BiasBlock]:
        """Relative biases of a layer, blocks of (heads, height * width + 1, height * width + 1)."""
        table = self.rel_pos_tables[layer]()
        return with_start_token(resized_grid_relative_bias(table[:-3], self.side, height, width), table[-3:])


def with_start_token(bias: torch.Tensor, rows: torch.Tensor) -> list[BiasBlock]:
    """Puts `<s>` before the patches of `bias` (heads, L, L): blocks of (heads, L + 1, L + 1).

    rows: (3, heads), a table's last rows: `<s>` as query, as key, as both.
    """
    start, patches = slice(0, 1), slice(1, None)
    query, key, both = rows[:, :, None, None].unbind()
    return [(patches, patches, bias), (start, patches, query), (patches, start, key), (start, start, both)]


def word_distance(words: torch.Tensor) -> torch.Tensor:
    """Root mean square distance between two different words: (batch, N, d_model) -> (batch,); 0 for a single word."""
    return (2 * words.var(1, correction=min(1, words.shape[1] - 1)).sum(-1)).sqrt()


class IFSegForSemanticSegmentation(IFSegPreTrainedModel):
    """Segments a photo, or an artificial image made of words, into categories that are named by words.

    The decoder reads `<s>` and the encoder's output of every patch in one pass (section 2.2 of the paper); its output
    before each patch is compared with the mean sub-word embedding of every category.
    """

    main_input_name = "pixel_values"

    def __init__(self, config: IFSegConfig):
        super().__init__(config)
        config.check_words()
        self.model = IFSegModel(config)
        if config.decoder_positions == "segmentation":
            self.segmentation_positions = IFSegSegmentationPositions(config)
        self.post_init()

    # Words ------------------------------------------------------------------------------------------------------------

    def set_words(
        self,
        id2label: dict[int, str],
        category_ids: list[list[int]],
        prompt_ids: list[int],
        prompt: str | None = None,
        word_ids: list[list[int]] | None = None,
        word_categories: list[int] | None = None,
    ):
        """Makes these the model's own words, which it uses when none are passed and saves with its weights.

        Args:
            id2label: names of the N categories by index.
            category_ids: sub-words of each category; prompt_ids: the whole prompt; prompt: its wording.
            word_ids, word_categories: sub-words of each fine word of a hierarchical vocabulary, and the index of the
                category that it belongs to. Word maps are then made of these words.

        Raises `ValueError` where they contradict each other.
        """
        config = copy.copy(self.config)
        config.id2label, config.category_ids = id2label, category_ids
        config.prompt, config.prompt_ids = prompt, prompt_ids
        config.word_ids, config.word_categories = word_ids, word_categories
        config.check_words()
        self.config.__dict__.update(config.__dict__)

    def _padded(self, rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sub-words (1, N, K) padded to the longest, and their mask."""
        longest = max(map(len, rows))
        ids = [row + [self.config.pad_token_id] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return torch.tensor([ids], device=device), torch.tensor([mask], device=device)

    def embed_words(self, word_ids: torch.Tensor, word_mask: torch.Tensor) -> torch.Tensor:
        """E_c, the mean embedding of each word's sub-words: (batch, N, K) ids and mask -> (batch, N, d_model).

        A row without sub-words becomes zero.
        """
        embeds = self.get_input_embeddings()(word_ids)
        mask = word_mask[..., None].to(embeds)
        return (embeds * mask).sum(2) / mask.sum(2).clamp(min=1)

    def _words(self, input_ids, category_ids, category_mask, device):
        """The words passed, or else the configuration's: prompt, sub-words of the categories and their mask."""
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
            category_ids, category_mask = self._padded(config.category_ids, device)
        elif category_mask is None:
            category_mask = category_ids != config.pad_token_id
        return input_ids, category_ids, category_mask

    def _artificial_image(self, word_map: torch.Tensor, categories: torch.Tensor, own_words: bool) -> torch.Tensor:
        """Image tokens (batch, h, w, d_model) of a word map (batch, h, w): each patch is its word's embedding.

        In training with `word_noise`, Gaussian noise is added.
        """
        words = categories
        if own_words and self.config.word_ids is not None:
            words = self.embed_words(*self._padded(self.config.word_ids, word_map.device))
        word_map = word_map.to(words.device).long()
        if words.shape[0] == 1:
            patches = words[0][word_map]
        else:
            patches = torch.stack([row[places] for row, places in zip(words, word_map, strict=True)])
        if self.training and self.config.word_noise:
            scale = self.config.word_noise * word_distance(words.detach())
            patches = patches + scale[:, None, None, None] * torch.randn_like(patches)
        return patches

    # Training ---------------------------------------------------------------------------------------------------------

    def freeze_for_word_maps(self):
        """Leaves trainable what image-free training updates (section 3 of the paper, the published settings).

        Frozen are the trunk, `image_proj` and the word embeddings, and whatever takes no part in segmentation.
        """
        encoder, decoder = self.model.encoder, self.model.decoder
        unused = [
            decoder.embed_positions,
            decoder.embed_image_positions,
            decoder.pos_ln,
            decoder.image_pos_ln,
            decoder.code_layernorm_embedding,
            decoder.token_rel_pos_table_list,
        ]
        if self.config.decoder_positions == "segmentation":
            unused.append(decoder.image_rel_pos_table_list)
        for module in [encoder.embed_images, encoder.image_proj, encoder.embed_tokens, decoder.embed_tokens, *unused]:
            module.requires_grad_(False)

    # Forward ----------------------------------------------------------------------------------------------------------

    def _decoder_positions(self, height: int, width: int) -> torch.Tensor:
        """Normalised positions of `<s>` and the patches, (1, height * width + 1, d_model)."""
        if self.config.decoder_positions == "segmentation":
            return self.segmentation_positions(height, width)
        encoder = self.model.encoder
        start = encoder.embed_image_positions()[:1]
        grid = encoder.image_positions(height, width, interpolate=True)
        return encoder.image_pos_ln(torch.cat([start, grid]))[None]

    def _decoder_relative_bias(self, layer: int, height: int, width: int) -> list[BiasBlock]:
        """Relative biases of a decoder layer, blocks of (heads, height * width + 1, height * width + 1)."""
        if self.config.decoder_positions == "segmentation":
            return self.segmentation_positions.relative_bias(layer, height, width)
        decoder = self.model.decoder
        bias = decoder.image_relative_bias(layer, height, width, interpolate=True)
        return with_start_token(bias, decoder.image_rel_pos_table_list[layer]()[-3:])

    @one_photo_size_at_a_time
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> IFSegSegmentationOutput:
        r"""
        Args:
            pixel_values: (batch, 3, H, W), mean 0.5 and standard deviation 0.5 taken off.
            pixel_mask: (batch, H, W), 1 inside each photo of a padded batch.
            word_map: (batch, h, w), the word of each patch of an artificial image, in place of `pixel_values`: an
                index into the categories or, where the configuration is hierarchical, into its fine words.
            input_ids: (1 or batch, tokens), the prompt; attention_mask: the same shape, 0 where it is padding.
            category_ids: (1 or batch, categories, sub-words) and category_mask of the same shape. Categories without
                sub-words are never predicted. Without prompt and categories, the configuration's words are used.
            labels: (batch, H, W), category of each pixel, -100 ignored; their size may differ from the photo's.
        """
        if (pixel_values is None) == (word_map is None):
            raise ValueError("Pass either pixel_values (photos) or word_map (artificial images).")
        image = pixel_values if word_map is None else word_map
        own_words = category_ids is None
        input_ids, category_ids, category_mask = self._words(input_ids, category_ids, category_mask, image.device)
        categories = self.embed_words(category_ids, category_mask)
        image_embeds = None if word_map is None else self._artificial_image(word_map, categories, own_words)

        encoder_outputs = self.model.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_embeds=image_embeds,
            interpolate_pos_encoding=True,
            **kwargs,
        )
        height, width = encoder_outputs.patch_mask.shape[1:]
        patches = encoder_outputs.last_hidden_state[:, : height * width]
        tables = self.model.decoder.image_rel_pos_table_list
        if self.config.decoder_positions == "segmentation":
            tables = self.segmentation_positions.rel_pos_tables
        start = torch.full((len(patches), 1), self.config.decoder_start_token_id, device=patches.device)
        decoder_outputs = self.model.decoder(
            inputs_embeds=cat_sequences([self.get_input_embeddings()(start), patches]),
            position_embeddings=self._decoder_positions(height, width),
            grid=(height, width),
            relative_bias=lambda layer: self._decoder_relative_bias(layer, height, width),
            relative_tables=[table() for table in tables],
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=encoder_outputs.attention_mask,
            encoder_position_embeddings=encoder_outputs.position_embeddings,
            use_cache=False,
            **kwargs,
        )
        # output i has read the patches before i, and all of them through cross-attention: it is patch i's prediction
        predictions = decoder_outputs.last_hidden_state[:, :-1]
        logits = (
            (predictions @ categories.to(predictions.device).transpose(1, 2))
            .transpose(1, 2)
            .unflatten(2, (height, width))
        )
        absent = ~category_mask.to(logits.device).bool().any(2)
        logits = logits.masked_fill(absent[:, :, None, None], torch.finfo(logits.dtype).min)

        return IFSegSegmentationOutput(
            loss=None if labels is None else segmentation_loss(logits, labels),
            logits=logits,
            image_features=encoder_outputs.image_features,
            patch_mask=encoder_outputs.patch_mask,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
        )

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, IFSegSegmentationPositions):
            for embedding in [module.embed_positions, *module.rel_pos_tables]:
                init.normal_(embedding.weight, std=0.02)


def _linear_weights(size: int, new_size: int) -> torch.Tensor:
    """What each of `size` values counts for in each of `new_size` linearly resized ones, (new_size, size), float64."""
    basis = torch.eye(size, dtype=torch.float64, device="cpu")
    return nn.functional.interpolate(basis[None], size=new_size, mode="linear", align_corners=False)[0].T


class _ResizedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over the pixels of resized logits, and its gradient, a few rows of pixels at a time.

    At no time is there a (batch, categories, H, W) tensor: for 171 categories that would be gigabytes. Both directions
    of the bilinear resizing are matrix products, and so are their gradients.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        categories, h, w = logits.shape[1:]
        height, width = labels.shape[1:]
        to_rows, to_columns = _linear_weights(h, height), _linear_weights(w, width).T.to(logits)
        # on a CPU a block should stay in the cache, on a GPU it should fill the machine
        limit = 2**19 if logits.device.type == "cpu" else 2**24
        blocks = []
        for rows in to_rows.split(max(1, limit // (categories * width))):
            used = rows.any(0).nonzero()
            source = slice(int(used[0]), int(used[-1]) + 1)  # the few rows of logits that these rows of pixels need
            blocks.append((source, rows[:, source].to(logits)))

        loss = logits.new_zeros(())
        gradient = torch.zeros_like(logits)
        for i in range(len(logits)):
            wide = (logits[i] @ to_columns).transpose(0, 1).flatten(1)  # (h, categories * width)
            wide_gradient = torch.zeros_like(wide)
            pixels = labels[i].split([len(rows) for _, rows in blocks])
            for (source, rows), target in zip(blocks, pixels, strict=True):
                known = (target != -100)[:, None]
                target = target[:, None].where(known, 0)
                scores = (rows @ wide[source]).unflatten(1, (categories, width)).log_softmax(1)
                loss -= scores.gather(1, target).where(known, 0).sum()
                if ctx.needs_input_grad[0]:
                    scores.exp_().scatter_add_(1, target, scores.new_full((), -1).expand(target.shape))
                    wide_gradient[source] += rows.T @ (scores * known).flatten(1)
            gradient[i] = wide_gradient.unflatten(1, (categories, width)).transpose(0, 1) @ to_columns.T
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits (batch, categories, h, w), resized bilinearly to labels (batch, H, W).

    Pixels labelled -100 do not count. Computed in float32, or in float64 if the logits are.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.to(logits.device).long()
    with torch.autocast(logits.device.type, enabled=False):
        return _ResizedCrossEntropy.apply(logits, labels) / (labels != -100).sum()


__all__ = ["IFSegForSemanticSegmentation", "IFSegSegmentationOutput"]
