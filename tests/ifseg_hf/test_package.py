"""The package as a whole: what imports what, what an installation holds, what transformers knows after the import."""

import ast
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from checkpoints import small_model
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
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
# What a third-party module is called by pip.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def imports(file: Path) -> set[tuple[int, str]]:
    """(level, module) of every import in a file: level 0 is absolute, 1 is the file's own folder."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.level, node.module)} if node.module else {(node.level, a.name) for a in node.names}
    return found


def third_party(folder: str) -> set[str]:
    found = set().union(*(imports(file) for file in (ROOT / folder).rglob("*.py")))
    return {module.split(".")[0] for level, module in found if not level} - sys.stdlib_module_names


def run(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A fresh process of this Python in `folder`, with its remote code cached there and no network."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("folder", ["modeling", "processing"])
def test_what_a_checkpoint_carries_stands_alone(folder):
    assert third_party(folder) <= {"torch", "transformers", "numpy", "PIL"}
    for file in (ROOT / folder).glob("*.py"):
        for level, module in imports(file):
            assert level <= 1, f"{file.name} imports from outside of its folder"
            assert not level or (ROOT / folder / f"{module}.py").is_file(), f"{file.name} imports .{module}"
    # Saved side by side, so no two files of one name, and no folders inside.
    assert not [path for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_no_file_of_modeling_is_called_like_one_of_processing():
    names = [{file.name for file in (ROOT / folder).glob("*.py")} for folder in ("modeling", "processing")]
    assert names[0] & names[1] == {"__init__.py"}


def test_imports_point_one_way():
    for file in (ROOT / "ifseg_hf").rglob("*.py"):
        modules = {module.split(".")[0] for level, module in imports(file) if not level}
        assert not modules & {"modeling", "processing", "scripts", "tests"}, file
    for file in (ROOT / "scripts").glob("*.py"):
        modules = {module.split(".")[0] for level, module in imports(file) if not level}
        assert not modules & {"modeling", "processing", "tests"}, file


def test_every_import_is_a_declared_dependency():
    required = {Requirement(line) for line in distribution("ifseg-hf").requires or []}
    always = {canonicalize_name(requirement.name) for requirement in required if requirement.marker is None}
    used = third_party("ifseg_hf") | third_party("modeling") | third_party("processing")
    used = {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in used - {"ifseg_hf"}}
    demo = {canonicalize_name(r.name) for r in required if r.marker and r.marker.evaluate({"extra": "demo"})}
    optional = {"scikit-learn": "sklearn", "scikit-image": "skimage"}
    extras = {
        canonicalize_name(r.name)
        for r in required
        for extra in ("onnx", "train", "plot")
        if r.marker and r.marker.evaluate({"extra": extra})
    }
    assert {name for name in used if name not in optional.values()} <= always | extras
    assert demo == set(optional)


def test_tested_versions_are_in_the_declared_ranges():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    for line in distribution("ifseg-hf").requires or []:
        requirement = Requirement(line)
        if requirement.name != "ifseg-hf":
            assert tested[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_only_ifseg_hf_is_at_the_top_of_an_installation():
    installed = distribution("ifseg-hf")
    assert (installed.read_text("top_level.txt") or "").split() == ["ifseg_hf"]


def test_import_from_the_root_of_the_repository_is_light():
    """There ifseg_hf/ is on the path before any installation. `before` is what a user of transformers has anyway."""
    code = (
        "import sys; from transformers import AutoModel, AutoProcessor, AutoImageProcessor, pipeline; "
        "before = set(sys.modules); import ifseg_hf, ifseg_hf.modeling, ifseg_hf.processing; "
        "print({name.split('.')[0] for name in set(sys.modules) - before} - {'ifseg_hf', 'transformers', 'wrapt'}, end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()", done.stderr
    assert done.stderr == ""


def test_resolve_model(tmp_path, monkeypatch):
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
    """The folder of a small random model with words of its own."""
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
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def test_auto_classes_know_ifseg(saved):
    assert type(AutoConfig.from_pretrained(saved)) is ifseg_hf.IFSegConfig
    assert type(AutoProcessor.from_pretrained(saved)) is ifseg_hf.IFSegProcessor
    assert type(AutoImageProcessor.from_pretrained(saved)) is ifseg_hf.IFSegImageProcessor
    assert type(AutoModelForSemanticSegmentation.from_pretrained(saved)) is ifseg_hf.IFSegForSemanticSegmentation
    config = AutoConfig.from_pretrained(saved)
    assert type(AutoModel.from_config(config)) is ifseg_hf.IFSegModel
    assert type(AutoModelForImageTextToText.from_config(config)) is ifseg_hf.IFSegForConditionalGeneration


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_pipeline_of_an_ifseg_model_is_this_projects(saved, photo, trust_remote_code):
    pipe = pipeline("image-segmentation", model=str(saved), trust_remote_code=trust_remote_code)
    assert type(pipe) is ifseg_hf.IFSegImageSegmentationPipeline
    assert type(pipe.model) is ifseg_hf.IFSegForSemanticSegmentation
    assert {segment["label"] for segment in pipe(photo)} <= {"cat", "wet grass"}
    assert {segment["label"] for segment in pipe(photo, categories=["roof", "sea"])} <= {"roof", "sea"}


def test_pipeline_of_another_model_stays_transformers_own(photo):
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes))
    pipe = pipeline("image-segmentation", model=model, image_processor=SegformerImageProcessorPil())
    assert type(pipe) is ImageSegmentationPipeline
    assert pipe(photo)


def test_saved_pipeline_and_model_name_the_pipeline_and_load_again(saved, photo, tmp_path):
    pipe = pipeline("image-segmentation", model=str(saved))
    pipe.save_pretrained(tmp_path)
    again = pipeline("image-segmentation", model=str(tmp_path))
    assert type(again) is ifseg_hf.IFSegImageSegmentationPipeline
    assert [s["label"] for s in again(photo)] == [s["label"] for s in pipe(photo)]


def test_saved_model_runs_without_the_package(saved, photo, tmp_path):
    """trust_remote_code in a process that cannot import the package: the same result, the same classes by name."""
    photo.save(tmp_path / "photo.png")
    code = """
import sys; sys.modules["ifseg_hf"] = None
from transformers import AutoModelForSemanticSegmentation, AutoProcessor, pipeline
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
pipe = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(pipe).__name__, type(processor).__name__, type(model).__name__)
print(*(f"{segment['label']} {segment['score']:.5f}" for segment in pipe("photo.png")), sep="; ")
print(*(segment["label"] for segment in pipe("photo.png", categories=["roof"])))
"""
    done = run(code, tmp_path, str(saved))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    segments = pipeline("image-segmentation", model=str(saved))(photo)
    assert done.stdout.splitlines() == [
        "IFSegImageSegmentationPipeline IFSegProcessor IFSegForSemanticSegmentation",
        "; ".join(f"{segment['label']} {segment['score']:.5f}" for segment in segments),
        "roof",
    ]
