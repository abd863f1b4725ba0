"""CLIP and MaskCLIP, with small random weights, against computations from these weights."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch.nn.functional import interpolate, layer_norm, normalize
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ifseg_hf import NANO
from ifseg_hf.evaluation import baselines
from ifseg_hf.evaluation.baselines import BASELINES, CLIPSegmenter, load_baseline
from ifseg_hf.modeling.templates_clip import PROMPT_TEMPLATES
from ifseg_hf.processing.image_processing_ifseg import resize_bilinear
from ifseg_hf.processing.post_processing_ifseg import patch_scores, segmentation_maps

PATCH, HEADS = 32, 2
MEAN, STD = [0.48, 0.45, 0.4], [0.27, 0.26, 0.28]
WORDS = ["cat", "wet grass", "sky"]
UNKNOWN = "é"  # its bytes are left out of the tokenizer


def clip_config(layers: int = 2, max_position_embeddings: int = 60) -> CLIPConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": HEADS, "num_hidden_layers": layers}
    return CLIPConfig(
        vision_config={**sizes, "image_size": 2 * PATCH, "patch_size": PATCH, "attention_dropout": 0.5},
        text_config={
            **sizes,
            "vocab_size": 600,
            "max_position_embeddings": max_position_embeddings,
            "eos_token_id": 1,
            "attention_dropout": 0.5,
        },
        projection_dim=12,
    )


def save_clip(folder, **kwargs) -> str:
    """A random CLIP whose every weight matters, and a processor whose tokens are bytes."""
    characters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ã", "©"})
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    CLIPProcessor(CLIPImageProcessorPil(image_mean=MEAN, image_std=STD), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    model = CLIPModel(clip_config(**kwargs))
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


def segmenter(kind: str, folder: str, words=WORDS):
    loaded = load_baseline(kind, folder, "cpu")
    loaded.set_words(words)
    return loaded


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def pixels(height: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """One image as the model reads it."""
    values = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": values, "pixel_mask": torch.ones(1, height, width, dtype=torch.int64)}


def computed_features(weights: dict[str, torch.Tensor], pixel_values: torch.Tensor, value_path: bool) -> torch.Tensor:
    """Patch features (patches, C) of one image from CLIP's weights and plain tensor algebra."""

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def attention(query, key, value):
        return (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1) @ value

    rows, columns = (side // PATCH for side in pixel_values.shape[1:])
    patches = pixel_values.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)
    x = patches.reshape(rows * columns, -1) @ weights["vision_model.embeddings.patch_embedding.weight"].flatten(1).T
    x = torch.cat([weights["vision_model.embeddings.class_embedding"][None], x])
    positions = weights["vision_model.embeddings.position_embedding.weight"]
    grid = positions[1:].T.unflatten(1, (2, 2))[None]
    grid = interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)[0].flatten(1).T
    x = norm(x + torch.cat([positions[:1], grid]), "vision_model.pre_layrnorm")
    count = sum(name.endswith("layer_norm1.weight") and name.startswith("vision_model") for name in weights)
    for layer in range(count):
        start = f"vision_model.encoder.layers.{layer}"
        y = norm(x, f"{start}.layer_norm1")
        query, key, value = (linear(y, f"{start}.self_attn.{part}_proj") for part in "qkv")
        if not (value_path and layer == count - 1):
            heads = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (query, key, value))
            value = attention(*heads).transpose(0, 1).flatten(1)
        x = x + linear(value, f"{start}.self_attn.out_proj")
        y = linear(norm(x, f"{start}.layer_norm2"), f"{start}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{start}.mlp.fc2")
    return norm(x[1:], "vision_model.post_layernorm") @ weights["visual_projection.weight"].T


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])  # the size that CLIP was trained at, and another
def test_patch_features_agree_with_the_weights(kind, size, folder):
    weights = CLIPModel.from_pretrained(folder).state_dict()
    inputs = pixels(*size)
    loaded = segmenter(kind, folder)
    outputs = loaded(inputs)
    expected = normalize(computed_features(weights, inputs["pixel_values"][0], kind == "maskclip"), dim=1)
    torch.testing.assert_close(outputs.image_features[0].flatten(1).T, expected, rtol=0, atol=5e-6)
    cosines = expected @ loaded.word_embeddings.T
    logits = outputs.logits[0].flatten(1).T
    torch.testing.assert_close(logits, weights["logit_scale"].exp() * cosines, rtol=0, atol=1e-4)
    assert outputs.logits.shape == (1, 3, size[0] // PATCH, size[1] // PATCH)
    assert outputs.patch_mask.all()
    assert outputs.patch_mask.dtype == torch.bool


def test_clip_is_clip(folder, monkeypatch):
    """Against CLIPModel's own text embeddings, hidden states and scale, with a single template."""
    monkeypatch.setattr(baselines, "PROMPT_TEMPLATES", ["a photo of a {}."])
    model = CLIPModel.from_pretrained(folder).eval()
    texts = CLIPProcessor.from_pretrained(folder)(
        text=[f"a photo of a {word}." for word in WORDS], padding=True, return_tensors="pt"
    )
    inputs = pixels(64, 64)
    with torch.no_grad():
        own = model(**texts, pixel_values=inputs["pixel_values"])
        hidden = own.vision_model_output.last_hidden_state
        features = normalize(model.visual_projection(model.vision_model.post_layernorm(hidden)), dim=-1)
        logits = model.logit_scale.exp() * features @ own.text_embeds.T
    torch.testing.assert_close(logits[:, 0], own.logits_per_image)  # the class token: it is this that CLIP compares
    ours = segmenter("clip", folder)(inputs).logits
    torch.testing.assert_close(ours[0].flatten(1).T, logits[0, 1:], rtol=1e-5, atol=1e-5)


def test_the_last_attention_of_maskclip_mixes_no_patches(tmp_path):
    """In a tower of one layer a patch then depends on its own pixels alone."""
    one_layer = save_clip(tmp_path, layers=1)
    inputs, other = pixels(64, 96), pixels(64, 96)
    other["pixel_values"][:, :, :PATCH, :PATCH] = 1
    for kind, expected in [("maskclip", [True, False, False, False, False, False]), ("clip", [True] * 6)]:
        loaded = segmenter(kind, one_layer)
        changed = (loaded(inputs).image_features - loaded(other).image_features).abs().amax(1)
        assert (changed > 1e-6).flatten().tolist() == expected, kind


def test_words_are_averaged_over_templates(folder):
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    loaded = segmenter("clip", folder)
    for word, embedding in zip(WORDS, loaded.word_embeddings, strict=True):
        total = torch.zeros(12)
        for template in PROMPT_TEMPLATES:
            with torch.no_grad():  # one sentence at a time: no padding
                tokens = processor(text=template.replace("{}", word), return_tensors="pt")
                features = model.get_text_features(**tokens).pooler_output[0]
            total += features / features.norm()
        torch.testing.assert_close(embedding, total / total.norm(), rtol=0, atol=5e-6)


def test_templates_are_the_85_of_maskclip():
    assert len(set(PROMPT_TEMPLATES)) == len(PROMPT_TEMPLATES) == 85
    assert all(template.count("{}") == 1 for template in PROMPT_TEMPLATES)
    assert sum(template.endswith("{} in the scene.") for template in PROMPT_TEMPLATES) == 5
    # the published list joined by new lines
    text = "\n".join(PROMPT_TEMPLATES)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "f87d863dc7a96d46812438cf13a8a071e340f7be26222d17a0b61d41d28c0984"
    )


def test_a_category_is_the_mean_of_its_fine_names(folder):
    loaded = segmenter("clip", folder)
    cat, grass, sky = loaded.word_embeddings
    loaded.set_words({"animal": ["cat"], "outside": ["wet  grass", "sky"], "above": ["sky"]})
    expected = torch.stack([cat, (grass + sky) / (grass + sky).norm(), sky])
    torch.testing.assert_close(loaded.word_embeddings, expected, rtol=0, atol=5e-6)
    assert loaded(pixels(64, 64)).logits.shape[1] == 3


def test_background_words_have_one_label(folder):
    loaded = segmenter("clip", folder)
    plain = loaded(pixels(64, 64)).logits.softmax(1)
    assert loaded.background is None
    loaded.set_words(["cat"], background=["wet grass", "sky", "cat"])
    assert loaded.background == ["wet grass", "sky"]
    expected = torch.cat([plain[:, :1], plain[:, 1:].sum(1, keepdim=True)], 1)
    torch.testing.assert_close(loaded(pixels(64, 64)).logits.softmax(1), expected)
    loaded.set_words(["background", "cat"], background=["sky"])
    assert loaded(pixels(64, 64)).logits.shape[1] == 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 150), (512, 768)), ((150, 100), (768, 512)), ((30, 400), (160, 2048)), ((512, 655), (512, 640))],
)
def test_images_are_resized_to_whole_patches(size, expected, folder):
    inputs = load_baseline("clip", folder, "cpu").preprocess([random_image(*size)])
    assert inputs["pixel_values"].shape == (1, 3, *expected)
    assert inputs["pixel_mask"].all()
    wanted = (resize_bilinear(random_image(*size), *expected) / 255 - MEAN) / STD
    np.testing.assert_allclose(inputs["pixel_values"][0].permute(1, 2, 0), wanted, atol=1e-5)


def test_an_array_three_pixels_high_is_not_turned(folder):
    inputs = load_baseline("clip", folder, "cpu").preprocess([random_image(3, 4)])
    assert inputs["pixel_values"].shape == (1, 3, 512, 672)


@pytest.mark.parametrize("kind", BASELINES)
def test_images_of_several_sizes_get_what_each_gets_alone(kind, folder):
    loaded = segmenter(kind, folder)
    images = [random_image(60, 80, 0), random_image(80, 60, 1), random_image(60, 80, 2), random_image(50, 50, 3)]
    together = loaded(loaded.preprocess(images))
    assert together.logits.shape == (4, 3, 21, 21)
    sizes = [image.shape[:2] for image in images]
    scores, smoothed = list(patch_scores(together, iterations=0)), list(patch_scores(together))
    maps = segmentation_maps(together, sizes)
    for i, image in enumerate(images):
        alone = loaded(loaded.preprocess([image]))
        torch.testing.assert_close(scores[i], alone.logits[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(smoothed[i], next(patch_scores(alone)), rtol=0, atol=1e-4)
        assert maps[i].shape == image.shape[:2]
        assert (maps[i] == segmentation_maps(alone, sizes[i : i + 1])[0]).float().mean() > 0.999
        padding = ~together.patch_mask[i]
        assert padding.sum() == 21 * 21 - alone.logits[0, 0].numel()
        assert not together.logits[i][:, padding].any()
        assert not together.image_features[i][:, padding].any()


def test_evaluation_mode_without_gradients(folder):
    """The configuration has dropout: in training mode two calls would differ."""
    model, processor = CLIPModel.from_pretrained(folder).train(), CLIPProcessor.from_pretrained(folder)
    loaded = CLIPSegmenter(model, processor)
    loaded.set_words(WORDS)
    first, embeddings = loaded(pixels(64, 64)), loaded.word_embeddings
    loaded.set_words(WORDS)
    assert torch.equal(loaded(pixels(64, 64)).logits, first.logits)
    assert torch.equal(loaded.word_embeddings, embeddings)
    assert not any(module.training for module in loaded.model.modules())
    assert not any(x.requires_grad for x in (first.logits, first.image_features, embeddings))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_half_precision_checkpoints_compute_in_float32(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    CLIPModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    assert segmenter("clip", str(tmp_path))(pixels(64, 64)).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "name", "error", "message"),
    [
        ("dino", "openai/clip-vit-base-patch16", ValueError, 'no baseline "dino": choose from clip, maskclip'),
        ("clip", "RN50", ValueError, "no file: give the path of a CLIP with a ResNet"),
        ("maskclip", "openai/clip-rn50x4", ValueError, "no file: .*RN101.pt"),
        ("clip", "models/RN101.pt", ValueError, "no file: .*RN101.pt"),
        ("clip", "no-such-folder", FileNotFoundError, 'no model folder "no-such-folder"'),
        ("clip", str(NANO), ValueError, "its model type is ofa"),
    ],
)
def test_other_models_are_refused(kind, name, error, message):
    with pytest.raises(error, match=message) as caught:
        load_baseline(kind, name, "cpu")
    assert "\n" not in str(caught.value)


def remove_configuration(folder):
    (folder / "config.json").unlink()


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def leave_vision_only(folder):
    CLIPVisionModel(clip_config().vision_config).save_pretrained(folder)
    CLIPConfig.save_pretrained(clip_config(), folder)


def remove_processor(folder):
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()


@pytest.mark.parametrize("damage", [remove_configuration, cut_weights, leave_vision_only, remove_processor])
def test_incomplete_folders_are_refused(damage, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(ValueError, match="is no CLIP that can be loaded: ") as caught:
        load_baseline("clip", str(tmp_path), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is no category"),
        (["cat", "cat"], "given twice"),
        ({"animal": []}, 'no fine name of "animal"'),
        ([UNKNOWN], "The tokenizer has no tokens"),
        (["c" * 100], "the model reads 60"),
    ],
)
def test_unusable_words_are_refused(words, message, folder):
    with pytest.raises(ValueError, match=message):
        load_baseline("clip", folder, "cpu").set_words(words)


def test_images_before_words_are_refused(folder):
    with pytest.raises(ValueError, match="call set_words first"):
        load_baseline("clip", folder, "cpu")(pixels(64, 64))
