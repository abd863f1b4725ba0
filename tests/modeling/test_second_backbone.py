"""A second backbone in a single file (tests/helpers/backbone_tiny.py) that no other file knows."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import ROOT, run_without_package
from image_folders import save_masked_images
from PIL import Image
from tiny_model import save_tiny_model

from ifseg_hf.data.word_maps import WordMapCollator, word_map_stream
from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation
from ifseg_hf.processing import IFSegProcessor
from scripts import evaluate, run_script

WORDS = ["cat", "cup", "sky"]
FILES = (
    "backbone",
    "configuration_checks",
    "configuration_ifseg",
    "modeling_ifseg",
    "image_batches",
    "loading",
    "adapters_ifseg",
    "loss_ifseg",
    "merged_labels",
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The module of the second backbone, beside copies of the files that it imports, as in a fork of `modeling/`."""
    folder = tmp_path_factory.mktemp("fork") / "tiny_models"
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / "modeling" / f"{name}.py", folder)
    shutil.copy(ROOT / "tests" / "helpers" / "backbone_tiny.py", folder)
    (folder / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder.parent))
        yield importlib.import_module("tiny_models.backbone_tiny")


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> IFSegProcessor:
    folder = tmp_path_factory.mktemp("processor")
    save_tiny_model(folder)
    processor = IFSegProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 256}
    return processor


@pytest.fixture(scope="module")
def checkpoint(backbone, processor, tmp_path_factory) -> Path:
    """A saved model of the second backbone with words and processor."""
    torch.manual_seed(0)
    config = IFSegConfig(backbone_config=backbone.TinyConfig(vocab_size=len(processor.tokenizer)))
    model = IFSegForSemanticSegmentation(config)
    model.set_words(**processor.encode_categories(WORDS))
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_trains_on_word_maps(checkpoint):
    model = IFSegForSemanticSegmentation.from_pretrained(checkpoint)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.freeze_for_word_maps()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    stream = word_map_stream(len(WORDS), grid_size=model.config.grid_size, length=8)
    batch = WordMapCollator(model.config.image_size)([dict(sample) for sample in stream])
    losses = []
    for _ in range(40):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in trained)
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
def test_segments_images_as_alone(checkpoint, processor):
    model = IFSegForSemanticSegmentation.from_pretrained(checkpoint).eval()
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(64, 80), (100, 64)]]
    together = model(**processor(images=images, return_tensors="pt"))
    for index, image in enumerate(images):
        alone = model(**processor(images=image, return_tensors="pt"))
        height, width = alone.logits.shape[2:]
        torch.testing.assert_close(together.logits[index, :, :height, :width], alone.logits[0], atol=1e-5, rtol=0)
    maps = processor.post_process_semantic_segmentation(together, target_sizes=[(64, 80), (100, 64)])
    assert [tuple(labels.shape) for labels in maps] == [(64, 80), (100, 64)]


REMOTE = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, AutoProcessor, pipeline
folder, image = sys.argv[1:]
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open(image), return_tensors="pt")
print(model(**inputs).logits.sum().item())
segment = pipeline("image-segmentation", model=folder, trust_remote_code=True)
print({result["label"] for result in segment(image)} <= {"cat", "cup", "sky"})
assert "ifseg_hf" not in sys.modules
"""


def test_loads_with_remote_code_alone(checkpoint, processor, tmp_path):
    files = {path.name for path in checkpoint.glob("*.py")}
    assert {"backbone_tiny.py", "modeling_ifseg.py"} <= files
    assert not [name for name in files if "ofa" in name]
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(image)
    with torch.no_grad():
        model = IFSegForSemanticSegmentation.from_pretrained(checkpoint)
        expected = model(**processor(images=Image.open(image), return_tensors="pt")).logits.sum().item()
    total, known = run_without_package(REMOTE, checkpoint, image, home=tmp_path / "home").split()
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert known == "True"


def test_scripts_train_and_evaluate(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = save_masked_images(tmp_path / "data", split="val")
    words = ["--categories", "cat, cup, sky, sea", "--output-dir", tmp_path / "tuned"]
    recipe = ["--model", checkpoint, "--steps", "3", "--batch-size", "2"]
    refused = run_script("train.py", *recipe, *words)
    assert refused.returncode == 2
    assert "trust" in refused.stderr
    done = run_script("train.py", *recipe, *words, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tuned" / "backbone_tiny.py").is_file()
    results = evaluate(tmp_path / "tuned", data, tmp_path / "results", "--trust-remote-code")
    assert results["images"] == 6
