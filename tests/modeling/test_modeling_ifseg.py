"""The segmentation model: words, word maps, images of any size, and the habits of transformers models."""

import io

import pytest
import torch
from checkpoints import SMALL, WORDS, padded_images, small_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForSemanticSegmentation

from ifseg_hf.modeling import (
    IFSegConfig,
    IFSegForSemanticSegmentation,
    OFAConfig,
    OFAForConditionalGeneration,
    OFAModel,
    attention_ofa,
)
from ifseg_hf.modeling.loss_ifseg import LabelCheck, segmentation_loss
from ifseg_hf.modeling.positions_ofa import GridBias, add_blocks, resize_grid


@pytest.fixture(scope="module")
def model():
    return small_model()


def word_maps(batch=2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    word_map = torch.randint(0, 3, (batch, 4, 4), generator=generator)
    return {"word_map": word_map, "labels": word_map.repeat_interleave(16, 1).repeat_interleave(16, 2)}


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (40, 100), (33, 31), (300, 500), (32, 2048), (2048, 32)])
def test_images_of_any_size(model, size):
    output = model(pixel_values=torch.randn(1, 3, *size))
    grid = (-(-size[0] // 16), -(-size[1] // 16))
    assert output.logits.shape == (1, 3, *grid)
    assert output.image_features.shape == (1, 16, *grid)
    assert output.logits.isfinite().all()
    assert output.patch_mask.all()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_images_of_several_sizes_are_as_alone(attention):
    model = small_model()
    model.set_attn_implementation(attention)
    images, pixel_values, pixel_mask = padded_images()
    labels = torch.where(pixel_mask.bool(), 1, -100)
    together = model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels, output_hidden_states=True)
    losses, pixels = 0, 0
    for i, image in enumerate(images):
        own = torch.ones(1, *image.shape[1:], dtype=torch.long)
        alone = model(pixel_values=image[None], labels=own)
        height, width = alone.logits.shape[2:]
        torch.testing.assert_close(together.logits[i, :, :height, :width], alone.logits[0], atol=1e-5, rtol=0)
        assert together.patch_mask[i].sum() == height * width
        assert not together.logits[i, :, ~together.patch_mask[i]].any()
        losses, pixels = losses + alone.loss * own.numel(), pixels + own.numel()
    torch.testing.assert_close(together.loss, losses / pixels)
    assert together.encoder_hidden_states[0].shape == (4, 4 * 5 + 8, 16)
    assert isinstance(model(pixel_values=pixel_values, pixel_mask=pixel_mask, return_dict=False), tuple)


@torch.no_grad()
def test_a_padded_batch_of_one_size(model):
    image = torch.randn(2, 3, 32, 48)
    padded = nn.functional.pad(image, (0, 16, 0, 32))
    mask = nn.functional.pad(torch.ones(2, 32, 48), (0, 16, 0, 32))
    torch.testing.assert_close(
        model(pixel_values=padded, pixel_mask=mask).logits, model(pixel_values=image).logits, atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_words_at_call_time(model):
    image = torch.randn(2, 3, 32, 32)
    own = model(pixel_values=image).logits
    ids = torch.tensor([[[5, 1], [6, 7], [8, 1]]])
    passed = model(pixel_values=image, input_ids=torch.tensor([WORDS["prompt_ids"]]), category_ids=ids).logits
    torch.testing.assert_close(passed, own)

    # other words for the second image, which has one fewer
    ids = torch.tensor([[[5, 1], [6, 7], [8, 1]], [[20, 21], [22, 1], [1, 1]]])
    mask = torch.tensor([[[1, 0], [1, 1], [1, 0]], [[1, 1], [1, 0], [0, 0]]])
    prompts = torch.tensor([[*WORDS["prompt_ids"]], [0, 9, 10, 20, 21, 22, 2, 1]])
    both = model(
        pixel_values=image,
        input_ids=prompts,
        attention_mask=(prompts != 1).long(),
        category_ids=ids,
        category_mask=mask,
    ).logits
    torch.testing.assert_close(both[0], own[0], atol=1e-5, rtol=0)
    alone = model(
        pixel_values=image[1:], input_ids=prompts[1:, :-1], category_ids=ids[1:, :2], category_mask=mask[1:, :2]
    ).logits
    torch.testing.assert_close(both[1, :2], alone[0], atol=1e-5, rtol=0)
    assert (both[1, 2] == torch.finfo(torch.float32).min).all()


@torch.no_grad()
def test_logits_are_products_with_mean_sub_words(model):
    embedding = model.get_input_embeddings().weight
    words = model.backbone.embed_words(torch.tensor([[[6, 7], [8, 1]]]), torch.tensor([[[1, 1], [1, 0]]]))
    torch.testing.assert_close(words[0], torch.stack([(embedding[6] + embedding[7]) / 2, embedding[8]]))


@torch.no_grad()
def test_a_word_map_is_an_image_of_embeddings(model):
    """The word map's tokens take the place of image_proj(features), and of nothing else."""
    seen = {}
    hook = model.backbone.model.encoder.patch_layernorm_embedding.register_forward_pre_hook(
        lambda _, inputs: seen.__setitem__("tokens", inputs[0])
    )
    word_map = word_maps()["word_map"]
    output = model(word_map=word_map)
    hook.remove()
    words = model.backbone.embed_words(*model.pad_words(WORDS["category_ids"], torch.device("cpu")))[0]
    expected = words[word_map].flatten(1, 2) + model.backbone.model.encoder.type_embedding.weight[1]
    torch.testing.assert_close(seen["tokens"], expected)
    assert output.image_features is None
    assert output.logits.shape == (2, 3, 4, 4)


@torch.no_grad()
def test_hierarchical_words():
    """A word map of fine words, categories that each have several."""
    model = small_model()
    fine = {"word_ids": [[5], [20], [6, 7], [8]], "word_categories": [0, 0, 1, 2]}
    flat = model(word_map=torch.tensor([[[0, 2], [1, 0]]])).logits
    model.set_words(**WORDS, **fine)
    assert torch.allclose(model(word_map=torch.tensor([[[0, 3], [2, 0]]])).logits, flat, atol=1e-6)
    assert not torch.allclose(model(word_map=torch.tensor([[[1, 3], [2, 1]]])).logits, flat, atol=1e-3)


def test_contradicting_words_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match="3 names but sub-words for 2"):
        model.set_words(**{**WORDS, "category_ids": [[5], [6]]})
    with pytest.raises(ValueError, match="together"):
        model.set_words(**WORDS, word_ids=[[5], [6]])
    with pytest.raises(ValueError, match="every category"):
        model.set_words(**WORDS, word_ids=[[5], [6]], word_categories=[0, 1])


def test_inputs_are_checked(model):
    image, word_map = torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="either pixel_values"):
        model(pixel_values=image, word_map=word_map)
    with pytest.raises(ValueError, match="either pixel_values"):
        model()
    wordless = IFSegForSemanticSegmentation(small_config())
    with pytest.raises(ValueError, match="carries no words"):
        wordless(pixel_values=image)
    with pytest.raises(ValueError, match="category_ids"):
        wordless(pixel_values=image, input_ids=torch.tensor([[0, 5, 2]]))


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(*[st.integers(1, 3), st.integers(1, 5), *[st.integers(1, 6)] * 2, *[st.integers(1, 40)] * 2]),
    st.integers(0, 2**16),
)
def test_loss_is_the_plain_formula(shape, seed):
    batch, categories, h, w, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, categories, h, w, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(-1, categories, (batch, height, width), generator=generator)
    labels[labels < 0] = -100
    labels[0, 0, 0] = 0
    plain = nn.functional.cross_entropy(resize_grid(logits, height, width), labels, ignore_index=-100)
    loss = segmentation_loss(logits, labels)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, logits), torch.autograd.grad(3 * plain, logits))


def test_images_without_labels_change_nothing():
    model = small_model(dropout=0.0, drop_path_rate=0.0)
    images, pixel_values, pixel_mask = padded_images()
    labels = torch.full(pixel_mask.shape, -100)
    gradients = []
    for labelled in (False, True):
        height, width = images[0].shape[1:]
        labels[0, :height, :width] = 1 if labelled else -100
        model.zero_grad()
        loss = model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(gradient.isfinite().all() for gradient in gradients[-1])
        assert (loss.item() > 0) is labelled
    assert all((gradient == 0).all() for gradient in gradients[0])
    alone = model(pixel_values=images[0][None], labels=labels[:1, :height, :width]).loss
    torch.testing.assert_close(loss, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_of_one_unlabelled_image_has_loss_zero(model):
    labels = torch.full((1, 48, 48), -100)
    assert model(pixel_values=torch.zeros(1, 3, 48, 48), labels=labels).loss == 0


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_labels_are_checked_as_by_cross_entropy(model, padded):
    image, right = torch.zeros(1, 3, 48, 48), torch.zeros(1, 48, 48, dtype=torch.long)
    inputs = {"pixel_values": image} | ({"pixel_mask": torch.ones(1, 48, 48)} if padded else {})
    right[0, 0, 0] = 2  # the last of three categories
    expected = model(**inputs, labels=right).loss
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(model(**inputs, labels=right.to(dtype)).loss, expected)
    for wrong in (255, 3, -1):
        with pytest.raises(ValueError, match=f"labels holds {wrong}, but there are 3 categories"):
            model(**inputs, labels=right.index_fill(1, torch.tensor([5]), wrong))
    with pytest.raises(ValueError, match="labels holds 156"):  # which is -100 modulo 256
        model(**inputs, labels=torch.full((1, 48, 48), 156, dtype=torch.uint8))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=f"labels has the dtype {dtype}"):
            model(**inputs, labels=right.to(dtype))
    for shape in [(3, 48, 48), (1, 1, 48, 48), (48, 48)]:
        with pytest.raises(ValueError, match=r"it must be \(1, height, width\)"):
            model(**inputs, labels=right.new_zeros(shape))


def test_labels_can_be_checked_in_the_background():
    """As on a GPU: wrong labels do not reach the loss, and the error comes when it is asked for."""
    labels = torch.tensor([[[0, 255], [-100, 2]]])
    check = LabelCheck(labels, 3, in_background=True)
    assert check.labels.tolist() == [[[0, -100], [-100, 2]]]
    with pytest.raises(ValueError, match="labels holds 255, but there are 3 categories"):
        check.raise_for_wrong()
    check = LabelCheck(labels.clamp(max=2), 3, in_background=True)
    check.raise_for_wrong()
    assert torch.equal(check.labels, labels.clamp(max=2))


def test_paper_positions_add_no_parameters():
    published, paper = small_model(), small_model(decoder_positions="image")
    assert {n for n, _ in published.named_parameters()} - {n for n, _ in paper.named_parameters()} == {
        name for name, _ in published.named_parameters() if name.startswith("backbone.segmentation_positions.")
    }
    base = {name for name, _ in OFAModel(OFAConfig(**SMALL)).named_parameters()}
    assert {name.removeprefix("backbone.model.") for name, _ in paper.named_parameters()} == base

    image = torch.randn(1, 3, 64, 80)
    assert paper(pixel_values=image).logits.shape == published(pixel_values=image).logits.shape
    paper.freeze_for_word_maps()
    paper.train()
    paper(**word_maps()).loss.backward()
    assert paper.backbone.model.decoder.image_rel_pos_table_list[0].weight.grad is not None
    assert all(p.grad is not None for p in paper.parameters() if p.requires_grad)


def test_without_cross_attention_a_patch_has_read_those_before_it():
    attending, alone = small_model(), small_model(decoder_cross_attention=False)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = [model(pixel_values=images).logits[:, :, 0, 0] for model in (attending, alone)]
        later = alone(pixel_values=images).logits[:, :, 0, 1]
    assert not torch.allclose(first[0][0], first[0][1])
    torch.testing.assert_close(first[1][0], first[1][1])  # <s> is the same for all images
    assert not torch.allclose(later[0], later[1])
    alone.freeze_for_word_maps()
    alone.train()
    alone(**word_maps()).loss.backward()
    assert all((x.grad is not None) == x.requires_grad for x in alone.parameters())
    frozen = [name for name, x in alone.backbone.model.decoder.named_parameters() if not x.requires_grad]
    assert sum("cross_" in name for name in frozen) == sum("cross_" in x for x, _ in alone.named_parameters()) > 0


def test_paper_positions_are_the_encoders(model):
    paper = small_model(decoder_positions="image")
    encoder = paper.backbone.model.encoder
    positions = paper.backbone.patch_positions(4, 4).embeddings
    expected = encoder.image_pos_ln(encoder.embed_image_positions.weight[[0, 1, 2, 3, 4, 9]])
    torch.testing.assert_close(positions[0, :6], expected)  # <s>, then row by row of an 8 x 8 table
    table = paper.backbone.model.decoder.image_rel_pos_table_list[1].weight
    bias = add_blocks(torch.zeros(1, table.shape[1], 17, 17), paper.backbone.patch_positions(4, 4).relative_bias(1))[0]
    torch.testing.assert_close(bias[:, 1:, 1:], GridBias.from_table(table[:-3], 4, 4).whole())
    torch.testing.assert_close(bias[:, 0, 0], table[-1])
    torch.testing.assert_close(bias[:, 0, 5], table[-3])
    torch.testing.assert_close(bias[:, 5, 0], table[-2])


def test_every_trained_parameter_gets_a_gradient(model):
    model = small_model()
    model.freeze_for_word_maps()
    model.train()
    model(**word_maps()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("positions", ["segmentation", "image"])
def test_every_parameter_of_a_new_model_takes_part(positions, tmp_path):
    """Distributed training waits for the gradient of each trainable parameter."""
    small_model(decoder_positions=positions).save_pretrained(tmp_path)
    loaded, _ = IFSegForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    for model in (small_model(decoder_positions=positions), loaded):
        model.train()
        model(pixel_values=torch.randn(1, 3, 48, 80), labels=torch.zeros(1, 48, 80, dtype=torch.long)).loss.backward()
        assert all(p.requires_grad == (p.grad is not None) for p in model.parameters())


def test_torch_saves_a_whole_model(model):
    """Its default protocol cannot pickle all objects, such as torch's memory formats."""
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() > 4 * sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def test_artificial_images_hold_the_embeddings_of_their_words():
    model, seen = small_model().train(), []
    model.backbone.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["image_embeds"]), with_kwargs=True
    )
    words = model.backbone.embed_words(*model.pad_words(model.config.category_ids, "cpu"))[0]
    word_map = torch.randint(len(words), (2, 8, 8), generator=torch.Generator().manual_seed(0))
    model(word_map=word_map)
    torch.testing.assert_close(seen[0], words[word_map])


def test_word_maps_can_be_learnt():
    model = small_model(dropout=0.0, drop_path_rate=0.0)
    nn.init.normal_(model.get_input_embeddings().weight)
    model.freeze_for_word_maps()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for _ in range(120):
        loss = model(**word_maps(8)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.eval()
    maps = word_maps(8)["word_map"]
    assert (model(word_map=maps).logits.argmax(1) == maps).float().mean() > 0.8


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_attention_implementations_agree(model, size):
    image = torch.randn(2, 3, *size)
    logits = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        logits[attention] = model(pixel_values=image).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_in_blocks_trains_alike(checkpointing, monkeypatch):
    """Steps on grids that are large for the cache take another way through attention, to the same gradients."""
    gradients, calls, rows = [], [], attention_ofa.BlockwiseAttention.rows
    monkeypatch.setattr(
        attention_ofa.BlockwiseAttention, "rows", staticmethod(lambda *inputs: calls.append(1) or rows(*inputs))
    )
    for cached in (2**18, 60):
        monkeypatch.setattr(attention_ofa, "LOGITS_IN_BLOCK", cached)
        model = small_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(**word_maps()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert bool(calls) == (cached == 60)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_attention_in_blocks_under_autocast(monkeypatch):
    """It computes in float32, with what bfloat16 leaves of its inputs."""
    monkeypatch.setattr(attention_ofa, "LOGITS_IN_BLOCK", 60)
    calls, rows = [], attention_ofa.BlockwiseAttention.rows
    monkeypatch.setattr(
        attention_ofa.BlockwiseAttention,
        "rows",
        staticmethod(lambda query, *inputs: calls.append(query.dtype) or rows(query, *inputs)),
    )
    gradients = []
    for enabled in (False, True):
        model = small_model().train()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**word_maps()).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert set(calls) == {torch.float32}
        calls.clear()
    assert gradients[1].dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision(model, dtype, attention):
    image = torch.randn(1, 3, 48, 80)
    expected = model(pixel_values=image).logits
    half = small_model().to(dtype)
    half.set_attn_implementation(attention)
    actual = half(pixel_values=image, labels=torch.zeros(1, 48, 80, dtype=torch.long))
    assert actual.logits.dtype == dtype
    assert actual.loss.isfinite()
    torch.testing.assert_close(actual.logits.float(), expected, atol=0.02, rtol=0.05)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = small_model()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(**word_maps()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_compiles_without_graph_breaks(model):
    image = torch.randn(1, 3, 48, 80)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixel_values=image).logits, model(pixel_values=image).logits)


def test_compiled_training_has_the_same_gradients():
    """The compiler takes another way through biases and attention."""
    gradients = []
    for compiled in (False, True):
        model = small_model(dropout=0.0, drop_path_rate=0.0).train()
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        forward(**word_maps()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = IFSegForSemanticSegmentation.from_pretrained(tmp_path)
    image = torch.randn(1, 3, 48, 80)
    assert torch.equal(loaded(pixel_values=image).logits, model(pixel_values=image).logits)
    assert loaded.config.id2label == WORDS["id2label"]
    assert loaded.config.prompt_ids == WORDS["prompt_ids"]


def test_checkpoint_of_ofa_lacks_only_segmentation_positions(tmp_path):
    """Which are not reported as missing."""
    torch.manual_seed(0)
    ofa = OFAForConditionalGeneration(OFAConfig(**SMALL))
    ofa.save_pretrained(tmp_path)
    _, report = OFAModel.from_pretrained(tmp_path, output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    loaded, report = IFSegForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    saved = {f"backbone.model.{name}" for name, _ in OFAModel(OFAConfig(**SMALL)).named_parameters()}
    lacking = {name for name, _ in loaded.named_parameters()} - saved
    assert all(name.startswith("backbone.segmentation_positions.") for name in lacking)
    assert torch.equal(loaded.get_input_embeddings().weight, ofa.get_input_embeddings().weight)
    automatic = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(automatic) is IFSegForSemanticSegmentation
    assert type(automatic.config) is IFSegConfig


def test_new_positions_are_small_and_normal():
    torch.manual_seed(0)
    model = IFSegForSemanticSegmentation(small_config(d_model=64))
    positions = model.backbone.segmentation_positions
    for weight in [positions.embed_positions.weight, *(table.weight for table in positions.rel_pos_tables)]:
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert abs(weight.mean().item()) < 0.005
    assert torch.equal(positions.layer_norm.weight, torch.ones(64))
    assert torch.equal(positions.layer_norm.bias, torch.zeros(64))


@torch.no_grad()
def test_outputs_on_request():
    model = small_model()
    model.set_attn_implementation("eager")
    output = model(pixel_values=torch.randn(1, 3, 48, 80), output_hidden_states=True, output_attentions=True)
    tokens, patches = 3 * 5 + 8, 3 * 5 + 1
    assert [tuple(x.shape) for x in output.encoder_hidden_states] == [(1, tokens, 16)] * 3
    assert [tuple(x.shape) for x in output.decoder_hidden_states] == [(1, patches, 16)] * 3
    assert [tuple(x.shape) for x in output.encoder_attentions] == [(1, 2, tokens, tokens)] * 2
    assert [tuple(x.shape) for x in output.decoder_attentions] == [(1, 2, patches, patches)] * 2
    assert [tuple(x.shape) for x in output.cross_attentions] == [(1, 2, patches, tokens)] * 2
    assert output.decoder_attentions[0][0, 0].triu(1).abs().max() == 0  # causal


@torch.no_grad()
def test_decoder_input_of_a_patch_excludes_itself_and_later_patches():
    """Section 2.2: output i has the encodings of patches before i as inputs (cross-attention aside)."""
    model = small_model()
    seen = {}
    model.backbone.model.decoder.layernorm_embedding.register_forward_pre_hook(
        lambda _, inputs: seen.__setitem__("inputs", inputs[0])
    )
    output = model(pixel_values=torch.randn(1, 3, 48, 80))
    start = model.get_input_embeddings().weight[model.config.backbone_config.decoder_start_token_id]
    assert torch.equal(seen["inputs"][0, 0], start)
    assert torch.equal(seen["inputs"][0, 1:], output.encoder_last_hidden_state[0, :15])


def test_images_of_a_batch_run_one_by_one_in_inference_on_a_cpu(model, monkeypatch):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(-1, 3, (3, 90, 70), generator=torch.Generator().manual_seed(1))  # larger than the images
    labels[labels < 0] = -100
    batches, encode = [], model.backbone.encode
    monkeypatch.setattr(
        model.backbone, "encode", lambda *args, **kwargs: batches.append(len(args[2])) or encode(*args, **kwargs)
    )
    trained = model(pixel_values=images, labels=labels)
    assert batches == [3]
    with torch.no_grad():
        outputs = model(pixel_values=images, labels=labels)
        alone = [model(pixel_values=image[None]).logits for image in images]
    assert batches[1:4] == [1, 1, 1]
    assert torch.equal(outputs.logits, torch.cat(alone))
    torch.testing.assert_close(outputs.logits, trained.logits)
    torch.testing.assert_close(outputs.loss, trained.loss)
