import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference_outputs import SHARED, golden

from ifseg_hf.processing import IFSegImageProcessor
from ifseg_hf.processing.image_processing_ifseg import output_size, resize_bilinear, resize_nearest
from ifseg_hf.processing.image_reading_ifseg import read_image, to_array


def random_image(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def resize_by_loops(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The integer arithmetic of OpenCV's INTER_LINEAR, one pixel at a time."""

    def neighbours(target, size, size_of_target):
        position = np.float32((target + 0.5) * (1 / (size_of_target / size)) - 0.5)
        first = int(np.floor(position))
        return first, np.float32(position - np.float32(first))

    result = np.zeros((height, width, image.shape[2]), np.uint8)
    for y in range(height):
        top, fy = neighbours(y, image.shape[0], height)
        b0, b1 = (int(np.rint(w * np.float32(2048))) for w in (np.float32(1) - fy, fy))
        rows = [min(max(row, 0), image.shape[0] - 1) for row in (top, top + 1)]
        for x in range(width):
            left, fx = neighbours(x, image.shape[1], width)
            if left < 0 or left >= image.shape[1] - 1:
                left, fx = min(max(left, 0), image.shape[1] - 1), np.float32(0)
            a0, a1 = (int(np.rint(w * np.float32(2048))) for w in (np.float32(1) - fx, fx))
            right = min(left + 1, image.shape[1] - 1)
            for c in range(image.shape[2]):
                s0, s1 = (int(image[row, left, c]) * a0 + int(image[row, right, c]) * a1 for row in rows)
                result[y, x, c] = ((b0 * (s0 >> 4) >> 16) + (b1 * (s1 >> 4) >> 16) + 2) >> 2
    return result


@pytest.mark.skipif(SHARED is None, reason="needs the reference's images")
@pytest.mark.parametrize(
    ("name", "file"),
    [("cat_dog", "cat_dog.jpg"), ("camvid_0016E5_07959", "camvid/val/images/0016E5_07959.jpg")],
)
def test_resize_is_the_reference_resize(name, file):
    expected = golden("resized")
    processor = IFSegImageProcessor(do_rescale=False, do_normalize=False)
    resized = processor(str(SHARED / "data" / file), return_tensors="pt").pixel_values[0]
    assert list(resized.shape[1:]) == expected[f"{name}_size"].tolist()
    assert torch.equal(resized[:, ::4, ::4], expected[name].float())


@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 24)] * 4, st.integers(0, 100))
def test_resize_is_opencvs_arithmetic(height, width, new_height, new_width, seed):
    image = random_image(height, width, seed=seed)
    resized = resize_bilinear(image, new_height, new_width)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, resize_by_loops(image, new_height, new_width))


@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 24)] * 4)
def test_resize_of_floats_is_bilinear_without_antialiasing(height, width, new_height, new_width):
    image = random_image(height, width).astype(np.float32) / 255
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], size=(new_height, new_width), mode="bilinear"
    )[0].permute(1, 2, 0)
    resized = resize_bilinear(image, new_height, new_width)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_output_size(height, width):
    new_height, new_width = output_size(height, width, IFSegImageProcessor().size)
    scale = min(512 / min(height, width), 2048 / max(height, width))
    assert (new_height, new_width) == (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    assert max(new_height, new_width) <= 2048
    assert min(new_height, new_width) <= 512


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 50, "longest_edge": 120}, (50, 100)),
        ({"shortest_edge": 50, "longest_edge": 80}, (40, 80)),
        ({"shortest_edge": 50}, (50, 100)),
        ({"longest_edge": 50}, (25, 50)),
        ({"height": 30, "width": 40}, (30, 40)),
        (30, (30, 60)),
    ],
)
def test_sizes_that_transformers_knows(size, expected):
    inputs = IFSegImageProcessor(size=size)(random_image(200, 400), return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, *expected)


def test_normalises_to_minus_one_to_one():
    image = random_image(64, 96)
    processor = IFSegImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    inputs = processor(Image.fromarray(image), return_tensors="pt")
    assert inputs.pixel_values.dtype == torch.float32
    expected = (torch.from_numpy(image).permute(2, 0, 1).double() / 255 - 0.5) / 0.5
    assert (inputs.pixel_values[0] - expected).abs().max() < 1e-6
    assert torch.equal(inputs.pixel_mask, torch.ones(1, 64, 96, dtype=torch.int64))


def test_flags():
    image = random_image(30, 40)
    processor = IFSegImageProcessor(do_resize=False, do_normalize=False)
    plain = processor(image, do_rescale=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(plain[0], image.transpose(2, 0, 1))
    np.testing.assert_allclose(processor(image, return_tensors="np")["pixel_values"][0], plain[0] / 255, rtol=1e-6)
    with pytest.raises(ValueError, match="crop"):
        processor(image, do_center_crop=True, crop_size={"height": 8, "width": 8})
    with pytest.raises(ValueError, match="bilinear"):
        processor(image, resample=Image.Resampling.BICUBIC)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(8, 60), st.integers(8, 60)), min_size=1, max_size=4))
def test_padding_changes_no_pixel_of_an_image(sizes):
    processor = IFSegImageProcessor(size={"shortest_edge": 16, "longest_edge": 64})
    images = [random_image(*size, seed=index) for index, size in enumerate(sizes)]
    inputs = processor(images, return_tensors="pt")
    for image, pixels, mask in zip(images, inputs.pixel_values, inputs.pixel_mask, strict=True):
        alone = processor(image, return_tensors="pt").pixel_values[0]
        height, width = alone.shape[1:]
        assert torch.equal(pixels[:, :height, :width], alone)
        assert mask[:height, :width].all()
        assert mask.sum() == height * width
        assert pixels.masked_fill(mask.bool(), 0).eq(0).all()


def test_pads_to_a_given_size_or_not_at_all():
    images = [random_image(20, 20), random_image(20, 30)]
    processor = IFSegImageProcessor(do_resize=False)
    assert processor(images, pad_size={"height": 32, "width": 48}, return_tensors="pt").pixel_values.shape[2:] == (
        32,
        48,
    )
    assert [image.shape for image in processor(images, do_pad=False)["pixel_values"]] == [(3, 20, 20), (3, 20, 30)]


def test_kinds_of_input(tmp_path):
    image = random_image(20, 30)
    Image.fromarray(image).save(tmp_path / "a.png")
    tensor = torch.from_numpy(image)
    kinds = [
        image,
        image.transpose(2, 0, 1),
        tensor,
        tensor.permute(2, 0, 1),
        Image.fromarray(image),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        image.astype(np.int64),
        image.astype(np.uint16) * 257,
        image[None],
        [[image]],
    ]
    processor = IFSegImageProcessor(do_resize=False)
    expected = processor(image, return_tensors="pt").pixel_values
    for kind in kinds:
        assert torch.equal(processor(kind, return_tensors="pt").pixel_values, expected)
    assert torch.equal(processor(kinds[:4], return_tensors="pt").pixel_values, expected.expand(4, -1, -1, -1))
    scaled = processor(image.astype(np.float64) / 255, do_rescale=False, return_tensors="pt").pixel_values
    assert (scaled - expected).abs().max() < 1e-6
    half = processor(tensor.to(torch.bfloat16), return_tensors="pt").pixel_values
    assert (half - expected).abs().max() < 0.02


def test_modes_of_pil():
    grey = Image.fromarray(random_image(20, 30, 0))
    rgb = Image.fromarray(random_image(20, 30))
    from_grey = np.repeat(np.asarray(grey)[..., None], 3, 2)
    np.testing.assert_array_equal(to_array(grey), from_grey)
    np.testing.assert_array_equal(to_array(np.asarray(grey)), from_grey)
    np.testing.assert_array_equal(to_array(grey.convert("1")), np.asarray(grey.convert("1").convert("RGB")))
    sixteen = np.asarray(grey).astype(np.uint16) * 257
    np.testing.assert_array_equal(to_array(Image.fromarray(sixteen)), from_grey)
    np.testing.assert_array_equal(to_array(Image.fromarray(sixteen.astype(np.int32))), from_grey)
    palette = rgb.quantize(16)
    np.testing.assert_array_equal(to_array(palette), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(to_array(rgb.convert("CMYK")), np.asarray(rgb.convert("CMYK").convert("RGB")))


@pytest.mark.parametrize(
    ("dtype", "factor"), [(np.uint16, 257), (np.int32, 1), (np.int32, 257), (np.float32, 1 / 255), (np.float32, 257)]
)
def test_grey_of_more_than_8_bits_is_scaled_from_its_range(dtype, factor, tmp_path):
    grey = random_image(20, 30, 0)
    grey[0, 0] = 255
    Image.fromarray((grey.astype(np.float64) * factor).astype(dtype)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(to_array(read_image(tmp_path / "a.tif"))[..., 0], grey)


def test_16_bits_of_either_byte_order_are_scaled():
    grey = random_image(20, 30, 0)
    for order in ("<u2", ">u2"):
        np.testing.assert_array_equal(to_array((grey.astype(np.uint16) * 257).astype(order))[..., 0], grey)


@pytest.mark.parametrize("wrong", [-1, 65536, np.inf, np.nan])
def test_grey_of_an_unknown_range_is_refused(wrong):
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = wrong
    with pytest.raises(ValueError, match=r"whose range is unknown|not finite"):
        to_array(Image.fromarray(values))


def test_transparency_is_white():
    rgba = random_image(8, 8, 4)
    rgba[..., 3] = 255
    rgba[:4, :, 3] = 0
    for image in (Image.fromarray(rgba), rgba, rgba.transpose(2, 0, 1)):
        converted = to_array(image)
        assert (converted[:4] == 255).all()
        np.testing.assert_array_equal(converted[4:], rgba[4:, :, :3])


def test_exif_orientation(tmp_path):
    image = Image.fromarray(random_image(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(to_array(Image.open(tmp_path / "turned.png")), expected)
    inputs = IFSegImageProcessor(do_resize=False)(tmp_path / "turned.png", return_tensors="pt")
    assert inputs.pixel_values.shape[2:] == (30, 20)


def test_animation_takes_the_first_frame(tmp_path):
    frames = [Image.fromarray(random_image(20, 30, seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=100)
    assert Image.open(tmp_path / "a.png").n_frames == 3
    np.testing.assert_array_equal(to_array(Image.open(tmp_path / "a.png")), np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 9, 2), np.uint8), r"channels in an image of shape \(8, 9, 2\)"),
        (np.zeros((5, 8, 9), np.uint8), "channels"),
        (np.zeros((8,), np.uint8), "2 or 3 dimensions"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.full((8, 8, 3), 300), "0 to 255"),
        (np.full((8, 8, 3), np.nan), "finite"),
        ("no/such/file.jpg", "no/such/file.jpg"),
        ([], "no image"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        IFSegImageProcessor()(image)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    Image.fromarray(random_image(64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1000])
    for name in ("text.jpg", "cut.jpg"):
        with pytest.raises(ValueError, match=name):
            IFSegImageProcessor()(tmp_path / name)
    with pytest.raises(ValueError, match="Can't read"):
        IFSegImageProcessor()(Image.open(tmp_path / "cut.jpg"))
    with pytest.raises(TypeError, match="NoneType"):
        IFSegImageProcessor()([None])
    with Image.open(tmp_path / "whole.jpg") as closed:
        pass
    for images, maps in ((closed, None), (random_image(64, 64), closed)):
        with pytest.raises(ValueError, match="its file was closed before it was read"):
            IFSegImageProcessor()(images, maps)


@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 24)] * 4)
def test_labels_are_taken_under_pixel_centres(height, width, new_height, new_width):
    labels = np.arange(height * width).reshape(height, width)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(labels)[None, None].double(), size=(new_height, new_width), mode="nearest-exact"
    )[0, 0]
    # in exact arithmetic; torch rounds where a centre falls on a border
    assert (resize_nearest(labels, new_height, new_width) != expected.numpy()).mean() < 0.5
    rows = [int((2 * y + 1) * height // (2 * new_height)) for y in range(new_height)]
    columns = [int((2 * x + 1) * width // (2 * new_width)) for x in range(new_width)]
    np.testing.assert_array_equal(resize_nearest(labels, new_height, new_width), labels[np.ix_(rows, columns)])


def test_segmentation_maps(tmp_path):
    images = [random_image(20, 30), random_image(40, 30)]
    maps = [
        np.random.default_rng(index).integers(0, 4, image.shape[:2], np.uint8) for index, image in enumerate(images)
    ]
    processor = IFSegImageProcessor(size={"shortest_edge": 40, "longest_edge": 80})
    inputs = processor(images, maps, return_tensors="pt")
    assert inputs.labels.dtype == torch.int64
    assert inputs.labels.shape == inputs.pixel_mask.shape
    assert (inputs.labels[inputs.pixel_mask == 0] == -100).all()
    np.testing.assert_array_equal(inputs.labels[0, :40, :60], maps[0].repeat(2, 0).repeat(2, 1))

    Image.fromarray(maps[0]).save(tmp_path / "map.png")
    palette = Image.fromarray(maps[0]).convert("P")
    for kind in (str(tmp_path / "map.png"), torch.from_numpy(maps[0]), maps[0][None], palette):
        assert torch.equal(processor(images[0], kind, return_tensors="pt").labels[0], inputs.labels[0, :40, :60])


def test_ignored_labels():
    processor = IFSegImageProcessor(do_resize=False)
    image, labels = np.zeros((2, 3, 3), np.uint8), np.array([[0, 1, 2], [254, 255, 3]], np.uint8)
    assert processor(image, labels)["labels"][0].tolist() == [[0, 1, 2], [254, 255, 3]]
    assert processor(image, labels, ignore_index=255)["labels"][0].tolist() == [[0, 1, 2], [254, -100, 3]]
    reduced = processor(image, labels, do_reduce_labels=True)["labels"][0]
    assert reduced.tolist() == [[-100, 0, 1], [253, -100, 2]]
    wide = processor(image, labels.astype(np.int32), do_reduce_labels=True, ignore_index=2)["labels"][0]
    assert wide.tolist() == [[-100, 0, -100], [253, 254, 2]]
    already = processor(image, np.where(labels == 1, -100, labels.astype(int)), do_reduce_labels=True)["labels"][0]
    assert already.tolist() == [[-100, -100, 1], [253, 254, 2]]


def test_bad_segmentation_maps():
    processor, image = IFSegImageProcessor(), random_image(20, 30)
    with pytest.raises(ValueError, match=r"map 0 is \(30, 20\)"):
        processor(image, np.zeros((30, 20), np.uint8))
    with pytest.raises(ValueError, match="2 segmentation maps for 1"):
        processor(image, [np.zeros((20, 30), np.uint8)] * 2)
    with pytest.raises(ValueError, match="integer labels"):
        processor(image, np.zeros((20, 30), np.float32))
    with pytest.raises(ValueError, match="integer labels"):
        processor(image, Image.fromarray(image))


def test_saved_and_loaded(tmp_path):
    processor = IFSegImageProcessor(size={"shortest_edge": 256, "longest_edge": 1024}, ignore_index=255)
    processor.save_pretrained(tmp_path)
    loaded = IFSegImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.size == {"shortest_edge": 256, "longest_edge": 1024}
    image = random_image(300, 400)
    assert torch.equal(
        loaded(image, return_tensors="pt").pixel_values, processor(image, return_tensors="pt").pixel_values
    )
