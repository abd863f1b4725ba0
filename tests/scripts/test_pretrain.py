"""scripts/pretrain.py: errors for wrong folders, and a checkpoint from a miniature run."""

import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ifseg_hf.modeling import OFAForConditionalGeneration
from scripts import load_script


@pytest.fixture
def images(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    names, rows = [f"thing {i}" for i in range(12)], []
    for i in range(240):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (i, 99, 255 - i)).save(file, "png")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": i % 12})
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    table = arrow.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    folder = tmp_path / "images"
    folder.mkdir()
    parquet.write_table(table, folder / "images.parquet")
    return folder


def test_wrong_folders_are_errors(tmp_path, images, capsys):
    for arguments, error in [
        (["--images", str(tmp_path)], "no parquet files"),
        (["--images", str(images), "--street", str(tmp_path)], "no dataset.json"),
        (["--images", str(images), "--scale", "0"], "--scale"),
    ]:
        with pytest.raises(SystemExit):
            load_script("pretrain").main([*arguments, "--output-dir", str(tmp_path / "out")])
        assert error in capsys.readouterr().err


def test_a_miniature_run_writes_a_checkpoint(tmp_path, images, monkeypatch, capsys):
    from ifseg_hf.nano import pretraining
    from ifseg_hf.nano.batches import Phase

    small = {"steps": 1, "batch": 4, "size": 32, "whole_image_sizes": (32,)}
    for name, value in list(vars(pretraining).items()):  # all phases of the recipe
        if isinstance(value, Phase):
            monkeypatch.setattr(pretraining, name, replace(value, **small))
        elif isinstance(value, list) and isinstance(value[0], Phase):
            monkeypatch.setattr(pretraining, name, [replace(phase, **small) for phase in value])
    output = tmp_path / "out"
    assert load_script("pretrain").main(["--images", str(images), "--output-dir", str(output), "--workers", "1"]) == 0
    assert (output / "model.safetensors").stat().st_size < 12e6
    assert (output / "processor_config.json").is_file()
    assert "checkpoint is in" in capsys.readouterr().out

    again = tmp_path / "again"
    arguments = ["--images", str(images), "--output-dir", str(again), "--workers", "1", "--model", str(output)]
    start = pretraining.Pretraining(images, None, again, model=output).start().state_dict()
    saved = OFAForConditionalGeneration.from_pretrained(output, dtype=torch.float32).state_dict()
    assert all(torch.equal(start[name], saved[name]) for name in saved)
    assert load_script("pretrain").main(arguments) == 0
    with pytest.raises(ValueError, match="other names"):
        pretraining.Pretraining(images, None, again, model="ifseg-ofa-nano").start()


def test_evaluation_of_scenes_skips_without_data(tmp_path, capsys):
    assert load_script("evaluate_scenes").main(["--images", str(tmp_path)]) == 0
    assert "Skipped" in capsys.readouterr().out
