"""scripts/reproduce.py, every table: small random models, and datasets in the published layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SMALL
from clipcap_sources import save_sources
from hub_client import environment
from hub_client import run as run_program
from hub_server import Blob, HubServer, Repository
from PIL import Image
from published_ofa import write_published_ofa
from script_runner import ScriptRunner, fail
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ifseg_hf.data.vocabularies import VOCABULARIES, read_categories
from ifseg_hf.experiments import paper_tables
from ifseg_hf.hub.conversion_clipcap import convert_clipcap_checkpoint
from ifseg_hf.modeling import OFAConfig, OFAForConditionalGeneration
from ifseg_hf.nano.texts import train_tokenizer
from ifseg_hf.processing import IFSegImageProcessor, IFSegProcessor
from scripts import load_script

script = load_script("reproduce")
reproduce = script.main
# In the process of scripts/reproduce.py, as the test's own runner does: the same scripts without starting each.
IN_ONE_PROCESS = """
import sys
from script_runner import ScriptRunner
from scripts import load_script

class Patch:
    setattr = staticmethod(setattr)

sys.exit(load_script("reproduce").main(sys.argv[1:], ScriptRunner(Patch)))
"""
COCO_IDS = [x for x in range(182) if x not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]


def save_images(images: Path, masks: Path, values: list[int], seed: int) -> None:
    """Saves two images of noise, whose masks contain all the values."""
    rng = np.random.default_rng(seed)
    for folder in (images, masks):
        folder.mkdir(parents=True)
    for name in "ab":
        mask = rng.permutation(np.resize(np.array(values, np.uint8), 48 * 64)).reshape(48, 64)
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(images / f"{name}.jpg")
        Image.fromarray(mask).save(masks / f"{name}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small COCO-Stuff and ADE20K in the layouts of their distributions."""
    folder = tmp_path_factory.mktemp("data")
    for number, split in enumerate(("train2017", "val2017")):
        masks = folder / "coco-stuff" / "stuffthingmaps_trainval2017" / split
        save_images(folder / "coco-stuff" / split, masks, [*COCO_IDS, 255], number)
    for number, split in enumerate(("training", "validation")):
        root = folder / "ade20k" / "ADEChallengeData2016"
        save_images(root / "images" / split, root / "annotations" / split, list(range(151)), number)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small OFA for word maps of 16 x 16, whose tokenizer knows all vocabularies, and a small CLIP."""
    folder = tmp_path_factory.mktemp("models")
    vocabularies = [read_categories(name) for name in VOCABULARIES]
    words = [name for names in vocabularies for name in names]
    words += [x for names in vocabularies if isinstance(names, dict) for fine in names.values() for x in fine]
    tokenizer = train_tokenizer(words)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "init_std": 0.2}
    sizes |= {"image_size": 256, "image_bucket_size": 16}
    OFAForConditionalGeneration(OFAConfig(**{**SMALL, **sizes})).save_pretrained(folder / "ofa")
    size = {"shortest_edge": 64, "longest_edge": 256}
    IFSegProcessor(IFSegImageProcessor(size=size), tokenizer).save_pretrained(folder / "ofa")

    letters = [chr(x) for x in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained(folder / "clip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**sizes, "vocab_size": len(tokens), "eos_token_id": 1, "max_position_embeddings": 80}
    vision = {**sizes, "image_size": 128, "patch_size": 64}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder / "clip")
    sources = save_sources(folder / "sources", positions=512)
    parts = {"clip": str(sources.clip), "gpt2": str(sources.gpt2), "image_size": 96}
    convert_clipcap_checkpoint(sources.files["mlp"], folder / "clipcap", **parts)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all tables, because tables share models."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture
def run(monkeypatch):
    def smaller(command: list[str]) -> list[str]:
        return ["--dataloader-workers", "0"] if command[0] == "train.py" else []

    return ScriptRunner(monkeypatch, smaller)


@pytest.mark.parametrize("table", paper_tables.TABLES)
def test_every_table_is_reproduced_in_a_trial(table, models, data, out, run, capsys):
    arguments = ["--table", table, "--model", str(models / "ofa"), "--clip", str(models / "clip"), "--data", str(data)]
    arguments += ["--clipcap", str(models / "clipcap")] if table == "14" else []
    trial = ["--output-dir", str(out), "--steps", "1", "--limit", "1"]
    assert reproduce([*arguments, *trial], run) == 0
    rows = json.loads((out / f"table-{table}.json").read_text())
    assert [(row["name"], row["paper"]) for row in rows] == [(x.name, x.paper) for x in paper_tables.TABLES[table]]
    printed = capsys.readouterr().out
    for row, expected in zip(rows, paper_tables.TABLES[table], strict=True):
        paper = "-" if row["paper"] is None else f"{row['paper']:.1f}"
        if expected.model is None:
            assert row["quoted"]
            assert f"| {row['name']} (quoted) | {paper} | - | - |" in printed
            continue
        assert not row["quoted"]
        assert 0 <= row["ours"] <= 100
        assert f"| {row['name']} | {paper} | {row['ours']:.1f} |" in printed
        if row["paper"] is not None:
            assert row["difference"] == pytest.approx(row["ours"] - row["paper"], abs=0.051)
    assert "A trial: steps 1, images 1" in printed
    # Complete steps do not run again.
    run.commands.clear()
    assert reproduce([*arguments, *trial], run) == 0
    assert {command[0] for command in run.commands} == {"eval.py"}
    assert json.loads((out / f"table-{table}.json").read_text()) == rows


def test_a_table_is_reproduced_with_the_nano_checkpoint(data, tmp_path, run):
    """Table 10, with 15 categories: the words of longer vocabularies are too many tokens for this checkpoint."""
    arguments = ["--table", "10", "--model", "ifseg-ofa-nano", "--data", str(data), "--output-dir", str(tmp_path)]
    assert reproduce([*arguments, "--steps", "2", "--limit", "1"], run) == 0
    assert len(json.loads((tmp_path / "table-10.json").read_text())) == 8


@pytest.mark.slow
def test_day_one_starts_from_the_published_checkpoint_on_the_hub(data, models, tmp_path):
    """A narrow OFA in the published layout on a loopback Hub, and COCO alone: nothing else is on this machine."""
    folder = write_published_ofa(tmp_path / "published")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    helpers = str(Path(__file__).parents[1] / "helpers")
    arguments = ["--day-one", "--data", data / "coco-stuff", "--output-dir", tmp_path / "out"]
    arguments += ["--steps", "1", "--limit", "1", "--clip", models / "clip"]
    with HubServer({}) as hub:
        env = environment(hub, tmp_path / "home", token=None, IFSEG_CACHE=str(tmp_path / "cache"))
        env["PYTHONPATH"] += f":{helpers}"
        missing = run_program("-c", IN_ONE_PROCESS, *arguments, cwd=tmp_path, env=env)
        assert (missing.returncode, missing.stdout) == (1, "")
        assert missing.stderr.startswith('reproduce.py: The model "OFA-Sys/ofa-base" is not in the cache and cannot')
        assert missing.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()

        hub.repositories["OFA-Sys/ofa-base"] = Repository(private=False)
        blobs = {name: Blob(content, size=len(content)) for name, content in files.items()}
        hub.repositories["OFA-Sys/ofa-base"].commit("main", blobs, "Upload")
        done = run_program("-c", IN_ONE_PROCESS, *arguments, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    assert hub.unknown == []
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "table-1.json").read_text())}
    assert [name for name, row in rows.items() if row["quoted"]] == ["MaskCLIP+"]
    assert 0 <= rows["IFSeg"]["ours"] <= 100
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.startswith("# IFSeg with OFA-Sys/ofa-base\n\nTable 1: mIoU in per cent\n")
    assert "| giraffe | " in report
    assert "A trial: steps 1, images 1." in report
    assert "scripts/train.py --config" in report
    assert "1 images, 1 x cpu; python" in report


def test_baselines_without_a_model_are_quoted(capsys):
    assert reproduce(["--table", "14", "--model", "ofa", "--data", "data", "--dry-run"]) == 0
    clips = capsys.readouterr().out
    assert clips.count("--model openai/clip-vit-base-patch32") == 2
    assert "train.py" not in clips
    assert reproduce(["--table", "14", "--clipcap", "captions", "--data", "data", "--dry-run"]) == 0
    assert "coco_stuff_unseen.yaml --model captions " in capsys.readouterr().out
    assert reproduce(["--table", "1", "--model", "ofa", "--data", "data", "--dry-run"]) == 0
    assert "--baseline" not in capsys.readouterr().out


def test_dry_run_prints_shell_commands_in_order(capsys):
    assert reproduce(["--table", "9", "--model", "ofa", "--data", "my data", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("accelerate launch scripts/train.py --config ")
    assert "configs/coco_stuff_unseen.yaml --model ofa " in lines[0]
    assert "scripts/pseudo_label.py --data-dir 'my data'" in lines[1]
    made = [line.split("--output-dir ")[1] for line in lines]
    for number, line in enumerate(lines):  # every folder is made before it is read
        used = [x for x in line.split() if x.startswith("outputs/reproduction/")]
        assert set(used) <= set(made[: number + 1])


def test_steps_that_read_images_skip_damaged_ones(capsys):
    arguments = ["--table", "5", "--model", "ofa", "--clip", "clip", "--data", "data", "--dry-run"]
    assert reproduce([*arguments, "--on-error", "skip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.partition(" --output-dir")[0].endswith("--on-error skip") for line in lines)
    assert reproduce(["--table", "1", *arguments[2:], "--on-error", "skip"]) == 0
    assert ["--on-error skip" in line for line in capsys.readouterr().out.splitlines() if "train.py" in line] == [False]


def test_errors_are_printed_in_one_line(data, models, tmp_path, capsys):
    model = str(models / "ofa")
    arguments = ["--table", "1", "--model", model, "--data", str(data), "--output-dir", str(tmp_path)]
    assert reproduce(arguments, fail) == 1
    assert capsys.readouterr().err == (
        "reproduce.py: train.py ended with status 1. Run the same command again to resume.\n"
    )
    for wrong, error in [
        (["--table", "1", "--model", model, "--data", str(tmp_path)], "val2017"),
        (["--day-one", "--model", model, "--data", str(tmp_path)], "val2017"),
        (["--table", "2", "--model", model, "--data", str(data / "coco-stuff")], "validation"),
        (["--table", "1", "--model", "none", "--data", str(data)], 'The model "none" is not in the cache'),
    ]:
        assert reproduce([*wrong, "--output-dir", str(tmp_path / "out")], fail) == 1
        message = capsys.readouterr().err
        assert error in message
        assert message.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_every_row_has_a_known_model_and_dataset():
    assert set(script.TABLES) == set(paper_tables.TABLES)
    for table, rows in paper_tables.TABLES.items():
        for row in rows:
            if row.model is not None:
                assert row.model in (*paper_tables.COMMANDS, "ofa", *paper_tables.BASELINES), table
                assert row.dataset in paper_tables.DATA_DIRS
