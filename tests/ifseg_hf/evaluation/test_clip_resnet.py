"""CLIP and MaskCLIP with a ResNet: a small state dict with OpenAI's names, against computations from its tensors."""

import io
import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from image_folders import save_masked_images
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, interpolate, layer_norm, normalize
from transformers import CLIPTextConfig, CLIPTokenizer

from ifseg_hf.data.segmentation import load_segmentation_dataset
from ifseg_hf.evaluation import baselines
from ifseg_hf.evaluation.baselines import load_baseline
from ifseg_hf.evaluation.clip_resnet import CLIPResNet, load_clip_resnet
from ifseg_hf.evaluation.evaluate import evaluate_segmenter
from ifseg_hf.processing.post_processing_ifseg import segmentation_maps
from scripts import load_script

WIDTH, DEPTHS, TEXT, LAYERS, SHARED, CONTEXT = 4, (2, 1, 2, 1), 128, 2, 12, 60
CHANNELS = 32 * WIDTH  # of the last stage; two heads of 64
CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*CHARACTERS, *(f"{x}</w>" for x in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
WORDS = ["cat", "wet grass", "sky"]


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenAI's state dict, at this size."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, norm: str, out: int, channels: int, side: int):
        found[f"{name}.weight"] = (out, channels, side, side)
        found.update({f"{norm}.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")})

    half = WIDTH // 2
    for number, (out, channels) in enumerate([(half, 3), (half, half), (WIDTH, half)], 1):
        conv(f"visual.conv{number}", f"visual.bn{number}", out, channels, 3)
    channels = WIDTH
    for stage, depth in enumerate(DEPTHS):
        width = WIDTH * 2**stage
        for block in range(depth):
            start = f"visual.layer{stage + 1}.{block}"
            conv(f"{start}.conv1", f"{start}.bn1", width, channels, 1)
            conv(f"{start}.conv2", f"{start}.bn2", width, width, 3)
            conv(f"{start}.conv3", f"{start}.bn3", 4 * width, width, 1)
            if block == 0:
                conv(f"{start}.downsample.0", f"{start}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    found["visual.attnpool.positional_embedding"] = (50, CHANNELS)
    for part, out in (("q", CHANNELS), ("k", CHANNELS), ("v", CHANNELS), ("c", SHARED)):
        found |= {f"visual.attnpool.{part}_proj.weight": (out, CHANNELS), f"visual.attnpool.{part}_proj.bias": (out,)}
    found |= {"token_embedding.weight": (len(TOKENS), TEXT), "positional_embedding": (CONTEXT, TEXT)}
    found |= {"ln_final.weight": (TEXT,), "ln_final.bias": (TEXT,), "text_projection": (TEXT, SHARED)}
    for layer in range(LAYERS):
        start = f"transformer.resblocks.{layer}"
        sizes = {"attn.in_proj": (3 * TEXT, TEXT), "attn.out_proj": (TEXT, TEXT), "mlp.c_fc": (4 * TEXT, TEXT)}
        for name, (out, inside) in {**sizes, "mlp.c_proj": (TEXT, 4 * TEXT)}.items():
            separator = "_" if name == "attn.in_proj" else "."
            found |= {f"{start}.{name}{separator}weight": (out, inside), f"{start}.{name}{separator}bias": (out,)}
        for name in ("ln_1", "ln_2"):
            found |= {f"{start}.{name}.weight": (TEXT,), f"{start}.{name}.bias": (TEXT,)}
    return {**found, "logit_scale": ()}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes().items():
        scale = 0.3 if len(shape) < 2 else 1.5 * np.prod(shape[1:]) ** -0.5
        tensors[name] = scale * torch.randn(shape, generator=random)
        if name.endswith("running_var"):
            tensors[name] = 0.5 + torch.rand(shape, generator=random)
        elif len(shape) == 1 and name.endswith(".weight"):
            tensors[name] += 1
    return {**tensors, "logit_scale": torch.tensor(2.0)}


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    """The state dict as three kinds of files, beside a tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("clip")
    CLIPTokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]).save_pretrained(folder)
    counts = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(CONTEXT)}
    torch.save({**weights, **counts}, folder / "plain.pt")
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "plain.safetensors")
    save_torchscript({**weights, **counts}, folder / "RN50.pt")
    return folder


class Tree(torch.nn.Module):
    """A module with these tensors, whose forward pass is code in its archive."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                parts.setdefault(first, {})[rest] = tensor
            else:
                self.register_buffer(first, tensor)
        for name, inside in parts.items():
            self.add_module(name, Tree(inside))

    def forward(self, x: torch.Tensor):
        return x + 1


def save_torchscript(tensors: dict[str, torch.Tensor], file) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(Tree(tensors)).save(str(file))


def loaded(kind: str, file, words=WORDS):
    segmenter = load_baseline(kind, file, "cpu")
    segmenter.set_words(words)
    return segmenter


def computed_stages(weights: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
    """The last stage's features (1, C, h, w) of one image, by functions alone."""

    def conv_norm(x, conv, norm, **settings):
        mean, variance = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
        return batch_norm(
            conv2d(x, weights[f"{conv}.weight"], **settings),
            *(mean, variance, weights[f"{norm}.weight"], weights[f"{norm}.bias"]),
        )

    def halve(x):
        return adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))

    x = conv_norm(pixel_values, "visual.conv1", "visual.bn1", stride=2, padding=1).relu()
    x = conv_norm(x, "visual.conv2", "visual.bn2", padding=1).relu()
    x = halve(conv_norm(x, "visual.conv3", "visual.bn3", padding=1).relu())
    for stage, depth in enumerate(DEPTHS, 1):
        for block in range(depth):
            start, shrink = f"visual.layer{stage}.{block}", stage > 1 and block == 0
            y = conv_norm(x, f"{start}.conv1", f"{start}.bn1").relu()
            y = conv_norm(y, f"{start}.conv2", f"{start}.bn2", padding=1).relu()
            y, x = (halve(y), halve(x)) if shrink else (y, x)
            if block == 0:
                x = conv_norm(x, f"{start}.downsample.0", f"{start}.downsample.1")
            x = (x + conv_norm(y, f"{start}.conv3", f"{start}.bn3")).relu()
    return x


def computed_patches(weights: dict[str, torch.Tensor], stage: torch.Tensor, kind: str) -> torch.Tensor:
    """Patches (patches, shared) in the space of the texts."""

    def part(name, x):
        return x @ weights[f"visual.attnpool.{name}_proj.weight"].T + weights[f"visual.attnpool.{name}_proj.bias"]

    x = stage[0].flatten(1).T
    if kind == "maskclip":  # the projections as 1x1 convolutions
        value = conv2d(
            stage, weights["visual.attnpool.v_proj.weight"][:, :, None, None], weights["visual.attnpool.v_proj.bias"]
        )
        out = weights["visual.attnpool.c_proj.weight"][:, :, None, None]
        return conv2d(value, out, weights["visual.attnpool.c_proj.bias"])[0].flatten(1).T
    keys = torch.cat([x.mean(0, keepdim=True), x])
    heads = []
    for head in range(CHANNELS // 64):
        own = slice(64 * head, 64 * head + 64)
        similarity = part("q", x)[:, own] @ part("k", keys)[:, own].T / 8
        heads.append(similarity.softmax(1) @ part("v", keys)[:, own])
    return part("c", torch.cat(heads, 1))


def computed_text(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """The feature (shared,) of a text."""

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"][: len(ids)]
    hidden = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for layer in range(LAYERS):
        start = f"transformer.resblocks.{layer}"
        y = norm(x, f"{start}.ln_1") @ weights[f"{start}.attn.in_proj_weight"].T
        query, key, value = (y + weights[f"{start}.attn.in_proj_bias"]).unflatten(1, (3, 2, 64)).permute(1, 2, 0, 3)
        y = ((query @ key.mT / 8 + hidden).softmax(-1) @ value).transpose(0, 1).flatten(1)
        x = x + y @ weights[f"{start}.attn.out_proj.weight"].T + weights[f"{start}.attn.out_proj.bias"]
        y = norm(x, f"{start}.ln_2") @ weights[f"{start}.mlp.c_fc.weight"].T + weights[f"{start}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ weights[f"{start}.mlp.c_proj.weight"].T + weights[f"{start}.mlp.c_proj.bias"]
    return norm(x, "ln_final")[-1] @ weights["text_projection"]


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    small = torch.from_numpy(random.uniform(0, 255, (1, 3, 4, 5))).float()
    return interpolate(small, (height, width), mode="bilinear")[0].permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.mark.parametrize("kind", ["clip", "maskclip"])
def test_patches_and_words_agree_with_the_weights(kind, weights, folder, monkeypatch):
    monkeypatch.setattr(baselines, "PROMPT_TEMPLATES", ["a photo of a {}.", "the {}."])
    segmenter = loaded(kind, folder / "RN50.pt")
    pixel_values = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    outputs = segmenter({"pixel_values": pixel_values, "pixel_mask": torch.ones(1, 64, 96, dtype=torch.int64)})
    stage = computed_stages(weights, pixel_values)
    torch.testing.assert_close(outputs.image_features, stage, rtol=1e-4, atol=1e-4)
    embeddings = []
    for word in WORDS:
        ids = [segmenter.tokenizer(text)["input_ids"] for text in (f"a photo of a {word}.", f"the {word}.")]
        assert ids[0][0] == len(TOKENS) - 2
        texts = torch.stack([computed_text(weights, tokens) for tokens in ids])
        embeddings.append(normalize(normalize(texts, dim=1).mean(0), dim=0))
    torch.testing.assert_close(segmenter.word_embeddings, torch.stack(embeddings), rtol=0, atol=1e-5)
    patches = normalize(computed_patches(weights, stage, kind), dim=1)
    expected = weights["logit_scale"].exp() * patches @ torch.stack(embeddings).T
    torch.testing.assert_close(outputs.logits[0].flatten(1).T, expected, rtol=0, atol=1e-3)
    assert outputs.logits.shape == (1, 3, 2, 3)


def test_maskclip_differs_from_clip_only_in_the_pooling(folder):
    inputs = load_baseline("clip", folder / "plain.pt").preprocess([image(64, 64)])
    clip, maskclip = (loaded(kind, folder / "plain.pt")(inputs) for kind in ("clip", "maskclip"))
    assert torch.equal(clip.image_features, maskclip.image_features)
    assert (clip.logits - maskclip.logits).abs().max() > 0.01


def test_every_kind_of_file_gives_the_same_model(folder):
    first = load_clip_resnet(folder / "RN50.pt").state_dict()
    for name in ("plain.pt", "plain.safetensors"):
        other = load_clip_resnet(folder / name).state_dict()
        assert all(torch.equal(x, other[key]) for key, x in first.items())


def test_half_precision_files_compute_in_float32(weights, folder, tmp_path):
    save_torchscript({name: x.half() for name, x in weights.items()}, tmp_path / "RN50.pt")
    model = load_clip_resnet(tmp_path / "RN50.pt")
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.visual.conv1.weight, weights["visual.conv1.weight"], rtol=0, atol=1e-2)


def test_images_of_several_sizes_get_what_each_gets_alone(folder):
    segmenter = loaded("maskclip", folder / "RN50.pt")
    images = [image(60, 80), image(80, 60, 1)]
    together = segmenter(segmenter.preprocess(images))
    assert together.logits.shape == (2, 3, 21, 21)
    for number, single in enumerate(images):
        alone = segmenter(segmenter.preprocess([single]))
        height, width = alone.logits.shape[2:]
        torch.testing.assert_close(together.logits[number, :, :height, :width], alone.logits[0], rtol=0, atol=1e-4)
        (labels,) = segmentation_maps(alone, [single.shape[:2]])
        assert labels.shape == single.shape[:2]


def test_an_evaluation_is_resumed_by_the_weights(folder, tmp_path):
    data = load_segmentation_dataset(save_masked_images(tmp_path / "images", count=2), split="train")
    segmenter = loaded("clip", folder / "RN50.pt", data.names)
    evaluation = evaluate_segmenter(segmenter, data, [(3, 2)], state_dir=tmp_path / "state")
    again = evaluate_segmenter(segmenter, data, [(3, 2)], state_dir=tmp_path / "state")
    assert again.images == evaluation.images == 2
    assert again.results() == evaluation.results()
    other = loaded("clip", folder / "RN50.pt", data.names)
    other.model.visual.conv1.weight.data += 1
    with pytest.raises(ValueError, match="another"):
        evaluate_segmenter(other, data, [(3, 2)], state_dir=tmp_path / "state")


def test_the_command_evaluates_a_file_of_openai(folder, tmp_path, capsys):
    images = save_masked_images(tmp_path / "images", count=2)
    arguments = ["--baseline", "maskclip", "--model", str(folder / "RN50.pt"), "--dataset", images, "--split", "train"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--smoothing-iterations", "0", "--cpu"]
    assert load_script("eval").main(arguments) == 0
    assert "2 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["baseline"] == "maskclip"
    other = ["maskclip", "--model", str(folder / "tokenizer.json"), "--dataset", images, "--split", "train", "--cpu"]
    assert load_script("eval").main(["--baseline", *other, "--output-dir", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("depths", "shared", "millions"),
    [((3, 4, 6, 3), 1024, 102.01), ((3, 4, 23, 3), 512, 119.69)],
    ids=["RN50", "RN101"],
)
def test_published_sizes_have_the_published_numbers_of_parameters(depths, shared, millions):
    text = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    with torch.device("meta"):
        model = CLIPResNet(depths, 64, CLIPTextConfig(**text, num_attention_heads=8, projection_dim=shared))
    positions = 50 * 2048  # of the attention pooling, which are not used
    assert round((sum(x.numel() for x in model.parameters()) + positions) / 1e6, 2) == millions


def without(name):
    return lambda weights: {key: x for key, x in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("visual.layer2.0.conv2.weight"), r"visual\.layer2\.0\.conv2\.weight differ"),
        (without("token_embedding.weight"), "incomplete .*token_embedding"),
        (lambda w: {**w, "extra": torch.ones(1)}, "extra differ"),
        (lambda w: {**w, "ln_final.bias": torch.ones(3)}, r"final_layer_norm\.bias differ"),
        (lambda w: {"visual.class_embedding": torch.ones(3)}, "vision transformer"),
        (lambda w: {"encoder.weight": torch.ones(3)}, "no CLIP .*encoder.weight"),
        (lambda w: [1, 2], "no CLIP"),
    ],
)
def test_other_weights_are_refused(change, message, weights, tmp_path):
    torch.save(change(weights), tmp_path / "RN101.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_baseline("clip", tmp_path / "RN101.pt")
    assert "is no CLIP that can be loaded: " in str(caught.value)
    assert "\n" not in str(caught.value)


class Calls:
    """An object whose pickle would call a function."""

    def __reduce__(self):
        return print, ("code was run",)


def test_damaged_files_and_code_are_refused(folder, tmp_path, capsys):
    whole = (folder / "RN50.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"visual.layer1.0.conv1.weight": Calls()}, tmp_path / "code.pt")
    for name, message in (("cut.pt", "damaged|cannot be read"), ("code.pt", "no code in it was run")):
        with pytest.raises(ValueError, match=message) as caught:
            load_baseline("clip", tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


def test_code_in_a_torchscript_archive_is_not_run(folder, tmp_path, capsys):
    """Neither its source nor a function that its pickle calls."""
    pickled = b"\x80\x02c__builtin__\nprint\n(X\x0c\x00\x00\x00code was runtR."
    buffer = io.BytesIO()
    with zipfile.ZipFile(folder / "RN50.pt") as archive, zipfile.ZipFile(buffer, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, pickled if name.endswith("/data.pkl") else archive.read(name))
    (tmp_path / "RN50.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="no CLIP"):
        load_baseline("clip", tmp_path / "RN50.pt")
    assert "code was run" not in capsys.readouterr().out


def test_the_tokenizer_is_the_models(folder, weights, tmp_path):
    torch.save({**weights, "token_embedding.weight": torch.ones(len(TOKENS) + 1, TEXT)}, tmp_path / "RN50.pt")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=rf"has {len(TOKENS)} tokens, and the model {len(TOKENS) + 1}"):
        load_baseline("clip", tmp_path / "RN50.pt")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"put vocab\.json and merges\.txt") as caught:
        load_baseline("clip", tmp_path / "RN50.pt")
    assert "\n" not in str(caught.value)
