"""From words to a mask in one call, and the cache of tuned models."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SMALL
from PIL import Image
from safetensors.torch import load_file
from tiny_model import save_tiny_model, save_untuned_backbone

import ifseg_hf
from ifseg_hf.cache import cache_entries, cache_folder, clear_cache
from ifseg_hf.training import loop
from ifseg_hf.training.config import CHECKPOINT_FILE
from ifseg_hf.training.loop import TrainingRun
from ifseg_hf.tuning import choose_background, is_tuned_for

ROOT = Path(__file__).parents[2]
WORDS = ["cat", "wet grass", "sky"]
RECIPE = {"steps": 6, "warmup_steps": 1, "batch_size": 2, "max_cells": 2, "learning_rate": 1e-3}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a backbone that was never tuned, with a short recipe."""
    return save_untuned_backbone(tmp_path_factory.mktemp("model"), RECIPE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IFSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


@pytest.fixture
def runs(monkeypatch):
    """The configurations of all runs of training."""
    configs, train = [], loop.train
    monkeypatch.setattr(loop, "train", lambda config, **kwargs: configs.append(config) or train(config, **kwargs))
    return configs


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_words_are_tuned_once_and_then_read_from_the_cache(model, image, runs, cache, capfd):
    pipe = ifseg_hf.tune(WORDS, model=model)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert f"cat, wet grass, sky. This happens once: the result is kept in {cache}." in captured.err
    assert "6/6" in captured.err
    assert captured.err.count("Tuning") == 1  # one line for one person, without the settings
    assert "missing" not in captured.err.lower()
    assert "Writing model shards" not in captured.err
    found = pipe(image)
    assert {x["label"] for x in found} <= set(WORDS)
    again = ifseg_hf.tune("cat, wet grass, sky", model=model)
    assert again(image) == found
    assert ifseg_hf.segment(image, WORDS, model=model) == found
    assert capfd.readouterr().err == ""
    assert len(runs) == 1
    assert (runs[0].steps, runs[0].learning_rate) == (6, 1e-3)  # the model's recipe
    (entry,) = cache_entries()
    assert entry.folder.parent == cache / "tuned"
    assert not list(entry.folder.glob("checkpoint-*"))


def test_one_word_is_tuned_with_a_background(model, image, runs, capfd):
    found = ifseg_hf.segment(image, ["cat"], model=model)
    assert {x["label"] for x in found} <= {"cat", "background"}
    line = 'What is not "cat" is "background"; background="none": no background.'
    assert capfd.readouterr().err.splitlines().count(line) == 1
    assert ifseg_hf.segment(image, "cat", model=model, background="default") == found
    assert len(runs) == 1
    (entry,) = cache_entries()
    tuned = str(entry.folder)
    assert is_tuned_for(tuned, ["cat"], background="default")
    assert not is_tuned_for(tuned, ["cat"])
    assert not is_tuned_for(tuned, ["cat"], background=["sky"])
    pipe = ifseg_hf.tune(["cat", "dog"], model=model, background=["sky", "sea"])
    assert pipe.model.config.background == ["sky", "sea"]
    tuned = next(entry.folder for entry in cache_entries() if entry.categories == ["cat", "dog"])
    labels = {x["label"] for x in ifseg_hf.segment(image, ["dog", "cat"], model=tuned)}  # keeps the model's background
    assert len(runs) == 2
    assert labels <= {"cat", "dog", "background"}
    assert choose_background(["cat", "dog"], model=tuned) == ["sky", "sea"]
    assert choose_background(["cat", "dog"], "none", tuned) is None
    assert choose_background(["cat", "sky"], model=tuned) is None
    assert pipe(image, threshold=1.0) == []
    with pytest.raises(ValueError, match="One category is not enough for segmentation"):
        ifseg_hf.tune(["cat"], model=model, background="none")


def test_more_words_than_the_prompt_holds_are_tuned(model, image, runs):
    words = [f"word {index}" for index in range(1203)]
    pipe = ifseg_hf.tune(words, model=model, steps=2)
    assert len(pipe.model.config.prompt_ids) <= 120
    assert {x["label"] for x in pipe(image, smoothing_iterations=0)} <= set(words)
    assert is_tuned_for(str(cache_entries()[0].folder), words)


def test_other_words_models_and_settings_are_other_entries(model, runs, tmp_path):
    ifseg_hf.tune(WORDS, model=model)
    ifseg_hf.tune(WORDS, model=model, cpu=True, checkpointing_steps=7)  # have no effect on the result
    assert len(runs) == 1
    ifseg_hf.tune(WORDS[:2], model=model)
    ifseg_hf.tune(WORDS, model=model, steps=3)
    ifseg_hf.tune({"animal": ["cat"], "sky": ["sky", "wet grass"]}, model=model)
    save_tiny_model(tmp_path / "other")
    ifseg_hf.tune(WORDS, model=tmp_path / "other", **{**RECIPE, "steps": 2})
    assert len(runs) == len(cache_entries()) == 5


def test_an_output_folder_replaces_the_cache(model, tmp_path, capsys):
    ifseg_hf.tune(WORDS, model=model, output_dir=str(tmp_path / "out"), steps=2)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert cache_entries() == []
    assert "2 steps" in capsys.readouterr().out


def test_a_model_tuned_for_the_words_is_used_as_it_is(model, image, runs, tmp_path):
    out = str(tmp_path / "out")
    pipe = ifseg_hf.tune(WORDS, model=model, output_dir=out)
    assert is_tuned_for(out, WORDS)
    assert is_tuned_for(out, WORDS[::-1])
    assert not is_tuned_for(out, WORDS[:2])
    assert not is_tuned_for(out, {word: [word] for word in WORDS[:2]} | {"sky": ["sky", "cat"]})
    assert not is_tuned_for(model, WORDS)
    images = [image, image.rotate(90)]
    assert ifseg_hf.segment(images, WORDS, model=out) == pipe(images)
    assert len(runs) == 1
    ifseg_hf.segment(image, WORDS[:2], model=out, steps=1)
    assert len(runs) == 2


def stop_after(monkeypatch, step: int) -> None:
    """Sends this process Ctrl-C after a step of training."""
    finish = TrainingRun.finish_step

    def finish_step(run):
        finish(run)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingRun, "finish_step", finish_step)


def test_an_interrupted_tuning_is_continued(model, monkeypatch, cache, tmp_path):
    ifseg_hf.tune(WORDS, model=model, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            ifseg_hf.tune(WORDS, model=model)
    (entry,) = cache_entries()
    assert not entry.complete
    (checkpoint,) = entry.folder.glob("checkpoint-*")
    assert entry.categories == WORDS
    steps = []
    monkeypatch.setattr(TrainingRun, "_log", lambda run, values: steps.append(run.step))
    ifseg_hf.tune(WORDS, model=model)
    assert steps[0] == int(checkpoint.name.rpartition("-")[2]) + 1
    assert steps[-1] == 6
    (entry,) = cache_entries()
    assert entry.complete
    assert weights(entry.folder) == weights(tmp_path / "whole")


def test_a_damaged_checkpoint_starts_the_tuning_again(model, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            ifseg_hf.tune(WORDS, model=model)
    (entry,) = cache_entries()
    (checkpoint,) = entry.folder.glob("checkpoint-*")
    (checkpoint / CHECKPOINT_FILE).write_text("{")
    ifseg_hf.tune(WORDS, model=model)
    (entry,) = cache_entries()
    assert entry.complete


TUNE = "import sys, ifseg_hf; ifseg_hf.tune(['cat', 'wet grass', 'sky'], model=sys.argv[1]); print('done')"


def test_two_processes_tune_once(model):
    processes = [
        subprocess.Popen([sys.executable, "-c", TUNE, model], env=ENVIRONMENT | dict(os.environ), text=True, **PIPES)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [output for output, _ in outputs] == ["done\n"] * 2, outputs
    errors = "".join(error for _, error in outputs)
    assert errors.count("This happens once") == 1
    assert "Traceback" not in errors
    (entry,) = cache_entries()
    assert entry.complete


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def test_a_killed_tuning_leaves_nothing_that_harms(model, runs):
    killed = (
        "import os, signal, sys, ifseg_hf\nfrom ifseg_hf.training.loop import TrainingRun\n"
        "TrainingRun.save = lambda run: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = ENVIRONMENT | dict(os.environ)
    done = subprocess.run([sys.executable, "-c", killed + TUNE, model], env=environment, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    (entry,) = cache_entries()
    assert not entry.complete
    ifseg_hf.tune(WORDS, model=model)
    (entry,) = cache_entries()
    assert entry.complete


def test_the_place_of_the_cache(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("IFSEG_CACHE", "~/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/home/alice/elsewhere")
    monkeypatch.delenv("IFSEG_CACHE")
    assert cache_folder() == Path("/var/cache/ifseg")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/alice/.cache/ifseg")


def test_entries_are_cleared_by_name_or_all(model):
    for words in (WORDS, WORDS[:2], WORDS[1:]):
        ifseg_hf.tune(words, model=model, steps=1)
    entries = cache_entries()
    assert [entry.categories for entry in entries] == [WORDS[1:], WORDS[:2], WORDS]  # last used first
    assert {entry.model for entry in entries} == {model}
    assert min(entry.size for entry in entries) > 10_000
    with pytest.raises(ValueError, match='no "nothing" in the cache'):
        clear_cache([entries[0].name, "nothing"])
    assert clear_cache([entries[1].name]) == [entries[1]]
    assert [entry.name for entry in cache_entries()] == [entries[0].name, entries[2].name]
    assert len(clear_cache()) == 2
    assert cache_entries() == []


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["cat"], {"background": "none"}, "at least two"),
        ("cat, cat", {}, "twice"),
        (["x" * 200, "cat"], {}, "positions"),
        (WORDS, {"stepz": 5}, 'no setting "stepz": steps?'),
        (WORDS, {"steps": "many"}, "must be a whole number"),
        (WORDS, {"image_size": 50}, "image_size=50: must be a multiple of the model's patch size 16"),
        (WORDS, {"image_size": 16 * (SMALL["image_bucket_size"] + 1)}, "image_bucket_size"),
        (WORDS, {"model": "nowhere"}, "no model folder"),
        (WORDS, {"dataset": "coco-stuff"}, "give an output_dir"),
        (WORDS, {"stage": "supervised"}, "give an output_dir"),
    ],
)
def test_wrong_words_and_settings_are_named(model, words, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        ifseg_hf.tune(words, **{"model": model, **settings})
    assert "\n" not in str(caught.value)
    assert cache_entries() == []


def test_several_processes_do_not_tune_into_the_cache(model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--output-dir"):
        ifseg_hf.tune(WORDS, model=model)
