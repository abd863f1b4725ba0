"""The command `ifseg`, in this process and as a program."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SMALL
from PIL import Image
from tiny_model import save_untuned_backbone
from typer.main import get_command
from typer.testing import CliRunner

from ifseg_hf.cache import cache_entries, cache_folder
from ifseg_hf.cli import tune as tune_module
from ifseg_hf.cli.main import app
from ifseg_hf.cli.segment import split_arguments
from ifseg_hf.cli.tune import flag_name
from ifseg_hf.hub.model_folder import CARD_IMAGE
from ifseg_hf.training.config import TrainingConfig

ROOT = Path(__file__).parents[3]
COMMANDS = ["segment", "tune", "app", "convert", "evaluate", "pseudo-label", "push", "export", "cache"]
WORDS = "cat, wet grass, sky"
RECIPE = {"steps": 4, "warmup_steps": 1, "batch_size": 2, "max_cells": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a backbone that was never tuned, with a short recipe."""
    return save_untuned_backbone(tmp_path_factory.mktemp("model"), RECIPE)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder with two images, and a cache in it."""
    monkeypatch.setenv("IFSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(name)
    return tmp_path


def ifseg(*arguments):
    """The result of the command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def program(*arguments, **kwargs):
    """The result of the command as a program."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *kwargs.pop("python", []), "-m", "ifseg_hf", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, **kwargs)


# Help and arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_neither_torch_nor_transformers(command):
    """Which would take seconds; without them the help takes less than half a second."""
    done = program(command, "--help", python=["-X", "importtime"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: ifseg {command} ")
    imported = {line.split()[-1] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "numpy", "PIL", "accelerate", "huggingface_hub"}


SCRIPTS = sorted(file.stem for file in (ROOT / "scripts").glob("*.py") if file.stem != "evaluate")  # evaluate is eval


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [("ifseg_hf.cli.main", "ACTIVE", "ACTIVE"), *((script, None, "PASSIVE") for script in SCRIPTS)],
)
def test_waiting_threads_sleep_unless_set_otherwise(module, given, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    code = f"import os, sys, {module}; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_in_any_script_are_printed_in_any_encoding(encoding, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "IFSEG_CACHE": str(tmp_path / "猫 łąka")}
    command = [sys.executable, "-m", "ifseg_hf", "cache"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "猫 łąka".encode(encoding, "backslashreplace") in done.stdout


def test_the_program_lists_its_commands():
    done = ifseg("--help")
    assert done.exit_code == 0
    listed = [line.split()[0] for line in done.stdout.partition("Commands:\n")[2].splitlines()]
    assert listed == COMMANDS
    assert sorted(get_command(app).commands) == sorted(COMMANDS)


def test_every_setting_is_a_flag():
    flags = {option for parameter in get_command(app).commands["tune"].params for option in parameter.opts}
    assert {flag_name(field.name) for field in fields(TrainingConfig)} <= flags
    shown = ifseg("tune", "--help").stdout
    for text in ("--image-size NUMBER", "--decoder-positions TEXT", "--no-random-cells", "the recipe's, or 2000"):
        assert text in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment"], "ifseg segment: Missing argument"),
        (["segment", "a.png", "--smoothing-neighbors", "0"], "must be at least 1"),
        (["segment", "a.png", "--sizes"], "ifseg segment: No such option"),
        (["tune", "cat, cup", "--categories", "cat, cup", "--output-dir", "out"], "given twice"),
        (["tune", "cat, cup"], "ifseg tune: --output-dir is required"),
        (["tune", "cat, cup", "--output-dir", "out", "--image-size", "50"], "multiple of the model's patch size 16"),
        (["tune", "cat, cup", "--output-dir", "out", "--decoder-positions", "none"], "choose segmentation or image"),
        (["pseudo-label", "--model", "m", "--output-dir", "out"], "ifseg pseudo-label: give either --dataset or"),
        (["cache", "name"], "ifseg cache: names are for --clear"),
        (["app", "--port", "70000"], "must be from 1 to 65535"),
        (["push", "tuned"], "ifseg push: give the folder of a model and a repository id"),
        (["nothing"], "ifseg: No such command 'nothing'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    done = CliRunner().invoke(app, arguments, prog_name="ifseg")
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert message in line


def test_flags_are_over_the_file_over_the_recipe(model, monkeypatch, place):
    given = []
    monkeypatch.setattr(TrainingConfig, "check", lambda config: given.append(config))
    (place / "settings.yaml").write_text("learning_rate: 0.5\nbatch_size: 3\nsteps: 7\n")
    tune_module.parse_settings(WORDS, "settings.yaml", {"model": model, "output_dir": "out", "steps": 9, "seed": None})
    (config,) = given
    assert (config.learning_rate, config.batch_size, config.steps, config.max_cells) == (0.5, 3, 9, 2)
    assert (config.weight_decay, config.seed, config.categories) == (0.1, 0, ["cat", "wet grass", "sky"])


def test_split_arguments(place):
    (place / "words.txt").write_text("cat\nsky\n")
    (place / "ade20k").write_text("also the name of a file")
    (place / "image").write_text("without an ending")
    expected = {
        ("a.png",): None,
        ("sky, road",): None,
        ("a.png", "b.png"): None,
        ("a.png", "missing.JPG"): None,
        ("a.png", "image"): None,
        ("a.png", "https://somewhere/b"): None,
        ("a.png", "sky, road"): "sky, road",
        ("a.png", "b.png", "road"): "road",
        ("a.png", "words.txt"): "words.txt",
        ("a.png", "missing.txt"): "missing.txt",
        ("a.png", "ade20k"): "ade20k",
    }
    for arguments, words in expected.items():
        images = list(arguments) if words is None else list(arguments[:-1])
        assert split_arguments(list(arguments), None) == (images, words)
        assert split_arguments(list(arguments), "cat") == (list(arguments), "cat")


# From words to masks --------------------------------------------------------------------------------------------------


def test_words_are_tuned_once_and_the_cache_is_listed_and_cleared(model, place):
    command = ["segment", "a.png", "b.png", WORDS, "--model", model]
    done = program(*command)
    assert done.returncode == 0, done.stderr
    assert "cat, wet grass, sky. This happens once: the result is kept in" in done.stderr
    assert "4/4" in done.stderr  # the progress bar, with the time left
    assert "MISSING" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a.png", "b.png"]
    with Image.open(place / "outputs" / "a_mask.png") as mask:
        assert json.loads(mask.text["categories"]) == ["cat", "wet grass", "sky"]
        first = np.asarray(mask)
    (entry,) = cache_entries()

    done = ifseg(*command)
    assert (done.exit_code, done.stdout.splitlines()) == (0, lines)
    assert done.stderr == ""
    with Image.open(place / "outputs" / "a_mask.png") as mask:
        assert np.array_equal(np.asarray(mask), first)

    listed = ifseg("cache").stdout.splitlines()
    assert len(listed) == 2
    assert listed[0].startswith(f"{entry.name}  {model}: cat, wet grass, sky  ")
    assert listed[1].startswith("1 models, ")
    assert ifseg("cache", "--clear", "nothing").exit_code == 1
    assert len(cache_entries()) == 1
    assert "deleted from" in ifseg("cache", "--clear", entry.name).stdout
    assert cache_entries() == []
    assert ifseg("cache", "--clear").exit_code == 0


def test_converted_models_are_listed_and_cleared(place):
    folder = cache_folder() / "converted" / "OFA-Sys--ofa-base-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1_200_000)
    (folder.parent / f".{folder.name}-rest").mkdir()  # a conversion in progress
    listed = ifseg("cache").stdout.splitlines()
    assert listed[0].startswith(f"{folder.name}  OFA-Sys/ofa-base: converted  1.2 MB  ")
    assert listed[1].startswith("1 models, 1.2 MB, in ")
    assert "1 models" in ifseg("cache", "--clear", folder.name).stdout
    assert not folder.exists()
    assert cache_entries() == []


def test_tuning_with_a_file_of_settings(model, place):
    (place / "settings.yaml").write_text("steps: 2\nimage_size: 32\nmodel: somewhere-else\n")
    done = ifseg("segment", "a.png", WORDS, "--model", model, "--config", "settings.yaml", "--prompt", "what?")
    assert done.exit_code == 0, done.stderr
    (entry,) = cache_entries()
    settings = json.loads((entry.folder / "training_config.json").read_text())
    assert (settings["steps"], settings["image_size"], settings["prompt"]) == (2, 32, "what?")


def test_the_picture_of_the_card_is_drawn_after_tuning(model, place):
    settings = ["--model", model, "--cpu", "--output-dir"]
    assert ifseg("tune", WORDS, *settings, "plain").exit_code == 0
    assert not (place / "plain" / CARD_IMAGE).exists()
    done = ifseg("tune", WORDS, *settings, "pictured", "--card-image", "a.png")
    assert done.exit_code == 0, done.stderr
    assert f"The picture for the model card is {Path('pictured') / CARD_IMAGE}." in done.stdout
    with Image.open(place / "pictured" / CARD_IMAGE) as picture:
        assert picture.width > 2 * 90
    done = ifseg("tune", WORDS, *settings, "other", "--card-image", "nowhere.png")
    assert done.exit_code == 2
    assert 'There is no image "nowhere.png" for the model card.' in done.stderr
    assert not (place / "other" / "model.safetensors").exists()


def test_words_and_background_may_stand_in_the_file_of_settings(model, place):
    lines = ["steps: 2", f"model: {model}", "categories: [cat, sky]", "background: [sea, wet grass]"]
    (place / "settings.yaml").write_text("\n".join(lines))
    for more, background in (([], ["sea", "wet grass"]), (["--background", "none"], None)):
        done = ifseg("segment", "a.png", "--config", "settings.yaml", *more)
        assert done.exit_code == 0, done.stderr
        entry = cache_entries()[0]
        assert (entry.model, entry.categories) == (str(model), ["cat", "sky"])
        assert json.loads((entry.folder / "config.json").read_text())["background"] == background
    assert len(cache_entries()) == 2


def test_a_tuned_model_is_used_for_its_words_and_tuned_for_others(model, place):
    done = ifseg("tune", WORDS, "--model", model, "--output-dir", "tuned", "--steps", 2, "--resume")
    assert done.exit_code == 0, done.stderr
    for words in ([], [WORDS], ["sky, cat, wet grass"]):
        done = ifseg("segment", "a.png", *words, "--model", "tuned")
        assert done.exit_code == 0, done.stderr
    assert ifseg("segment", "a.png", "cat, roof", "--model", "tuned", "--no-tune").exit_code == 0
    assert cache_entries() == []
    assert ifseg("segment", "a.png", "cat, roof", "--model", "tuned").exit_code == 0
    (entry,) = cache_entries()
    assert entry.categories == ["cat", "roof"]
    assert entry.model == "tuned"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([WORDS, "--no-tune"], "never tuned on words, so its masks would mean nothing"),
        (["--categories", WORDS, "--no-tune"], "`ifseg tune"),
        ([], "was not tuned for any words"),
        (["cat", "--background", "none"], "One category is not enough"),
        (["cat, dog", "--background", "sky, sky"], "given twice"),
        (["cat, cat"], "given twice"),
        (["x" * 200 + ", cat"], "positions"),
        ([WORDS, "--config", "missing.yaml"], "missing.yaml"),
        ([WORDS, "--model", "nowhere"], 'no model folder "nowhere"'),
    ],
)
def test_errors_of_segmentation_are_one_line(model, arguments, message):
    given = [] if "--model" in arguments else ["--model", model]
    done = CliRunner().invoke(app, ["segment", "a.png", *arguments, *given], prog_name="ifseg")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ifseg segment: ")
    assert message in line
    assert cache_entries() == []


def test_a_model_never_tuned_is_used_where_it_is_meant(model):
    done = ifseg("segment", "a.png", WORDS, "--model", model, "--untuned")
    assert done.exit_code == 0, done.stderr
    assert cache_entries() == []
    assert done.stderr == ""


def test_an_image_size_without_positions_is_named(model):
    side = 16 * (SMALL["image_bucket_size"] + 1)
    done = ifseg("tune", WORDS, "--model", model, "--output-dir", "out", "--image-size", side)
    assert done.exit_code == 2
    assert "image_bucket_size" in done.stderr.splitlines()[-1]


# Adapters -------------------------------------------------------------------------------------------------------------


def test_commands_tune_and_use_adapters(model, place):
    made = ifseg("tune", WORDS, "--lora", "--lora-rank", 2, "--model", model, "--output-dir", "own")
    assert made.exit_code == 0, made.output
    masks = set()
    for arguments in (["--adapter", "own"], ["--model", "own"], ["--adapter", "own", "--model", model]):
        done = ifseg("segment", "a.png", *arguments, "--output-dir", "out")
        assert done.exit_code == 0, done.output
        masks.add((place / "out" / "a_mask.png").read_bytes())
    assert len(masks) == 1
    assert ifseg("segment", "a.png", "cup, bed", "--model", "own").exit_code == 0  # other words, without tuning
    assert cache_entries() == []
    assert ifseg("segment", "a.png", WORDS, "--lora", "--model", model).exit_code == 0
    (entry,) = cache_entries()
    assert (entry.folder / "adapter_model.safetensors").is_file()
    wrong = program("segment", "a.png", "--adapter", "missing")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert 'ifseg segment: "missing" is no adapter with words' in wrong.stderr


def test_an_adapter_of_a_local_model_is_not_pushed(model):
    done = program("tune", WORDS, "--lora", "--model", model, "--output-dir", "own", "--push-to-hub", "me/own")
    assert done.returncode == 2
    assert "a folder of this machine: publish this model first" in done.stderr
