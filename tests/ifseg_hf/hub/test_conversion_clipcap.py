"""Conversion of ClipCap checkpoints, and what a converted one does: training, evaluation, publishing, remote code."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from clipcap_sources import WORDS, ClipCapSources, save_sources
from hub_client import run_without_package
from image_folders import save_masked_images
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline
from transformers.image_utils import OPENAI_CLIP_MEAN

from ifseg_hf.hub.checkpoint_reader import ConversionError
from ifseg_hf.hub.conversion_clipcap import convert_clipcap_checkpoint
from ifseg_hf.hub.model_card import model_card
from ifseg_hf.hub.publish import files_to_publish
from ifseg_hf.modeling import IFSegForSemanticSegmentation
from ifseg_hf.processing import IFSegProcessor
from ifseg_hf.training.config import TrainingConfig
from ifseg_hf.training.loop import train
from scripts import evaluate, load_script


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> ClipCapSources:
    return save_sources(tmp_path_factory.mktemp("sources"))


def convert(sources: ClipCapSources, output, mapping: str = "mlp", **changes):
    parts = {"clip": sources.clip, "gpt2": sources.gpt2, "image_size": 96}
    return convert_clipcap_checkpoint(sources.files[mapping], output, **{**parts, **changes})


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    """The folder of a converted checkpoint, whose images have 96 pixels."""
    folder = tmp_path_factory.mktemp("converted") / "clipcap"
    convert(sources, folder)
    return folder


@pytest.fixture(scope="module")
def tuned(converted, tmp_path_factory):
    """The folder of a model tuned on words by the training entry."""
    folder = tmp_path_factory.mktemp("tuned") / "out"
    settings = {"steps": 60, "batch_size": 4, "learning_rate": 5e-3, "cpu": True, "dropout": 0.0}
    result = train(TrainingConfig(WORDS, str(folder), str(converted), **settings))
    assert result.steps == 60
    return folder


@pytest.mark.parametrize("mapping", ["mlp", "transformer"])
def test_every_tensor_is_used_or_accounted_for(mapping, sources, tmp_path):
    report = convert(sources, tmp_path / "out", mapping)
    weights = torch.load(sources.files[mapping], weights_only=True)
    assert report.used.keys() | report.accounted.keys() == weights.keys()
    assert report.used.keys() & report.accounted.keys() == set()
    reasons = {name.split(".")[-1]: reason for name, reason in report.accounted.items()}
    assert reasons == {
        "bias": "causal mask, which the model computes",
        "masked_bias": "causal mask, which the model computes",
        "weight": "copy of gpt.transformer.wte.weight",
    }
    model = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[target], weights[name]) for name, target in report.used.items())
    assert torch.equal(state["backbone.gpt.lm_head.weight"], weights["gpt.lm_head.weight"])
    assert model.config.backbone_config.mapping_type == mapping
    assert model.config.backbone_config.image_size == 96
    processor = IFSegProcessor.from_pretrained(tmp_path / "out")
    assert tuple(processor.image_processor.image_mean) == tuple(OPENAI_CLIP_MEAN)
    assert len(processor.tokenizer) == model.config.vocab_size


def change_file(sources: ClipCapSources, folder, change) -> ClipCapSources:
    """The sources with a changed MLP checkpoint."""
    weights = torch.load(sources.files["mlp"], weights_only=True)
    change(weights)
    torch.save(weights, folder / "changed.pt")
    return ClipCapSources(sources.clip, sources.gpt2, {"mlp": folder / "changed.pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("clip_project.model.0.bias"), r"Missing: backbone\.clip_project\.model\.0\.bias\."),
        (lambda w: w.pop("clip_project.model.2.weight"), r"clip_project\.model\.2\.weight is missing"),
        (lambda w: w.update({"gpt.extra": torch.ones(2)}), r"Left over: backbone\.gpt\.extra"),
        (lambda w: w.update({"head.weight": torch.ones(2)}), r"tensors that ClipCap does not have: head\.weight"),
        (lambda w: w.update({"gpt.lm_head.weight": torch.ones(2)}), "not tied"),
        (lambda w: w.update({"gpt.transformer.ln_f.bias": torch.ones(5)}), r"ln_f\.bias \(5,\) not \(16,\)"),
        (lambda w: w["gpt.transformer.ln_f.bias"].fill_(torch.nan), r"not finite numbers in .*ln_f\.bias"),
        (lambda w: w.update({"clip_project.model.0.weight": torch.ones(24, 640)}), "features of 640 .* RN50x4"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("clip_project")], "no ClipCap checkpoint"),
        (lambda w: w.update({"step": 3}), "no plain tensors"),
    ],
)
def test_missing_extra_or_wrong_tensors_are_refused(change, message, sources, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(change_file(sources, tmp_path, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Attack:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_no_code_in_a_checkpoint_is_run(sources, tmp_path):
    harmful = {"clip_project.model.0.weight": Attack(tmp_path / "harm")}
    torch.save(harmful, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(harmful))
    for name in ("zip.pt", "raw.pt"):
        changed = ClipCapSources(sources.clip, sources.gpt2, {"mlp": tmp_path / name})
        with pytest.raises(ConversionError):
            convert(changed, tmp_path / "out")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out").exists()


def test_other_clip_and_gpt2_are_refused(sources, tmp_path):
    with pytest.raises(ConversionError, match="is no GPT-2"):
        convert(sources, tmp_path / "out", gpt2=sources.clip)
    with pytest.raises(ConversionError, match=r"no CLIP that can be loaded|no whole CLIPModel"):
        convert(sources, tmp_path / "out", clip=sources.gpt2)
    shutil.copytree(sources.clip, tmp_path / "clip")
    shutil.copy(sources.gpt2 / "tokenizer.json", tmp_path / "clip")
    with pytest.raises(ConversionError, match="do not follow from its"):
        convert(sources, tmp_path / "out", clip=tmp_path / "clip")
    with pytest.raises(ConversionError, match="image_size=100 is not a multiple"):
        convert(sources, tmp_path / "out", image_size=100)
    with pytest.raises(ConversionError, match="give the path of ClipCap's"):
        convert(ClipCapSources(sources.clip, sources.gpt2, {"mlp": sources.clip}), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert(sources, tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_script_passes_arguments_on_and_prints_a_summary(sources, tmp_path, capsys):
    script = load_script("convert_clipcap")
    parts = ["--clip", sources.clip, "--gpt2", sources.gpt2, "--image-size", "96", "--patch-features", "maskclip"]
    output = tmp_path / "out"
    arguments = [str(x) for x in [sources.files["transformer"], output, *parts, "--normalize-features"]]
    assert script.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "ClipCap, transformer mapping" in printed
    assert "5 accounted for, none missing, none left over" in printed
    assert f"scripts/train.py --model {output}" in printed
    config = IFSegForSemanticSegmentation.from_pretrained(output).config.backbone_config
    assert (config.patch_features, config.normalize_features, config.image_size) == ("maskclip", True, 96)
    assert script.main(arguments) == 1
    assert capsys.readouterr().err.endswith(
        f"error: {output} exists and is not an empty folder. Give a new folder for the result.\n"
    )


def test_training_lowers_the_loss_on_word_maps(converted, tuned):
    word_map = torch.randint(0, len(WORDS), (4, 3, 3), generator=torch.Generator().manual_seed(0))
    losses = []
    for folder in (converted, tuned):
        model = IFSegForSemanticSegmentation.from_pretrained(folder).eval()
        model.set_words(**IFSegProcessor.from_pretrained(folder).encode_categories(WORDS))
        losses.append(model(word_map=word_map, labels=word_map).loss.item())
    assert losses[1] < 0.7 * losses[0]
    before, after = (IFSegForSemanticSegmentation.from_pretrained(folder).state_dict() for folder in (converted, tuned))
    moved = {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"clip_project", "gpt"}
    assert torch.equal(before["backbone.gpt.transformer.wte.weight"], after["backbone.gpt.transformer.wte.weight"])


def test_smoothing_and_segmentation_of_images(tuned):
    processor = IFSegProcessor.from_pretrained(tuned)
    model = AutoModelForSemanticSegmentation.from_pretrained(tuned).eval()
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(64, 80), (100, 64)]]
    with torch.no_grad():
        together = model(**processor(images=images, return_tensors="pt"))
        for index, image in enumerate(images):
            alone = model(**processor(images=image, return_tensors="pt"))
            height, width = alone.logits.shape[2:]
            torch.testing.assert_close(
                together.logits[index, :, :height, :width], alone.logits[0], atol=1e-4, rtol=1e-4
            )
    sizes = [(64, 80), (100, 64)]
    plain = processor.post_process_semantic_segmentation(together, target_sizes=sizes, smoothing_iterations=0)
    smooth = processor.post_process_semantic_segmentation(
        together, target_sizes=sizes, smoothing_iterations=5, smoothing_neighbors=2
    )
    assert [tuple(labels.shape) for labels in smooth] == sizes
    assert any((one != other).any() for one, other in zip(plain, smooth, strict=True))
    results = pipeline("image-segmentation", model=str(tuned))(Image.fromarray(images[0]))
    assert {result["label"] for result in results} <= set(WORDS)


def test_evaluation_and_publishing(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = save_masked_images(tmp_path / "data", split="val")
    results = evaluate(tuned, data, tmp_path / "results", "--categories", "cat, cup, sky, sea")
    assert results["images"] == 6
    names = {file.name for file in files_to_publish(tuned)}
    code = {"backbone_clipcap.py", "configuration_clipcap.py", "subwords_clip.py", "templates_clip.py"}
    assert code | {"modeling_ifseg.py", "processing_ifseg.py", "tokenizer.json", "model.safetensors"} <= names
    assert not [name for name in names if "ofa" in name]
    assert "cat" in str(model_card(tuned, "alice/clipcap"))


REMOTE = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, AutoProcessor
folder, image = sys.argv[1:]
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    print(model(**processor(images=Image.open(image), return_tensors="pt")).logits.sum().item())
    print(model(word_map=torch.tensor([[[0, 1], [2, 3]]])).logits.sum().item())
assert "ifseg_hf" not in sys.modules
"""


def test_loads_with_remote_code_alone(tuned, tmp_path):
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(image)
    processor = IFSegProcessor.from_pretrained(tuned)
    model = IFSegForSemanticSegmentation.from_pretrained(tuned).eval()
    with torch.no_grad():
        logits = model(**processor(images=Image.open(image), return_tensors="pt")).logits
        of_words = model(word_map=torch.tensor([[[0, 1], [2, 3]]])).logits
    printed = run_without_package(REMOTE, tuned, image, home=tmp_path / "home")
    expected = [logits.sum().item(), of_words.sum().item()]
    assert [float(number) for number in printed.split()] == pytest.approx(expected, rel=1e-4)
