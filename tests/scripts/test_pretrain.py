"""scripts/pretrain.py: wrong folders are named at once; a miniature run makes a checkpoint."""

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ifseg_hf.modeling import IFSegForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path):
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
    folder = tmp_path / "photos"
    folder.mkdir()
    parquet.write_table(table, folder / "photos.parquet")
    return folder


def test_wrong_folders_are_named(tmp_path, photos, capsys):
    for arguments, complaint in [
        (["--photos", str(tmp_path)], "no parquet files"),
        (["--photos", str(photos), "--street", str(tmp_path)], "no dataset.json"),
        (["--photos", str(photos), "--scale", "0"], "--scale"),
    ]:
        with pytest.raises(SystemExit):
            script("pretrain").main([*arguments, "--output-dir", str(tmp_path / "out")])
        assert complaint in capsys.readouterr().err


def test_a_miniature_run(tmp_path, photos, monkeypatch, capsys):
    from ifseg_hf.nano import pretraining

    small = {"steps": 1, "batch": 4, "size": 32, "photo_sizes": (32,)}
    for name, value in list(vars(pretraining).items()):  # whatever stages there are, and will be
        if isinstance(value, pretraining.Phase):
            monkeypatch.setattr(pretraining, name, replace(value, **small))
        elif isinstance(value, list) and isinstance(value[0], pretraining.Phase):
            monkeypatch.setattr(pretraining, name, [replace(phase, **small) for phase in value])
    output = tmp_path / "out"
    assert script("pretrain").main(["--photos", str(photos), "--output-dir", str(output), "--workers", "1"]) == 0
    assert (output / "model.safetensors").stat().st_size < 12e6
    assert (output / "processor_config.json").is_file()
    assert "checkpoint is in" in capsys.readouterr().out

    again = tmp_path / "again"
    arguments = ["--photos", str(photos), "--output-dir", str(again), "--workers", "1", "--model", str(output)]
    begun = pretraining.Pretraining(photos, None, again, model=output).start().state_dict()
    saved = IFSegForConditionalGeneration.from_pretrained(output, dtype=torch.float32).state_dict()
    assert all(torch.equal(begun[name], saved[name]) for name in saved)
    assert script("pretrain").main(arguments) == 0
    with pytest.raises(ValueError, match="other names"):
        pretraining.Pretraining(photos, None, again, model="ifseg-ofa-nano").start()


def test_evaluation_skips_without_the_data(tmp_path, capsys):
    assert script("evaluate_scenes").main(["--photos", str(tmp_path)]) == 0
    assert "Skipped" in capsys.readouterr().out
