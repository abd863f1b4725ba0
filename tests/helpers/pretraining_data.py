"""Small stand-ins for what pre-training reads: packages of weights and word vectors, and images with names."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from image_folders import save_masked_images
from PIL import Image as PILImage
from pyarrow import Table, parquet

from ifseg_hf.modeling import OFAConfig
from ifseg_hf.nano import pretraining
from ifseg_hf.nano.configuration import nano_config
from ifseg_hf.nano.trunk_weights import LITE2
from ifseg_hf.nano.word_vectors import GLOVE

# A small EfficientNet-Lite.
STEM, SIZES, DEPTHS = 6, (4, 6, 6, 8, 8, 10, 12), (1, 2, 1, 1, 2, 1, 1)
KERNELS = (3, 3, 5, 3, 5, 5, 3)
TRUNK = {
    "trunk_type": "efficientnet_lite",
    "trunk_embedding_size": STEM,
    "trunk_hidden_sizes": SIZES,
    "trunk_depths": DEPTHS,
}
FREQUENT = ["the", "dog", "sea", "ocean", "of", "sky", "cat", "2000", "walrus", "café", "a"]
# Width and height, source, name, captions and boxes of each image of `save_world`.
WORLD = [
    ((40, 30), "animals", "dogs", [], []),
    ((30, 40), "imagenet", "african crocodile", [], []),
    ((32, 48), "intel", "sea", [], []),
    ((48, 32), "imagenet", "nonesuch", [], []),
    ((40, 32), "flickr8k", None, ["A dog by the sea .", "Two dogs near an ocean", "a dog"], []),
    ((20, 60), "coco", None, [], [(5, 0, 10, 30, "cat"), (5, 20, 10, 10, "dog"), (0, 0, 9, 9, "dog")]),
    ((48, 30), "coco", None, [], [(12, 15, 24, 15, "cat"), (0, 0, 9, 9, "nonesuch")]),
]


def small_nano_config(vocab_size: int) -> OFAConfig:
    """The nano model's configuration with smaller and fewer layers."""
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return nano_config(vocab_size, **sizes, **heads, **TRUNK)


def trunk_config() -> OFAConfig:
    return OFAConfig(**TRUNK)


def published_lite_state(classes: int = 5) -> dict[str, torch.Tensor]:
    """Random tensors of a small EfficientNet-Lite under the published names."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(conv: str, norm: str, *shape: int):
        state[f"{conv}.weight"] = torch.randn(*shape, generator=generator)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{name}"] = torch.rand(shape[0], generator=generator) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(0)

    add("_conv_stem", "_bn0", STEM, 3, 3, 3)
    number, channels = 0, STEM
    for stage, (size, depth, kernel) in enumerate(zip(SIZES, DEPTHS, KERNELS, strict=True)):
        for _ in range(depth):
            block, width = f"_blocks.{number}", channels if stage == 0 else 6 * channels
            if stage:
                add(f"{block}._expand_conv", f"{block}._bn0", width, channels, 1, 1)
            add(f"{block}._depthwise_conv", f"{block}._bn1", width, 1, kernel, kernel)
            add(f"{block}._project_conv", f"{block}._bn2", size, width, 1, 1)
            number, channels = number + 1, size
    add("_conv_head", "_bn1", 20, SIZES[-1], 1, 1)
    state["_fc.weight"] = torch.randn(classes, 20, generator=generator)
    state["_fc.bias"] = torch.randn(classes, generator=generator)
    return state


def save_lite_package(folder: Path, name: str = LITE2, classes: int = 1000) -> str:
    """Saves a package with the weights of [`published_lite_state`]; importing it raises. Returns its name."""
    package = folder / name
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(published_lite_state(classes), package / "models" / "weights.pth")
    return name


def save_glove_package(folder: Path, words: Sequence[str] = FREQUENT, name: str = GLOVE) -> np.ndarray:
    """Saves a package with random word vectors; importing it raises. Returns the vectors, (words, 50)."""
    data = folder / name / "data"
    data.mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('imported')")
    vectors = np.random.default_rng(0).normal(2, 3, (len(words), 50)).astype(np.float32)
    parquet.write_table(Table.from_pydict({"index": list(words)}), data / "glove_6B_index.parquet")
    np.save(data / "glove_6B_50d_emb.npy", vectors)
    return vectors


def save_world(folder: Path) -> Path:
    """Saves the images of `WORLD`, of random pixels, as a parquet file."""
    random = np.random.default_rng(0)
    box = {"x": Value("float32"), "y": Value("float32"), "width": Value("float32"), "height": Value("float32")}
    features = Features(
        {
            "source": Value("string"),
            "name": Value("string"),
            "captions": List(Value("string")),
            "boxes": List({**box, "name": Value("string")}),
            "image": Image(),
        }
    )
    rows = []
    for (width, height), source, name, captions, boxes in WORLD:
        file = io.BytesIO()
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        PILImage.fromarray(pixels).save(file, "PNG")
        named = [dict(zip(("x", "y", "width", "height", "name"), values, strict=True)) for values in boxes]
        image = {"bytes": file.getvalue(), "path": None}
        rows.append({"source": source, "name": name, "captions": captions, "boxes": named, "image": image})
    folder.mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(folder / "world.parquet")
    return folder


def save_pretraining_data(folder: Path) -> Path:
    """Saves both packages, and the images `world`, `coco` and `street`, in a folder, and returns it."""
    save_world(folder / "world")
    save_masked_images(folder / "coco", count=3, split=None)
    save_masked_images(folder / "street", count=1)
    save_glove_package(folder)
    save_lite_package(folder)
    return folder


@contextmanager
def small_pretraining(folder: Path) -> Iterator[Path]:
    """Fills a folder with images and importable packages, and makes the pre-trained model a smaller one."""
    save_pretraining_data(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        monkeypatch.setattr(pretraining, "nano_config", small_nano_config)
        monkeypatch.syspath_prepend(folder)
        yield folder
