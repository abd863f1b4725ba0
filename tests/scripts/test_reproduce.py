"""scripts/reproduce.py, every table: small random models, and datasets in the published layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SMALL
from PIL import Image
from script_runner import ScriptRunner, fail
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ifseg_hf.data.vocabularies import VOCABULARIES, read_categories
from ifseg_hf.experiments import paper_tables
from ifseg_hf.modeling import OFAConfig, OFAForConditionalGeneration
from ifseg_hf.nano.texts import train_tokenizer
from ifseg_hf.processing import IFSegImageProcessor, IFSegProcessor
from scripts import load_script

reproduce = load_script("reproduce").main
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
    words = [name for vocabulary in VOCABULARIES for name in read_categories(vocabulary)]
    words += [name for names in read_categories("coco-stuff-coarse").values() for name in names]
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
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all tables, because tables share models."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture
def run(monkeypatch):
    return ScriptRunner(monkeypatch)


@pytest.mark.parametrize("table", [*map(str, range(1, 13)), "external-words"])
def test_every_table_is_reproduced_in_a_trial(table, models, data, out, run, capsys):
    arguments = ["--table", table, "--model", str(models / "ofa"), "--clip", str(models / "clip"), "--data", str(data)]
    trial = ["--output-dir", str(out), "--steps", "1", "--limit", "1"]
    assert reproduce([*arguments, *trial], run) == 0
    rows = json.loads((out / f"table-{table}.json").read_text())
    assert [(row["name"], row["paper"]) for row in rows] == [(x.name, x.paper) for x in paper_tables.TABLES[table]]
    assert all(0 <= row["ours"] <= 100 for row in rows)
    assert all(row["difference"] == pytest.approx(row["ours"] - row["paper"], abs=0.051) for row in rows)
    printed = capsys.readouterr().out
    assert f"| {rows[-1]['name']} | {rows[-1]['paper']:.1f} | {rows[-1]['ours']:.1f} |" in printed
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


def test_dry_run_prints_shell_commands_in_order(capsys):
    assert reproduce(["--table", "9", "--model", "ofa", "--data", "my data", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("accelerate launch scripts/train.py --model ofa --categories coco-stuff ")
    assert "scripts/pseudo_label.py --data-dir 'my data'" in lines[1]
    made = [line.split("--output-dir ")[1] for line in lines]
    for number, line in enumerate(lines):  # every folder is made before it is read
        used = [x for x in line.split() if x.startswith("outputs/reproduction/")]
        assert set(used) <= set(made[: number + 1])


def test_errors_are_printed_in_one_line(data, tmp_path, capsys):
    arguments = ["--table", "1", "--model", "ofa", "--data", str(data), "--output-dir", str(tmp_path)]
    assert reproduce(arguments, fail) == 1
    assert capsys.readouterr().err == (
        "reproduce.py: train.py ended with status 1. Run the same command again to resume.\n"
    )
    assert reproduce(["--table", "1", "--model", "ofa", "--data", str(tmp_path / "none")], fail) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_every_row_has_a_known_model_and_dataset():
    for table, rows in paper_tables.TABLES.items():
        for row in rows:
            assert row.model in (*paper_tables.COMMANDS, "ofa", *paper_tables.BASELINES), table
            assert row.dataset in paper_tables.DATA_DIRS
