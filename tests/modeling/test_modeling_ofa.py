"""The backbone's parts against the formulas they implement, and generation."""

import math

import pytest
import torch
from checkpoints import IMAGE_SIZES, SMALL, padded_images, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ifseg_hf.modeling import OFAConfig, OFAForConditionalGeneration, OFAModel, attention_ofa
from ifseg_hf.modeling.attention_ofa import BlockwiseAttention
from ifseg_hf.modeling.image_batches import image_sizes
from ifseg_hf.modeling.layers_ofa import drop_path
from ifseg_hf.modeling.modeling_ofa import CACHE
from ifseg_hf.modeling.positions_ofa import GridBias, add_blocks, text_relative_bias


@pytest.fixture(scope="module")
def generator_model():
    torch.manual_seed(0)
    return OFAForConditionalGeneration(OFAConfig(**SMALL)).eval()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))
def test_relative_bias_of_a_grid(height, width, spare):
    side = max(height, width) + spare
    table = torch.randn((2 * side - 1) ** 2, 2)
    bias = GridBias.from_table(table, height, width).whole()
    for i in range(height * width):
        for j in range(height * width):
            dy, dx = i // width - j // width, i % width - j % width
            assert torch.equal(bias[:, i, j], table[(dy + side - 1) * (2 * side - 1) + dx + side - 1])


@pytest.mark.parametrize("length", [1, 50, 300, 1024])
def test_text_relative_bias(length):
    mid, size = 128, 256
    table = torch.arange(2.0 * size - 1)[:, None]
    bias = text_relative_bias(table, 0, length)[0]
    for i, j in {(0, 0), (0, length - 1), (length - 1, 0), (length // 2, length // 7), (length - 1, length // 3)}:
        r = i - j
        bucket = r
        if abs(r) > mid:
            bucket = int(math.copysign(math.ceil(math.log(abs(r) / mid) / math.log(1023 / mid) * (mid - 1)) + mid, r))
        assert bias[i, j] == bucket + size - 1
    assert torch.equal(text_relative_bias(table, length // 2, length)[0], bias[length // 2 :])


def test_the_longest_distance_is_in_the_table_however_logarithms_round(monkeypatch):
    log = torch.log
    monkeypatch.setattr(torch, "log", lambda x: log(x).nextafter(torch.tensor(torch.inf)))
    table = torch.arange(511.0)[:, None]
    bias = text_relative_bias(table, 1023, 1024)[0, 0]
    assert bias[0] == 510
    assert bias[-1] == 255


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
    st.integers(1, 7),
    st.integers(1, 7),
    st.booleans(),
    st.integers(1, 120),
    st.integers(1, 8),
    st.booleans(),
)
def test_blockwise_attention_is_the_plain_formula(
    batch, heads, shared, queries, keys, causal, limit, products, recompute
):
    """Values and gradients, in blocks of any size, with a bias for all images or one for each."""
    keys = queries if causal else keys
    generator = torch.Generator().manual_seed(batch + 10 * queries + 100 * keys)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    query, key, value = (random(batch, length, heads, 4).transpose(1, 2) for length in (queries, keys, keys))
    bias = random(1 if shared else batch, heads, queries, keys)
    later = torch.ones(queries, keys).triu(1).bool() & causal
    upstream = random(batch, heads, queries, 4).detach()

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        return [output, *torch.autograd.grad(output, (query, key, value, bias), upstream)]

    def masked() -> torch.Tensor:
        return bias.masked_fill(later, torch.finfo(bias.dtype).min)

    expected = gradients((0.3 * query @ key.transpose(2, 3) + masked()).softmax(3) @ value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_ofa, "LOGITS_IN_BLOCK", limit)
        patch.setattr(attention_ofa, "PRODUCTS_IN_BLOCK", products)
        if recompute:
            patch.setattr(attention_ofa, "KEPT_WEIGHTS", 0)
        actual = gradients(BlockwiseAttention.apply(query, key, value, masked(), 0.3, causal))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("batch", [1, 2])
def test_add_blocks(batch):
    """A part of the bias and a value for all of another, with the gradients of adding in place."""

    def sums(add) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((batch, 3, 5, 4), (3, 2, 4), (3, 1, 1))
        tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        total = add(*tensors)
        return [total, *torch.autograd.grad(total.square().sum(), tensors)]

    def in_place(bias, block, value):
        bias = bias.clone()
        bias[:, :, 3:] += block
        bias[:, :, :3, :1] += value
        return bias

    def in_blocks(bias, block, value):
        return add_blocks(bias, [(slice(3, None), slice(None), block), (slice(3), slice(0, 1), value)])

    for one, other in zip(sums(in_blocks), sums(in_place), strict=True):
        torch.testing.assert_close(one, other)


def test_image_sizes():
    _, _, pixel_mask = padded_images()
    assert image_sizes(pixel_mask) == IMAGE_SIZES


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 3, 2), 0.25, training=True)
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(dropped.amax((1, 2)), dropped.amin((1, 2)))
    assert torch.equal(drop_path(torch.ones(2, 3), 0.25, training=False), torch.ones(2, 3))


def test_stochastic_depth_rises_linearly():
    model = OFAModel(OFAConfig(**{**SMALL, "encoder_layers": 3, "drop_path_rate": 0.2}))
    assert [layer.drop_path_rate for layer in model.encoder.layers] == pytest.approx([0, 0.1, 0.2])


def test_trunk_is_a_sixteenth_rounded_up(generator_model):
    features = generator_model.model.encoder.embed_images(torch.zeros(1, 3, 33, 50))
    assert features.shape == (1, 16, 3, 4)
    with pytest.raises(ValueError, match=r"\(batch, 3, H, W\)"):
        generator_model.model.encoder.embed_images(torch.zeros(1, 1, 32, 32))


def test_trunk_statistics_never_move(generator_model):
    trunk = generator_model.model.encoder.embed_images
    before = {name: tensor.clone() for name, tensor in trunk.named_buffers()}
    trunk.train()
    trunk(torch.randn(2, 3, 64, 64))
    trunk.eval()
    assert before
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.named_buffers())


def test_embeddings_are_shared(generator_model):
    weights = {
        generator_model.lm_head.weight.data_ptr(),
        generator_model.model.decoder.embed_tokens.weight.data_ptr(),
        generator_model.get_input_embeddings().weight.data_ptr(),
    }
    assert len(weights) == 1


@torch.no_grad()
def test_images_of_several_sizes_are_as_alone(generator_model):
    images, pixel_values, pixel_mask = padded_images()
    ids = torch.tensor([[0, 5, 6, 2]])
    together = generator_model(
        input_ids=ids.expand(4, -1),
        pixel_values=pixel_values,
        pixel_mask=pixel_mask,
        decoder_input_ids=ids.expand(4, -1),
    )
    for i, image in enumerate(images):
        alone = generator_model(input_ids=ids, pixel_values=image[None], decoder_input_ids=ids)
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padded_text_is_as_alone(generator_model):
    image = torch.randn(1, 3, 64, 64)
    short, long = torch.tensor([[0, 5, 2]]), torch.tensor([[0, 5, 2, 1, 1]])
    start = torch.tensor([[0, 7]])
    alone = generator_model(input_ids=short, pixel_values=image, decoder_input_ids=start).logits
    padded = generator_model(
        input_ids=long, attention_mask=(long != 1).long(), pixel_values=image, decoder_input_ids=start
    ).logits
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_generation_is_the_argmax_of_full_passes(generator_model):
    _, pixel_values, pixel_mask = padded_images()
    inputs = {"input_ids": torch.tensor([[0, 5, 6, 2]] * 4), "pixel_values": pixel_values, "pixel_mask": pixel_mask}
    written = generator_model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for step in range(1, 7):
        logits = generator_model(**inputs, decoder_input_ids=written[:, :step]).logits[:, -1]
        assert torch.equal(logits.argmax(-1), written[:, step])


@torch.no_grad()
def test_beam_search_finds_a_likelier_text_than_greedy(generator_model):
    inputs = {"input_ids": torch.tensor([[0, 5, 6, 2]]), "pixel_values": padded_images()[0][0][None]}

    def likelihood(sequence):
        logits = generator_model(**inputs, decoder_input_ids=sequence[:, :-1]).logits.log_softmax(-1)
        return logits.gather(2, sequence[:, 1:, None]).sum().item()

    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    beams = generator_model.generate(**inputs, **settings, num_beams=8, num_return_sequences=2)
    assert beams.shape == (2, 5)
    assert likelihood(beams[:1]) >= likelihood(generator_model.generate(**inputs, **settings)) - 1e-5
    assert likelihood(beams[:1]) >= likelihood(beams[1:])


def test_captions_can_be_learnt(generator_model):
    """Loss from labels alone: shifted into the decoder's input, -100 ignored."""
    torch.manual_seed(0)
    model = OFAForConditionalGeneration(
        OFAConfig(**SMALL, dropout=0.0, encoder_drop_path_rate=0.0, decoder_drop_path_rate=0.0)
    )
    inputs = {"input_ids": torch.tensor([[0, 5, 2]] * 2), "pixel_values": torch.randn(2, 3, 32, 32)}
    labels = torch.tensor([[10, 11, 2], [12, 2, -100]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), torch.tensor([[0, 10, 11], [0, 12, 2]]))


def test_limits_are_named(generator_model):
    with pytest.raises(ValueError, match="65 tokens; this model has positions for 64"):
        generator_model(input_ids=torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="9 x 2 patches"):
        generator_model(input_ids=torch.zeros(1, 3, dtype=torch.long), pixel_values=torch.zeros(1, 3, 144, 32))
    with pytest.raises(ValueError, match="pixel_mask has shape"):
        generator_model(pixel_values=torch.zeros(1, 3, 32, 32), pixel_mask=torch.ones(1, 16, 16))
    with pytest.raises(ValueError, match="not both"):
        generator_model(pixel_values=torch.zeros(1, 3, 32, 32), image_embeds=torch.zeros(1, 2, 2, 16))


@torch.no_grad()
def test_the_cache_has_the_name_of_any_version_of_transformers():
    """Since transformers 5.24 generation passes it as `cache`, before as `past_key_values`."""
    model = OFAForConditionalGeneration(small_model().config.backbone_config).eval()
    inputs = {"input_ids": torch.tensor([[0, 5, 6, 2]]), "pixel_values": torch.zeros(1, 3, 64, 64)}
    tokens = torch.tensor([[0, 7, 8]])
    expected = model(**inputs, decoder_input_ids=tokens).logits[:, -1]
    for name in ("cache", "past_key_values"):
        first = model(**inputs, decoder_input_ids=tokens[:, :2], use_cache=True)
        assert first[CACHE].get_seq_length() == 2
        last = model(**inputs, decoder_input_ids=tokens[:, 2:], use_cache=True, **{name: first[CACHE]})
        torch.testing.assert_close(last.logits[:, -1], expected)
