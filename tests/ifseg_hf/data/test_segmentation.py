"""Small datasets in the published layouts, label by label, and the errors of damaged ones."""

import io
import json
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from ifseg_hf.data import segmentation
from ifseg_hf.data.image_files import SampleError
from ifseg_hf.data.segmentation import load_segmentation_dataset
from ifseg_hf.data.vocabularies import read_categories

CAMVID = Path(__file__).parents[4] / "shared" / "data" / "camvid"
ABSENT = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
COCO_IDS = [value for value in range(182) if value not in ABSENT]
UNSEEN = [29, 36, 88, 51, 76, 28, 23, 19, 137, 160, 157, 112, 136, 94, 133]


def save_pair(images: Path, masks: Path, name: str, values) -> np.ndarray:
    """Writes an image `name`.jpg of one colour and a grey mask `name`.png with `values` in rows of 4."""
    values = np.asarray(values, np.uint8).reshape(-1, 4)
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", values.shape[::-1], (200, 100, 50)).save(images / f"{name}.jpg")
    Image.fromarray(values).save(masks / f"{name}.png")
    return values


@pytest.fixture
def coco(tmp_path):
    masks = tmp_path / "stuffthingmaps_trainval2017" / "val2017"
    save_pair(tmp_path / "val2017", masks, "000000000139", [*COCO_IDS, 255])
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    """A folder with an image, whose mask has the values 0, 1, 2 and 9, the ignored one."""
    save_pair(tmp_path / "images", tmp_path / "masks", "a", [0, 1, 2, 9, 2, 2, 2, 2])
    (tmp_path / "dataset.json").write_text(json.dumps({"categories": ["sky", "tree", "road"], "ignore_index": 9}))
    return tmp_path


def read_one(data) -> np.ndarray:
    """The labels of the only sample, flattened."""
    (sample,) = data.samples
    image, labels = data.read(sample)
    assert (image.dtype, labels.dtype) == (np.uint8, np.int64)
    assert image.shape == (*labels.shape, 3)
    return labels.ravel()


def test_every_mask_value_of_coco_stuff(coco):
    data = load_segmentation_dataset("coco-stuff", coco)
    assert data.samples["id"][:] == ["000000000139"]
    assert read_one(data).tolist() == [*range(171), -100]
    assert data.names == read_categories("coco-stuff")
    assert data.subsets["unseen"] == sorted(UNSEEN)
    assert data.subsets["seen"] == [label for label in range(171) if label not in UNSEEN]
    assert [value for value in range(255) if data.labels[value] == -1] == [*sorted(ABSENT), *range(182, 255)]


def test_unseen_and_seen_categories_of_coco_stuff(coco):
    data = load_segmentation_dataset("coco-stuff-unseen", coco)
    assert data.names == read_categories("coco-stuff-unseen")
    expected = [UNSEEN.index(label) if label in UNSEEN else -100 for label in range(171)]
    assert read_one(data).tolist() == [*expected, -100]
    assert data.subsets == {}

    data = load_segmentation_dataset("coco-stuff-seen", coco)
    seen = [label for label in range(171) if label not in UNSEEN]
    assert data.names == [read_categories("coco-stuff")[label] for label in seen]
    assert read_one(data).tolist() == [*(seen.index(x) if x in seen else -100 for x in range(171)), -100]


def test_every_value_of_coco_stuff_has_one_coarse_category(coco):
    """Things by COCO's ranges of values for its supercategories, stuff by Table 15 and the names that it omits."""
    table = read_categories("coco-stuff-coarse")
    data = load_segmentation_dataset("coco-stuff-coarse", coco)
    assert data.names == list(table)
    assert data.subsets == {}
    labels = read_one(data)
    assert labels[-1] == -100
    coarse = dict(zip(COCO_IDS, [data.names[label] for label in labels[:-1]], strict=True))
    assert set(coarse.values()) == set(table)
    things = {"person": 1, "vehicle": 9, "outdoor": 15, "animal": 25, "accessory": 33, "sports": 43, "kitchen": 51}
    things |= {"food (things)": 61, "furniture (things)": 71, "electronic": 77, "appliance": 83, "indoor": 91}
    start = 0
    for category, end in things.items():
        assert {coarse[value] for value in range(start, end) if value in coarse} == {category}
        start = end
    names = dict(zip(COCO_IDS, read_categories("coco-stuff"), strict=True))
    omitted = {"skyscraper": "building", "ceiling tile": "ceiling", "food": "food (stuff)"}
    omitted |= {"furniture": "furniture (stuff)"}
    for value in range(91, 182):
        name = names[value]
        listed = [c for c, fine in table.items() if name in fine and c != "furniture (things)"]
        expected = listed or [omitted.get(name, name.removeprefix("other "))]
        assert [coarse[value]] == expected, name


@pytest.mark.parametrize(("images", "maps"), [("val2017", "stuffthingmaps"), ("images/val2017", "stuffthingmaps")])
def test_other_folders_and_splits_of_coco_stuff(images, maps, tmp_path):
    save_pair(tmp_path / images, tmp_path / maps / "val2017", "000000000139", [0, 1, 2, 3])
    train = Path(images).with_name("train2017")
    save_pair(tmp_path / train, tmp_path / maps / "train2017", "000000000009", [4, 5, 6, 7])
    assert read_one(load_segmentation_dataset("coco-stuff", tmp_path)).tolist() == [0, 1, 2, 3]
    for split in ("train", "train2017"):
        assert read_one(load_segmentation_dataset("coco-stuff", tmp_path, split)).tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match='no split "test": choose from val2017, train2017'):
        load_segmentation_dataset("coco-stuff", tmp_path, "test")


@pytest.mark.parametrize("root", [".", "ADEChallengeData2016"])
def test_every_mask_value_of_ade20k(root, tmp_path):
    values = [*range(151), 0]
    for split, name in (("validation", "ADE_val_00000001"), ("training", "ADE_train_00000001")):
        save_pair(tmp_path / root / "images" / split, tmp_path / root / "annotations" / split, name, values)
    data = load_segmentation_dataset("ade20k", tmp_path)
    assert data.samples[0]["id"] == "ADE_val_00000001"
    assert data.names == read_categories("ade20k")
    assert read_one(data).tolist() == [-100, *range(150), -100]
    assert set(data.labels[151:]) == {-1}
    assert load_segmentation_dataset("ade20k", tmp_path, "train").samples[0]["id"] == "ADE_train_00000001"


@pytest.mark.parametrize("source", ["coco-stuff", "coco-stuff-coarse", "ade20k"])
def test_errors_name_missing_folders(source, tmp_path):
    with pytest.raises(ValueError, match="give data_dir"):
        load_segmentation_dataset(source)
    with pytest.raises(ValueError, match=f"images of .* are missing: there is no folder {tmp_path}"):
        load_segmentation_dataset(source, tmp_path)
    with pytest.raises(ValueError, match="defines its categories"):
        load_segmentation_dataset(source, tmp_path, categories=["a"])


def test_a_folder_is_loaded(folder):
    data = load_segmentation_dataset(str(folder))
    assert data.names == ["sky", "tree", "road"]
    assert isinstance(data.samples, datasets.Dataset)
    assert data.samples.column_names == ["id", "image", "mask"]
    assert data.samples.features["mask"] == datasets.Image(decode=False)
    assert read_one(data).tolist() == [0, 1, 2, -100, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="has no splits"):
        load_segmentation_dataset(str(folder), split="val")


def test_a_folder_without_dataset_json_needs_categories(folder):
    (folder / "dataset.json").unlink()
    with pytest.raises(ValueError, match='no list "categories"'):
        load_segmentation_dataset(str(folder))
    data = load_segmentation_dataset(str(folder), categories=["sky", "tree", "road"], ignore_index=9)
    assert read_one(data).tolist() == [0, 1, 2, -100, 2, 2, 2, 2]
    # An ignored value among the categories' values has no name.
    data = load_segmentation_dataset(str(folder), categories=["sky", "road", *map(str, range(3, 10))], ignore_index=1)
    assert read_one(data).tolist() == [0, -100, 1, 8, 1, 1, 1, 1]
    data = load_segmentation_dataset(str(folder), categories=["tree", "road", *map(str, range(3, 10))], ignore_index=0)
    assert read_one(data).tolist() == [-100, 0, 1, 8, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "should hold"),
        ('{"categories": ["a"], "ignore_index": "9"}', "should hold"),
        ('{"ignore_index": 9}', 'no list "categories"'),
        ('{"categories": ["a", "a"]}', '"a" is given twice'),
    ],
)
def test_errors_name_a_wrong_dataset_json(content, message, folder):
    (folder / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_segmentation_dataset(str(folder))


def test_mask_values_may_have_gaps(folder):
    """In any order; labels are in that of the values."""
    metadata = {"categories": {"2": "road", "1": "tree", "0": "sky", "9": "none"}, "ignore_index": 9}
    (folder / "dataset.json").write_text(json.dumps(metadata))
    data = load_segmentation_dataset(str(folder))
    assert data.names == ["sky", "tree", "road"]
    assert read_one(data).tolist() == [0, 1, 2, -100, 2, 2, 2, 2]
    (folder / "dataset.json").write_text(json.dumps({"categories": {"1": "tree", "9": "road", "0": "sky", "2": "car"}}))
    assert read_one(load_segmentation_dataset(str(folder))).tolist() == [0, 1, 2, 3, 2, 2, 2, 2]
    for categories, message in [({"sky": "x"}, '"mask value": "name"'), ({"-1": "x"}, "negative mask value")]:
        (folder / "dataset.json").write_text(json.dumps({"categories": categories}))
        with pytest.raises(ValueError, match=message):
            load_segmentation_dataset(str(folder))


def test_a_folder_can_have_splits(folder):
    shutil.copytree(folder / "images", folder / "val" / "images")
    (folder / "masks").rename(folder / "val" / "masks")
    shutil.rmtree(folder / "images")
    (folder / "train" / "images").mkdir(parents=True)
    assert read_one(load_segmentation_dataset(str(folder))).tolist() == [0, 1, 2, -100, 2, 2, 2, 2]
    with pytest.raises(ValueError, match=r'no split "test" in .*: choose from train, val'):
        load_segmentation_dataset(str(folder), split="test")
    with pytest.raises(ValueError, match=f"folder {folder / 'train' / 'masks'} can't be read"):
        load_segmentation_dataset(str(folder), split="train")
    with pytest.raises(ValueError, match="already has categories"):
        load_segmentation_dataset(str(folder), categories=["a"])


def test_masks_can_have_a_palette_or_16_bits(folder):
    mask = Image.open(folder / "masks" / "a.png").convert("P")
    mask.putpalette([255, 0, 0, 0, 255, 0] + [7] * 750)
    mask.putdata([0, 1, 2, 9, 1, 1, 1, 1])
    mask.save(folder / "masks" / "a.png")
    data = load_segmentation_dataset(str(folder))
    assert read_one(data).tolist() == [0, 1, 2, -100, 1, 1, 1, 1]
    Image.fromarray(np.array([[0, 1, 2, 9]] * 2, np.uint16)).save(folder / "masks" / "a.png")
    assert read_one(data).tolist() == [0, 1, 2, -100] * 2
    Image.fromarray(np.array([[0, 1, 2, 300]] * 2, np.uint16)).save(folder / "masks" / "a.png")
    with pytest.raises(SampleError, match=r"300 \(2 pixels\)"):
        read_one(data)


def test_an_image_is_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: 2 x 4 pixels become 4 x 2
    stored = np.zeros((4, 2, 3), np.uint8)
    stored[:2, :] = 255
    Image.fromarray(stored).save(folder / "images" / "a.png", exif=exif)
    (folder / "images" / "a.jpg").unlink()
    data = load_segmentation_dataset(str(folder))
    image, labels = data.read(data.samples[0])
    assert image.shape == (2, 4, 3)
    assert image[0, :, 0].tolist() == [0, 0, 255, 255]
    assert labels.shape == (2, 4)


def damage(folder: Path, kind: str):
    image, mask = folder / "images" / "a.jpg", folder / "masks" / "a.png"
    if kind == "no mask":
        mask.unlink()
    elif kind == "no image":
        image.unlink()
    elif kind == "truncated image":
        image.write_bytes(image.read_bytes()[:300])
    elif kind == "text":
        mask.write_text("mask")
    elif kind == "size":
        Image.new("L", (3, 2)).save(mask)
    elif kind == "value":
        Image.fromarray(np.array([[0, 7, 7, 9], [3, 0, 0, 0]], np.uint8)).save(mask)
    elif kind == "colours":
        Image.new("RGB", (4, 2)).save(mask)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no mask", "There is no mask .*masks/a.png"),
        ("no image", "There is no image .*images/a.jpg"),
        ("truncated image", "Can't read .*images/a.jpg: .*[Tt]runcated"),
        ("text", "masks/a.png is no image that Pillow can read"),
        ("size", "masks/a.png is 3 x 2 pixels, but its image .*images/a.jpg is 4 x 2"),
        ("value", r"masks/a.png has values .*: 3 \(1 pixels\), 7 \(2 pixels\)\. .*ignore_index"),
        ("colours", "masks/a.png has mode RGB"),
    ],
)
def test_errors_of_a_sample_name_its_file(kind, message, folder):
    save_pair(folder / "images", folder / "masks", "b", [0, 1, 2, 9])
    damage(folder, kind)
    data = load_segmentation_dataset(str(folder))
    assert data.samples["id"][:] == ["a", "b"]  # the other sample can be used
    with pytest.raises(SampleError, match=message) as error:
        data.read(data.samples[0])
    assert "\n" not in str(error.value)
    assert data.read(data.samples[1])[1].tolist() == [[0, 1, 2, -100]]


def test_errors_name_folders_without_pairs(folder):
    (folder / "masks" / "a.png").rename(folder / "masks" / "a_mask.png")
    (folder / "images" / "Thumbs.db").write_text("no image")
    with pytest.raises(ValueError, match=r"No image in .*images has a mask of the same name"):
        load_segmentation_dataset(str(folder))
    shutil.copy(folder / "images" / "a.jpg", folder / "images" / "a.jpeg")
    with pytest.raises(ValueError, match="two images called a"):
        load_segmentation_dataset(str(folder))


def test_a_list_selects_and_orders_categories(folder):
    data = load_segmentation_dataset(str(folder)).select(["road", "sky"])
    assert data.names == ["road", "sky"]
    assert read_one(data).tolist() == [1, -100, 0, -100, 0, 0, 0, 0]
    damage(folder, "value")
    with pytest.raises(SampleError, match=r"7 \(2 pixels\)"):  # values without a category remain errors
        read_one(data)


def test_a_mapping_renames_and_merges_categories(folder):
    data = load_segmentation_dataset(str(folder)).select({"ground": ["road"], "outdoors": ["tree", "sky"]})
    assert data.names == ["ground", "outdoors"]
    assert read_one(data).tolist() == [1, 1, 0, -100, 0, 0, 0, 0]
    assert read_one(data.select({"all": ["ground", "outdoors"]})).tolist() == [0, 0, 0, -100, 0, 0, 0, 0]


def test_other_categories_count_as_the_rest(folder):
    data = load_segmentation_dataset(str(folder))
    rest = data.select(["road"], rest=" back  ground ")
    assert rest.names == ["road", "back ground"]
    assert read_one(rest).tolist() == [1, 1, 0, -100, 0, 0, 0, 0]
    merged = data.select({"background": ["sky"], "ground": ["road"]}, rest="background")
    assert merged.names == ["background", "ground"]
    assert read_one(merged).tolist() == [0, 0, 1, -100, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r'rest="other": every category is selected'):
        data.select(data.names, rest="other")
    with pytest.raises(ValueError, match='rest=" ": give the name'):
        data.select(["road"], rest=" ")
    damage(folder, "value")
    with pytest.raises(SampleError, match=r"7 \(2 pixels\)"):  # values without a category remain errors
        read_one(rest)


def test_subsets_follow_a_selection(coco):
    data = load_segmentation_dataset("coco-stuff", coco)
    assert data.select(["cow", "car", "road"]).subsets == {"seen": [1], "unseen": [0, 2]}
    assert data.select({"animal": ["cow", "giraffe"], "auto": ["car"]}).subsets == {"seen": [1], "unseen": [0]}
    assert data.select({"animal": ["cow", "horse"], "auto": ["car"], "way": ["road"]}).subsets == {}
    assert data.select(["cat", "dog"]).subsets == {}
    assert data.select(["cow"], rest="other").subsets == {}


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (["raod"], 'no category "raod". Similar: road'),
        (["zzz"], 'no category "zzz".$'),
        ({"a": ["road"], "b": ["tree", "road"]}, '"road" counts as "a" and as "b"'),
        (["road", "road"], "given twice"),
        ([], "no category"),
    ],
)
def test_errors_name_wrong_selections(categories, message, folder):
    with pytest.raises(ValueError, match=message):
        load_segmentation_dataset(str(folder)).select(categories)


def test_thousands_of_files_are_listed_without_opening_any(tmp_path, monkeypatch):
    images, masks = tmp_path / "val2017", tmp_path / "stuffthingmaps" / "val2017"
    for parent, extension in ((images, "jpg"), (masks, "png")):
        parent.mkdir(parents=True)
        for number in range(5000):
            (parent / f"{number:012d}.{extension}").touch()
    monkeypatch.setattr(Image, "open", None)
    started = time.process_time()
    data = load_segmentation_dataset("coco-stuff", tmp_path)
    assert time.process_time() - started < 5
    assert len(data.samples) == 5000
    assert data.samples[4999] == {
        "id": "000000004999",
        "image": {"path": str(images / "000000004999.jpg"), "bytes": None},
        "mask": {"path": str(masks / "000000004999.png"), "bytes": None},
    }


def png(values) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8)).save(buffer, "PNG")
    return {"path": None, "bytes": buffer.getvalue()}


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A function that writes two images with masks, in columns of given names, to a parquet file for `load_dataset`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(images: str, mask: str, split: str = "validation", **more) -> str:
        masks = [[[0, 1], [2, 255]], [[2, 2], [3, 0]]]
        columns = {"scene": [0, 1], images: [png(np.zeros((2, 2, 3)))] * 2, mask: [png(values) for values in masks]}
        features = {"scene": datasets.ClassLabel(names=["street", "room"]), images: datasets.Image()}
        features[mask] = datasets.Image()
        for name, (values, feature) in more.items():
            columns[name], features[name] = values, feature
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
        return str(tmp_path / "hub")

    return write


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("image", "mask"), [("image", "annotation"), ("pixel_values", "label"), ("photo", "segmentation")]
)
def test_a_dataset_of_the_hub(image, mask, streaming, parquet):
    source = parquet(image, mask)
    (Path(source) / "id2label.json").write_text('{"3": "tree", "0": "sky", "1": "road", "2": "car"}')
    data = load_segmentation_dataset(source, ignore_index=255, streaming=streaming)
    assert isinstance(data.samples, datasets.IterableDataset if streaming else datasets.Dataset)
    assert data.samples.column_names == ["id", "image", "mask"]
    assert data.samples.features["image"] == data.samples.features["mask"] == datasets.Image(decode=False)
    assert data.names == ["sky", "road", "car", "tree"]
    samples = list(data.samples)
    assert [sample["id"] for sample in samples] == ["000000", "000001"]
    assert [data.read(sample)[1].tolist() for sample in samples] == [[[0, 1], [2, -100]], [[2, 2], [3, 0]]]
    assert data.select({"thing": ["car", "tree"]}).read(samples[0])[1].tolist() == [[-100, -100], [0, -100]]


def test_names_of_a_dataset_of_the_hub(parquet):
    """From a column that lists each image's categories, but not from a column with one class per image."""
    source = parquet("image", "mask")
    with pytest.raises(ValueError, match=r"does not name its categories: .*--categories"):
        load_segmentation_dataset(source)
    data = load_segmentation_dataset(source, categories=["a", "b", "c"], ignore_index=0)
    assert data.labels[:4].tolist() == [-100, 0, 1, 2]
    with pytest.raises(SampleError, match=r"the mask of sample 000000 .*255 \(1 pixels\)"):
        data.read(data.samples[0])
    listed = ([[0, 1], [2]], datasets.List(datasets.ClassLabel(names=["none", "a", "b", "c"])))
    source = parquet("image", "mask", present=listed)
    data = load_segmentation_dataset(source, ignore_index=0)
    assert data.names == ["a", "b", "c"]
    assert data.labels[:4].tolist() == [-100, 0, 1, 2]
    with pytest.raises(ValueError, match="names its categories"):
        load_segmentation_dataset(source, categories=["a"])
    (Path(source) / "id2label.json").write_text('["a"]')
    with pytest.raises(ValueError, match=r"id2label.json of .* should hold"):
        load_segmentation_dataset(source)


@pytest.mark.parametrize("there", [True, False])
def test_names_are_downloaded_from_the_hub(there, parquet, monkeypatch):
    """`datasets` and `huggingface_hub` read a folder in place of a dataset of the Hub."""
    folder = parquet("image", "mask")
    (Path(folder) / "id2label.json").write_text('{"0": "sky", "1": "road"}')
    for function in ("load_dataset", "get_dataset_split_names"):
        real = getattr(datasets, function)
        monkeypatch.setattr(datasets, function, lambda source, real=real, **kwargs: real(folder, **kwargs))

    def download(repo_id, name, repo_type):
        assert (repo_id, repo_type) == ("owner/name", "dataset")
        if not there:
            raise EntryNotFoundError("404")
        return f"{folder}/{name}"

    monkeypatch.setattr(segmentation, "hf_hub_download", download)
    if there:
        assert load_segmentation_dataset("owner/name").names == ["sky", "road"]
    with pytest.raises(ValueError, match="names its categories" if there else "given twice"):
        load_segmentation_dataset("owner/name", categories=["a", "a"])


def test_errors_name_what_a_dataset_of_the_hub_lacks(parquet, tmp_path):
    source = parquet("image", "picture")
    with pytest.raises(ValueError, match=r'Its columns .* are: image, picture\. Name them "image" and "mask"'):
        load_segmentation_dataset(source, categories=["a"])
    more = ([{"path": None, "bytes": b"no image"}, None], datasets.Image())
    source = parquet("image", "mask", depth=more)  # of several columns the one called image
    assert load_segmentation_dataset(source, categories=["a"]).samples.column_names == ["id", "image", "mask"]
    source = parquet("photo", "label", "train", image=more)
    parquet("photo", "label", "other", image=more)
    (tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"several splits: choose from .*other"):
        load_segmentation_dataset(source, categories=["a"])
    data = load_segmentation_dataset(source, split="train", categories=["a"])
    with pytest.raises(SampleError, match="the image of sample 000000 is no image that Pillow can read"):
        data.read(data.samples[0])
    with pytest.raises(SampleError, match="Sample 000001 has no image"):
        data.read(data.samples[1])


def test_errors_name_an_unknown_source(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r'"coco_stuff" is no folder.* Did you mean coco-stuff\?'):
        load_segmentation_dataset("coco_stuff", None)
    with pytest.raises(ValueError, match="is no folder, no dataset of the Hub"):
        load_segmentation_dataset(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="data_dir is for coco-stuff"):
        load_segmentation_dataset("owner/name", tmp_path)

    def missing(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'data/streets'\ndoesn't exist on the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", missing)
    with pytest.raises(ValueError, match=r'"data/streets" is no folder here and .* loaded: .* exist on the Hub$'):
        load_segmentation_dataset("data/streets")


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not here")
def test_camvid_is_loaded():
    data = load_segmentation_dataset(str(CAMVID))
    assert len(data.samples) == 101
    assert len(load_segmentation_dataset(str(CAMVID), split="train").samples) == 367
    assert (data.names[0], data.names[10]) == ("sky", "bicyclist")
    sample = data.samples[0]
    image, labels = data.read(sample)
    assert image.shape == (360, 480, 3)
    raw = np.asarray(Image.open(sample["mask"]["path"])).astype(int)
    np.testing.assert_array_equal(labels, np.where(raw == 11, -100, raw))
    assert (labels == -100).any()
