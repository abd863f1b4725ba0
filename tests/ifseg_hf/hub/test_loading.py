"""Loading, device placement, attention kernels, adapters and changed categories, as for any transformers model."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, WORDS, small_config, small_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model
from torch.utils import backend_registration
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    BitsAndBytesConfig,
    TorchAoConfig,
    pipeline,
)

from ifseg_hf import (
    NANO,
    IFSegForSemanticSegmentation,
    IFSegProcessor,
    OFAConfig,
    OFAForConditionalGeneration,
    OFAModel,
)
from ifseg_hf.loading import load_segmentation_model

NEW_IN_SEGMENTATION = {
    "backbone.segmentation_positions.embed_positions.weight",
    "backbone.segmentation_positions.layer_norm.weight",
    "backbone.segmentation_positions.layer_norm.bias",
    "backbone.segmentation_positions.rel_pos_tables.0.weight",
    "backbone.segmentation_positions.rel_pos_tables.1.weight",
}
IMAGE = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> str:
    """A folder with a model that has three categories."""
    folder = tmp_path_factory.mktemp("tuned")
    small_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ofa(tmp_path_factory) -> str:
    """A folder with a converted OFA: no categories, no segmentation positions."""
    folder = tmp_path_factory.mktemp("ofa")
    torch.manual_seed(1)
    OFAForConditionalGeneration(OFAConfig(**SMALL, init_std=0.2)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return logits(small_model())


@torch.no_grad()
def logits(model, image: torch.Tensor = IMAGE, **words) -> torch.Tensor:
    return model.eval()(pixel_values=image, **words).logits


# Types, devices, kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(tuned, expected, dtype):
    model = IFSegForSemanticSegmentation.from_pretrained(tuned, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = logits(model)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02 if dtype.itemsize == 2 else 1e-5)


def test_dtype_by_name_and_from_checkpoint(tuned, tmp_path):
    half = IFSegForSemanticSegmentation.from_pretrained(tuned, dtype="bfloat16")
    half.save_pretrained(tmp_path)
    for load in (IFSegForSemanticSegmentation.from_pretrained, AutoModelForSemanticSegmentation.from_pretrained):
        assert load(tmp_path).dtype == torch.float32
        assert load(tmp_path, dtype="auto").dtype == torch.bfloat16
        assert load(tmp_path, dtype=torch.float64).dtype == torch.float64
        assert load(tmp_path, torch_dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_complete_checkpoint_is_loaded_without_from_pretrained(tuned, dtype, tmp_path, monkeypatch):
    IFSegForSemanticSegmentation.from_pretrained(tuned, dtype=dtype).save_pretrained(tmp_path)
    expected = IFSegForSemanticSegmentation.from_pretrained(tmp_path)
    monkeypatch.setattr(IFSegForSemanticSegmentation, "from_pretrained", None)
    model = load_segmentation_model(tmp_path)
    assert (model.config.to_dict(), model.training) == (expected.config.to_dict(), False)
    assert model.name_or_path == str(tmp_path)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(x.dtype == torch.float32 and torch.equal(x, theirs[name]) for name, x in ours.items())
    trained = ({name for name, x in m.named_parameters() if x.requires_grad} for m in (model, expected))
    assert next(trained) == next(trained)
    assert len(list(model.parameters())) == len(list(expected.parameters()))  # tied weights are one


def test_incomplete_checkpoint_of_tuned_model_is_refused(tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("image_proj.weight"))
    save_file({name: x for name, x in weights.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are incomplete: .*image_proj\.weight missing"):
        load_segmentation_model(tmp_path / "model")
    save_file({**weights, lost: weights[lost][:, :-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatched"):
        load_segmentation_model(tmp_path / "model")


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForSemanticSegmentation], ids=lambda x: x.__name__
)
def test_embedded_checkpoint_is_loaded_in_float32(auto_class):
    model = auto_class.from_pretrained(NANO)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32


def test_adapter_of_embedded_checkpoint_trains_without_nan():
    """In half precision, which its weights are saved in, the loss was NaN at the second step."""
    torch.manual_seed(0)
    model = AutoModelForSemanticSegmentation.from_pretrained(NANO)
    model.set_words(**IFSegProcessor.from_pretrained(NANO).encode_categories(["cat", "grass", "sky"]))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-3)
    word_map = torch.randint(3, (2, 8, 8))
    labels = word_map.repeat_interleave(16, 1).repeat_interleave(16, 2)
    for _ in range(3):
        loss = model(word_map=word_map, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(x).all() for x in model.parameters())


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "cpu",
        {"": "cpu"},
        {"backbone.model": "cpu", "backbone.segmentation_positions": "disk"},
        {"": "disk"},
    ],
)
def test_device_map(tuned, expected, device_map, tmp_path):
    """Weights on the disk are loaded when needed, including tables that only the model itself reads."""
    model = AutoModelForSemanticSegmentation.from_pretrained(tuned, device_map=device_map, offload_folder=tmp_path)
    if "disk" in str(device_map):
        assert any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("decoder_positions", ["segmentation", "image"])
def test_device_map_with_little_memory(decoder_positions, tmp_path):
    model = small_model(decoder_positions=decoder_positions)
    model.save_pretrained(tmp_path / "model")
    loaded = IFSegForSemanticSegmentation.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "disk"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a fake device",
)
def test_device_map_over_two_devices():
    script = Path(__file__).parents[2] / "helpers" / "two_devices.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_generation_with_weights_on_disk(ofa, tmp_path):
    inputs = {"input_ids": torch.tensor([[0, 7, 8, 2]]), "pixel_values": IMAGE, "max_new_tokens": 4, "do_sample": False}
    whole = OFAForConditionalGeneration.from_pretrained(ofa)
    spread = OFAForConditionalGeneration.from_pretrained(ofa, device_map={"": "disk"}, offload_folder=tmp_path)
    assert torch.equal(spread.generate(**inputs), whole.generate(**inputs))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_attention_kernels_give_the_same_logits(tuned, expected, kernel):
    model = IFSegForSemanticSegmentation.from_pretrained(tuned, attn_implementation=kernel)
    assert model.config._attn_implementation == kernel
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize(
    ("kernel", "message"), [("flash_attention_2", "Flash Attention 2"), ("flex_attention", "flex_attention")]
)
def test_kernels_without_bias_are_refused(tuned, kernel, message):
    with pytest.raises(ValueError, match=f"IFSegForSemanticSegmentation does not support.*{message}"):
        IFSegForSemanticSegmentation.from_pretrained(tuned, attn_implementation=kernel)


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
        ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True)),
        ("torchao", lambda: TorchAoConfig("int8_weight_only")),
    ],
)
def test_quantization_error_names_the_missing_package(tuned, package, settings):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises((ImportError, ValueError), match=f"pip install.*{package}"):
        IFSegForSemanticSegmentation.from_pretrained(tuned, quantization_config=settings())


# Loading into another class -------------------------------------------------------------------------------------------


def ofa_model(model) -> OFAModel:
    """The encoder and decoder in a model of any class."""
    model = getattr(model, "backbone", model)
    return getattr(model, "model", model)


@pytest.mark.parametrize(
    ("saved", "loaded", "missing", "unexpected"),
    [
        (OFAModel, OFAForConditionalGeneration, set(), set()),  # the head is tied to the word embeddings
        (OFAForConditionalGeneration, OFAModel, set(), set()),
        (OFAForConditionalGeneration, IFSegForSemanticSegmentation, set(), set()),  # new ones are expected
        (IFSegForSemanticSegmentation, IFSegForSemanticSegmentation, set(), set()),
    ],
)
def test_missing_and_unexpected_keys(saved, loaded, missing, unexpected, tmp_path):
    torch.manual_seed(0)
    model = saved(small_config() if saved is IFSegForSemanticSegmentation else OFAConfig(**SMALL))
    model.save_pretrained(tmp_path)
    other, report = loaded.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    assert set(report["unexpected_keys"]) == unexpected
    assert not report["mismatched_keys"]
    assert not report.get("error_msgs")
    ours, theirs = (ofa_model(x).state_dict() for x in (model, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_missing_positions_of_a_tuned_model_are_reported(tuned, tmp_path):
    weights = load_file(f"{tuned}/model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if name not in NEW_IN_SEGMENTATION}
    shutil.copytree(tuned, tmp_path / "model")
    save_file(left, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    _, report = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert set(report["missing_keys"]) == NEW_IN_SEGMENTATION


def test_image_positions_need_no_new_weights(ofa):
    positions = {"decoder_positions": "image"}
    for kwargs in ({"backbone_config": positions}, {"config": OFAConfig.from_pretrained(ofa, **positions)}):
        model, report = IFSegForSemanticSegmentation.from_pretrained(ofa, **kwargs, output_loading_info=True)
        assert model.backbone.config.decoder_positions == "image"
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


def test_categories_are_set_on_a_loaded_backbone(ofa):
    model = IFSegForSemanticSegmentation.from_pretrained(ofa)
    with pytest.raises(ValueError, match="no words"):
        logits(model)
    model.set_words(**WORDS)
    assert logits(model).shape == (1, 3, 4, 5)


def test_model_is_pickled_by_torch_save(expected, tmp_path):
    torch.save(small_model(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)


# Categories of a loaded model -----------------------------------------------------------------------------------------

OTHERS = {
    "id2label": {0: "cup", 1: "saucer"},
    "category_ids": [[11], [12, 13]],
    "prompt_ids": [0, 9, 10, 11, 12, 13, 2],
    "prompt": "what is it?",
}


def test_changed_categories_are_consistent_and_saved(tuned, tmp_path):
    model = IFSegForSemanticSegmentation.from_pretrained(tuned)
    model.set_words(**OTHERS)
    model.save_pretrained(tmp_path)
    passed = {"input_ids": torch.tensor([OTHERS["prompt_ids"]]), "category_ids": torch.tensor([[[11, 1], [12, 13]]])}
    expected = logits(small_model(), **passed)
    for changed in (model, IFSegForSemanticSegmentation.from_pretrained(tmp_path)):
        config = changed.config
        assert config.id2label == {0: "cup", 1: "saucer"}
        assert config.label2id == {"cup": 0, "saucer": 1}
        assert config.num_labels == 2
        assert config.category_ids == OTHERS["category_ids"]
        assert config.prompt_ids == OTHERS["prompt_ids"]
        assert changed.backbone.config is config.backbone_config
        torch.testing.assert_close(logits(changed), expected)


@pytest.mark.parametrize(
    "names", [{0: "a", 1: "b", 2: "c"}, {"0": "a", "1": "b", "2": "c"}], ids=["numbers", "as in JSON"]
)
def test_categories_can_be_renamed_when_loading(tuned, names):
    config = IFSegForSemanticSegmentation.from_pretrained(tuned, id2label=names, num_labels=3).config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("contradiction", "message"),
    [
        ({"num_labels": 5}, "5 names but sub-words for 3"),
        ({"id2label": {0: "a", 1: "b"}}, "2 names but sub-words for 3"),
        ({"id2label": {0: "a", 1: "b", 3: "c"}}, "number the categories from 0"),
        ({"label2id": {"a": 0, "b": 1, "c": 2}}, "label2id"),
        ({"category_ids": [[5], [6]]}, "3 names but sub-words for 2"),
        ({"word_ids": [[5], [6], [7]]}, "together"),
        ({"word_ids": [[5], [6]], "word_categories": [0, 1]}, "every category"),
    ],
)
def test_inconsistent_categories_are_refused(tuned, contradiction, message):
    with pytest.raises(ValueError, match=message):
        IFSegForSemanticSegmentation.from_pretrained(tuned, **contradiction)
    model = IFSegForSemanticSegmentation.from_pretrained(tuned)
    for name, value in contradiction.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        logits(model)


def test_refused_change_leaves_model_unchanged(tuned, expected):
    model = IFSegForSemanticSegmentation.from_pretrained(tuned)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="3 names but sub-words for 2"):
        model.set_words(**{**WORDS, "category_ids": [[5], [6]]})
    assert model.config.to_dict() == before
    torch.testing.assert_close(logits(model), expected)


# Adapters -------------------------------------------------------------------------------------------------------------


def lora(**kwargs) -> LoraConfig:
    """LoRA on the projections of every attention; segmentation positions are trained and saved in full."""
    return LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
        modules_to_save=["segmentation_positions"],
        **kwargs,
    )


def with_words(folder: str) -> IFSegForSemanticSegmentation:
    model = IFSegForSemanticSegmentation.from_pretrained(folder)
    model.set_words(**WORDS)
    return model


def tune(model, steps: int = 5) -> float:
    """Trains on word maps in a plain loop; returns by how much the loss fell."""
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    word_map = torch.randint(3, (4, 4, 4), generator=generator)
    labels = word_map.repeat_interleave(16, 1).repeat_interleave(16, 2)

    @torch.no_grad()
    def loss_without_dropout() -> float:
        return model.eval()(word_map=word_map, labels=labels).loss.item()

    before = loss_without_dropout()
    model.train()
    for _ in range(steps):
        model(word_map=word_map, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before - loss_without_dropout()


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM", "CAUSAL_LM"])
def test_lora_with_peft(task_type, ofa, tmp_path):
    model = get_peft_model(with_words(ofa), lora(task_type=task_type))
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert all("lora_" in name or "segmentation_positions" in name for name in trained)
    before = logits(model)
    assert tune(model) > 0
    after = logits(model)
    assert not torch.allclose(after, before)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(with_words(ofa), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), after, rtol=0, atol=0)

    # the merged model is an ordinary model with categories
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, report = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert merged.config.id2label == WORDS["id2label"]
    torch.testing.assert_close(logits(merged), after)


def test_a_segmentation_model_generates_no_text(ofa, caplog):
    model = with_words(ofa)
    assert not model.can_generate()
    assert getattr(model, "generation_config", None) is None
    with pytest.raises(ValueError, match="segments images and generates no text"):
        model.prepare_inputs_for_generation(None)
    assert not caplog.records


def test_lora_for_text_with_peft(ofa, tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(OFAForConditionalGeneration.from_pretrained(ofa), config).eval()
    inputs = {"pixel_values": IMAGE, "input_ids": torch.tensor([[0, 5, 6, 2]]), "labels": torch.tensor([[7, 8, 2]])}
    expected = model(**inputs)
    expected.loss.backward()
    assert any(x.grad.any() for name, x in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(OFAForConditionalGeneration.from_pretrained(ofa), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected.logits, rtol=0, atol=0)
    assert loaded.generate(pixel_values=IMAGE, input_ids=inputs["input_ids"], max_new_tokens=3).shape[0] == 1


def test_lora_on_convolutions_of_the_trunk(tuned, expected, tmp_path):
    config = LoraConfig(r=2, target_modules=["conv1", "conv2", "downsample.0"], init_lora_weights=False)
    model = get_peft_model(IFSegForSemanticSegmentation.from_pretrained(tuned), config)
    after = logits(model)
    assert not torch.allclose(after, expected)
    model(pixel_values=IMAGE).logits.square().sum().backward()
    trained = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    for layer in config.target_modules:  # a few units of so narrow a trunk are always off, without a gradient
        assert any(gradient.any() for name, gradient in trained.items() if f".{layer}.lora_" in name)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(IFSegForSemanticSegmentation.from_pretrained(tuned), tmp_path)
    torch.testing.assert_close(logits(loaded), after, rtol=0, atol=0)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), after)


def test_lora_with_transformers(ofa, tmp_path):
    model = with_words(ofa)
    model.add_adapter(lora())
    assert tune(model) > 0
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    after = logits(model)

    loaded = with_words(ofa)
    loaded.load_adapter(tmp_path)
    torch.testing.assert_close(logits(loaded), after, rtol=0, atol=0)

    # the adapter's folder names its base model, so it loads like a model; its categories must be set again
    whole = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    whole.set_words(**WORDS)
    torch.testing.assert_close(logits(whole), after, rtol=0, atol=0)


def test_lora_beside_frozen_weights_of_word_maps(ofa):
    """`freeze_for_word_maps` and an adapter freeze their weights independently."""
    model = with_words(ofa)
    model.freeze_for_word_maps()
    model = get_peft_model(model, lora())
    frozen = {name: x.clone() for name, x in model.named_parameters() if not x.requires_grad}
    tune(model, steps=2)
    assert all(torch.equal(x, frozen[name]) for name, x in model.named_parameters() if name in frozen)


def test_adapter_with_processor_loads_as_pipeline(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    processor = IFSegProcessor.from_pretrained(base)
    model = get_peft_model(IFSegForSemanticSegmentation.from_pretrained(base), lora())
    model.set_words(**processor.encode_categories(["cat", "wet grass", "sky"]))
    tune(model)
    image = torch.randint(256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = processor.pipeline(model.eval())(image)

    model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    pipe = pipeline("image-segmentation", model=str(tmp_path / "adapter"), categories=["cat", "wet grass", "sky"])
    assert pipe(image) == expected  # labels, scores and masks
