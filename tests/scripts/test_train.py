"""`scripts/train.py` as a program: training, resuming, several processes, and errors in arguments."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from hub_client import environment
from hub_server import HubServer
from image_folders import save_masked_images, save_tiny_segmenter
from safetensors.torch import load_file
from tiny_model import is_key_bias, save_tiny_model

from ifseg_hf.cli import tune as cli
from ifseg_hf.training import loop
from ifseg_hf.training.config import SETTINGS_FILE, checkpoints
from ifseg_hf.training.log import read_log
from ifseg_hf.training.loop import TrainingConfig, train
from scripts import load_script

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "train.py")
WORDS = ["--categories", "cat, cup, sky"]
# With this checkout's package, and one thread per process, so that runs can be compared exactly.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*command, cwd=None, env=ENVIRONMENT):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def messages_of(done):
    """The messages of a run with `-X importtime`, and the names of the modules it imported."""
    lines = done.stderr.splitlines()
    messages = [line for line in lines if not line.startswith("import time:")]
    return messages, {line.split()[-1] for line in lines if line.startswith("import time:")}


@pytest.mark.slow
def test_accelerate_launch_trains_and_publishes_a_model(tiny_model, tmp_path):
    """With a published settings file, and flags that override what is too large for a test."""
    config = ROOT / "scripts" / "configs" / "coco_stuff_coarse.yaml"
    settings = ["--model", tiny_model, "--steps", 25, "--batch-size", 4, "--learning-rate", 1e-2, "--max-cells", 2]
    out = tmp_path / "out"
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", SCRIPT]
    with HubServer({"hf_alice": "alice"}) as hub:
        push = ["--push-to-hub", "alice/tuned", "--hub-private"]
        env = environment(hub, tmp_path / "home")
        done = run(*launcher, "--config", config, *WORDS, "--output-dir", out, *settings, *push, env=env)
    assert done.returncode == 0, done.stderr
    assert "Published: " in done.stdout
    assert {"model.safetensors", "README.md", SETTINGS_FILE} <= set(hub.files("alice/tuned"))
    assert "25/25" in done.stderr  # the progress bar
    assert "step/s, loss=" in done.stderr
    for expected in ["25 steps in", "steps/s", "peak memory", str(out)]:
        assert expected in done.stdout
    resolved = json.loads((out / SETTINGS_FILE).read_text())
    assert resolved["categories"] == ["cat", "cup", "sky"]
    assert (resolved["steps"], resolved["weight_decay"]) == (25, 0.1)

    # The two lines of Python in the last message, with an image.
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    image = "import PIL.Image; PIL.Image.new('RGB', (50, 40)).save('image.jpg')"
    used = run("-c", "\n".join([image, *lines, "print(sorted(mask['label'] for mask in masks))"]), cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    assert set(eval(used.stdout)) <= {"cat", "cup", "sky"}


def assert_close_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name in one:
        if not is_key_bias(name):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_compiled_layers_saves_and_resumes_like_one_without(tiny_model, tmp_path):
    """With the flags of `accelerate launch` that compile a model layer by layer."""
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", 1]
    compiled = ["--dynamo_backend", "aot_eager", "--dynamo_use_regional_compilation"]
    flags = ["--model", tiny_model, "--steps", 4, "--dropout", 0, "--drop-path", 0, "--checkpointing-steps", 2]
    for name, options in (("eager", []), ("compiled", compiled)):
        done = run(*launcher, *options, SCRIPT, *WORDS, *flags, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert_close_weights(tmp_path / "eager", tmp_path / "compiled")
    expected = load_file(tmp_path / "compiled" / "model.safetensors")
    half = ["--resume", tmp_path / "compiled" / "checkpoint-2", "--output-dir", tmp_path / "compiled"]
    assert run(*launcher, *compiled, SCRIPT, *WORDS, *flags, *half).returncode == 0
    resumed = load_file(tmp_path / "compiled" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_processes_accumulation_and_workers_lead_to_the_same_weights(tiny_model, tmp_path):
    """1 x 16 samples, and 2 processes with 8 each: the same 20 steps up to rounding.

    Also if resumed half-way with 1 process, 2 accumulated batches and a worker. Key biases are not compared: they
    do not affect the softmax, and Adam scales the rounding noise in their gradients to whole steps.
    """
    quiet = {"steps": 20, "learning_rate": 1e-4, "dropout": 0.0, "drop_path": 0.0, "cpu": True}
    words = ["cat", "cup", "sky"]
    train(TrainingConfig(words, str(tmp_path / "one"), tiny_model, **quiet))

    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29000 + os.getpid() % 2000]
    flags = ["--steps", 20, "--learning-rate", 1e-4, "--dropout", 0, "--drop-path", 0, "--cpu"]
    folder = ["--model", tiny_model, "--output-dir", tmp_path / "two", "--checkpointing-steps", 10]
    two = run(*launcher, SCRIPT, *WORDS, *folder, *flags)
    assert two.returncode == 0, two.stderr
    assert "2 x cpu" in two.stdout
    assert_close_weights(tmp_path / "one", tmp_path / "two")

    half = str(tmp_path / "two" / "checkpoint-10")
    other = {"gradient_accumulation_steps": 2, "dataloader_workers": 1, "resume": half}
    train(TrainingConfig(words, str(tmp_path / "three"), tiny_model, **quiet, **other))
    assert_close_weights(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
def test_two_processes_label_and_train_like_one(tmp_path):
    """Equal pseudo-labels, and equal weights up to rounding with word maps, refreshed labels and evaluations."""
    pytest.importorskip("kornia")
    model, images = save_tiny_segmenter(tmp_path / "model"), save_masked_images(tmp_path / "images")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29000 + os.getpid() % 2000]
    write = [ROOT / "scripts" / "pseudo_label.py", "--model", model, "--dataset", images, "--keep-labels", "--cpu"]
    write += ["--unseen", "sky, sea", "--min-confidence", 0.3, "--output-dir"]  # some pixels have no label
    flags = ["--stage", "self-training", "--freeze", "nothing", "--word-map-ratio", 0.25, "--refresh-every", 3]
    flags += ["--steps", 5, "--batch-size", 8, "--learning-rate", 1e-4, "--dropout", 0, "--drop-path", 0, "--cpu"]
    flags += ["--model", model, "--crop-size", 32, "--eval-steps", 4, "--eval-dataset", images]
    for name, launch in [("one", []), ("two", launcher)]:
        labels = tmp_path / f"labels-{name}"
        for command in ([*write, labels], [SCRIPT, *flags, "--dataset", labels, "--output-dir", tmp_path / name]):
            done = run(*launch, *command)
            assert done.returncode == 0, done.stderr
        assert "Step 3: new pseudo-labels." in done.stdout
    masks = sorted((tmp_path / "labels-one" / "masks").iterdir())
    assert len(masks) == 6
    for mask in masks:
        assert mask.read_bytes() == (tmp_path / "labels-two" / "masks" / mask.name).read_bytes()
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert ["mean_iou" in line for line in one] == [True, False, False, False, True, True]
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, abs=1e-3)
    assert not list((tmp_path / "two").glob("*.incomplete"))


@pytest.mark.slow
def test_a_run_resumes_after_ctrl_c_sigterm_and_kill(tiny_model, tmp_path):
    """After all three in turn, the weights equal those of an uninterrupted run, bit for bit."""
    flags = ["--model", tiny_model, "--steps", 80, "--batch-size", 2, "--cpu", "--checkpointing-steps", 10, "--resume"]
    torch.set_num_threads(1)  # as in the other processes
    train(
        TrainingConfig(
            ["cat", "cup", "sky"], str(tmp_path / "uninterrupted"), tiny_model, steps=80, batch_size=2, cpu=True
        )
    )

    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, *WORDS, "--output-dir", out, *flags]
    for number, status in [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]:
        before = max(checkpoints(out), default=0)
        process = subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and max(checkpoints(out), default=0) == before:
            time.sleep(0.005)
        process.send_signal(number)
        output, errors = process.communicate(timeout=600)
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        last = max(checkpoints(out))
        assert before < last < 80
        assert before or "There is no checkpoint" in output  # --resume also starts a run
        if number != signal.SIGKILL:
            assert (
                f"Stopped after {last} of 80 steps. Continue from {out / f'checkpoint-{last}'} with --resume." in output
            )
    rejected = run(SCRIPT, *WORDS, "--output-dir", out, *flags, "--seed", 5)
    assert rejected.returncode == 2
    assert "seed (was 0, is 5)" in rejected.stderr
    done = run(SCRIPT, *WORDS, "--output-dir", out, *flags)
    assert done.returncode == 0, done.stderr
    assert f"Resuming after step {last}" in done.stdout
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "uninterrupted", out))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_missing_output_folder_is_reported(tiny_model):
    done = run(SCRIPT, *WORDS, "--model", tiny_model)
    assert done.returncode == 2
    assert done.stderr == "train.py: --output-dir is required, as a flag or in the --config file.\n"


@pytest.mark.parametrize("process", ["0", "1"])
def test_only_the_main_process_publishes(process, tmp_path, monkeypatch):
    published = []
    config = TrainingConfig(["cat", "cup"], str(tmp_path), push_to_hub="alice/tuned")
    monkeypatch.setattr(cli, "parse_settings", lambda *arguments: config)
    monkeypatch.setattr(cli, "publish", published.append)
    monkeypatch.setattr(loop, "train", lambda config: None)
    monkeypatch.setattr(PartialState, "is_main_process", process == "0")
    assert load_script("train").main([]) == 0
    assert published == ([config] if process == "0" else [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--categories", ""], "no category"),
        (["--categories", "cat, , cup"], "position 2 is empty"),
        (["--categories", "cat, cup, cat "], '"cat" is given twice'),
        (["--categories", "cat"], "at least two"),
        (["--categories", "missing.txt"], "missing.txt"),
        (["--categories", "broken.yaml"], "not valid YAML"),
        (["--categories", "twice.yaml"], '"sky" is given twice'),
        (["--categories", "unquoted.yaml"], "quotes"),
        (["--categories", "shared.json"], '"cat" is given twice'),
        (["--categories", "coco_stuff"], "coco-stuff?"),
        (["--model", "nowhere"], 'no model folder "nowhere"'),
        (["--model", "full"], "no config.json"),
        (["--model", "other"], "no IFSeg model"),
        (["--steps", "0"], "steps=0"),
        (["--steps", "many"], "--steps"),
        (["--batch-size", "-1"], "batch_size=-1"),
        (["--batch-size", "6", "--gradient-accumulation-steps", "4"], "equal batches"),
        (["--learning-rate", "nan"], "learning_rate=nan"),
        (["--learning-rate", "inf"], "learning_rate=inf"),
        (["--dropout", "1"], "dropout=1.0"),
        (["--seed", "-1"], "seed=-1"),
        (["--max-cells", "5"], "4 cells a side"),
        (["--max-cells", "0"], "max_cells=0"),
        (["--mixed-precision", "fp8"], "fp8"),
        (["--output-dir", "full"], "no result of training"),
        (["--output-dir", "full/file"], "cannot be created"),
        (["--output-dir", "full/file/out"], "cannot be created"),
        (["--stage", "supervise"], 'stage="supervise": choose'),
        (["--stage", "supervised"], "stage=supervised needs images"),
        (["--crop-size", "32"], "crop_size belongs to stage=supervised or self-training"),
        (["--stage", "supervised", "--dataset", "full", "--crop-size", "40"], "crop_size=40: must be a multiple"),
        (
            ["--stage", "self-training", "--dataset", "full", "--refresh-every", "5"],
            "no folder of `ifseg pseudo-label`",
        ),
        (["--no-such-flag"], "--no-such-flag"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "settings.yaml"], 'no setting "stepz": steps?'),
        (["--resume", "full"], "no checkpoint"),
        (["--checkpointing-steps", "-1"], "checkpointing_steps=-1"),
        (["--checkpoints-total-limit", "0"], "checkpoints_total_limit=0"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(arguments, expected, tiny_model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("somebody's")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken.yaml").write_text("cat: [dog")
    (tmp_path / "twice.yaml").write_text("sky: [cloud]\nsky: [sun]")
    (tmp_path / "unquoted.yaml").write_text("[yes, no]")
    (tmp_path / "settings.yaml").write_text("stepz: 5")
    (tmp_path / "shared.json").write_text('{"animal": ["cat", "cat"], "pet": ["dog"]}')
    defaults = [*WORDS, "--model", tiny_model, "--output-dir", "out"]
    done = run("-X", "importtime", SCRIPT, *defaults, *arguments, cwd=tmp_path)
    messages, imported = messages_of(done)
    assert done.returncode == 2
    assert len(messages) == 1
    assert expected in messages[0]
    assert not imported & {"torch", "numpy", "transformers"}  # they take seconds
    assert (tmp_path / "full" / "file").read_text() == "somebody's"


def test_missing_hub_access_is_reported_before_training(tiny_model, tmp_path):
    command = ["-X", "importtime", SCRIPT, *WORDS, "--model", tiny_model, "--output-dir", tmp_path / "out"]
    with HubServer({"hf_alice": "alice"}) as hub:
        done = run(*command, "--push-to-hub", "alice/tuned", env=environment(hub, tmp_path / "home", token=None))
    messages, imported = messages_of(done)
    assert done.returncode == 2
    assert len(messages) == 1
    assert "token" in messages[0]
    assert not imported & {"torch", "transformers"}
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(("name", "kind"), [("accelerate_multi_gpu", "MULTI_GPU"), ("accelerate_fsdp", "FSDP")])
def test_accelerate_accepts_the_example_configurations(name, kind):
    config = load_config_from_file(str(ROOT / "scripts" / "configs" / f"{name}.yaml"))  # rejects unknown names
    assert config.distributed_type.value == kind
    flags = vars(launch_command_parser().parse_args(["train.py"]))
    flags["fsdp_ignored_modules"] = None  # read from the file, but not a flag
    assert set(config.fsdp_config) <= set(flags)
