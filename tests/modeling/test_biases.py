"""Attention biases: computed once a grid in evaluation, and never used with other weights than their own."""

import copy
import pickle

import pytest
import torch
from checkpoints import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ifseg_hf.modeling.positions_ofa import GridBias, add_blocks, resize_grid

IMAGE = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))
WORD_MAP = torch.arange(16).view(1, 4, 4) % 3


@torch.no_grad()
def segment(model: nn.Module, image: torch.Tensor = IMAGE, **kwargs) -> torch.Tensor:
    return model(pixel_values=image, **kwargs).logits


def forget(model: nn.Module) -> nn.Module:
    for stack in (model.backbone.model.encoder, model.backbone.model.decoder):
        stack.bias_cache.clear()
    return model


def kept(model: nn.Module) -> list[torch.Tensor]:
    stacks = (model.backbone.model.encoder, model.backbone.model.decoder)
    return [bias for stack in stacks for _, biases in stack.bias_cache.entries.values() for bias in biases.values()]


@pytest.mark.parametrize(("side", "spare", "height", "width"), [(4, 0, 4, 6), (4, 2, 7, 3), (3, 1, 1, 5), (5, 0, 2, 2)])
def test_resized_biases_are_two_bilinear_resizings(side, spare, height, width):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn((2 * (side + spare) - 1) ** 2, 2, dtype=torch.float64, generator=generator)
    expected = GridBias.from_table(table, side, side).whole()
    expected = resize_grid(expected.unflatten(2, (side, side)), height, width).flatten(2).transpose(1, 2)
    expected = resize_grid(expected.unflatten(2, (side, side)), height, width).flatten(2).transpose(1, 2)
    torch.testing.assert_close(GridBias.from_table(table, height, width, side).whole(), expected)


@pytest.mark.parametrize("positions", ["segmentation", "image"])
def test_a_second_image_computes_no_bias(positions, monkeypatch):
    model = small_model(decoder_positions=positions)
    first = segment(model)
    before = kept(model)
    assert len(before) == 2 + 2 + 1  # two encoder layers, two decoder layers, cross-attention
    monkeypatch.setattr(GridBias, "from_table", None)
    assert torch.equal(segment(model), first)
    assert all(a is b for a, b in zip(kept(model), before, strict=True))


@pytest.mark.parametrize("positions", ["segmentation", "image"])
@pytest.mark.parametrize("through_data", [False, True])
def test_changed_weights_change_the_biases(positions, through_data):
    """Every weight that positions depend on, changed in place, with and without torch's noticing (`.data`)."""
    model = small_model(decoder_positions=positions)
    segment(model)
    marks = ("pos_q_linear", "pos_k_linear", "rel_pos_table", "embed_positions", "embed_image_positions", "_pos_ln")
    names = [name for name, _ in model.named_parameters() if any(mark in name for mark in marks)]
    assert len(names) > 20
    changed = 0
    for name in names:
        parameter = model.get_parameter(name)
        before = segment(model)
        if through_data:
            parameter.data.add_(torch.randn_like(parameter))
        else:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))
        after = segment(model)
        assert torch.equal(after, segment(forget(model))), name
        changed += not torch.equal(after, before)
    assert changed > 15  # the others belong to text generation


def test_training_and_loading_change_the_biases():
    model, other = small_model(), small_model()
    segment(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(other.state_dict())
    assert torch.equal(segment(model), segment(other))

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    segment(model)
    model(
        word_map=WORD_MAP, labels=WORD_MAP
    ).loss.backward()  # in evaluation mode, so that nothing else clears the biases
    optimizer.step()
    assert torch.equal(segment(model), segment(forget(model)))


def test_biases_that_are_trained_are_not_kept():
    model = small_model()
    model(word_map=WORD_MAP, labels=WORD_MAP).loss.backward()
    assert not kept(model)
    segment(model)
    assert kept(model)
    model.train()
    assert not kept(model)


def test_grids_words_and_types_do_not_mix():
    model = small_model()
    images = {size: torch.randn(1, 3, *size) for size in [(48, 80), (80, 48), (64, 64)]}
    prompts = {n: {"input_ids": torch.arange(n)[None], "category_ids": torch.tensor([[[5], [8]]])} for n in (5, 9)}
    masked = {**prompts[9], "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])}
    calls = [(image, words) for image in images.values() for words in (*prompts.values(), masked, {})]
    expected = [segment(forget(model), image, **words) for image, words in calls]
    for _ in range(2):
        for (image, words), logits in zip(calls, expected, strict=True):
            assert torch.equal(segment(model, image, **words), logits)
    assert model.double().dtype == torch.float64
    assert not kept(model)
    torch.testing.assert_close(segment(model), segment(small_model()).double(), atol=1e-4, rtol=0)
    with torch.inference_mode():
        segment(model)
    assert model(pixel_values=IMAGE.double().requires_grad_()).logits.sum().backward() is None


def test_memory_is_bounded():
    model = small_model()
    segment(model)
    for stack in (model.backbone.model.encoder, model.backbone.model.decoder):
        stack.bias_cache.limit = int(1.5 * stack.bias_cache.nbytes)
    expected = [segment(forget(small_model()), torch.ones(1, 3, *size)) for size in [(48, 80), (80, 48), (160, 160)]]
    for _ in range(2):
        for size, logits in zip([(48, 80), (80, 48), (160, 160)], expected, strict=True):
            assert torch.equal(segment(model, torch.ones(1, 3, *size)), logits)
            assert len(model.backbone.model.encoder.bias_cache.entries) == 1  # one fits, the large one never


def test_a_batch_shares_biases_and_copies_have_none():
    model = small_model()
    mask = torch.ones(1, len(model.config.prompt_ids), dtype=torch.long)
    segment(model, IMAGE.expand(4, -1, -1, -1), attention_mask=mask)
    assert {len(bias) for bias in kept(model)} == {1}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not kept(other)
        assert torch.equal(segment(other), segment(model))
    assert not any("bias_cache" in name for name in model.state_dict())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 2))
def test_biases_added_line_by_line_are_the_whole_ones(side, height, width, batch):
    """A grid of the table's size, one whose columns alone are resized (height == side), and others; with gradients."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn((2 * side - 1) ** 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    size = height * width + 2
    bias, weights = torch.randn(2, batch, 2, size, size, dtype=torch.float64, generator=generator)
    bias.requires_grad_()
    patches = slice(1, 1 + height * width)
    results = []
    for whole in (False, True):
        grid = GridBias.from_table(table, height, width, side)
        total = add_blocks(bias, [(patches, patches, grid.whole() if whole else grid)])
        results.append((total, *torch.autograd.grad((total * weights).sum(), [table, bias])))
    for line_by_line, expected in zip(*results, strict=True):
        torch.testing.assert_close(line_by_line, expected)


def test_a_bias_that_is_no_longer_needed_is_reused_where_no_gradient_is():
    bias, block = torch.randn(1, 2, 5, 5), torch.randn(2, 3, 4)
    places = [(slice(2, 5), slice(0, 4), block)]
    expected = add_blocks(bias, places)
    assert add_blocks(bias.clone().requires_grad_(), places, reuse=True).grad_fn is not None
    with torch.no_grad():
        assert add_blocks(bias, places).data_ptr() != bias.data_ptr()
        found = add_blocks(bias, places, reuse=True)
    assert found.data_ptr() == bias.data_ptr()
    assert torch.equal(found, expected)
