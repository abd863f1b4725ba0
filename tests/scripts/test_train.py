"""`scripts/train.py` as a person runs it: in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import is_key_bias, save_tiny_model

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "train.py")
WORDS = ["--categories", "cat, cup, sky"]
# Of the package, wherever it is installed, and with one thread a process, so that runs can be compared exactly.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*command, cwd=None):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_accelerate_launch_tunes_a_model_that_runs_by_itself(tiny_model, tmp_path):
    settings = ["--model", tiny_model, "--steps", 25, "--batch-size", 4, "--learning-rate", 1e-2, "--max-cells", 2]
    out = tmp_path / "out"
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", SCRIPT]
    done = run(*launcher, *WORDS, "--output-dir", out, *settings)
    assert done.returncode == 0, done.stderr
    assert "25/25" in done.stderr  # the progress bar
    assert "step/s, loss=" in done.stderr
    for told in ["25 steps in", "steps/s", "peak memory", str(out)]:
        assert told in done.stdout

    # The two lines of Python that it ends with, on a photo.
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    photo = "import PIL.Image; PIL.Image.new('RGB', (50, 40)).save('photo.jpg')"
    used = run("-c", "\n".join([photo, *lines, "print(sorted(mask['label'] for mask in masks))"]), cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    assert set(eval(used.stdout)) <= {"cat", "cup", "sky"}


@pytest.mark.slow
def test_processes_accumulation_and_workers_change_nothing(tiny_model, tmp_path):
    """1 x 16 samples and 2 processes x 2 accumulated x 4, in real processes: the same steps up to rounding."""
    settings = [
        "--model",
        tiny_model,
        "--steps",
        20,
        "--learning-rate",
        1e-4,
        "--dropout",
        0,
        "--drop-path",
        0,
        "--cpu",
    ]
    one = run(SCRIPT, *WORDS, "--output-dir", tmp_path / "one", *settings)
    assert one.returncode == 0, one.stderr
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29000 + os.getpid() % 2000]
    spread = ["--gradient-accumulation-steps", 2, "--dataloader-workers", 1]
    two = run(*launcher, SCRIPT, *WORDS, "--output-dir", tmp_path / "two", *settings, *spread)
    assert two.returncode == 0, two.stderr
    assert "2 x cpu" in two.stdout
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        if not is_key_bias(name):
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_ctrl_c_ends_in_a_sentence(tiny_model, tmp_path):
    command = [sys.executable, SCRIPT, *WORDS, "--model", tiny_model, "--output-dir", str(tmp_path / "out"), "--cpu"]
    process = subprocess.Popen(
        [*command, "--steps", "1000000"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "Tuning" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "of 1000000 steps. Nothing was saved." in told
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--categories", ""], "no category"),
        (["--categories", "cat, , cup"], "place 2 is empty"),
        (["--categories", "cat, cup, cat "], '"cat" is given twice'),
        (["--categories", "cat"], "at least two"),
        (["--categories", "missing.txt"], "missing.txt"),
        (["--categories", "broken.yaml"], "not valid YAML"),
        (["--categories", "twice.yaml"], '"sky" is given twice'),
        (["--categories", "unquoted.yaml"], "quotes"),
        (["--categories", "shared.json"], '"cat" is given twice'),
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
        (["--output-dir", "full/file"], "cannot be made"),
        (["--output-dir", "full/file/out"], "cannot be made"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_wrong_arguments_end_at_once_in_one_line(arguments, told, tiny_model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("somebody's")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken.yaml").write_text("cat: [dog")
    (tmp_path / "twice.yaml").write_text("sky: [cloud]\nsky: [sun]")
    (tmp_path / "unquoted.yaml").write_text("[yes, no]")
    (tmp_path / "shared.json").write_text('{"animal": ["cat"], "pet": ["cat", "dog"]}')
    defaults = [*WORDS, "--model", tiny_model, "--output-dir", "out"]
    done = run("-X", "importtime", SCRIPT, *defaults, *arguments, cwd=tmp_path)
    imported, messages = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else messages).append(line)
    assert done.returncode == 2
    assert len(messages) == 1
    assert told in messages[0]
    assert not any(line.split()[-1] in ("torch", "numpy", "transformers") for line in imported)  # they take seconds
    assert (tmp_path / "full" / "file").read_text() == "somebody's"


def test_every_kind_of_vocabulary(tmp_path):
    from ifseg_hf.vocabularies import read_categories

    (tmp_path / "words.txt").write_text("cat\n traffic  light \n\ncup\n")
    (tmp_path / "flat.yaml").write_text("- cat\n- traffic light\n- cup\n")
    (tmp_path / "coarse.yml").write_text("animal: [cat, dog]\nsky: [cloud]\n")
    (tmp_path / "coarse.json").write_text('{"animal": ["cat", "dog"], "sky": ["cloud"]}')
    flat, coarse = ["cat", "traffic light", "cup"], {"animal": ["cat", "dog"], "sky": ["cloud"]}
    assert read_categories("cat,traffic  light , cup") == flat
    assert read_categories(str(tmp_path / "words.txt")) == flat
    assert read_categories(str(tmp_path / "flat.yaml")) == flat
    assert read_categories(str(tmp_path / "coarse.yml")) == coarse
    assert read_categories(str(tmp_path / "coarse.json")) == coarse
