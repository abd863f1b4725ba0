"""LoRA adapters of words: training, files, several on one model, and errors."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model, save_untuned_backbone
from transformers import pipeline

import ifseg_hf
from ifseg_hf import NANO, IFSegConfig, IFSegForSemanticSegmentation, OFAConfig, adapters
from ifseg_hf.adapters import add_lora, base_of_adapter, find_adapter, load_adapter, lora_targets, save_adapter
from ifseg_hf.cache import cache_entries
from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.loading import load_segmentation_model
from ifseg_hf.modeling import adapters_ifseg
from ifseg_hf.modeling.adapters_ifseg import WORDS_FILE, base_digest
from ifseg_hf.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WORDS, EMBEDDED
from ifseg_hf.training import loop
from ifseg_hf.training.config import LORA_RANK, SETTINGS_FILE, TrainingConfig
from ifseg_hf.training.loop import SettingError, TrainingRun, TrainingStopped, train
from ifseg_hf.training.recipes import training_config

RECIPE = {"steps": 4, "warmup_steps": 1, "batch_size": 2, "max_cells": 2, "learning_rate": 1e-3}
STREET, ROOM = ["road", "car", "sky"], ["bed", "lamp"]
FILES = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WORDS, SETTINGS_FILE}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a backbone that was never tuned, with a short recipe: it lacks segmentation positions."""
    return save_untuned_backbone(tmp_path_factory.mktemp("model"), RECIPE)


def settings(model, folder, words=STREET, **changes) -> TrainingConfig:
    given = {"categories": list(words), "output_dir": str(folder), "model": str(model), "lora": True, "cpu": True}
    return training_config({**given, "learning_rate": 0.05, "lora_rank": 3, **changes})


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """The folders of two adapters of one model, of other words and ranks."""
    root = tmp_path_factory.mktemp("adapters")
    train(settings(model, root / "street"), report=False)
    train(settings(model, root / "room", ROOM, lora_rank=2, seed=1), report=False)
    return {"street": root / "street", "room": root / "room"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IFSEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def outputs(segmenter, image, **kwargs) -> torch.Tensor:
    return segmenter(segmenter.preprocess([image]), **kwargs).logits


# Training -------------------------------------------------------------------------------------------------------------


def test_training_writes_the_adapter_its_words_and_no_model(made, model):
    for name, words in (("street", STREET), ("room", ROOM)):
        assert {file.name for file in made[name].iterdir() if file.suffix != ".jsonl"} == FILES
        assert list(json.loads((made[name] / ADAPTER_WORDS).read_text())["words"]["id2label"].values()) == words
        assert base_of_adapter(made[name]) == str(Path(model).resolve())
    weights = load_file(made["street"] / ADAPTER_WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert any("segmentation_positions" in name for name in weights)
    trained = [tensor for name, tensor in weights.items() if "lora_B" in name]  # zero before training
    assert trained
    assert any(tensor.any() for tensor in trained)


def test_the_same_run_writes_the_same_files(made, model, tmp_path):
    train(settings(model, tmp_path / "again"), report=False)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WORDS):
        assert (tmp_path / "again" / name).read_bytes() == (made["street"] / name).read_bytes()


def test_the_linear_layers_that_tuning_trains_are_adapted(model):
    loaded = load_segmentation_model(model)
    image_free = {id(parameter) for parameter in loaded.backbone.image_free_parameters()}
    modules = dict(loaded.named_modules())
    names = lora_targets(loaded)
    assert {name.split(".")[2] for name in names} == {"encoder", "decoder"}
    assert all(id(modules[name].weight) in image_free for name in names)
    add_lora(loaded, 2, model)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0] for name in trained if ".lora_" in name} == set(names)
    others = {name for name in trained if ".lora_" not in name}
    assert others
    assert all(name.startswith("backbone.segmentation_positions.modules_to_save.") for name in others)


def test_a_resumed_run_ends_with_the_same_bits(made, model, monkeypatch, tmp_path):
    finish = TrainingRun.finish_step

    def finish_step(run):
        finish(run)
        if run.step == 1:  # noticed in the next step
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "finish_step", finish_step)
        with pytest.raises(TrainingStopped):
            train(settings(model, tmp_path / "run"), report=False)
    result = train(settings(model, tmp_path / "run", resume="latest"), report=False)
    assert result.resumed_at == 2
    whole, resumed = (load_file(folder / ADAPTER_WEIGHTS) for folder in (made["street"], tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    with pytest.raises(ValueError, match=r"lora_rank \(was 3, is 8\)"):
        train(settings(model, tmp_path / "run", lora_rank=8, resume="latest"))


def test_the_learning_rate_is_ten_times_that_of_the_recipe(model):
    given = {"categories": STREET, "output_dir": "", "model": str(model)}
    assert training_config(given).learning_rate == 1e-3
    assert training_config({**given, "lora": True}).learning_rate == pytest.approx(1e-2)
    assert training_config({**given, "lora": True, "learning_rate": 1e-4}).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": False}, "lora_rank=3 belongs to lora"),
        ({"lora_rank": 0}, "lora_rank=0: must be at least 1"),
        ({"decoder_positions": "image"}, "decoder_positions=image would change the model itself"),
        ({"image_size": 32}, "image_size=32 would change the model itself"),
        ({"stage": "supervised", "dataset": "x"}, "lora belongs to stage=word-maps"),
    ],
)
def test_wrong_settings_are_refused(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(settings(model, tmp_path / "out", **changes))


def test_a_folder_holds_a_model_or_an_adapter(made, model, tmp_path):
    shutil.copytree(made["street"], tmp_path / "adapter")
    with pytest.raises(SettingError, match="holds an adapter and not a model: choose another"):
        train(settings(model, tmp_path / "adapter", lora=False, lora_rank=LORA_RANK))
    train(settings(model, tmp_path / "model", lora=False, lora_rank=LORA_RANK), report=False)
    with pytest.raises(SettingError, match="holds a model and not an adapter: choose another"):
        train(settings(model, tmp_path / "model"))


# Size -----------------------------------------------------------------------------------------------------------------


def adapter_size(config: OFAConfig, rank: int) -> tuple[int, int]:
    """Parameters of an adapter and of its model, counted without weights."""
    with torch.device("meta"):
        model = IFSegForSemanticSegmentation(IFSegConfig(backbone_config=config))
    modules = dict(model.named_modules())
    lora = sum(rank * (modules[name].in_features + modules[name].out_features) for name in lora_targets(model))
    whole = sum(p.numel() for name in adapters.new_modules(model) for p in modules[name].parameters())
    return lora + whole, sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "limit"), [("nano", 1e6), ("base", 10e6)])
def test_adapters_of_the_default_rank_are_small(name, limit):
    config = OFAConfig.from_pretrained(NANO) if name == "nano" else OFAConfig.preset("base")
    parameters, of_model = adapter_size(config, LORA_RANK)
    assert 2 * parameters < limit  # in float16
    assert parameters < 0.02 * of_model


def test_the_file_has_the_counted_size(made, model):
    parameters, _ = adapter_size(OFAConfig.from_pretrained(model), 3)
    assert sum(tensor.numel() for tensor in load_file(made["street"] / ADAPTER_WEIGHTS).values()) == parameters


# Several adapters on one model ----------------------------------------------------------------------------------------


def test_adapters_by_turns_give_the_results_of_each_alone(made, model, image):
    alone = {name: outputs(load_segmenter(folder), image) for name, folder in made.items()}
    assert [logits.shape[1] for logits in alone.values()] == [3, 2]
    segmenter = load_segmenter(model, adapter=made["street"])
    weights = {
        name: parameter.data_ptr() for name, parameter in adapters_ifseg.base_parameters(segmenter.model).items()
    }
    segmenter.load_adapter(made["room"], "room")
    assert segmenter.model.active_adapters() == ["room"]
    for _ in range(2):
        assert torch.equal(outputs(segmenter, image, adapter="default"), alone["street"])
        assert torch.equal(outputs(segmenter, image, adapter="room"), alone["room"])
    assert torch.equal(outputs(segmenter, image), alone["room"])
    after = adapters_ifseg.base_parameters(segmenter.model)
    assert {name: parameter.data_ptr() for name, parameter in after.items()} == weights  # no second backbone
    own = sum(x.numel() for folder in made.values() for x in load_file(folder / ADAPTER_WEIGHTS).values())
    added = sum(x.numel() for name, x in segmenter.model.named_parameters() if "lora_" in name or ".modules_to" in name)
    assert added == own
    segmenter.model.delete_adapter("room")
    segmenter.model.set_adapter("default")
    assert torch.equal(outputs(segmenter, image), alone["street"])


def test_weights_of_an_adapter_have_the_dtype_of_the_model(made, model):
    for dtype in (torch.float32, torch.bfloat16):
        loaded = IFSegForSemanticSegmentation.from_pretrained(model, dtype=dtype)
        loaded.load_adapter(made["street"], "encoder")  # the name of a module, too
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "lora_" in name)


def test_pipeline_loads_an_adapter_and_switches_per_call(made, model, image, monkeypatch):
    image = Image.fromarray(image)
    pipe = pipeline("image-segmentation", model=str(made["street"]))
    expected = load_segmenter(made["street"])
    assert pipe(image) == expected.processor.pipeline(expected.model)(image)
    street = pipe(image)
    pipe.load_adapter(made["room"], "room")
    room = pipe(image, adapter="room")
    assert {x["label"] for x in street} <= set(STREET)
    assert {x["label"] for x in room} <= set(ROOM)
    assert pipe([image, image], adapter="default") == [street, street]
    assert pipe(image, adapter="room") == room
    assert {x["label"] for x in pipe(image, adapter="room", categories=["cat", "dog"])} <= {"cat", "dog"}
    assert pipeline(model=made["room"])(image) == room  # the task of an adapter is known
    with pytest.raises(ValueError, match="Adapter with name garden not found"):
        pipe(image, adapter="garden")


def test_transformers_saves_and_loads_the_words_with_an_adapter(made, model, tmp_path):
    loaded = IFSegForSemanticSegmentation.from_pretrained(model)
    loaded.load_adapter(made["street"])
    loaded.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = IFSegForSemanticSegmentation.from_pretrained(model)
    again.load_adapter(tmp_path, "copy")
    assert list(again.config.id2label.values()) == STREET
    assert again.adapter_words["copy"] == loaded.adapter_words["default"]


# The cache ------------------------------------------------------------------------------------------------------------


def test_tuned_adapters_are_kept_in_the_cache_by_rank(model, image, monkeypatch):
    runs, trained = [], loop.train
    monkeypatch.setattr(loop, "train", lambda config, **kwargs: runs.append(config) or trained(config, **kwargs))
    image = Image.fromarray(image)
    found = ifseg_hf.segment(image, STREET, model=model, lora=True)
    assert ifseg_hf.tune(STREET, model=model, lora=True)(image) == found
    assert len(runs) == 1
    assert find_adapter(cache_entries()[0].folder) is not None
    ifseg_hf.tune(STREET, model=model, lora=True, lora_rank=2)
    ifseg_hf.tune(STREET, model=model)
    assert len(runs) == len(cache_entries()) == 3


# Errors ---------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_refused(made, tmp_path):
    other = save_tiny_model(tmp_path / "other")  # the same shapes, other weights
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file(
        {name: 1.01 * x for name, x in weights.items()}, tmp_path / "other" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"street\" was tuned on another model than this one"):
        load_segmenter(other, adapter=made["street"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: "[]", "cannot be read"),
        (lambda saved: "{", "cannot be read"),
        (lambda saved: json.dumps({**saved, "words": {"id2label": {"0": "a"}}}), "are damaged: expected id2label"),
        (lambda saved: json.dumps({**saved, "words": {**saved["words"], "category_ids": [[5]]}}), "are damaged"),
        (lambda saved: json.dumps({**saved, "words": {**saved["words"], "prompt_ids": [99999]}}), "a vocabulary of"),
        (lambda saved: json.dumps({**saved, "words": {**saved["words"], "prompt_ids": "x"}}), "are damaged"),
        (lambda saved: json.dumps({**saved, "words": {**saved["words"], "category_ids": None}}), "are damaged"),
    ],
)
def test_damaged_words_are_refused(made, model, tmp_path, damage, message):
    shutil.copytree(made["street"], tmp_path / "adapter")
    file = tmp_path / "adapter" / ADAPTER_WORDS
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=message):
        load_segmenter(tmp_path / "adapter")


def test_incomplete_weights_are_refused_and_leave_the_model_usable(made, model, image, tmp_path):
    shutil.copytree(made["street"], tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    save_file(dict(list(weights.items())[3:]), tmp_path / "adapter" / ADAPTER_WEIGHTS, {"format": "pt"})
    segmenter = load_segmenter(model, adapter=made["street"])
    expected = outputs(segmenter, image)
    with pytest.raises(ValueError, match="do not fit this model: 3 tensors are missing"):
        segmenter.load_adapter(tmp_path / "adapter", "broken")
    assert torch.equal(outputs(segmenter, image), expected)
    (tmp_path / "adapter" / ADAPTER_WEIGHTS).write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_segmenter(tmp_path / "adapter")


def test_a_name_that_is_taken_is_refused(made, model):
    segmenter = load_segmenter(model, adapter=made["street"])
    with pytest.raises(ValueError, match='has an adapter "default" already'):
        segmenter.load_adapter(made["room"])


def test_what_is_no_adapter_is_refused(model, tmp_path):
    for name in (model, str(tmp_path / "missing"), "me/missing"):
        with pytest.raises(ValueError, match=f'"{name}" is no adapter with words'):
            load_segmenter(model, adapter=name)
    loaded = load_segmentation_model(model)
    with pytest.raises(ValueError, match='There is no adapter "street"'), loaded.use_adapter("street"):
        pass


def test_without_peft_one_sentence_says_what_to_install(made, model, monkeypatch, tmp_path):
    monkeypatch.setattr(adapters_ifseg, "is_peft_available", lambda: False)
    for load in (lambda: load_segmenter(made["street"]), lambda: pipeline(model=str(made["street"]))):
        with pytest.raises(ValueError, match=r'needs peft, which is not installed: pip install "ifseg-hf\[peft\]"'):
            load()
    find_spec = adapters.importlib.util.find_spec
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(SettingError, match="needs peft, which is not installed"):
        train(settings(model, tmp_path / "out"))


# The embedded model ---------------------------------------------------------------------------------------------------


def test_an_adapter_of_the_embedded_model_names_it(tmp_path):
    model = load_segmentation_model(NANO)
    model.set_words(**ifseg_hf.IFSegProcessor.from_pretrained(NANO).encode_categories(STREET))
    digest = base_digest(model)
    add_lora(model, LORA_RANK, EMBEDDED)
    assert base_digest(model) == digest
    save_adapter(model, tmp_path)
    assert base_of_adapter(tmp_path) == EMBEDDED
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 250_000
    load_adapter(load_segmentation_model(NANO), tmp_path)
    pipe = pipeline("image-segmentation", model=str(tmp_path))
    assert list(pipe.model.config.id2label.values()) == STREET


def test_the_name_of_the_words_file_is_the_same_everywhere():
    assert WORDS_FILE == ADAPTER_WORDS
