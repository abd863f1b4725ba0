"""Phases and batches of scenes."""

import random

import torch
from nano_scenes import NAMES, make_scenes

from ifseg_hf.nano.batches import Phase, SceneBatches, to_pixels


def test_phases_keep_the_number_of_pixels():
    phase = Phase(1, 32, (64, 128))
    assert {phase.draw(random.Random(seed)) for seed in range(20)} == {(64, 32, False), (128, 8, False)}
    assert Phase(1, 32, 64).draw(random.Random(0)) == (64, 32, False)


def test_some_steps_have_whole_images():
    phase = Phase(200, 8, 64, whole_image_share=0.5, whole_image_sizes=(32, 64))
    drawn = {phase.draw(random.Random(seed)) for seed in range(40)}
    assert drawn == {(64, 8, False), (32, 32, True), (64, 8, True)}
    batches = list(SceneBatches(make_scenes(), [phase], 0))
    assert 70 < sum(batch["whole_images"] for batch in batches) < 130
    road = NAMES.index("road")  # only in street crops, which are never whole images
    for batch in batches:
        if batch["whole_images"]:
            assert batch["boxes"].eq(torch.tensor([0.0, 0, 1, 1])).all()
            assert not batch["labels"].eq(road).any()
    assert any(batch["labels"].eq(road).any() for batch in batches)


def test_whole_images_are_distorted():
    phase = Phase(30, 16, 64, whole_image_share=1.0, whole_image_sizes=((32, 64), (64, 16)))
    assert {phase.draw(random.Random(seed)) for seed in range(20)} == {((32, 64), 32, True), ((64, 16), 64, True)}
    batches = list(SceneBatches(make_scenes(), [phase], 0))
    assert {tuple(batch["images"].shape) for batch in batches} == {(32, 32, 64, 3), (64, 64, 16, 3)}
    for batch in batches:
        assert batch["boxes"].eq(torch.tensor([0.0, 0, 1, 1])).all()
        levels = batch["images"].float().mean((1, 2, 3))  # identify the images; see `make_scenes`
        assert torch.equal((levels / 80).floor().long(), batch["labels"][:, 0])


def test_batches_are_the_same_after_resuming():
    phases = [Phase(2, 3, 32, single=True), Phase(2, 2, (32, 64))]
    everything = list(SceneBatches(make_scenes(), phases, 0))
    rest = list(SceneBatches(make_scenes(), phases, 0, start=3))
    assert [len(batch["images"]) for batch in everything[:2]] == [3, 3]
    assert len(everything) == 4
    assert len(rest) == 1
    for name in ("images", "boxes", "labels"):
        assert torch.equal(everything[3][name], rest[0][name])
    assert (everything[0]["labels"] >= 0).all()


def test_processes_share_the_scenes_of_a_batch():
    phases = [Phase(1, 5, 32)]
    (whole,) = SceneBatches(make_scenes(), phases, 0)
    halves = [next(iter(SceneBatches(make_scenes(), phases, 0, rank=rank, world=2))) for rank in range(2)]
    assert torch.equal(whole["images"][0::2], halves[0]["images"])
    assert torch.equal(whole["images"][1::2], halves[1]["images"])


def test_pixels_are_normalised_with_and_without_jitter():
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 8, 8, 3)
    pixels = to_pixels(images)
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels[0].eq(-1).all()
    assert pixels[1].eq(1).all()
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    jittered = to_pixels(images, torch.Generator().manual_seed(0))
    assert jittered.abs().max() <= 1
    assert not torch.equal(jittered, to_pixels(images))
