"""Published OFA checkpoints: loading without conversion, conversion into the cache, captions."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import ROOT, code_blocks, environment, run
from hub_server import Blob, HubServer, Repository
from image_folders import save_masked_images
from PIL import Image
from published_ofa import write_published_ofa
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from ifseg_hf import IFSegForSemanticSegmentation, OFAConfig, OFAForConditionalGeneration, OFAModel, resolve_model
from ifseg_hf.hub.conversion import ConversionError, convert_ofa_checkpoint
from ifseg_hf.hub.model_card import model_card
from ifseg_hf.hub.published import resolve_checkpoint
from ifseg_hf.processing import IFSegProcessor
from ifseg_hf.training.config import SETTINGS_FILE
from scripts import load_script

REPO = "OFA-Sys/ofa-small"
QUESTION = "what does the image describe?"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_published_ofa(tmp_path_factory.mktemp("published") / "OFA-small")


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "ofa"
    convert_ofa_checkpoint(published, folder)
    return folder


@pytest.fixture
def hub(published):
    """A Hub with the published OFA."""
    with HubServer({"hf_alice": "alice"}) as server:
        server.repositories[REPO] = Repository(private=False)
        commit(server, published)
        yield server
    assert server.unknown == []


def commit(hub: HubServer, folder: Path) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    blobs = {name: Blob(content, size=len(content)) for name, content in files.items()}
    hub.repositories[REPO].commit("main", blobs, "Upload")


def images() -> dict[str, Image.Image]:
    """Pictures of several sizes and modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    sizes = {"wide": (640, 480), "high": (480, 640), "narrow": (100, 1000)}
    pictures = {name: Image.fromarray(pixels[:height, :width]) for name, (width, height) in sizes.items()}
    return {**pictures, "palette": pictures["wide"].quantize(16)}


# Loading without conversion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [(AutoModelForImageTextToText, OFAForConditionalGeneration), (AutoModel, OFAModel)],
    ids=["generation", "base"],
)
def test_published_folder_loads_without_conversion(published, auto_class, model_class, converted, capfd):
    assert type(AutoConfig.from_pretrained(published)) is OFAConfig
    model, report = auto_class.from_pretrained(published, output_loading_info=True)
    assert type(model) is model_class
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert "UNEXPECTED" not in (shown := capfd.readouterr().err)
    assert "MISSING" not in shown
    other = auto_class.from_pretrained(converted)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    values = model.config.to_dict()
    assert (values["image_size"], tuple(values["trunk_depths"]), values["trunk_type"]) == (512, (3, 4, 6), "resnet")
    assert not values.keys() & {"resnet_type", "forced_eos_token_id", "normformer", "code_image_size"}


def test_published_ofa_loads_as_segmentation_model(published, tmp_path, capfd):
    """Directly and by its own class, with all weights that it has, and without a list of tensors on the screen."""
    expected = AutoModel.from_pretrained(published).state_dict()
    for model_class in (AutoModelForSemanticSegmentation, IFSegForSemanticSegmentation):
        model, report = model_class.from_pretrained(published, output_loading_info=True)
        assert not any(report.values())
        assert not model.config.is_tuned
        shown = capfd.readouterr().err
        assert not any(word in shown for word in ("MISSING", "UNEXPECTED", "segmentation_positions"))
        assert all(torch.equal(x, expected[name]) for name, x in model.backbone.model.state_dict().items())
        model.save_pretrained(tmp_path)
        assert all(name.startswith("backbone.") for name in load_file(tmp_path / "model.safetensors"))


def test_published_vocabulary_gives_tokenizer_and_processor(published, converted):
    tokenizer = AutoTokenizer.from_pretrained(published)
    processor, other = AutoProcessor.from_pretrained(published), AutoProcessor.from_pretrained(converted)
    assert type(processor) is IFSegProcessor
    assert len(tokenizer) == AutoConfig.from_pretrained(published).vocab_size
    assert tokenizer(" wet cat<bin_5>").tokens() == ["<s>", "Ġwet", "Ġcat", "<bin_5>", "</s>"]
    assert tokenizer.backend_tokenizer.to_str() == processor.tokenizer.backend_tokenizer.to_str()
    for name in ("size", "generation_size", "image_mean", "smoothing_iterations", "sliding_window"):
        assert getattr(processor.image_processor, name) == getattr(other.image_processor, name)
    assert processor.tokenizer.model_max_length == other.tokenizer.model_max_length == 256
    assert processor.tokenizer.get_vocab() == other.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"resnet_type": "resnet18"}, 'resnet_type="resnet18": choose resnet50'),
        ({"scale_embedding": True}, "scale_embedding=True: there is no such OFA"),
        ({"normformer": False}, "normformer=False: there is no such OFA"),
    ],
)
def test_published_variants_without_implementation_are_refused(published, tmp_path, entry, message):
    config = json.loads((published / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


# Conversion on the way ------------------------------------------------------------------------------------------------


def train(hub: HubServer, home: Path, output: Path, model=REPO, **variables) -> subprocess.CompletedProcess:
    """Trains for one step in a subprocess whose home folder, which holds the caches, is `home`."""
    settings = ["--steps", "1", "--batch-size", "2", "--cpu", "--output-dir", output]
    script = ROOT / "scripts" / "train.py"
    env = environment(hub, home / "hf", HOME=str(home), **variables)
    return run(script, "--model", model, "--categories", "cat, dog", *settings, cwd=home, env=env)


def test_hub_id_is_converted_once_into_the_cache(hub, published, tmp_path):
    first = train(hub, tmp_path, tmp_path / "first")
    assert first.returncode == 0, first.stderr
    assert first.stderr.count(f"Converting {REPO} once") == 1
    (folder,) = (tmp_path / ".cache" / "ifseg" / "converted").glob("OFA-Sys--ofa-small-*")
    assert str(folder) in first.stderr
    assert json.loads((tmp_path / "first" / SETTINGS_FILE).read_text())["model"] == REPO
    assert json.loads((folder / "config.json").read_text())["trunk_type"] == "resnet"

    hub.requests.clear()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    second = train(hub, tmp_path, tmp_path / "second")
    assert second.returncode == 0, second.stderr
    assert "Converting" not in second.stderr
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert not any("pytorch_model" in request for request in hub.requests)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_commits_of_the_hub_are_converted_apart(hub, published, tmp_path):
    code = f"""
from ifseg_hf.hub.published import *
print(resolve_checkpoint({REPO!r}), flush=True)
while input():
    print(resolve_checkpoint({REPO!r}), flush=True)
"""
    changed = shutil.copytree(published, tmp_path / "changed")
    (changed / "README.md").write_text("changed")
    env = environment(hub, tmp_path / "hf", HOME=str(tmp_path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, env=env, cwd=tmp_path, **pipes) as process:
        first = process.stdout.readline()
        commit(hub, changed)
        rest, errors = process.communicate("again\nagain\n\n", timeout=300)
    assert process.returncode == 0, errors
    second, third = rest.splitlines(keepends=True)
    assert first != second == third
    assert errors.count(f"Converting {REPO} once") == 2
    # without a network, from the caches
    done = run("-c", code, cwd=tmp_path, env={**env, "HF_HUB_OFFLINE": "1"}, input="\n")
    assert (done.stdout, done.returncode) == (second, 0), done.stderr


def test_folder_and_file_are_converted_once_by_their_contents(published, tmp_path):
    weights = torch.load(published / "pytorch_model.bin", weights_only=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(published / name, tmp_path)
    file = tmp_path / "ofa_small.pt"
    torch.save({"args": argparse.Namespace(arch="ofa"), "model": weights}, file)
    said: list[str] = []
    cache = tmp_path / "cache"

    def resolve(name) -> Path:
        return Path(resolve_checkpoint(name, cache, said.append))

    folders = [resolve(published), resolve(published), resolve(file), resolve(str(file))]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert len(said) == 2
    assert [path.name.rpartition("-")[0] for path in folders[::2]] == ["OFA-small", "ofa_small"]
    assert resolve_model(file) == folders[2]  # what reads the model in this process
    for folder in folders[::2]:
        model = OFAForConditionalGeneration.from_pretrained(folder)
        assert torch.equal(model.lm_head.weight, weights["encoder.embed_tokens.weight"].float())

    weights["encoder.image_proj.bias"] = weights["encoder.image_proj.bias"] + 1
    torch.save({"model": weights}, file)
    assert resolve(file) not in folders
    assert len(said) == 3
    assert resolve(folders[0]) == folders[0]  # a converted folder is no published one
    assert resolve_checkpoint("ifseg-ofa-nano", cache) == resolve_model("ifseg-ofa-nano")


def test_of_two_processes_one_converts(published, tmp_path):
    code = "import sys; from ifseg_hf.hub.published import *; print(resolve_checkpoint(sys.argv[1], sys.argv[2]))"
    command = [sys.executable, "-c", code, str(published), str(tmp_path / "cache")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert "".join(error for _, error in results).count("Converting") == 1
    assert Path(results[0][0].strip(), "model.safetensors").is_file()


def test_rest_of_a_killed_conversion_is_removed(published, tmp_path):
    folder = Path(resolve_checkpoint(published, tmp_path, lambda sentence: None))
    shutil.rmtree(folder)
    rest = tmp_path / f".{folder.name}-abc"
    rest.mkdir()
    (rest / "model.safetensors").write_bytes(b"half")
    assert resolve_checkpoint(published, tmp_path, lambda sentence: None) == folder
    assert not rest.exists()


@pytest.mark.parametrize("lost", ["pytorch_model.bin", "vocab.json"])
def test_incomplete_folder_is_refused_by_name(published, tmp_path, lost):
    folder = shutil.copytree(published, tmp_path / "ofa")
    (folder / lost).unlink()
    with pytest.raises(ConversionError, match=r"incomplete: it needs pytorch_model.bin and vocab.json and merges.txt"):
        resolve_checkpoint(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_damaged_weights_leave_nothing_in_the_cache(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "ofa")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-1000])
    with pytest.raises(ConversionError, match="cannot be read as a checkpoint"):
        resolve_checkpoint(folder, tmp_path / "cache", lambda sentence: None)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_cache_that_cannot_be_written_is_named(published, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConversionError, match=r"The cache .*cache cannot be written \(File exists\)"):
        resolve_checkpoint(published, tmp_path / "cache", lambda sentence: None)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train", ["--categories", "cat, dog", "--output-dir", "out", "--cpu"]),
        ("segment", ["data/train/images/0.png", "--output-dir", "out"]),
        ("eval", ["--dataset", "data", "--split", "train", "--output-dir", "out", "--cpu"]),
        ("pseudo_label", ["--images", "data/train/images", "--categories", "cat, dog", "--output-dir", "out", "--cpu"]),
        ("export_onnx", ["out.onnx", "--categories", "cat, dog"]),
    ],
)
def test_scripts_that_take_a_model_convert_it(script, arguments, published, tmp_path, monkeypatch, capsys):
    def resolve(name):
        assert name == str(published)
        raise ConversionError("Converting, and no further.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ifseg_hf.hub.published.resolve_checkpoint", resolve)
    save_masked_images(tmp_path / "data")
    model = [str(published)] if script == "export_onnx" else ["--model", str(published)]
    assert load_script(script).main([*model, *arguments]) == 1
    assert capsys.readouterr().err.endswith(f"{script}.py: Converting, and no further.\n")


# Texts about images ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForImageTextToText.from_pretrained(converted)


@pytest.fixture(scope="module")
def processor(converted):
    return AutoProcessor.from_pretrained(converted)


@pytest.mark.parametrize("name", ["wide", "high", "narrow", "palette"])
def test_code_of_the_card_describes_any_picture(converted, tmp_path, monkeypatch, capsys, name):
    images()[name].save(tmp_path / "image.jpg", format="PNG" if name == "palette" else "JPEG")
    monkeypatch.chdir(tmp_path)
    card = model_card(converted, str(converted))
    names: dict = {}
    exec(code_blocks(card.content)[0], names)
    printed = capsys.readouterr().out
    assert printed.endswith("\n")
    assert names["inputs"]["pixel_values"].shape == (1, 3, 256, 256)
    assert names["ids"].shape[1] <= 21
    assert printed.strip() == names["processor"].tokenizer.decode(names["ids"][0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["wide", "narrow", "palette"])
def test_images_become_squares_bicubically(processor, name):
    inputs = processor(images=images()[name], text=QUESTION, return_tensors="pt")
    square = images()[name].convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
    expected = (torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(inputs["pixel_values"][0], expected, rtol=0, atol=1e-6)
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [processor.tokenizer(f" {QUESTION}")["input_ids"]]


@pytest.mark.parametrize(("d_model", "side"), [(256, 256), (512, 256), (768, 384), (1024, 480), (1280, 480)])
def test_side_of_squares_is_the_models_own(processor, d_model, side):
    image_processor = type(processor.image_processor).for_ofa(512, d_model)
    (square,) = image_processor.square(images()["high"])
    assert square.shape == (side, side, 3)


def test_floating_point_images_become_squares_like_others(processor):
    smooth = images()["high"].resize((30, 20)).resize((200, 300), Image.Resampling.BILINEAR)
    (square,), (floats,) = (processor.image_processor.square(x) for x in (smooth, np.float32(smooth) / 255))
    np.testing.assert_allclose(floats * 255, square, atol=1.5)  # rounded twice, after each direction


def test_texts_and_images_are_paired(processor, model):
    wide, high = images()["wide"], images()["high"]
    both = processor(images=[wide, high], text=["a cat?", "the wet dog?"], return_tensors="pt")
    lengths = [len(processor.tokenizer(f" {text}").input_ids) for text in ("a cat?", "the wet dog?")]
    assert both["attention_mask"].sum(1).tolist() == lengths
    ids = model.generate(**both, max_new_tokens=4, num_beams=2)
    for row, image, text in zip(ids, (wide, high), ("a cat?", "the wet dog?"), strict=True):
        alone = model.generate(**processor(images=image, text=text, return_tensors="pt"), max_new_tokens=4, num_beams=2)
        assert row.tolist() == alone[0].tolist()
    one_text = processor(images=[wide, high], text=QUESTION, return_tensors="pt")
    one_image = processor(images=wide, text=[QUESTION, "a"], return_tensors="pt")
    assert len(one_text["input_ids"]) == len(one_image["pixel_values"]) == 2
    assert set(processor(text="Cat/Dog", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert processor(text="Cat/Dog")["input_ids"] == processor(text="cat dog")["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "cat " * 300}, r'The text "cat cat .*" has 302 tokens, but the model has 256 positions'),
        ({"text": []}, "The list of texts is empty"),
        ({"text": [3]}, "The text must be a string, not 3"),
        ({"text": "a", "categories": ["cat"]}, "text is for generation, categories for segmentation"),
        ({"text": ["a", "b", "c"], "images": 2}, "3 texts for 2 images"),
        ({"text": "a", "images": 1, "size": {"shortest_edge": 64}}, "size: images become squares"),
        ({"text": "a", "do_normalize": False}, "There are no images for do_normalize"),
    ],
)
def test_wrong_texts_are_refused(processor, arguments, message):
    if count := arguments.get("images"):
        arguments = {**arguments, "images": [images()["wide"]] * count}
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_pipeline_writes_texts_without_a_logged_error(converted, published, capfd):
    for folder in (converted, published):
        pipe = pipeline("image-text-to-text", model=str(folder))
        assert type(pipe.model) is OFAForConditionalGeneration
        (answer,) = pipe(images()["palette"], text=QUESTION, max_new_tokens=4)
        assert answer["generated_text"].startswith(QUESTION)
        answers = pipe([*images().values()], text=[QUESTION, "a cat?"] * 2, max_new_tokens=4)
        assert [answer["input_text"] for answer in answers] == [QUESTION, "a cat?"] * 2
    assert "not supported" not in capfd.readouterr().err


# Remote code alone ----------------------------------------------------------------------------------------------------

LOADING = """
import sys
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSemanticSegmentation, AutoProcessor
from transformers import pipeline
from transformers.utils import logging

logging.disable_progress_bar()
folder, again = sys.argv[1:]
try:
    import ifseg_hf
    raise SystemExit("the package is there")
except ImportError:
    pass
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForSemanticSegmentation):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(f"{again}/{auto_class.__name__}")
    model = auto_class.from_pretrained(f"{again}/{auto_class.__name__}", trust_remote_code=True)
    total = sum(x.double().sum() for x in model.parameters())
    print(type(model).__name__, type(model).__module__.partition(".")[0], f"{total:.3f}")
pipeline("image-text-to-text", model=folder, trust_remote_code=True)
"""


def test_remote_code_alone_loads_all_classes(converted, hub, tmp_path):
    env = environment(hub, tmp_path / "home", package=False)
    done = run("-c", LOADING, converted, tmp_path, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [
        ["OFAModel", "transformers_modules"],
        ["OFAForConditionalGeneration", "transformers_modules"],
        ["IFSegForSemanticSegmentation", "transformers_modules"],
    ]
    expected = sum(x.double().sum() for x in AutoModel.from_pretrained(converted).parameters())
    assert rows[0][2] == rows[1][2] == f"{expected:.3f}"
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForSemanticSegmentation"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        modules = {reference.partition(".")[0] for reference in config["auto_map"].values()}
        assert all((tmp_path / name / f"{module}.py").is_file() for module in modules)
    # and with the package, what was saved without it
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "AutoModel")) is OFAForConditionalGeneration
    assert "segmentation_positions" not in done.stderr  # new in segmentation, and nothing to tell a person
    assert "not supported" not in done.stderr
