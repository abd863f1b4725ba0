"""Crops as a pure function of seed and index, whose labels stay on their pixels, and word maps among them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import COLOURS, NAMES, save_masked_images
from PIL import Image

from ifseg_hf.data.crops import (
    LARGEST_SHARE,
    CropDataset,
    MixedDataset,
    collate_samples,
    find_labels,
    largest_share,
    load_training_dataset,
)
from ifseg_hf.data.image_files import SampleError
from ifseg_hf.data.segmentation import SegmentationDataset
from ifseg_hf.data.word_maps import WordMapSampler, word_map_stream

pytest.importorskip("kornia")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_training_dataset(save_masked_images(tmp_path_factory.mktemp("images")))


@pytest.fixture
def samples(data):
    return CropDataset(data, crop_size=32, short_side=48, seed=3)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_sample_depends_on_seed_and_index_alone(data, samples):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = [samples[index] for index in (0, 5, 40)]
    assert torch.equal(torch.random.get_rng_state(), before)  # dropout draws from it, too
    torch.manual_seed(2)
    for index, expected in zip((40, 5, 0), reversed(first), strict=True):
        assert_same(CropDataset(data, 32, 48, seed=3)[index], expected)
    assert first[0]["pixel_values"].shape == (3, 32, 32)
    assert first[0]["pixel_values"].dtype == torch.float32
    assert first[0]["labels"].shape == (32, 32)
    assert first[0]["labels"].dtype == torch.int64
    other = CropDataset(data, 32, 48, seed=4)
    assert any(not torch.equal(other[index]["labels"], samples[index]["labels"]) for index in range(4))


def test_an_epoch_shows_every_image_once_in_new_order(samples):
    epochs = [[samples.position(index) for index in range(6 * epoch, 6 * epoch + 6)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert samples.position(0) == epochs[0][0]  # also after later epochs


def test_labels_stay_on_their_pixels(samples):
    """Without distortion each colour stands for a label, except where resizing has blended two colours."""
    samples.augment.distort = torch.nn.Identity()
    right = total = 0
    for index in range(20):
        sample = samples[index]
        pixels, labels = sample["pixel_values"] / 2 + 0.5, sample["labels"]
        distances = torch.stack(
            [(pixels - torch.tensor(colour)[:, None, None] / 255).norm(dim=0) for colour in COLOURS]
        )
        right += (distances.argmin(0) == labels)[labels >= 0].sum().item()
        total += (labels >= 0).sum().item()
    assert total > 5000
    assert right / total > 0.97


@pytest.mark.parametrize("long_side", [None, 50])
def test_no_crop_is_padded(long_side, data):
    """Every pixel of an image has a label here, and padding would have none."""
    whole = SegmentationDataset(data.samples, data.names, np.where(data.labels < 0, 0, data.labels), {})
    samples = CropDataset(whole, crop_size=160, short_side=40, long_side=long_side)
    for index in range(5):
        sample = samples[index]
        assert sample["pixel_values"].shape[1:] == sample["labels"].shape == (160, 160)
        assert (sample["labels"] >= 0).all()


def test_the_short_side_is_at_least_the_crop(monkeypatch):
    """Images with sides from 7 to 4000, at the scale where rounding errors could lose a pixel."""
    sizes = []
    data = SegmentationDataset([{"id": "0"}], NAMES, np.arange(4), {})
    crops = CropDataset(data, crop_size=512, short_side=512, long_side=2048)
    crops.augment = lambda image, labels, seed: (sizes.append(labels.shape), (torch.zeros(3, 1, 1), labels))[1]
    for height, width in [(7, 7), (375, 500), (683, 512), (333, 4000), (4000, 331)]:
        blank = np.zeros((height, width), np.int64)
        monkeypatch.setattr(data, "read", lambda sample, blank=blank: (np.zeros((*blank.shape, 3), np.uint8), blank))
        for index in range(12):
            crops[index]
    assert min(map(min, sizes)) == 512
    assert max(map(min, sizes[:12])) > 800


def test_the_long_side_is_limited_as_in_inference(monkeypatch):
    """Labels of a panorama of 8 x 80 pixels, resized to a short side of 32 or a long one of 64."""
    sizes = []
    image, labels = np.zeros((8, 80, 3), np.uint8), np.zeros((8, 80), np.int64)
    data = SegmentationDataset([{"id": "0"}], NAMES, np.arange(4), {})
    monkeypatch.setattr(data, "read", lambda sample: (image, labels.copy()))
    for long_side in (None, 64):
        crops = CropDataset(data, crop_size=2, short_side=32, long_side=long_side)
        crops.augment = lambda image, labels, seed: (sizes.append(labels.shape), (torch.zeros(3, 2, 2), labels))[1]
        for index in range(20):
            crops[index]
    assert max(width for _, width in sizes[:20]) > 320
    assert all(32 <= width <= 128 for _, width in sizes[20:])
    assert max(width for _, width in sizes[20:]) > 64
    assert all(abs(width / 10 - height) <= 1 for height, width in sizes[20:])


def test_images_that_cannot_be_read_are_skipped(tmp_path, capsys, monkeypatch):
    """The next image of the epoch is in their place, named once; every other image is seen in each epoch."""
    folder = Path(save_masked_images(tmp_path, count=5))
    for name in ("1", "3"):
        (folder / "train" / "images" / f"{name}.png").write_bytes(b"damaged")
    data = load_training_dataset(str(folder))
    with pytest.raises(SampleError, match=r"\d.png is no image"):
        [CropDataset(data, crop_size=32, short_side=48)[index] for index in range(5)]
    seen, read = [], data.read
    monkeypatch.setattr(data, "read", lambda sample: (read(sample), seen.append(sample["id"]))[0])
    crops = CropDataset(data, crop_size=32, short_side=48, on_error="skip")
    samples = [crops[index]["labels"] for index in range(15)]
    assert all(set(seen[first : first + 5]) == {"0", "2", "4"} for first in (0, 5, 10))
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == len(set(messages)) == 2
    assert all("Skipped: " in message and "is no image that Pillow can read" in message for message in messages)
    again = CropDataset(data, crop_size=32, short_side=48, on_error="skip")  # a sample does not depend on earlier ones
    assert all(torch.equal(again[index]["labels"], samples[index]) for index in reversed(range(15)))
    for file in (folder / "train" / "images").glob("*.png"):
        file.write_bytes(b"damaged")
    with pytest.raises(SampleError, match="None of the 5 images can be used"):
        CropDataset(data, crop_size=32, short_side=48, on_error="skip")[0]


def test_scales_range_from_half_to_twice_the_short_side(data, monkeypatch):
    sides = []

    def record(image, labels, seed):
        assert image.shape[:2] == labels.shape
        sides.append(min(labels.shape))
        return torch.zeros(3, 1, 1), torch.zeros(1, 1)

    samples = CropDataset(data, crop_size=16, short_side=48)
    monkeypatch.setattr(samples, "augment", record)
    for index in range(200):
        samples[index]
    assert min(sides) in range(24, 28)
    assert max(sides) in range(92, 97)


def test_crops_of_one_category_are_drawn_again(tmp_path):
    """Most crops of an image of two halves would otherwise have one category only."""
    half = np.repeat([0, 1], 64)[None].repeat(64, 0)

    class Halves(SegmentationDataset):
        def read(self, sample):
            return np.zeros((64, 128, 3), np.uint8), half.copy()

    halves = CropDataset(Halves([{"id": "0"}], NAMES, np.arange(4), {}), crop_size=16, short_side=32)
    shares = [largest_share(halves[index]["labels"]) for index in range(60)]
    assert np.mean(np.array(shares) > LARGEST_SHARE) < 0.25
    assert largest_share(torch.full((4, 4), -100)) == 1
    assert largest_share(torch.tensor([[0, 0], [1, -100]])) == pytest.approx(2 / 3)


def test_colours_are_distorted_and_labels_are_not(samples):
    changed = samples[7]
    samples.augment.distort = torch.nn.Identity()
    plain = samples[7]
    assert torch.equal(changed["labels"], plain["labels"])
    assert not torch.equal(changed["pixel_values"], plain["pixel_values"])
    assert changed["pixel_values"].abs().max() <= 1


def test_labels_can_be_ignored_and_masks_replaced(data, tmp_path):
    ignoring = CropDataset(data, 32, 48, ignored=[1, 2])
    plain = CropDataset(data, 32, 48)
    seen = plain[0]["labels"].unique().tolist()
    assert {1, 2} & {label for index in range(6) for label in plain[index]["labels"].unique().tolist()}
    for index in range(6):
        assert set(ignoring[index]["labels"].unique().tolist()) <= {-100, 0, 3}
    for sample in data.samples:
        with Image.open(sample["mask"]["path"]) as mask:
            Image.fromarray(np.full((mask.height, mask.width), 255, np.uint8)).save(tmp_path / f"{sample['id']}.png")
    assert set(CropDataset(data, 32, 48, masks=tmp_path)[0]["labels"].unique().tolist()) == {-100} != set(seen)


# Word maps among the crops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.3, 0.9])
def test_word_maps_are_spread_evenly_and_no_crop_is_skipped(samples, ratio):
    word_maps = WordMapSampler(4, 3, 4, 4)
    mixed = MixedDataset(samples, word_maps, ratio)
    kinds = ["word_map" in mixed[index] for index in range(20)]
    assert sum(kinds) == int(20 * ratio)
    for start in range(0, 20, 10):
        assert abs(sum(kinds[start : start + 10]) - 10 * ratio) <= 1
    crops = [mixed[index] for index in range(20) if not kinds[index]]
    for position in (0, len(crops) - 1):
        assert_same(crops[position], samples[position])
    stream = iter(word_map_stream(4, seed=3, grid_size=4))
    for index in range(20):
        if kinds[index]:
            expected = next(stream)
            assert np.array_equal(mixed[index]["word_map"], expected["word_map"])
            assert np.array_equal(mixed[index]["grid_size"], expected["grid_size"])


def test_a_batch_has_both_kinds(samples):
    mixed = MixedDataset(samples, WordMapSampler(4, 0, 4, 4), 0.25)
    batch = collate_samples([mixed[index] for index in range(8)])
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes == {
        "pixel_values": (6, 3, 32, 32),
        "labels": (6, 32, 32),
        "word_map": (2, 4, 4),
        "grid_size": (2, 2),
    }
    assert collate_samples([samples[0]]).keys() == {"pixel_values", "labels"}


# Datasets -------------------------------------------------------------------------------------------------------------


def test_the_training_split_is_taken_and_categories_are_selected(tmp_path):
    folder = save_masked_images(tmp_path / "split")
    save_masked_images(tmp_path / "split", count=2, split="val")
    assert len(load_training_dataset(folder).samples) == 6
    assert len(load_training_dataset(folder, split="val").samples) == 2
    assert load_training_dataset(folder, categories={"thing": ["cat", "cup"], "sea": ["sea"]}).names == ["thing", "sea"]
    flat = save_masked_images(tmp_path / "flat", split=None)
    assert len(load_training_dataset(flat).samples) == 6


def test_labels_are_found_by_name(data):
    assert find_labels(data, None) == []
    assert find_labels(data, " sky,cat ") == [2, 0]
    with_subsets = SegmentationDataset(data.samples, data.names, data.labels, {"unseen": [1, 3]})
    assert find_labels(with_subsets, "unseen") == [1, 3]
    for names, message in [("dog", 'no category "dog"'), ("", "at least one"), (", ".join(NAMES), "not all")]:
        with pytest.raises(ValueError, match=message):
            find_labels(data, names)
