"""Export by torch.export and to ONNX, from images to logits."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import small_model
from tiny_model import save_tiny_model

from ifseg_hf import IFSegForSemanticSegmentation, IFSegProcessor
from ifseg_hf.hub.export import OnnxSameConv2d, export_onnx
from ifseg_hf.modeling.modeling_ifseg import IFSegSegmentationOutput
from scripts import load_script

SCRIPT = load_script("export_onnx")
IMAGE = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))


def run_onnx(path, pixel_values: torch.Tensor) -> tuple[list[np.ndarray], dict]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": pixel_values.numpy()}), session.get_modelmeta().custom_metadata_map


@torch.no_grad()
def assert_same(found: list[np.ndarray], model, pixel_values: torch.Tensor = IMAGE):
    expected = model(pixel_values=pixel_values)
    for array, tensor in zip(found, [expected.logits, expected.image_features], strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_torch_export_gives_the_same_outputs():
    model = small_model()
    program = torch.export.export(model, (), {"pixel_values": IMAGE})
    other = IMAGE.flip(3)  # the image must not become a constant of the program
    found = program.module()(pixel_values=other)
    assert isinstance(found, IFSegSegmentationOutput)
    expected = model(pixel_values=other)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_torch_export_survives_saving_and_loading(tmp_path):
    model = small_model(decoder_positions="image")
    program = torch.export.export(model, (), {"pixel_values": IMAGE})
    torch.export.save(program, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(pixel_values=IMAGE)
    torch.testing.assert_close(found.logits, model(pixel_values=IMAGE).logits)


LITE = {
    "trunk_type": "efficientnet_lite",
    "trunk_hidden_sizes": (4, 6, 6, 8, 8, 10, 12),
    "trunk_depths": (1, 1, 2, 1, 1, 1, 1),
}


@pytest.mark.parametrize("trunk", [{}, LITE], ids=["resnet", "efficientnet_lite"])
def test_onnx_file_takes_any_number_of_images_of_any_size(trunk, tmp_path):
    """Images of and within the model's own grid, beyond it, of all ratios, and of parts of a patch."""
    model = small_model(**trunk, encoder_layers=1, decoder_layers=1)
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert {type(module) for module in model.modules()}.isdisjoint({OnnxSameConv2d})
    sizes = [(1, 64, 64), (3, 64, 64), (1, 32, 48), (2, 48, 160), (3, 160, 32), (1, 50, 79), (2, 121, 98), (1, 7, 100)]
    for count, height, width in sizes:
        images = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))
        assert_same(session.run(None, {"pixel_values": images.numpy()}), model, images)


def test_onnx_file_gives_the_same_logits(tmp_path):
    model = small_model().train()
    export_onnx(model, tmp_path / "model.onnx", 64, 80)
    other = IMAGE.flip(3).repeat(3, 1, 1, 1)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    found, metadata = run_onnx(tmp_path / "model.onnx", other)
    assert_same(found, model.eval(), other)
    assert json.loads(metadata["id2label"]) == {"0": "cat", "1": "wet grass", "2": "sky"}


def test_script_writes_onnx_file(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    output = tmp_path / "new" / "model.onnx"
    arguments = [folder, str(output), "--height", "48", "--width", "64", "--categories", "cat, wet grass"]
    assert SCRIPT.main(arguments) == 0
    assert capsys.readouterr().out == f"{output}: images of 48 x 64 -> cat, wet grass\n"

    model = IFSegForSemanticSegmentation.from_pretrained(folder).eval()
    processor = IFSegProcessor.from_pretrained(folder)
    model.set_words(**processor.encode_categories(["cat", "wet grass"]))
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixel_values = processor(images=image, do_resize=False, return_tensors="pt")["pixel_values"]
    found, _ = run_onnx(output, pixel_values)
    assert_same(found, model, pixel_values)

    # post-processing takes the outputs of the file
    outputs = IFSegSegmentationOutput(logits=torch.from_numpy(found[0]), image_features=torch.from_numpy(found[1]))
    (labels,) = processor.post_process_semantic_segmentation(outputs, [(48, 64)])
    with torch.no_grad():
        (expected,) = processor.post_process_semantic_segmentation(model(pixel_values=pixel_values), [(48, 64)])
    assert (labels == expected).float().mean() > 0.99


def test_a_background_is_in_the_file_and_its_metadata(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    arguments = [folder, str(tmp_path / "one.onnx"), "--height", "48", "--width", "64", "--categories", "cat"]
    assert SCRIPT.main([*arguments, "--background", "sky, wet grass"]) == 0
    assert capsys.readouterr().out.endswith("one.onnx: images of 48 x 64 -> cat, background\n")
    model = IFSegForSemanticSegmentation.from_pretrained(folder).eval()
    processor = IFSegProcessor.from_pretrained(folder)
    model.set_words(**processor.encode_categories(["cat"], background=["sky", "wet grass"]))
    found, metadata = run_onnx(tmp_path / "one.onnx", IMAGE[..., :48, :64])
    assert_same(found, model, IMAGE[..., :48, :64])
    assert found[0].shape[1] == 2
    assert json.loads(metadata["id2label"]) == {"0": "cat", "1": "background"}
    assert json.loads(metadata["background"]) == ["sky", "wet grass"]


def test_script_errors_are_one_line(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    capsys.readouterr()  # the progress bar of saving
    for arguments, message in [
        ([folder, "x.onnx"], "has no categories"),
        ([str(tmp_path / "none"), "x.onnx"], "no model folder"),
        ([folder, "x.onnx", "--categories", "cat, cat"], "cat"),
        ([folder, f"{folder}/config.json/x.onnx", "--categories", "cat, dog"], "config.json"),
    ]:
        assert SCRIPT.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("export_onnx.py: ")
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        SCRIPT.main([folder, "x.onnx", "--height", "0"])
    assert SCRIPT.main([folder, "x.onnx", "--height", "64", "--categories", "cat, dog"]) == 1
    assert "height=64, width=None: give both" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no categories"):
        export_onnx(IFSegForSemanticSegmentation.from_pretrained(folder), tmp_path / "x.onnx")
