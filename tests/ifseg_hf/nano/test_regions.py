"""Named regions of training images, and their loss."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifseg_hf.nano.examples import THIN_SHARE, Example
from ifseg_hf.nano.features import Features
from ifseg_hf.nano.regions import (
    ASKED_SHARE,
    BOX_SHARE,
    CAPTION_SHARE,
    CLASS_PROBABILITY,
    FILLED_SHARE,
    MOST_BOXES,
    OBJECT_SHARE,
    SCENE_SHARE,
    WEIGHTS,
    WHOLE,
    Region,
    RegionSampler,
    class_loss,
    region_loss,
    select_patches,
)
from ifseg_hf.nano.vocabulary import BACKGROUND, Vocabulary

VOCABULARY = Vocabulary()
BEAGLE, DOG, ANIMAL, CAT, SKY, SEA, OCEAN, CAR = (
    VOCABULARY.index[name] for name in ("beagle", "dog", "animal", "cat", "sky", "sea", "ocean", "car")
)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)


def class_of(name: int) -> int:
    """A class of ImageNet that has a name."""
    return int((VOCABULARY.classes == name).nonzero()[0][0])


def make_features(height: int = 8, width: int = 8) -> Features:
    """Features whose first channel is 1 in the left half, and of which no class is sure."""
    fine = torch.zeros(2, height, width, dtype=torch.float16)
    fine[0, :, : width // 2] = 1
    classes = torch.arange(10, dtype=torch.int16)[:, None, None].repeat(1, height // 2, width // 2)
    return Features(fine, fine[:, ::2, ::2] * 0, classes, torch.full_like(classes, 0.01, dtype=torch.float16))


def make_sampler(*examples: Example, cache: list[Features] | None = None, seed: int = 0) -> RegionSampler:
    return RegionSampler(examples, cache or [make_features()], VOCABULARY, random.Random(seed))


box_side = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(rows=box_side, columns=box_side, height=st.integers(1, 30), width=st.integers(1, 30))
@settings(deadline=None)
def test_each_box_has_a_patch(rows, columns, height, width):
    box = (rows[0], columns[0], rows[1], columns[1])
    mask = Region("named", [box], 0).mask(height, width)
    assert mask.shape == (height, width)
    assert mask.any()
    assert np.array_equal(Region("outside", [box], 0).mask(height, width), ~mask)
    ys, xs = mask.nonzero()
    assert abs(ys.min() / height - rows[0]) <= 1.5 / height + 1e-9
    assert abs((xs.max() + 1) / width - columns[1]) <= 1.5 / width + 1e-9


def test_masks_of_boxes_cover_their_patches():
    mask = Region("named", [(0.25, 0.5, 0.75, 1.0)], 0).mask(4, 6)
    expected = np.zeros((4, 6), bool)
    expected[1:3, 3:] = True
    assert np.array_equal(mask, expected)
    outside = Region("outside", [(0, 0, 0.5, 1), (0.5, 0, 1, 0.5)], 0).mask(4, 6)
    assert outside.sum() == 6
    assert outside[2:, 3:].all()


def test_boxes_are_mirrored_with_the_features():
    sampler = make_sampler(Example("coco", 0, filled={CAT: [LEFT], SKY: [RIGHT]}))
    features, examples, regions = sampler.batch(24, (8, 8))
    assert features.shape == (24, 8, 8, 4)
    assert len(examples) == 24
    mirrored = features[:, 0, 0, 0] == 0
    assert 4 < mirrored.sum() < 20
    for image, found in zip(features, regions, strict=True):
        masks = {region.name: torch.from_numpy(region.mask(8, 8)) for region in found}
        assert masks.keys() == {CAT, SKY}
        assert torch.equal(masks[CAT], image[..., 0] == 1)
        assert torch.equal(masks[SKY], image[..., 0] == 0)


def test_mirroring_leaves_the_examples_unchanged():
    example = Example("coco", 0, boxes=[((0.0, 0.1, 1.0, 0.3), CAT)], filled={SKY: [LEFT]})
    make_sampler(example).batch(12, (8, 8), background=True)
    assert example == Example("coco", 0, boxes=[((0.0, 0.1, 1.0, 0.3), CAT)], filled={SKY: [LEFT]})


def test_features_are_resized_to_the_grid():
    sampler = make_sampler(Example("coco", 0, name=CAT), cache=[make_features(6, 10)])
    assert sampler.batch(2, (9, 12))[0].shape == (2, 9, 12, 4)


def test_batches_are_determined_by_the_random_generator():
    examples = [Example("animals", 0, name=BEAGLE), Example("coco", 0, filled={SKY: [LEFT], SEA: [RIGHT, LEFT]})]
    examples.append(Example("coco", 0, boxes=[(LEFT, CAT), (RIGHT, DOG)], captions=["a"], caption_names=[CAT, SEA]))
    drawn = []
    for seed in (3, 3, 4):
        sampler = make_sampler(*examples)
        sampler.rng = random.Random(seed)
        drawn.append((*sampler.batch(20, (8, 8)), sampler.distractors([CAT], 5)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert drawn[0][1:] == drawn[1][1:]
    assert drawn[0][1:] != drawn[2][1:]


def test_images_have_the_orientation_of_the_grid():
    cache = [make_features(8, 12), make_features(12, 8), make_features(8, 8)]
    sampler = make_sampler(*(Example("animals", i, name=CAT) for i in range(3)), cache=cache)
    assert {sampler.draw(portrait=True)[0].view for _ in range(30)} == {1, 2}
    assert {sampler.draw(portrait=False)[0].view for _ in range(30)} == {0, 2}


@pytest.mark.parametrize(("portrait", "shape"), [(True, "wider than high"), (False, "higher than wide")])
def test_images_of_one_orientation_alone_are_refused(portrait, shape):
    sampler = make_sampler(Example("animals", 0, name=CAT), cache=[make_features(*((8, 12) if portrait else (12, 8)))])
    with pytest.raises(ValueError, match=f"training images that were drawn are {shape}: add other"):
        sampler.draw(portrait)


def test_each_kind_of_example_has_its_regions():
    example = Example("coco", 0, boxes=[(LEFT, CAT)], captions=["sky"], caption_names=[SKY])
    found = [make_sampler(example, seed=seed).draw(False)[1] for seed in range(30)]
    assert all(len(regions) == 1 for regions in found)
    assert {(region.kind, *region.boxes, region.share) for [region] in found} == {
        ("named", LEFT, BOX_SHARE),
        ("caption", WHOLE, CAPTION_SHARE),
    }


@pytest.mark.parametrize(("source", "share"), [("animals", OBJECT_SHARE), ("intel", SCENE_SHARE)])
def test_scenes_fill_more_of_their_images_than_objects(source, share):
    [region] = make_sampler(Example(source, 0, name=SEA)).draw(False)[1]
    assert (region.kind, region.boxes, region.share) == ("named", [WHOLE], share)
    assert SCENE_SHARE > OBJECT_SHARE


def test_names_are_sometimes_replaced_by_what_holds_too():
    sampler = make_sampler(Example("animals", 0, name=BEAGLE))
    names = [sampler.generalize(BEAGLE) for _ in range(400)]
    assert set(names) == {BEAGLE, DOG, ANIMAL}
    assert abs(names.count(BEAGLE) / 400 - (0.55 + 0.45 / 3)) < 0.08


@pytest.mark.parametrize(
    ("classes", "probabilities", "names"),
    [
        ([class_of(BEAGLE)], [0.9], {BEAGLE, DOG, ANIMAL}),
        ([class_of(BEAGLE)], [CLASS_PROBABILITY - 0.01], set()),
        ([class_of(BEAGLE), class_of(VOCABULARY.index["zebra"])], [0.3, 0.3], set()),
        ([970], [0.9], set()),  # alp, a whole place
    ],
)
def test_sure_classes_of_patches_are_regions(classes, probabilities, names):
    features = make_features()
    for i, (number, probability) in enumerate(zip(classes, probabilities, strict=True)):
        features.classes[i, 2, 1], features.probabilities[i, 2, 1] = number, probability
    found = []
    for seed in range(20):
        sampler = make_sampler(Example("animals", 0, name=CAT), cache=[features], seed=seed)
        found += [region for region in sampler.draw(False)[1] if region.kind == "class"]
    assert {region.name for region in found} == names
    assert all(region.boxes == [(0.5, 0.25, 0.75, 0.5)] for region in found)
    assert all(region.weight == pytest.approx(sum(probabilities), abs=1e-3) for region in found)


def test_probabilities_of_classes_with_one_name_add_up():
    names, counts = np.unique(VOCABULARY.classes[VOCABULARY.things], return_counts=True)
    name = names[counts > 1][0]
    features = make_features()
    same = (VOCABULARY.classes == name).nonzero()[0][:2]
    features.classes[:2, 0, 0] = torch.from_numpy(same.astype(np.int16))
    features.probabilities[:2, 0, 0] = 0.25
    regions = make_sampler(Example("animals", 0, name=CAT), cache=[features]).draw(False)[1]
    [region] = [region for region in regions if region.kind == "class"]
    assert VOCABULARY.accepted[name, region.name]
    assert region.weight == pytest.approx(0.5, abs=1e-2)


def test_background_replaces_names_of_surfaces():
    background = VOCABULARY.index[BACKGROUND]
    sampler = make_sampler(Example("coco", 0, filled={SKY: [LEFT], CAR: [RIGHT]}))
    [regions] = sampler.batch(1, (8, 8), background=True)[2]
    assert {region.name for region in regions} == {background, CAR}
    [regions] = sampler.batch(1, (8, 8))[2]
    assert {region.name for region in regions} == {SKY, CAR}


def test_background_replaces_some_things_and_all_that_are_not_related_to_the_others():
    background = VOCABULARY.index[BACKGROUND]
    names = [CAT, CAR, DOG, BEAGLE]
    sampler = make_sampler(*[Example("caltech", 0, boxes=[(LEFT, name)]) for name in names])
    kept = []
    for _ in range(40):
        regions = [[Region("named", [LEFT], name, share=0.4)] for name in names]
        sampler._name_background(regions)
        left = [region.name for found in regions for region in found]
        assert all(new in (old, background) for new, old in zip(left, names, strict=True))
        assert (left[2] == background) == (left[3] == background)  # a beagle is a dog
        assert left.count(background) <= len(names) - math.ceil(ASKED_SHARE * len(names))
        shares = [region.share for found in regions for region in found]
        assert shares == [SCENE_SHARE if name == background else 0.4 for name in left]
        kept += left
    assert {*names, background} == set(kept)


def test_small_boxes_are_left_out_on_small_grids():
    sampler = make_sampler(Example("street", 0, filled={SKY: [LEFT]}, thin={CAR: [RIGHT] * 4}))
    for grid, kinds in (((8, 8), ["filled", *["thin"] * 3]), ((5, 5), ["filled"])):
        for _ in range(5):
            [regions] = sampler.batch(1, grid)[2]
            assert sorted(region.kind for region in regions) == kinds
    only_thin = make_sampler(Example("street", 0, thin={CAR: [RIGHT]}))
    [[region]] = only_thin.batch(1, (5, 5))[2]
    assert (region.kind, region.name, region.share) == ("thin", CAR, THIN_SHARE)


def test_class_patches_have_the_features_of_their_classes():
    features = make_features()
    features.classes[:] += (torch.arange(4) >= 2).short() * 100  # other classes in the right half
    sampler = make_sampler(*[Example("animals", 0, name=CAT)] * 5, cache=[features])
    found, classes, probabilities = sampler.class_patches(3, 7)
    assert found.shape == (21, 4)
    assert classes.shape == probabilities.shape == (21, 10)
    assert classes.dtype == torch.int64
    left = found[:, 0] > 0.5
    assert 0 < left.sum() < 21
    assert torch.equal(classes[:, 0] < 100, left)
    assert len(sampler.class_patches(9, 99)[0]) == 5 * 16  # all there are


def test_class_loss_counts_sure_patches_more():
    scores = torch.randn(3, 4)
    columns = torch.tensor([[0, 2, 0], [1, 3, 3], [3, 0, 1]])
    probabilities = torch.tensor([[0.5, 0.1, 0.3], [0.0, 0.2, 0.3], [0.0, 0.0, 0.0]])
    log_p = scores.log_softmax(1)
    first = -(0.8 * log_p[0, 0] + 0.1 * log_p[0, 2])
    second = -0.5 * log_p[1, 3]
    expected = (0.8 * first + 0.5 * second) / 1.3
    torch.testing.assert_close(class_loss(scores, columns, probabilities), expected)
    assert class_loss(scores, columns, 0 * probabilities) == 0


@pytest.mark.parametrize("count", [1, MOST_BOXES, MOST_BOXES + 1])
def test_background_is_outside_of_few_boxes(count):
    sampler = make_sampler(Example("coco", 0, boxes=[(LEFT, CAT)] * count))
    features, _, [regions] = sampler.batch(1, (8, 8), background=True)
    outside = [region for region in regions if region.kind == "outside"]
    assert len(outside) == (count <= MOST_BOXES)
    for region in outside:
        assert region.name == VOCABULARY.index[BACKGROUND]
        assert torch.equal(torch.from_numpy(region.mask(8, 8)), features[0, ..., 0] == 0)


def test_distractors_are_not_related_to_anything():
    examples = [Example("animals", 0, name=name) for name in (DOG, SEA, OCEAN, SKY, CAR)]
    sampler = make_sampler(*examples)
    found = []
    for _ in range(30):
        names = [BEAGLE, SEA, *sampler.distractors([BEAGLE, SEA], 8)]
        assert len(names) == 10
        related = VOCABULARY.related[names][:, names]
        assert related.sum() == 10  # each to itself
        found += names[2:]
    assert CAR in found
    assert not {DOG, ANIMAL, SEA, OCEAN, BEAGLE} & set(found)


# region_loss --------------------------------------------------------------------------------------------------------

CANDIDATES = [CAT, DOG, ANIMAL, SKY, CAR]
RELATED = torch.from_numpy(VOCABULARY.related)


def loss_of(scores: torch.Tensor, regions: list[list[Region]], **options) -> dict[str, torch.Tensor]:
    """The losses of regions in images, from the logits of all patches, (batch, h, w, candidates)."""
    selection = select_patches(regions, *scores.shape[1:3], **options)
    return region_loss(scores.flatten(0, 2)[selection.indices], selection, CANDIDATES, RELATED)


def expected_loss(scores: torch.Tensor, region: Region) -> float:
    """The loss of a region in an image (h, w, candidates), patch by patch, without its kind's weight."""
    probabilities = []
    for y, x in zip(*region.mask(*scores.shape[:2]).nonzero(), strict=True):
        kept = [i for i, name in enumerate(CANDIDATES) if name == region.name or not RELATED[region.name, name]]
        exponentials = {i: math.exp(scores[y, x, i]) for i in kept}
        probabilities.append(exponentials[CANDIDATES.index(region.name)] / sum(exponentials.values()))
    mean = np.mean(probabilities)
    if region.kind == "filled":
        named_best = sorted(probabilities, reverse=True)[: math.ceil(FILLED_SHARE * len(probabilities))]
        return -np.mean(np.log(named_best))
    if region.kind == "class":
        return -np.mean(np.log(probabilities)) * region.weight
    return -math.log(min(1, mean / region.share))


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_loss_of_each_kind_equals_its_definition(kind):
    scores = 3 * torch.randn(2, 3, 4, len(CANDIDATES), generator=torch.Generator().manual_seed(0))
    scores[..., 3] -= 3
    first = [Region(kind, [LEFT], DOG, 0.7, 0.9), Region(kind, [(0, 0.25, 0.7, 1)], SKY, 0.5)]
    regions = [first, [Region(kind, [RIGHT], CAR, share=0.01)]]
    found = loss_of(scores, regions)
    expected = [expected_loss(scores[i], region) for i, image in enumerate(regions) for region in image]
    assert list(found) == [kind]
    assert min(expected) >= 0
    assert max(expected) > 0.1
    assert found[kind].item() == pytest.approx(WEIGHTS[kind] * np.mean(expected), rel=1e-4)


def test_kinds_have_separate_losses():
    scores = torch.randn(1, 3, 4, len(CANDIDATES), generator=torch.Generator().manual_seed(0))
    regions = [Region("named", [LEFT], DOG), Region("filled", [RIGHT], SKY)]
    found = loss_of(scores, [regions])
    assert found.keys() == {"named", "filled"}
    for region in regions:
        alone = loss_of(scores, [[region]])
        assert found[region.kind].item() == pytest.approx(alone[region.kind].item())


def test_related_names_are_never_compared():
    scores = torch.zeros(1, 2, 2, len(CANDIDATES), requires_grad=True)
    loss_of(scores, [[Region("filled", [WHOLE], DOG)]])["filled"].backward()
    gradient = scores.grad[0].sum((0, 1))
    assert gradient[CANDIDATES.index(ANIMAL)] == 0
    assert gradient[CANDIDATES.index(DOG)] < 0
    assert all(gradient[CANDIDATES.index(name)] > 0 for name in (CAT, SKY, CAR))


@pytest.mark.parametrize("kind", ["named", "caption", "outside"])
def test_a_name_is_satisfied_by_a_share_of_its_region(kind):
    scores = torch.zeros(1, 10, 10, len(CANDIDATES))
    region = Region(kind, [WHOLE] if kind != "outside" else [], SKY, share=0.15)
    scores[..., 0] = 20
    losses = []
    for columns in (1, 2):
        scores[:, :, :columns, 3] = 40
        losses.append(loss_of(scores, [[region]])[kind].item())
    assert losses == pytest.approx([WEIGHTS[kind] * math.log(0.15 / 0.1), 0], abs=1e-4)


def test_a_few_patches_of_a_filled_box_may_show_something_else():
    scores = torch.zeros(1, 4, 4, len(CANDIDATES), requires_grad=True)
    values = torch.zeros_like(scores)
    values[:, 0, :, 0], values[:, 1:, :, 3] = 5, 2  # the first row is a cat
    loss_of(scores + values, [[Region("filled", [WHOLE], SKY)]])["filled"].backward()
    learned = scores.grad[0].abs().sum(2) > 0
    assert FILLED_SHARE == 0.75
    assert learned[1:].all()
    assert not learned[0].any()


def test_an_empty_region_has_no_loss():
    scores = torch.zeros(1, 4, 4, len(CANDIDATES))
    outside, named = Region("outside", [WHOLE], SKY), Region("named", [LEFT], CAR)
    assert loss_of(scores, [[outside, named]]).keys() == {"named"}


def test_at_most_max_patches_of_a_region_are_used():
    scores = torch.zeros(1, 6, 6, len(CANDIDATES), requires_grad=True)
    regions = [[Region("named", [WHOLE], CAT), Region("named", [(0, 0, 0.1, 0.3)], SKY)]]
    loss_of(scores, regions, max_patches=5)["named"].backward()
    used = scores.grad[0].abs().sum(2) > 0
    assert used[0, :2].all()
    assert 5 <= used.sum() <= 7
