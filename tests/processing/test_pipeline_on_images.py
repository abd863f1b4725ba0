"""The pipeline on every kind of image and in every way of calling it; what it computes is in test_pipeline_ifseg.py."""

import io
import logging

import datasets
import numpy as np
import pytest
import torch
from checkpoints import small_model
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    ImageSegmentationPipeline,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from ifseg_hf.processing import IFSegImageProcessor, IFSegImageSegmentationPipeline, IFSegProcessor

WORDS = ["cat", "dog", "sky"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_tokenizer) -> str:
    folder = tmp_path_factory.mktemp("model")
    processor = IFSegProcessor(IFSegImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}), small_tokenizer)
    model = small_model(vocab_size=len(small_tokenizer))
    with torch.no_grad():  # so that several categories win somewhere
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.set_words(**processor.encode_categories(WORDS))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-segmentation", model=folder)


@pytest.fixture(scope="module")
def plain(folder):
    """transformers' own class on the same folder; it complains that it doesn't know the model's class, and works."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    pipe = ImageSegmentationPipeline(
        model=AutoModelForSemanticSegmentation.from_pretrained(folder),
        image_processor=AutoImageProcessor.from_pretrained(folder),
    )
    logger.setLevel(before)
    return pipe


def make_image(height: int = 90, width: int = 120, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str, **kwargs) -> Image.Image:
    """The image as it comes back out of a file."""
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return Image.open(file)


def label_map(segments: list[dict]) -> np.ndarray:
    """The label of each pixel; checks that every pixel is in exactly one mask."""
    masks = np.stack([np.asarray(segment["mask"]) for segment in segments])
    assert set(np.unique(masks)) <= {0, 255}
    assert (masks == 255).any((1, 2)).all()
    assert ((masks == 255).sum(0) == 1).all()
    names = [segment["label"] for segment in segments]
    assert len(set(names)) == len(names)
    assert set(names) <= set(WORDS)
    return np.array(names)[masks.argmax(0)]


# Kinds of image -------------------------------------------------------------------------------------------------------


def rgba() -> Image.Image:
    image = make_image().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(make_image().convert("L")).astype(np.uint16) * 257)


def animation(format: str) -> Image.Image:
    return saved(make_image(), format, save_all=True, append_images=[make_image(seed=1), make_image(seed=2)])


def rotated(orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(make_image(), "JPEG", exif=exif)


KINDS = {
    "greyscale": (lambda: make_image().convert("L"), (120, 90)),
    "greyscale with alpha": (lambda: rgba().convert("LA"), (120, 90)),
    "RGBA": (rgba, (120, 90)),
    "RGBA in a file": (lambda: saved(rgba(), "PNG"), (120, 90)),
    "RGBa": (lambda: rgba().convert("RGBa"), (120, 90)),
    "palette": (lambda: make_image().quantize(16), (120, 90)),
    "palette with a transparent colour": (lambda: saved(make_image().quantize(16), "PNG", transparency=3), (120, 90)),
    "two colours": (lambda: make_image().convert("1"), (120, 90)),
    "16 bits": (sixteen_bits, (120, 90)),
    "16 bits in a PNG": (lambda: saved(sixteen_bits(), "PNG"), (120, 90)),
    "16 bits in a TIFF": (lambda: saved(sixteen_bits(), "TIFF"), (120, 90)),
    "32 bits": (lambda: Image.fromarray(np.asarray(make_image().convert("L")).astype(np.int32)), (120, 90)),
    "CMYK": (lambda: saved(make_image().convert("CMYK"), "JPEG"), (120, 90)),
    "YCbCr": (lambda: make_image().convert("YCbCr"), (120, 90)),
    "Lab": (lambda: saved(Image.new("LAB", (120, 90), (120, 90, 200)), "TIFF"), (120, 90)),
    "animated GIF": (lambda: animation("GIF"), (120, 90)),
    "animated PNG": (lambda: animation("PNG"), (120, 90)),
    "animated WebP": (lambda: animation("WEBP"), (120, 90)),
    "pages": (lambda: animation("TIFF"), (120, 90)),
    **{f"orientation {i}": (lambda i=i: rotated(i), (120, 90) if i < 5 else (90, 120)) for i in range(1, 9)},
    "an orientation that does not exist": (lambda: rotated(9), (120, 90)),
    "one pixel wide": (lambda: make_image(50, 1), (1, 50)),
    "one pixel high": (lambda: make_image(1, 50), (50, 1)),
    "one pixel": (lambda: make_image(1, 1), (1, 1)),
    "very wide": (lambda: make_image(3, 1000), (1000, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_partition_the_image_as_a_viewer_shows_it(pipe, kind):
    make, size = KINDS[kind]
    segments = pipe(make())
    assert all(segment["mask"].size == size for segment in segments)
    assert all(0 < segment["score"] <= 1 for segment in segments)
    label_map(segments)


def test_every_kind_is_seen_as_a_viewer_shows_it(pipe):
    expected = label_map(pipe(make_image()))
    for kind in ("animated PNG", "pages"):
        assert (label_map(pipe(KINDS[kind][0]())) == expected).all(), kind
    for kind in ("palette", "two colours", "CMYK", "YCbCr", "animated GIF", "animated WebP", "greyscale"):
        shown = KINDS[kind][0]().convert("RGB")
        assert (label_map(pipe(KINDS[kind][0]())) == label_map(pipe(shown))).all(), kind
    grey = label_map(pipe(make_image().convert("L")))
    for kind in ("16 bits", "16 bits in a PNG", "16 bits in a TIFF", "32 bits"):
        assert (label_map(pipe(KINDS[kind][0]())) == grey).all(), kind
    for kind in ("RGBA", "RGBA in a file", "palette with a transparent colour"):
        on_white = Image.new("RGBA", (120, 90), "white")
        on_white.alpha_composite(KINDS[kind][0]().convert("RGBA"))
        assert (label_map(pipe(KINDS[kind][0]())) == label_map(pipe(on_white.convert("RGB")))).all(), kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_images_are_turned_upright(pipe, plain, orientation):
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }
    upright = saved(make_image(), "JPEG").convert("RGB")
    for turn in turns.get(orientation, []):
        upright = upright.transpose(turn)
    expected = label_map(pipe(upright))
    assert (label_map(pipe(rotated(orientation))) == expected).all()
    assert (label_map(plain(rotated(orientation))) == expected).all()


def test_a_frame_that_was_chosen_is_kept(pipe):
    frames = animation("PNG")
    frames.seek(1)
    assert (label_map(pipe(frames)) == label_map(pipe(make_image(seed=1)))).all()


# What is no image -----------------------------------------------------------------------------------------------------


def truncated() -> bytes:
    file = io.BytesIO()
    make_image(400, 400).save(file, "JPEG")
    return file.getvalue()[:2000]


@pytest.mark.parametrize("content", [b"", b"no image", truncated()], ids=["empty", "text", "truncated"])
def test_damaged_files_are_named(pipe, content, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(content)
    for source in (tmp_path / "holiday.jpg", str(tmp_path / "holiday.jpg")):
        with pytest.raises(ValueError, match=r"holiday\.jpg"):
            pipe(source)


def test_a_damaged_image_that_is_open_already(pipe):
    with pytest.raises(ValueError, match="Can't read the image"):
        pipe(Image.open(io.BytesIO(truncated())))


def test_missing_files_are_named(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.jpg"):
        pipe(str(tmp_path / "missing.jpg"))


def test_urls_that_cannot_be_reached_are_named(pipe):
    """Port 9 of this machine: what a URL gives without a network, at once."""
    with pytest.raises(ValueError, match=r"Can't read the image http://127\.0\.0\.1:9/cat\.jpg"):
        pipe("http://127.0.0.1:9/cat.jpg", timeout=2)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 5, 2), (5, 5, 5, 3)])
def test_arrays_that_are_no_images(pipe, shape):
    with pytest.raises(ValueError, match="shape"):
        pipe(np.zeros(shape, np.uint8))


# Ways of calling ------------------------------------------------------------------------------------------------------


def test_ours_comes_for_the_task_and_agrees_with_transformers(pipe, plain):
    assert type(pipe) is IFSegImageSegmentationPipeline
    assert type(plain) is ImageSegmentationPipeline
    for image in (make_image(), make_image(70, 200, seed=3), make_image().convert("L")):
        for kwargs in ({}, {"subtask": "semantic"}):
            ours, theirs = pipe(image, **kwargs), plain(image, **kwargs)
            assert [segment["label"] for segment in ours] == [segment["label"] for segment in theirs]
            assert (label_map(ours) == label_map(theirs)).all()
            assert all(segment["score"] is None for segment in theirs)
    for both in (pipe, plain):
        with pytest.raises(ValueError, match=r"(?i)subtask"):
            both(make_image(), subtask="panoptic")


def test_batches_generators_and_datasets(pipe, plain, tmp_path):
    files = []
    for i in range(5):
        files.append(str(tmp_path / f"{i}.png"))
        make_image(seed=i).save(files[-1])
    expected = [label_map(pipe(file)) for file in files]
    dataset = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    for both in (pipe, plain):
        for inputs in (files, (file for file in files), KeyDataset(dataset, "image")):
            found = [label_map(segments) for segments in both(inputs, batch_size=2)]
            assert len(found) == 5
            assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_odd_images_share_a_batch(pipe):
    images = [make() for make, _ in KINDS.values()]
    together = pipe(images, batch_size=len(images))
    for kind, segments in zip(KINDS, together, strict=True):
        assert (label_map(segments) == label_map(pipe(KINDS[kind][0]()))).all(), kind


def test_device_and_dtype(folder, pipe):
    expected = label_map(pipe(make_image()))
    for place in ({"device": "cpu"}, {"device": -1}, {"device": torch.device("cpu")}, {"device_map": "auto"}):
        assert (label_map(pipeline("image-segmentation", model=folder, **place)(make_image())) == expected).all()
    for dtype in (torch.bfloat16, "float16"):
        half = pipeline("image-segmentation", model=folder, dtype=dtype)
        assert half.model.dtype.itemsize == 2
        assert (label_map(half(make_image())) == expected).mean() > 0.8
        assert (label_map(half(make_image(), categories=["cat", "dog", "sky"])) == expected).mean() > 0.8
