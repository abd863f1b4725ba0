"""Biases of large grids in blocks of queries: the same outputs and gradients as with the whole bias."""

import pytest
import torch
from checkpoints import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ifseg_hf.modeling import attention_ofa, blockwise_bias_ofa, modeling_ofa
from ifseg_hf.modeling.blockwise_bias_ofa import BlockwiseBias
from ifseg_hf.modeling.positions_ofa import GridBias

PROMPTS = {
    "own words": {},
    "padded prompt": {
        "input_ids": torch.arange(9)[None].repeat(2, 1),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
        "category_ids": torch.tensor([[[5], [8]]]),
    },
}


def outputs_and_gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


@pytest.fixture
def in_blocks(monkeypatch):
    """A function that makes every bias one in blocks, and counts them."""
    made = []

    def enable():
        monkeypatch.setattr(blockwise_bias_ofa, "LARGEST_BIAS", 0)
        attention = BlockwiseBias.attention
        monkeypatch.setattr(BlockwiseBias, "attention", lambda *args: (made.append(args), attention(*args))[1])
        return made

    return enable


def run_as_on_a_gpu(monkeypatch):
    for module in (attention_ofa, blockwise_bias_ofa):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_lines_of_a_grid_are_the_resized_biases(side, spare, height, width, causal):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn((2 * (side + spare) - 1) ** 2, 3, dtype=torch.float64, generator=generator)
    grid = GridBias.from_table(table, height, width, side)
    expected = grid.whole()
    for y in range(height):
        lines = y + 1 if causal else height
        bias = grid.line(y, lines, slice(1, 3))
        queries = slice(y * width, (y + 1) * width)
        torch.testing.assert_close(bias, expected[1:, queries, : lines * width])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2), st.integers(1, 7), st.integers(1, 7), st.data())
def test_several_lines_of_a_grid_are_its_lines(side, spare, height, width, data):
    first = data.draw(st.integers(0, height - 1))
    stop, key_lines = data.draw(st.integers(first + 1, height)), data.draw(st.integers(1, height))
    generator = torch.Generator().manual_seed(0)
    table = torch.randn((2 * (side + spare) - 1) ** 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    grid = GridBias.from_table(table, height, width, side)
    heads = slice(1, 3)
    part = grid.part(first, stop, key_lines, heads)
    lines = torch.cat([grid.line(y, key_lines, heads) for y in range(first, stop)], dim=1)
    torch.testing.assert_close(part, lines)
    weights = torch.randn(part.shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad((x * weights).sum(), table, retain_graph=True)[0] for x in (part, lines)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("positions", ["segmentation", "image"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_outputs_and_gradients_equal_those_of_the_whole_bias(device, positions, prompt, in_blocks, monkeypatch):
    model = small_model(decoder_positions=positions)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 160, 112, generator=generator)
    inputs = {
        "pixel_values": images,
        "pixel_mask": torch.ones(2, 160, 112).index_fill(2, torch.arange(80, 112), 0),
        "labels": torch.randint(0, 2, (2, 160, 112), generator=generator),
        **PROMPTS[prompt],
    }
    expected = outputs_and_gradients(model, **inputs)
    made = in_blocks()
    if device == "gpu":  # several lines in a block, as on a GPU
        run_as_on_a_gpu(monkeypatch)
        monkeypatch.setattr(blockwise_bias_ofa, "LOGITS_IN_GPU_BLOCK", 2**13)
    found = outputs_and_gradients(model, **inputs)
    assert len(made) >= 2 + 2 + 2  # two layers of the encoder, two of the decoder with cross-attention
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_large_image_has_no_whole_bias(in_blocks, monkeypatch):
    """No tensor of all heads, patches and patches is made, and none is cached."""
    model, image = small_model(), torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=image).logits
        for stack in (model.backbone.model.encoder, model.backbone.model.decoder):
            stack.bias_cache.clear()
        in_blocks()
        monkeypatch.setattr("ifseg_hf.modeling.modeling_ofa.add_blocks", None)
        monkeypatch.setattr("ifseg_hf.modeling.modeling_ofa.masked_bias", None)
        found = model(pixel_values=image).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not model.backbone.model.encoder.bias_cache.entries


@pytest.mark.parametrize(("case", "biases"), [("fused", 2), ("eager", 3), ("checkpointed", 3)])
def test_cross_attention_has_no_whole_bias_in_training_on_a_gpu(case, biases, monkeypatch):
    model = small_model().train()
    if case == "eager":
        model.set_attn_implementation("eager")
    inputs = {"word_map": torch.arange(24).reshape(1, 4, 6) % 2, "labels": torch.zeros(1, 8, 12, dtype=torch.long)}
    torch.manual_seed(0)
    expected = outputs_and_gradients(model, **inputs)
    run_as_on_a_gpu(monkeypatch)
    if case == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    whole, masked_bias = [], modeling_ofa.masked_bias
    monkeypatch.setattr(modeling_ofa, "masked_bias", lambda *args: (whole.append(args), masked_bias(*args))[1])
    torch.manual_seed(0)
    found = outputs_and_gradients(model, **inputs)
    assert len(whole) == biases  # of the encoder, the decoder and, unless it is fused, cross-attention
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_eager_attention_has_the_weights_of_all_queries(in_blocks):
    model = small_model()
    model.set_attn_implementation("eager")
    made = in_blocks()
    encoded = model.backbone.model.encoder(
        pixel_values=torch.zeros(1, 3, 96, 96), interpolate_pos_encoding=True, output_attentions=True
    )
    assert encoded.attentions[0].shape[2:] == (36, 36)
    assert not made


def test_dropout_and_autocast_run_in_blocks(in_blocks):
    model = small_model(attention_dropout=0.5).train()
    inputs = {"pixel_values": torch.ones(1, 3, 96, 96), "labels": torch.zeros(1, 96, 96, dtype=torch.long)}
    assert in_blocks() == []
    torch.manual_seed(0)
    first = outputs_and_gradients(model, **inputs)
    torch.manual_seed(0)
    again = outputs_and_gradients(model, **inputs)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.eval()(pixel_values=inputs["pixel_values"]).logits
    assert logits.isfinite().all()


def test_a_bias_moves_between_devices():
    grid = GridBias(torch.ones(2, 2, 3, 2), torch.ones(3, 2, 2))
    positions = torch.ones(1, 2, 4, 8)
    bias = BlockwiseBias(positions, positions, 2, 2, grid, blocks=[(slice(0, 1), slice(0, 1), positions)])
    moved = bias.to("meta")
    tensors = [moved.query_positions, moved.key_positions, moved.grid.lines, moved.grid.columns, moved.blocks[0][2]]
    assert all(x.device.type == "meta" for x in tensors)
