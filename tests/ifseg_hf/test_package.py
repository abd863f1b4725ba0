"""The installed package: a light import, and the registration of its classes with transformers."""

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from checkpoints import small_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    pipeline,
)
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

import ifseg_hf
from ifseg_hf.processing import IFSegImageProcessor, IFSegProcessor

ROOT = Path(__file__).parents[2]


def run(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The result of Python code in a new process in `folder`, with the cache of remote code there and no network."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_an_installation_has_one_top_level_package():
    installed = distribution("ifseg-hf")
    assert (installed.read_text("top_level.txt") or "").split() == ["ifseg_hf"]


def test_import_loads_neither_torch_nor_transformers(tmp_path):
    code = "import sys, ifseg_hf; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    for folder in (tmp_path, ROOT):  # in ROOT, ifseg_hf/ is on the path before the installed package
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("set()\n", "")


def test_classes_need_no_module_beyond_transformers():
    code = (
        "import sys; from transformers import AutoModel, AutoProcessor, AutoImageProcessor, pipeline; "
        "before = set(sys.modules); import ifseg_hf, ifseg_hf.modeling, ifseg_hf.processing; "
        "import ifseg_hf.tuning, ifseg_hf.training.errors; "
        "added = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(added - {'ifseg_hf', 'transformers', 'wrapt'}, end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()", done.stderr
    assert done.stderr == ""


def test_model_names_are_resolved(tmp_path, monkeypatch):
    assert ifseg_hf.resolve_model("ifseg-ofa-nano") == ifseg_hf.NANO
    assert ifseg_hf.resolve_model("owner/name") == "owner/name"
    assert ifseg_hf.resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ifseg_hf.resolve_model("~") == tmp_path
    for missing in ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", Path("nowhere")]:
        with pytest.raises(FileNotFoundError, match=r"no model folder.*nowhere|no model folder.*a/b/c"):
            ifseg_hf.resolve_model(missing)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small random model that has words."""
    folder = tmp_path_factory.mktemp("saved")
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=120, **special)
    processor = IFSegProcessor(IFSegImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}), tokenizer)
    model = small_model(vocab_size=len(alphabet), max_position_embeddings=120)
    model.set_words(**processor.encode_categories(["cat", "wet grass"]))
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize("first", ["import ifseg_hf", "import transformers", "import ifseg_hf.modeling"])
def test_classes_are_registered_in_any_order_of_imports(first, saved, tmp_path):
    code = f"""
import sys
{first}
import ifseg_hf
from transformers import AutoConfig, pipeline
print(type(AutoConfig.from_pretrained(sys.argv[1])) is ifseg_hf.IFSegConfig)
print(type(pipeline("image-segmentation", model=sys.argv[1])) is ifseg_hf.IFSegImageSegmentationPipeline)
"""
    assert run(code, tmp_path, str(saved)).stdout == "True\nTrue\n"


def test_auto_classes_know_ifseg(saved):
    assert type(AutoConfig.from_pretrained(saved)) is ifseg_hf.IFSegConfig
    assert type(AutoProcessor.from_pretrained(saved)) is ifseg_hf.IFSegProcessor
    assert type(AutoImageProcessor.from_pretrained(saved)) is ifseg_hf.IFSegImageProcessor
    assert type(AutoModelForSemanticSegmentation.from_pretrained(saved)) is ifseg_hf.IFSegForSemanticSegmentation
    config = AutoConfig.from_pretrained(saved).backbone_config
    assert type(AutoModel.from_config(config)) is ifseg_hf.OFAModel
    assert type(AutoModelForImageTextToText.from_config(config)) is ifseg_hf.OFAForConditionalGeneration


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_pipeline_of_an_ifseg_model_is_the_ifseg_pipeline(saved, image, trust_remote_code):
    pipe = pipeline("image-segmentation", model=str(saved), trust_remote_code=trust_remote_code)
    assert type(pipe) is ifseg_hf.IFSegImageSegmentationPipeline
    assert type(pipe.model) is ifseg_hf.IFSegForSemanticSegmentation
    assert {segment["label"] for segment in pipe(image)} <= {"cat", "wet grass"}
    assert {segment["label"] for segment in pipe(image, categories=["roof", "sea"])} <= {"roof", "sea"}


def test_pipeline_of_another_model_is_the_one_of_transformers(image):
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes))
    pipe = pipeline("image-segmentation", model=model, image_processor=SegformerImageProcessorPil())
    assert type(pipe) is ImageSegmentationPipeline
    assert pipe(image)


def test_a_saved_pipeline_loads_again(saved, image, tmp_path):
    pipe = pipeline("image-segmentation", model=str(saved))
    pipe.save_pretrained(tmp_path)
    again = pipeline("image-segmentation", model=str(tmp_path))
    assert type(again) is ifseg_hf.IFSegImageSegmentationPipeline
    assert [s["label"] for s in again(image)] == [s["label"] for s in pipe(image)]


def test_saved_model_runs_without_the_package(saved, image, tmp_path):
    """With trust_remote_code, in a process that cannot import the package: the same classes and results."""
    image.save(tmp_path / "image.png")
    code = """
import sys; sys.modules["ifseg_hf"] = None
from transformers import AutoModelForSemanticSegmentation, AutoProcessor, pipeline
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
pipe = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(pipe).__name__, type(processor).__name__, type(model).__name__)
print(*(f"{segment['label']} {segment['score']:.5f}" for segment in pipe("image.png")), sep="; ")
print(*(segment["label"] for segment in pipe("image.png", categories=["roof"])))
"""
    done = run(code, tmp_path, str(saved))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    segments = pipeline("image-segmentation", model=str(saved))(image)
    assert done.stdout.splitlines() == [
        "IFSegImageSegmentationPipeline IFSegProcessor IFSegForSemanticSegmentation",
        "; ".join(f"{segment['label']} {segment['score']:.5f}" for segment in segments),
        "roof",
    ]
