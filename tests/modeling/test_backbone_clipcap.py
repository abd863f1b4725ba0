"""ClipCap with small random weights, compared with an independent computation from the same weights."""

import copy
import itertools

import pytest
import torch
from clipcap_sources import MAPPING, PATCH, PREFIX, WIDTH, WORDS, clip_tokenizer, gpt2_tokenizer, save_sources
from torch.nn.functional import layer_norm, normalize
from transformers import CLIPModel, CLIPTokenizer, GPT2Config, GPT2LMHeadModel

from ifseg_hf.hub.conversion_clipcap import convert_clipcap_checkpoint
from ifseg_hf.hub.export import export_onnx
from ifseg_hf.modeling import ClipCapConfig, IFSegConfig, IFSegForSemanticSegmentation
from ifseg_hf.modeling.subwords_clip import CLIPSubwords
from ifseg_hf.modeling.templates_clip import PROMPT_TEMPLATES
from ifseg_hf.processing import IFSegProcessor

MAPPINGS = ["mlp", "transformer"]
IMAGE_SIZE = 3 * PATCH


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return save_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    """Folders of converted checkpoints with words, by mapping and patch features."""
    folder = tmp_path_factory.mktemp("converted")
    folders = {}
    for mapping, features in itertools.product(MAPPINGS, ["clip", "maskclip"]):
        output = folders[mapping, features] = folder / f"{mapping}-{features}"
        parts = {"clip": sources.clip, "gpt2": sources.gpt2, "image_size": IMAGE_SIZE}
        convert_clipcap_checkpoint(sources.files[mapping], output, patch_features=features, **parts)
    return folders


def load(folder, words=WORDS) -> tuple[IFSegForSemanticSegmentation, IFSegProcessor]:
    """Model in evaluation mode, with words, and processor."""
    model, processor = IFSegForSemanticSegmentation.from_pretrained(folder), IFSegProcessor.from_pretrained(folder)
    model.set_words(**processor.encode_categories(words))
    return model.eval(), processor


class Direct:
    """ClipCap's computation for one patch after the other, from the files of its parts."""

    def __init__(self, sources, mapping: str):
        self.weights = torch.load(sources.files[mapping], weights_only=True)
        self.clip = CLIPModel.from_pretrained(sources.clip).eval()
        self.clip_words = CLIPTokenizer.from_pretrained(sources.clip)
        self.gpt2 = GPT2LMHeadModel(GPT2Config.from_pretrained(sources.gpt2)).eval()
        masks = (".attn.bias", ".attn.masked_bias")
        own = {name.removeprefix("gpt."): x for name, x in self.weights.items() if name.startswith("gpt.")}
        self.gpt2.load_state_dict({name: x for name, x in own.items() if not name.endswith(masks)})
        self.mapping = mapping

    def word(self, name: str) -> torch.Tensor:
        """The text feature of a word: direction of the mean over templates, mean length of the features."""
        features = []
        for template in PROMPT_TEMPLATES:
            tokens = self.clip_words(template.replace("{}", name), return_tensors="pt")
            features.append(self.clip.get_text_features(**tokens).pooler_output[0])
        lengths = [feature.norm() for feature in features]
        total = sum(feature / length for feature, length in zip(features, lengths, strict=True))
        return total / total.norm() * sum(lengths) / len(lengths)

    def patches(self, pixel_values: torch.Tensor, features: str) -> torch.Tensor:
        """Features (patches, d) of one image (3, H, W)."""
        tower = self.clip.vision_model
        out = tower(pixel_values[None], interpolate_pos_encoding=True, output_hidden_states=True)
        hidden = out.last_hidden_state[0]
        if features == "maskclip":
            weights = dict(tower.encoder.layers[-1].named_parameters())

            def linear(x, name):
                return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

            def norm(x, name):
                return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

            x = out.hidden_states[1][0]  # after the first of two layers
            x = x + linear(linear(norm(x, "layer_norm1"), "self_attn.v_proj"), "self_attn.out_proj")
            y = linear(norm(x, "layer_norm2"), "mlp.fc1")
            hidden = x + linear(y * torch.sigmoid(1.702 * y), "mlp.fc2")
        return self.clip.visual_projection(tower.post_layernorm(hidden[1:]))

    def prefix(self, feature: torch.Tensor) -> torch.Tensor:
        """GPT-2's embeddings (PREFIX, WIDTH) of one CLIP feature."""
        weights = {name.removeprefix("clip_project."): x for name, x in self.weights.items()}
        if self.mapping == "mlp":
            hidden = torch.tanh(weights["model.0.weight"] @ feature + weights["model.0.bias"])
            return (weights["model.2.weight"] @ hidden + weights["model.2.bias"]).reshape(PREFIX, WIDTH)
        mapped = (weights["linear.weight"] @ feature + weights["linear.bias"]).reshape(MAPPING, WIDTH)
        x = torch.cat([mapped, weights["prefix_const"]])
        for layer in range(2):
            own = {name.split(f"layers.{layer}.")[-1]: x for name, x in weights.items() if f"layers.{layer}." in name}
            y = layer_norm(x, (WIDTH,), own["norm1.weight"], own["norm1.bias"])
            queries = (y @ own["attn.to_queries.weight"].T).reshape(-1, 8, WIDTH // 8)
            both = (y @ own["attn.to_keys_values.weight"].T).reshape(-1, 2, 8, WIDTH // 8)
            scores = torch.einsum("nhd,mhd->nmh", queries, both[:, 0]) / (WIDTH // 8) ** 0.5
            attended = torch.einsum("nmh,mhd->nhd", scores.softmax(1), both[:, 1]).reshape(-1, WIDTH)
            x = x + attended @ own["attn.project.weight"].T + own["attn.project.bias"]
            y = layer_norm(x, (WIDTH,), own["norm2.weight"], own["norm2.bias"])
            y = torch.relu(y @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"])
            x = x + y @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]
        return x[MAPPING:]

    def logits(self, feature: torch.Tensor, category_ids: list[list[int]]) -> torch.Tensor:
        """One patch's logits: GPT-2's next-token logits after the prefix, averaged over each category's sub-words."""
        tokens = self.gpt2(inputs_embeds=self.prefix(feature)[None]).logits[0, -1]
        return torch.stack([tokens[ids].mean() for ids in category_ids])


@torch.no_grad()
@pytest.mark.parametrize("features", ["clip", "maskclip"])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_images_agree_with_the_direct_computation(mapping, features, sources, converted):
    model, _ = load(converted[mapping, features])
    direct = Direct(sources, mapping)
    for size in [(64, 64), (96, 160)]:  # the size that CLIP was trained at, and another
        pixels = torch.randn(3, *size)
        outputs = model(pixel_values=pixels[None])
        patches = direct.patches(pixels, features)
        torch.testing.assert_close(outputs.image_features[0].flatten(1).T, patches, rtol=0, atol=2e-5)
        expected = torch.stack([direct.logits(patch, model.config.category_ids) for patch in patches])
        assert expected.std() > 0.1
        torch.testing.assert_close(outputs.logits[0].flatten(1).T, expected, rtol=1e-4, atol=1e-4)
        assert outputs.logits.shape[2:] == (size[0] // PATCH, size[1] // PATCH)


@torch.no_grad()
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_word_maps_agree_with_the_direct_computation(mapping, sources, converted):
    model, _ = load(converted[mapping, "clip"])
    direct = Direct(sources, mapping)
    word_map = torch.tensor([[[0, 1, 2], [3, 4, 4], [2, 0, 1]]])
    outputs = model(word_map=word_map)
    expected = [direct.logits(direct.word(name), model.config.category_ids) for name in WORDS]
    torch.testing.assert_close(
        outputs.logits[0].flatten(1).T, torch.stack(expected)[word_map.flatten()], rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_features_of_unit_length_on_request(converted):
    model, _ = load(converted["mlp", "clip"])
    pixels = torch.randn(1, 3, 64, 96)
    before = model(pixel_values=pixels).image_features
    words = model.backbone.embed_words(*model.pad_words(model.config.category_ids, "cpu"))
    config = copy.deepcopy(model.config)
    config.backbone_config.normalize_features = True
    unit = IFSegForSemanticSegmentation(config).eval()
    unit.load_state_dict(model.state_dict())
    torch.testing.assert_close(unit(pixel_values=pixels).image_features, normalize(before, dim=1))
    unit_words = unit.backbone.embed_words(*model.pad_words(model.config.category_ids, "cpu"))
    torch.testing.assert_close(unit_words, normalize(words, dim=-1))
    assert (words.norm(dim=-1) - 1).abs().min() > 0.05


TEXTS = [
    "cat",
    "wet grass",
    "A PHOTO of a Dog's tail",
    "it's 12 cups, e.g. 3½ of them!",
    "fire-hydrant / stop sign",
    "café Ärger 天空",
    "  traffic   light ",
    "the 'sky'd we'll",
]


def test_subwords_agree_with_both_tokenizers(converted):
    subwords = load(converted["mlp", "clip"])[0].backbone.subwords
    clip, gpt2 = clip_tokenizer(), gpt2_tokenizer()
    assert len(set(clip("a photo of a wet grass.")["input_ids"])) < 10  # merges are in use
    ids = [gpt2(f" {text}")["input_ids"] for text in TEXTS]
    assert subwords.texts(ids) == [text.strip() for text in TEXTS]
    assert subwords.encode(TEXTS) == [clip(text)["input_ids"] for text in TEXTS]
    assert subwords.texts([[]]) == [""]
    assert subwords.texts([[len(gpt2) - 1, len(gpt2) + 5]]) == [""]


def test_subwords_without_merges_are_bytes():
    subwords = CLIPSubwords(gpt_vocab_size=300, clip_vocab_size=600)
    assert subwords.texts([[66, 64, 83], [280]]) == ["cat", ""]
    assert subwords.encode(["cat"]) == [[598, 66, 64, 256 + 83, 599]]


@torch.no_grad()
def test_features_of_words_are_cached_until_a_weight_changes(converted, monkeypatch):
    model, _ = load(converted["mlp", "clip"])
    backbone = model.backbone
    ids, mask = model.pad_words(model.config.category_ids, "cpu")
    computed = []
    compute = type(backbone)._text_features
    monkeypatch.setattr(
        type(backbone), "_text_features", lambda self, words: computed.append(len(words)) or compute(self, words)
    )
    with torch.inference_mode():
        first = backbone.embed_words(ids, mask)
    assert torch.equal(backbone.embed_words(ids, mask), first)
    assert not backbone.embed_words(ids, mask).is_inference()
    assert computed == [len(WORDS), 0, 0]
    model.train()
    assert torch.equal(backbone.embed_words(ids, mask), first)
    backbone.clip.text_projection.weight.mul_(2)
    torch.testing.assert_close(backbone.embed_words(ids, mask), 2 * first)
    assert copy.deepcopy(backbone).word_features.features == {}
    mask[0, 0] = 0
    assert not backbone.embed_words(ids, mask)[0, 0].any()


def test_words_that_are_too_long_are_refused(converted):
    model, _ = load(converted["mlp", "clip"], ["cat", "x" * 49])
    with pytest.raises(ValueError, match=r'"x{49}" makes a sentence of \d+ tokens; CLIP reads 50'):
        model(word_map=torch.zeros(1, 2, 2, dtype=torch.long))


def test_training_on_word_maps_updates_mapping_and_gpt2(converted):
    model, _ = load(converted["transformer", "clip"])
    model.freeze_for_word_maps()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {name.split(".")[1] for name in trained}
    assert parts == {"clip_project", "gpt"}
    assert "backbone.gpt.transformer.wte.weight" not in trained
    assert "backbone.gpt.transformer.h.1.mlp.c_fc.weight" in trained
    labels = torch.arange(3)[None].repeat(3, 1)[None]
    model(word_map=labels, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_supervised_training_uses_every_segmentation_parameter(converted):
    for features in ("clip", "maskclip"):
        model, _ = load(converted["mlp", features])
        expected = {id(parameter) for parameter in model.backbone.segmentation_parameters()}
        model(pixel_values=torch.randn(1, 3, 64, 64), labels=torch.zeros(1, 64, 64, dtype=torch.long)).loss.backward()
        used = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
        assert used == expected


def test_dropout_of_the_configuration_is_that_of_gpt2(converted):
    model, _ = load(converted["mlp", "clip"])
    config = copy.deepcopy(model.config)
    config.backbone_config.dropout = 0.25
    gpt = IFSegForSemanticSegmentation(config).backbone.gpt.transformer
    rates = {module.p for module in gpt.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}
    assert not model.train().backbone.clip.text_model.training
    assert model.backbone.gpt.training


def test_onnx_file_for_images_of_any_size_is_refused(converted, tmp_path):
    model, _ = load(converted["mlp", "clip"])
    with pytest.raises(ValueError, match="the backbone clipcap can be exported for images of one size only"):
        export_onnx(model, tmp_path / "model.onnx")


def test_layers_outputs_have_a_row_for_each_image(converted):
    model, _ = load(converted["mlp", "clip"])
    model.set_attn_implementation("eager")
    outputs = model(pixel_values=torch.randn(2, 3, 64, 96), output_hidden_states=True, output_attentions=True)
    assert [tuple(x.shape) for x in outputs.decoder_hidden_states] == [(2, 6, PREFIX, WIDTH)] * 3
    assert [tuple(x.shape) for x in outputs.decoder_attentions] == [(2, 6, 8, PREFIX, PREFIX)] * 2
    assert [tuple(x.shape) for x in outputs.encoder_hidden_states] == [(2, 7, WIDTH)] * 3


def test_tied_weights_and_added_tokens_survive_saving(converted, tmp_path):
    model, _ = load(converted["transformer", "maskclip"])
    model.resize_token_embeddings(len(gpt2_tokenizer()) + 3)
    model.save_pretrained(tmp_path)
    again = IFSegForSemanticSegmentation.from_pretrained(tmp_path)
    assert again.backbone.gpt.lm_head.weight is again.backbone.gpt.transformer.wte.weight
    assert len(again.get_input_embeddings().weight) == len(gpt2_tokenizer()) + 3
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mapping_type": "conv"}, 'mapping_type="conv": choose mlp or transformer'),
        ({"patch_features": "dino"}, 'patch_features="dino": choose clip or maskclip'),
        ({"image_size": 500}, "image_size=500 is not a multiple of CLIP's patch size 32"),
        ({"prefix_length": 0}, "prefix_length=0: sizes are at least 1"),
        ({"mapping_type": "transformer", "mapping_heads": 7}, "mapping_heads=7: GPT-2's width 768"),
        ({"templates": []}, "templates is empty"),
        ({"templates": ["a photo"]}, '"a photo" has not: give sentences with exactly one {}'),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipCapConfig(**settings)


def test_defaults_are_the_published_sizes():
    config = ClipCapConfig()
    assert (config.patch_size, config.vocab_size, config.pad_token_id) == (32, 50257, 50256)
    assert config.clip_config.projection_dim == 512
    assert config.clip_config.vision_config.hidden_size == 768
    assert len(config.templates) == 85
    with torch.device("meta"):
        model = IFSegForSemanticSegmentation(IFSegConfig(backbone_config=config))
    shapes = {name: tuple(x.shape) for name, x in model.backbone.state_dict().items()}
    assert shapes["clip_project.model.0.weight"] == (3840, 512)
    assert shapes["clip_project.model.2.weight"] == (7680, 3840)
    assert shapes["subwords.clip_merges"] == (48894, 2)
    assert shapes["subwords.gpt_merges"] == (50000, 2)
