"""Training on words alone, with a model of a few thousand parameters."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_model import is_key_bias, save_tiny_model

from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.modeling.modeling_ofa import OFAForConditionalGeneration
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training import setup, signals
from ifseg_hf.training.config import CHECKPOINT_FILE, SETTINGS_FILE, checkpoints
from ifseg_hf.training.log import LOG_FILE, TrainingLog, read_log, read_usage
from ifseg_hf.training.loop import (
    SettingError,
    TrainingConfig,
    TrainingError,
    TrainingRun,
    TrainingStopped,
    train,
)
from ifseg_hf.training.setup import make_accelerator, samples_per_batch
from ifseg_hf.training.signals import stop_signals


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def settings(model, folder, **changes):
    quick = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "cpu": True}
    return TrainingConfig(["cat", "cup", "sky"], str(folder), model, **{**quick, **changes})


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def assert_equal_weights(one, other):
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_training_lowers_the_loss_and_keeps_frozen_parameters(tiny_model, tmp_path):
    short = train(settings(tiny_model, tmp_path / "short", steps=1))
    result = train(settings(tiny_model, tmp_path / "out", steps=80, batch_size=8, max_cells=2))
    assert result.steps == 80
    assert result.loss < 0.6 * short.loss
    assert result.peak_memory > 0

    before, after = weights(tiny_model), weights(tmp_path / "out")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    model = IFSegForSemanticSegmentation.from_pretrained(tiny_model)
    model.freeze_for_word_maps()
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert moved <= trained
    assert {name for name in trained - moved if not is_key_bias(name)} == set()


def test_the_result_carries_its_words_processor_and_settings(tiny_model, tmp_path):
    train(settings(tiny_model, tmp_path / "out"))
    model = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == {0: "cat", 1: "cup", 2: "sky"}
    assert model(pixel_values=torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3, 4, 4)
    processor = IFSegProcessor.from_pretrained(tmp_path / "out")
    assert processor.encode_categories(["cat", "cup", "sky"])["prompt_ids"] == model.config.prompt_ids
    saved = json.loads((tmp_path / "out" / SETTINGS_FILE).read_text())
    assert TrainingConfig(**saved) == settings(tiny_model, tmp_path / "out")


def test_weights_depend_on_the_seed_and_not_on_workers(tiny_model, tmp_path):
    """Training into the folder of an earlier result is allowed."""
    train(settings(tiny_model, tmp_path / "one", seed=5))
    train(settings(tiny_model, tmp_path / "two", seed=6))
    name = "backbone.model.encoder.layers.0.fc1.weight"
    assert not torch.equal(weights(tmp_path / "one")[name], weights(tmp_path / "two")[name])
    train(settings(tiny_model, tmp_path / "two", seed=5, dataloader_workers=1))
    assert_equal_weights(tmp_path / "one", tmp_path / "two")


def test_gradient_accumulation_leads_to_the_same_weights(tiny_model, tmp_path):
    quiet = {"dropout": 0.0, "drop_path": 0.0, "learning_rate": 1e-3}
    train(settings(tiny_model, tmp_path / "one", **quiet))
    train(settings(tiny_model, tmp_path / "two", gradient_accumulation_steps=2, **quiet))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        if not is_key_bias(name):  # Adam scales their rounding noise to whole steps
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_training_with_hierarchical_categories(tiny_model, tmp_path):
    changed = settings(tiny_model, tmp_path / "out")
    changed.categories = {"animal": ["cat", "dog"], "sky": ["cloud"]}
    train(changed)
    config = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "out").config
    assert config.id2label == {0: "animal", 1: "sky"}
    assert config.word_categories == [0, 0, 1]
    assert len(config.word_ids) == 3


def test_training_starts_from_a_plain_ofa(tmp_path):
    ofa = save_tiny_model(tmp_path / "ofa", OFAForConditionalGeneration)
    train(settings(ofa, tmp_path / "one"))
    train(settings(ofa, tmp_path / "two"))
    assert "backbone.segmentation_positions.embed_positions.weight" in weights(tmp_path / "one")
    assert_equal_weights(tmp_path / "one", tmp_path / "two")  # the new positions too


def test_a_loss_that_is_not_finite_stops_training(tiny_model, tmp_path):
    with pytest.raises(TrainingError, match=r"not finite at step [23], after [12] completed"):
        train(settings(tiny_model, tmp_path / "out", learning_rate=1e30))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    train(settings(tiny_model, tmp_path / "out", steps=1))  # the folder may be used again


def test_the_error_of_a_loss_names_the_last_checkpoint(tiny_model, tmp_path):
    with pytest.raises(TrainingError, match=r"not finite at step ([23]), after [12] completed.*checkpoint-[12]\. "):
        train(settings(tiny_model, tmp_path / "out", learning_rate=1e30, checkpointing_steps=1))


def test_a_full_disk_at_saving_is_reported(tiny_model, tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IFSegForSemanticSegmentation, "save_pretrained", disk_full)
    with pytest.raises(TrainingError, match="No space left"):
        train(settings(tiny_model, tmp_path / "out", steps=1))


def test_a_too_long_prompt_is_rejected_before_weights_are_loaded(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(IFSegForSemanticSegmentation, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    changed = settings(tiny_model, tmp_path / "out")
    changed.categories = ["a" * 200, "cat"]
    with pytest.raises(SettingError, match="120 positions"):
        train(changed)


@pytest.mark.parametrize(
    ("batch_size", "processes", "accumulated", "expected"), [(16, 1, 1, 16), (16, 2, 1, 8), (16, 4, 2, 2)]
)
def test_batch_size_of_a_process(batch_size, processes, accumulated, expected):
    changed = TrainingConfig(["a", "b"], "", batch_size=batch_size, gradient_accumulation_steps=accumulated)
    assert samples_per_batch(changed, processes) == expected


def test_an_indivisible_batch_size_is_rejected():
    with pytest.raises(SettingError, match="3 processes"):
        samples_per_batch(TrainingConfig(["a", "b"], ""), 3)


def test_trackers_log_the_run(tiny_model, tmp_path):
    """A run that is rejected leaves no tracker files, which would make its folder unusable."""
    pytest.importorskip("tensorboard")
    changed = settings(tiny_model, tmp_path / "out", report_to="tensorboard")
    with pytest.raises(SettingError, match="120 positions"):
        train(replace(changed, categories=["cat", "a" * 200]))
    train(changed)
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(("name", "expected"), [("nonesuch", "nonesuch"), ("dvclive", "report_to=dvclive")])
def test_a_missing_tracker_is_reported(name, expected, tiny_model, tmp_path):
    with pytest.raises(SettingError, match=expected):
        train(settings(tiny_model, tmp_path / "out", report_to=name))


@pytest.mark.parametrize("requested", [{"mixed_precision": "bf16"}, {}])
def test_float32_is_used_on_a_cpu_slow_in_bfloat16(requested, tmp_path, monkeypatch, capsys):
    """bfloat16 is requested by the settings or by `accelerate launch`; a CPU that is faster in it uses it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if requested else "bf16")
    for faster, precision in [(False, "no"), (True, "bf16")]:
        monkeypatch.setattr(setup, "cpu_gains_from_bfloat16", lambda faster=faster: faster)
        AcceleratorState._reset_state(reset_partial_state=True)
        assert make_accelerator(settings("model", tmp_path, **requested)).mixed_precision == precision
        assert ("In float32: this CPU is slower in bfloat16" in capsys.readouterr().out) is not faster
    AcceleratorState._reset_state(reset_partial_state=True)


# Checkpoints (killed runs: test_interruptions.py) ---------------------------------------------------------------------


def test_old_checkpoints_are_deleted(tiny_model, tmp_path):
    changed = settings(tiny_model, tmp_path / "out", steps=7, checkpointing_steps=2, checkpoints_total_limit=2)
    train(changed)
    assert list(checkpoints(tmp_path / "out")) == [4, 6]
    metadata = json.loads((tmp_path / "out" / "checkpoint-6" / CHECKPOINT_FILE).read_text())
    assert TrainingConfig(**metadata["settings"]) == changed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_its_step_with_a_checkpoint(number, tiny_model, tmp_path, monkeypatch, capfd):
    def send_signal(run, norm):
        if run.step == 2:
            os.kill(os.getpid(), number)

    train(settings(tiny_model, tmp_path / "complete", steps=6))
    monkeypatch.setattr(TrainingRun, "check_finite", send_signal)
    with pytest.raises(TrainingStopped) as stopped:
        train(settings(tiny_model, tmp_path / "out", steps=6))
    assert stopped.value.signal_number == number
    step = max(checkpoints(tmp_path / "out"))
    assert step in (3, 4)  # the signal counts from this step's reduction on, or from the next
    assert f"Stopped after {step} of 6 steps" in capfd.readouterr().out

    monkeypatch.undo()
    result = train(settings(tiny_model, tmp_path / "out", steps=6, resume="latest"))
    assert f"{6 - step} steps (the last {6 - step} of 6)" in str(result)
    parts = read_usage(tmp_path / "out")
    assert [(part["first_step"], part["last_step"]) for part in parts] == [(1, step), (step + 1, 6)]
    assert parts[1]["seconds"] == pytest.approx(result.seconds, abs=1e-3)
    assert parts[1]["peak_memory"] == result.peak_memory
    assert_equal_weights(tmp_path / "complete", tmp_path / "out")


def test_a_stopped_run_without_checkpoints_saves_nothing(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(TrainingRun, "check_finite", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingStopped):
        train(settings(tiny_model, tmp_path / "out", checkpointing_steps=0))
    assert "Nothing was saved" in capfd.readouterr().out
    assert set(os.listdir(tmp_path / "out")) == {SETTINGS_FILE, LOG_FILE}


def test_only_a_late_second_signal_interrupts_immediately(monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # ignored in background jobs of a shell
    now = time.monotonic()
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGINT, signal.SIGINT, signal.SIGTERM]
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 60)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_resumed_run_logs_every_step_once(tiny_model, tmp_path):
    """A killed run may have logged steps after its last checkpoint, and half a line."""
    rare = {"steps": 5, "checkpointing_steps": 3}
    result = train(settings(tiny_model, tmp_path / "complete", **rare))
    log = read_log(tmp_path / "complete")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert log[-1]["loss"] == result.loss
    assert log[0]["learning_rate"] == 1e-2
    file = tmp_path / "complete" / LOG_FILE
    text = file.read_text()
    file.write_text(text + '{"step": 6, "lo')
    train(settings(tiny_model, tmp_path / "complete", resume="latest", **rare))
    assert file.read_text() == text
    # The log of another run in the folder is overwritten.
    other = tmp_path / "other"
    train(settings(tiny_model, other, steps=2, seed=1))
    resume = str(tmp_path / "complete" / "checkpoint-3")
    train(settings(tiny_model, other, resume=resume, **rare))
    assert read_log(other) == log[3:]
    assert [(part["first_step"], part["last_step"]) for part in read_usage(other)] == [(4, 5)]
    with pytest.raises(ValueError, match=r"holds no training_log\.jsonl"):
        read_log(tmp_path)


def test_a_full_disk_at_logging_stops_the_run(tiny_model, tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainingLog, "log", disk_full)
    with pytest.raises(TrainingError, match=r"The log could not be written.*No space left"):
        train(settings(tiny_model, tmp_path / "out"))


def test_a_finished_run_may_be_resumed(tiny_model, tmp_path):
    first = train(settings(tiny_model, tmp_path / "out", checkpointing_steps=3))
    before = weights(tmp_path / "out")
    again = train(settings(tiny_model, tmp_path / "out", resume="latest"))
    assert again.loss == first.loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "out").items())


def test_resuming_with_another_precision_is_rejected(tiny_model, tmp_path):
    train(settings(tiny_model, tmp_path / "out", checkpointing_steps=2))
    file = tmp_path / "out" / "checkpoint-2" / CHECKPOINT_FILE
    file.write_text(file.read_text().replace('"mixed_precision": "no"', '"mixed_precision": "bf16"'))
    with pytest.raises(SettingError, match=r"mixed_precision \(was bf16, is no\)"):
        train(settings(tiny_model, tmp_path / "out", resume="latest"))


def test_a_damaged_checkpoint_is_reported(tiny_model, tmp_path):
    train(settings(tiny_model, tmp_path / "out", checkpointing_steps=2))
    os.truncate(tmp_path / "out" / "checkpoint-2" / "optimizer.bin", 100)
    with pytest.raises(SettingError, match=r"checkpoint-2.* cannot be loaded; delete it"):
        train(settings(tiny_model, tmp_path / "out", resume="latest"))


def test_a_read_only_folder_is_reported_with_the_last_checkpoint(tiny_model, tmp_path, monkeypatch):
    def read_only(self, folder):
        if "checkpoint-2" not in str(folder):
            raise OSError(30, "Read-only file system")
        return save_state(self, folder)

    save_state = setup.Accelerator.save_state
    monkeypatch.setattr(setup.Accelerator, "save_state", read_only)
    with pytest.raises(TrainingError, match=r"step 4 .*checkpoint-2\. .*Read-only file system\."):
        train(settings(tiny_model, tmp_path / "out", steps=5, checkpointing_steps=2))
    assert list(checkpoints(tmp_path / "out")) == [2]
