"""Pre-training in miniature: tokenizer, losses, both stages, and a checkpoint that loads."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.modeling.modeling_ofa import IFSegForConditionalGeneration, IFSegFrozenBatchNorm2d, IFSegTrunk
from ifseg_hf.nano import pretraining, scenes
from ifseg_hf.nano.pretraining import Phase
from ifseg_hf.processing.processing_ifseg import IFSegProcessor

NAMES = ["cat", "ice cream", "go-kart", "road"]
SMALL = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "image_bucket_size": 8,
    "image_size": 64,
    "max_position_embeddings": 64,
    "trunk_embedding_size": 4,
    "trunk_hidden_sizes": (8, 8, 8),
    "trunk_depths": (1, 1, 1),
}


@pytest.fixture(scope="module")
def tokenizer():
    return pretraining.train_tokenizer(NAMES)


def maker() -> scenes.SceneMaker:
    labels = np.arange(12) % 3
    pixels = (labels * 80)[:, None, None, None] + np.random.default_rng(0).integers(0, 60, (12, 64, 64, 3))
    mask = np.full((1, 120, 160), 0, np.uint8)
    streets = scenes.Streets(np.full((1, 120, 160, 3), 99, np.uint8), mask, ["road"], 11)
    return scenes.SceneMaker(scenes.Photos(pixels.astype(np.uint8), labels, NAMES[:3]), streets)


def test_the_nano_model_is_small_enough():
    with torch.device("meta"):
        model = IFSegForConditionalGeneration(pretraining.nano_config(800))
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 12e6


def test_every_word_of_the_names_is_one_token(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(token) for token in pretraining.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    for name in NAMES:
        ids = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        assert len(ids) == len(name.replace("-", " - ").split())
    assert tokenizer(" cat")["input_ids"][::2] == [0, 2]


@pytest.mark.parametrize("text", ["zebra crossing", "naïve café", "猫と犬 🐈", "a\tb\nc", 'x"y\\z'])
def test_any_text_can_be_encoded(tokenizer, text, tmp_path):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 3 not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == ids


def test_phases_keep_the_number_of_pixels():
    phase = Phase(1, 32, (64, 128))
    assert {phase.draw(random.Random(seed)) for seed in range(20)} == {(64, 32, False), (128, 8, False)}
    assert Phase(1, 32, 64).draw(random.Random(0)) == (64, 32, False)


def test_some_steps_have_photos_that_show_one_thing_all_over():
    phase = Phase(200, 8, 64, photo_share=0.5, photo_sizes=(32, 64))
    drawn = {phase.draw(random.Random(seed)) for seed in range(40)}
    assert drawn == {(64, 8, False), (32, 32, True), (64, 8, True)}
    batches = list(pretraining.SceneBatches(maker(), [phase], 0))
    assert 70 < sum(batch["whole_photos"] for batch in batches) < 130
    road = NAMES.index("road")  # in street crops alone, which are never all of one thing
    for batch in batches:
        if batch["whole_photos"]:
            assert batch["boxes"].eq(torch.tensor([0.0, 0, 1, 1])).all()
            assert not batch["labels"].eq(road).any()
    assert any(batch["labels"].eq(road).any() for batch in batches)


def test_photos_are_distorted_to_flat_and_tall_ones():
    phase = Phase(30, 16, 64, photo_share=1.0, photo_sizes=((32, 64), (64, 16)))
    assert {phase.draw(random.Random(seed)) for seed in range(20)} == {((32, 64), 32, True), ((64, 16), 64, True)}
    batches = list(pretraining.SceneBatches(maker(), [phase], 0))
    assert {tuple(batch["images"].shape) for batch in batches} == {(32, 32, 64, 3), (64, 64, 16, 3)}
    for batch in batches:
        assert batch["boxes"].eq(torch.tensor([0.0, 0, 1, 1])).all()
        levels = batch["images"].float().mean((1, 2, 3))  # tell the photos apart; see `maker`
        assert torch.equal((levels / 80).floor().long(), batch["labels"][:, 0])


def test_batches_are_the_same_wherever_a_run_goes_on():
    phases = [Phase(2, 3, 32, single=True), Phase(2, 2, (32, 64))]
    everything = list(pretraining.SceneBatches(maker(), phases, 0))
    rest = list(pretraining.SceneBatches(maker(), phases, 0, start=3))
    assert [len(batch["images"]) for batch in everything[:2]] == [3, 3]
    assert len(everything) == 4
    assert len(rest) == 1
    for name in ("images", "boxes", "labels"):
        assert torch.equal(everything[3][name], rest[0][name])
    assert (everything[0]["labels"] >= 0).all()


def test_processes_share_the_scenes_of_a_batch():
    phases = [Phase(1, 5, 32)]
    (whole,) = pretraining.SceneBatches(maker(), phases, 0)
    halves = [next(iter(pretraining.SceneBatches(maker(), phases, 0, rank=rank, world=2))) for rank in range(2)]
    assert torch.equal(whole["images"][0::2], halves[0]["images"])
    assert torch.equal(whole["images"][1::2], halves[1]["images"])


def _average(rank, file):
    pretraining.distributed.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    assert pretraining.processes() == (rank, 2)
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1, 3)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.full((2,), float(rank)), torch.full((1, 3), 2.0 * rank)
    pretraining.average_gradients(parameters)
    assert parameters[0].grad.tolist() == [0.5, 0.5]
    assert parameters[1].grad.tolist() == [[1, 1, 1]]
    assert parameters[2].grad is None


def test_gradients_are_averaged_over_processes(tmp_path):
    pretraining.multiprocessing.spawn(_average, ((tmp_path / "rendezvous").as_uri(),), nprocs=2)


def test_pixels_are_normalised_and_jitter_stays_in_range():
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 8, 8, 3)
    pixels = pretraining.to_pixels(images)
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels[0].eq(-1).all()
    assert pixels[1].eq(1).all()
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    jittered = pretraining.to_pixels(images, torch.Generator().manual_seed(0))
    assert jittered.abs().max() <= 1
    assert not torch.equal(jittered, pretraining.to_pixels(images))


def test_boxes_pool_the_patches_inside():
    features = torch.arange(16.0).view(1, 1, 4, 4)
    boxes = torch.tensor([[[0, 0, 1, 1], [0.5, 0, 1, 0.5], [0.125, 0, 0.375, 0.25]]])
    pooled = pretraining.pool_boxes(features, boxes)[0, :, 0]
    # all; the upper right quarter; the halves of the first two patches that touch
    assert torch.allclose(pooled, torch.tensor([7.5, 4.5, 0.5]))


def test_batch_norm_learns_and_freezes_again():
    config = pretraining.nano_config(**SMALL)
    trunk = pretraining.train_batch_norm(pretraining.initialize_trunk(IFSegTrunk(config)))
    trunk.train()(torch.randn(4, 3, 32, 32))
    frozen = IFSegTrunk(config)
    frozen.load_state_dict(pretraining.trunk_state(trunk))
    assert not frozen.bn1.running_mean.eq(0).all()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(frozen(pixels), trunk.eval()(pixels), atol=1e-5)


def test_captions_and_infilling(tokenizer):
    texts = pretraining.Texts(tokenizer, NAMES)
    boxes = torch.tensor([[[0.5, 0, 1, 1], [0, 0, 0.5, 1]], [[0, 0, 1, 1], [0, 0, 0, 0]]], dtype=torch.float)
    captions = texts.captions({"boxes": boxes, "labels": torch.tensor([[0, 1], [3, -100]])})
    assert tokenizer.decode(captions[0], skip_special_tokens=True) == " ice cream cat"
    assert captions[1].tolist()[2:] == [-100] * (captions.shape[1] - 2)
    prompts, targets = texts.infilling(random.Random(0), 50)
    assert (prompts == tokenizer.mask_token_id).any()
    assert (targets == 2).sum() == 50
    assert not (targets == tokenizer.mask_token_id).any()


def test_alignment_is_zero_where_patches_point_at_their_names():
    words = torch.eye(4)
    labels = torch.tensor([[2, 0]])
    boxes = torch.tensor([[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]])
    patches = words[torch.tensor([[2, 0], [2, 0]])][None]
    assert pretraining.alignment_loss(patches, boxes, labels, words, temperature=0.05) < 1e-6
    assert pretraining.alignment_loss(patches.flip(2), boxes, labels, words, temperature=0.05) > 5


def test_the_patch_loss_asks_every_patch():
    words, labels = torch.eye(4), torch.tensor([[2], [0]])
    patches = words[labels][:, :, None].repeat(1, 2, 3, 1)
    # cross-entropy of a cosine of 1 and three of 0, with label smoothing
    logs = torch.tensor([10.0, 0, 0, 0]).log_softmax(0)
    perfect = -(0.9 * logs[0] + 0.1 * logs.mean())
    assert torch.allclose(pretraining.patch_loss(patches, labels, words), perfect)
    patches[0, 1, 2] = words[3]
    wrong = -(0.9 * logs[1] + 0.1 * logs.mean())
    assert torch.allclose(pretraining.patch_loss(patches, labels, words), (11 * perfect + wrong) / 12)
    # alignment hardly minds one patch of six
    boxes = torch.tensor([[[0.0, 0, 1, 1]]])
    assert pretraining.alignment_loss(patches[:1], boxes, labels[:1], words) < 0.2


def test_the_mean_of_two_models():
    torch.manual_seed(0)
    model, other = (torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(2))
    for one in (model, other):
        one[1].weight = one[0].weight  # as words are tied to the output
    mean = {name: (value + other.state_dict()[name]) / 2 for name, value in model.state_dict().items()}
    pretraining.average(model, other.state_dict())
    assert all(torch.allclose(value, mean[name]) for name, value in model.state_dict().items())


def test_steps_without_language_leave_the_words_alone(tokenizer, tmp_path):
    config = pretraining.nano_config(len(tokenizer), **SMALL)
    model = IFSegForConditionalGeneration(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phases = [Phase(3, 4, 32, language_every=0, photo_share=0.5, photo_sizes=(32,))]
    pretraining.train_vision_language(maker(), model, tokenizer, phases, tmp_path / "patches.pt")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"model.encoder.image_proj.weight", "model.encoder.embed_images.conv1.weight"} <= changed
    assert all("image_proj" in name or "embed_images" in name for name in changed)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_trains_convolutions_as_matrices(memory_format):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 6, side, side).to(memory_format=memory_format)) for side in (1, 3)]
    order = (0, 2, 3, 1) if memory_format == torch.channels_last else (0, 1, 2, 3)
    matrices = [torch.nn.Parameter(w.detach().permute(order).reshape(8, -1).clone()) for w in weights]
    places = [weight.data_ptr() for weight in weights]
    expected = torch.optim.Muon(matrices, 0.1, 0.05, adjust_lr_fn="match_rms_adamw")
    optimizer = pretraining.convolution_muon(weights, 0.1, 0.05)
    for _ in range(2):
        for weight, matrix in zip(weights, matrices, strict=True):
            weight.grad = torch.randn(weight.shape)
            matrix.grad = weight.grad.permute(order).reshape(matrix.shape)
        optimizer.step()
        expected.step()
    assert places == [weight.data_ptr() for weight in weights]
    for weight, matrix in zip(weights, matrices, strict=True):
        torch.testing.assert_close(weight.detach().permute(order).reshape(8, -1), matrix.detach())
    before = weights[0].detach().clone()
    weights[0].grad = None  # a frozen trunk
    optimizer.step()
    assert torch.equal(weights[0], before)


def test_every_parameter_has_one_optimizer(tokenizer, tmp_path):
    model = IFSegForConditionalGeneration(pretraining.nano_config(len(tokenizer), **SMALL))
    adamw, muon = pretraining.vision_language_optimizers(model, 1e-3, 1e-3, 0.05, muon=True)
    counts = [sum(p.numel() for group in o.param_groups for p in group["params"]) for o in (adamw, muon)]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    assert len(pretraining.vision_language_optimizers(model, 1e-3, 1e-3, 0.05)) == 1

    trunk = model.model.encoder.embed_images
    before = {name: value.clone() for name, value in trunk.named_parameters()}
    phases = [Phase(3, 4, 32, language_every=0, photo_share=0.5, photo_sizes=(32,))]
    arguments = (maker(), model, tokenizer, phases, tmp_path / "patches.pt")
    pretraining.train_vision_language(*arguments, muon=True)
    assert not any(torch.equal(value, before[name]) for name, value in trunk.named_parameters() if value.ndim == 4)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    pretraining.train_vision_language(*arguments, muon=True)  # done already
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_both_stages_run_save_and_go_on(tokenizer, tmp_path):
    config = pretraining.nano_config(len(tokenizer), **SMALL)
    scene_maker, file = maker(), tmp_path / "trunk.pt"
    phases = [Phase(2, 4, 32, single=True), Phase(1, 2, 64)]
    lines = []
    state = pretraining.train_trunk(scene_maker, scene_maker.photos, config, phases, file, log=lines.append)
    again = pretraining.train_trunk(scene_maker, scene_maker.photos, config, phases, file, log=lines.append)
    assert len(lines) == 1
    assert "held-out" in lines[0]
    assert all(torch.equal(state[name], again[name]) for name in state)

    model = IFSegForConditionalGeneration(config)
    model.model.encoder.embed_images.load_state_dict(state)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phases = [Phase(2, 2, 32, train_trunk=False)]
    pretraining.train_vision_language(scene_maker, model, tokenizer, phases, tmp_path / "language.pt")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "model.encoder.image_proj.weight" in changed
    assert not any("embed_images" in name for name in changed)

    phases = [Phase(3, 4, 32, train_norms=True, language_every=2), Phase(1, 2, 32)]
    pretraining.train_vision_language(scene_maker, model, tokenizer, phases, tmp_path / "more.pt", log=lines.append)
    assert "caption" in lines[-1]
    norm = model.model.encoder.embed_images.bn1
    assert isinstance(norm, IFSegFrozenBatchNorm2d)
    assert not torch.equal(norm.running_mean, state["bn1.running_mean"])

    pretraining.save_checkpoint(model, tokenizer, tmp_path / "nano")
    processor = IFSegProcessor.from_pretrained(tmp_path / "nano")
    segmenter = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "nano", dtype=torch.float32)
    photo = np.zeros((40, 60, 3), np.uint8)
    inputs = processor(images=photo, categories=["cat", "road"], return_tensors="pt")
    assert inputs["pixel_values"].shape[2:] == (48, 72)
    assert segmenter(**inputs).logits.shape == (1, 2, 3, 5)
    assert segmenter.config.grid_size == 3
