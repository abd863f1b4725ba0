"""Conversion of OFA and IFSeg checkpoints: names, golden outputs, vocabulary, malicious and damaged sources."""

import argparse
import builtins
import datetime
import enum
import errno
import json
import os
import pickle
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch
from reference_outputs import BPE, fixture, golden, golden_metadata, relative_error, token_ids
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer

from ifseg_hf.hub import checkpoint_reader, conversion
from ifseg_hf.hub.conversion import ConversionError, convert_ofa_checkpoint
from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation, OFAConfig, OFAForConditionalGeneration
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training.recipes import published_recipe

SIZES = ["tiny", "medium", "base", "large", "huge"]
MERGES = ["c a", "ca t", "Ġ cat", "d o", "do g", "Ġ dog"]
EXTRA_TOKENS = 8192 + 1000


def write_vocabulary(folder, layout, bart_tokens=None):
    """Writes a small vocabulary with every byte and two words, padded to `bart_tokens`, in either layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    missing = (bart_tokens or len(tokens) + 8) - 5 - len(tokens)
    tokens += [f"madeupword{i:04}" for i in range(missing)]
    if layout == "hf":
        rows = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]
        (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(rows)}))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    else:
        # numbers and rows are in different orders, as in the published files
        numbers = {token: 7 * i % 100003 for i, token in enumerate(tokens) if not token.startswith("madeup")}
        (folder / "encoder.json").write_text(json.dumps(numbers))
        (folder / "dict.txt").write_text(
            "".join(f"{numbers.get(token, token)} {9 - i}\n" for i, token in enumerate(tokens))
        )
        (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


def small_config():
    return OFAConfig(
        vocab_size=256 + len(MERGES) + 8 + EXTRA_TOKENS,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=40,
        max_position_embeddings=100,
        token_bucket_size=8,
        image_bucket_size=6,
        image_size=64,
        trunk_embedding_size=4,
        trunk_hidden_sizes=(8, 16, 24),
        trunk_depths=(1, 2, 1),
    )


def ofa_name(name):
    """The name of a parameter of this package in OFA's transformers format, or `segmentation_positions.*`."""
    return name.removeprefix("backbone.").removeprefix("model.")


def fairseq_name(name):
    """The fairseq name of a parameter with the name that [`ofa_name`] returns."""
    name = name.replace("segmentation_positions.embed_positions", "decoder.embed_seg_positions")
    name = name.replace("segmentation_positions.layer_norm", "decoder.seg_pos_ln")
    name = name.replace("segmentation_positions.rel_pos_tables", "decoder.seg_rel_pos_table_list")
    name = name.replace("ffn_layer_norm", "ffn_layernorm").replace("cross_attn_mid_layer_norm", "cross_attn_ln")
    name = name.replace("self_attn_mid_layer_norm", "attn_ln" if name.startswith("encoder") else "self_attn_ln")
    return name.replace("cross_attn.", "encoder_attn.").replace("cross_attn_layer_norm", "encoder_attn_layer_norm")


def small_weights(layout, segmentation=False):
    """Random weights of a small model with the names of a published checkpoint, including copies and buffers."""
    torch.manual_seed(0)
    if segmentation:
        model = IFSegForSemanticSegmentation(IFSegConfig(backbone_config=small_config()))
    else:
        model = OFAForConditionalGeneration(small_config())
    weights = {}
    for name, tensor in model.state_dict().items():
        name = ofa_name(name)
        weights[fairseq_name(name) if layout == "fairseq" else name] = torch.rand_like(tensor)
    weights.pop("lm_head.weight", None)
    embedding = weights["encoder.embed_tokens.weight"]
    weights["decoder.embed_tokens.weight"] = weights["decoder.output_projection.weight"] = embedding
    weights["encoder.version"] = weights["decoder.version"] = torch.tensor([3.0])
    weights["encoder.embed_images.bn1.num_batches_tracked"] = torch.tensor(7)
    weights["decoder.image_rp_bucket"] = torch.zeros(5, 5, dtype=torch.long)
    if segmentation:
        weights["encoder.embed_tokens_bag.weight"] = embedding
        weights["decoder.seg_projection.weight"] = torch.rand(2, 16)
        weights["decoder.seg_rp_bucket"] = torch.zeros(5, 5, dtype=torch.long)
    return weights


@pytest.fixture
def hf_folder(tmp_path):
    folder = write_vocabulary(tmp_path / "source", "hf")
    torch.save(small_weights("hf"), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def fairseq_file(tmp_path):
    folder = write_vocabulary(tmp_path / "source", "fairseq")
    save_fairseq(small_weights("fairseq"), folder / "ofa.pt")
    return folder / "ofa.pt"


def save_fairseq(weights, path, **options):
    """Saves weights as fairseq does, with arguments and training state beside them."""
    state = {"args": argparse.Namespace(arch="ofa"), "cfg": None, "model": weights, "extra_state": {"epoch": 3}}
    torch.save(state, path, **options)
    return path


def assert_nothing_written(tmp_path):
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"] == []


# ---------------------------------------------------------------------------------------------------------------------
# Names, shapes, sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "fairseq", "released"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_published_sizes_is_used_or_accounted(size, kind):
    layout = "hf" if kind == "hf" else "fairseq"
    rows = [row for row in fixture.inventory(size) if kind == "released" or not row["segmentation"]]
    shapes = {row[layout]: tuple(row["shape"]) for row in rows}
    used, accounted = conversion.match_names(shapes)
    config = conversion.config_from_shapes({used[name]: shapes[name] for name in used})
    model = conversion.empty_model(config, {used[name]: shapes[name] for name in used})

    assert config.to_dict() == OFAConfig.preset(size, architectures=config.architectures).to_dict()
    assert isinstance(model, IFSegForSemanticSegmentation if kind == "released" else OFAForConditionalGeneration)
    assert used.keys() | accounted.keys() == shapes.keys()
    assert not used.keys() & accounted.keys()
    left_out = {
        row[layout]
        for row in rows
        if row["tied_to"] or row["fairseq"].endswith(("seg_embed_tokens.weight", "seg_projection.weight"))
    }
    assert accounted.keys() == left_out
    for row in rows:  # names in the model are those of the transformers format
        if row["hf"] and row[layout] in used:
            assert used[row[layout]] == row["hf"]


def without_saved_names(config):
    """A configuration's dictionary without the entries that saving adds, also in the backbone's configuration."""
    return {
        name: without_saved_names(value) if name == "backbone_config" else value
        for name, value in config.items()
        if name not in ("architectures", "auto_map", "dtype", "_name_or_path")
    }


@pytest.mark.parametrize("segmentation", [False, True], ids=["ofa", "released"])
def test_converted_fairseq_file_loads_with_from_pretrained(tmp_path, fairseq_file, segmentation):
    weights = small_weights("fairseq", segmentation)
    save_fairseq(weights, fairseq_file)
    report = convert_ofa_checkpoint(fairseq_file, tmp_path / "out")

    model_class = IFSegForSemanticSegmentation if segmentation else OFAForConditionalGeneration
    model, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    config = small_config()
    if not segmentation:
        # without segmentation positions: the largest that the image positions allow, up to 512
        config.image_size = 6 * 16
    config.tuning = published_recipe()
    expected = IFSegConfig(backbone_config=config, tuned=True) if segmentation else config
    assert without_saved_names(model.config.to_dict()) == without_saved_names(expected.to_dict())
    loaded = {fairseq_name(ofa_name(name)): tensor for name, tensor in model.state_dict().items()}
    for name in report.used:
        assert torch.equal(loaded[name], weights[name]), name
    assert report.used.keys() | report.accounted.keys() == weights.keys()
    assert report.ignored == ["args", "cfg", "extra_state"]
    assert (report.size, report.architecture) == ("custom", model_class.__name__)
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())

    processor = IFSegProcessor.from_pretrained(tmp_path / "out")
    assert len(processor.tokenizer) == config.vocab_size
    assert processor.tokenizer.model_max_length == 100
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (config.image_size, 4 * config.image_size)


def test_both_layouts_give_the_same_folder(tmp_path, hf_folder, fairseq_file):
    weights = small_weights("hf")
    save_fairseq({fairseq_name(name): tensor for name, tensor in weights.items()}, fairseq_file)
    convert_ofa_checkpoint(hf_folder, tmp_path / "hf", tokenizer=hf_folder)
    convert_ofa_checkpoint(fairseq_file, tmp_path / "fairseq", tokenizer=hf_folder)
    for name in sorted(os.listdir(tmp_path / "hf")):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "fairseq" / name).read_bytes(), name


def test_converted_ofa_loads_as_segmentation_model(tmp_path, hf_folder):
    convert_ofa_checkpoint(hf_folder, tmp_path / "out")
    model, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(model, IFSegForSemanticSegmentation)
    assert not any(info.values())  # positions for segmentation are expected to be new


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_half_precision_weights_without_training_state(tmp_path, fairseq_file, zipped):
    weights = {name: tensor.half() for name, tensor in small_weights("fairseq").items()}
    torch.save(weights, fairseq_file, _use_new_zipfile_serialization=zipped)
    report = convert_ofa_checkpoint(fairseq_file, tmp_path / "out")
    assert report.ignored == []
    state_dict = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_sources(tmp_path, hf_folder, kind):
    weights = {name: tensor.clone() for name, tensor in small_weights("hf").items()}
    names = sorted(weights)
    file_name = "model-{:05}-of-00002.safetensors" if kind == "safetensors" else "pytorch_model-{:05}-of-00002.bin"
    save = save_file if kind == "safetensors" else torch.save
    shards = {file_name.format(1): names[:100], file_name.format(2): names[100:]}
    for file, members in shards.items():
        save({name: weights[name] for name in members}, hf_folder / file)
    index = hf_folder / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"weight_map": {name: file for file, members in shards.items() for name in members}}))
    (hf_folder / "pytorch_model.bin").unlink()
    report = convert_ofa_checkpoint(hf_folder, tmp_path / "out", max_shard_size="100KB")
    assert report.used.keys() | report.accounted.keys() == weights.keys()
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    model = OFAForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, weights["encoder.embed_tokens.weight"])

    (hf_folder / file_name.format(2)).unlink()
    with pytest.raises(ConversionError, match="is missing"):
        convert_ofa_checkpoint(hf_folder, tmp_path / "again")


def test_embedding_row_beyond_the_vocabulary_is_dropped(tmp_path, fairseq_file):
    weights = small_weights("fairseq", segmentation=True)
    embedding = weights["encoder.embed_tokens.weight"]
    longer = torch.cat([embedding, torch.ones(1, 16)])
    for name in (
        "encoder.embed_tokens",
        "encoder.embed_tokens_bag",
        "decoder.embed_tokens",
        "decoder.output_projection",
    ):
        weights[f"{name}.weight"] = longer
    save_fairseq(weights, fairseq_file)
    report = convert_ofa_checkpoint(fairseq_file, tmp_path / "out")
    model = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert model.config.vocab_size == len(embedding)
    assert "belongs to no token" in report.notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of the published implementation
# ---------------------------------------------------------------------------------------------------------------------


def full_vocabulary(folder, layout):
    """Writes a vocabulary of the published length; golden inputs are ids, so its tokens do not matter."""
    return write_vocabulary(folder, layout, bart_tokens=50265)


def segmentation_error(folder, name):
    """Relative error of the logits of a converted model."""
    expected = golden(name)
    model = IFSegForSemanticSegmentation.from_pretrained(folder)
    known = {
        category: torch.tensor(ids)
        for words in token_ids().values()
        if "categories" in words
        for category, ids in zip(words["categories"], words["category_token_ids"], strict=True)
    }
    ids = [known[category] for category in golden_metadata(name)["categories"]]
    category_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)[None]
    with torch.no_grad():
        logits = model(
            pixel_values=fixture.pixel_values(512, 512),
            input_ids=expected["input_ids"],
            category_ids=category_ids,
            category_mask=(category_ids != 1).long(),
        ).logits
    return relative_error(logits.flatten(2).transpose(1, 2), expected["logits"])


def test_tiny_released_checkpoint_gives_golden_logits(tmp_path):
    folder = full_vocabulary(tmp_path / "source", "fairseq")
    save_fairseq(fixture.checkpoint("tiny", "fairseq", segmentation=True), folder / "ifseg.pt")
    report = convert_ofa_checkpoint(folder / "ifseg.pt", tmp_path / "out")
    assert report.size == "tiny"
    assert segmentation_error(tmp_path / "out", "tiny_512x512") < 5e-6


def test_tiny_transformers_checkpoint_gives_golden_text_logits(tmp_path):
    folder = full_vocabulary(tmp_path / "source", "hf")
    torch.save(fixture.checkpoint("tiny", "hf"), folder / "pytorch_model.bin")
    convert_ofa_checkpoint(folder, tmp_path / "out")
    expected = golden("ofa_tiny_256x256")
    model = OFAForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = {
        "pixel_values": fixture.pixel_values(256, 256, batch=2),
        "input_ids": expected["input_ids"],
        "attention_mask": (expected["input_ids"] != 1).long(),
    }
    with torch.no_grad():
        outputs = model(**inputs, decoder_input_ids=expected["decoder_input_ids"])
    hidden = outputs.encoder_last_hidden_state
    hidden = hidden[:, torch.linspace(0, hidden.shape[1] - 1, 24).long()]
    assert relative_error(hidden, expected["encoder_last_hidden_sampled"]) < 5e-6
    assert relative_error(outputs.logits[..., ::97], expected["logits_every_97th_token"]) < 5e-6


@pytest.mark.slow
def test_base_in_both_layouts(tmp_path):
    try:
        vocabulary = full_vocabulary(tmp_path / "source", "fairseq")
        weights = fixture.checkpoint("base", "fairseq", segmentation=True)
        save_fairseq(weights, tmp_path / "source" / "ifseg.pt")
        report = convert_ofa_checkpoint(tmp_path / "source" / "ifseg.pt", tmp_path / "released")
        assert report.size == "base"
        assert segmentation_error(tmp_path / "released", "base_512x512") < 5e-6

        names = {row["hf"]: row["fairseq"] for row in fixture.inventory("base") if row["hf"]}
        torch.save({hf: weights[fairseq] for hf, fairseq in names.items()}, tmp_path / "source" / "pytorch_model.bin")
        report = convert_ofa_checkpoint(tmp_path / "source", tmp_path / "hf", tokenizer=vocabulary)
        assert report.size == "base"
        released, converted = (
            {ofa_name(name): tensor for name, tensor in load_file(tmp_path / folder / "model.safetensors").items()}
            for folder in ("released", "hf")
        )
        assert released.keys() - converted.keys() == {name for name in released if name.startswith("segmentation_pos")}
        for name, tensor in converted.items():
            assert torch.equal(tensor, released[name]), name
    finally:
        shutil.rmtree(tmp_path)  # 3 GB that pytest would keep


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary
# ---------------------------------------------------------------------------------------------------------------------


def test_both_vocabulary_layouts_give_the_same_tokenizer(tmp_path):
    tokenizers = [conversion.load_tokenizer(write_vocabulary(tmp_path / name, name)) for name in ("hf", "fairseq")]
    assert tokenizers[0].backend_tokenizer.to_str() == tokenizers[1].backend_tokenizer.to_str()
    bart = len(tokenizers[0]) - EXTRA_TOKENS
    ids = tokenizers[1](" cat<bin_5> dog<code_0>").input_ids
    assert tokenizers[1].convert_ids_to_tokens(ids[1:-1]) == ["Ġcat", "<bin_5>", "Ġdog", "<code_0>"]
    assert [ids[2], ids[4]] == [bart + 8192 + 5, bart]

    tokenizers[1].save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(loaded) == bart + EXTRA_TOKENS
    assert loaded(" cat<bin_5> dog<code_0>").input_ids == ids


@pytest.mark.skipif(BPE is None, reason="the published vocabulary is not part of the project")
def test_published_vocabulary(tmp_path):
    for name in ("dict.txt", "encoder.json", "vocab.bpe"):
        shutil.copy(BPE / name, tmp_path)
    vocab = conversion.read_fairseq_vocabulary(tmp_path / "dict.txt", tmp_path / "encoder.json")
    assert vocab == json.loads((BPE / "vocab.json").read_text())
    assert list(vocab.values()) == list(range(50265))
    ours, theirs = conversion.load_tokenizer(tmp_path), conversion.load_tokenizer(BPE)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert len(ours) == 59457
    reference = token_ids()["coco_stuff_unseen_15"]
    for category, ids in zip(reference["categories"], reference["category_token_ids"], strict=True):
        assert ours(f" {category}", add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize("layout", ["hf", "fairseq"])
def test_damaged_vocabulary(tmp_path, layout):
    folder = write_vocabulary(tmp_path / "source", layout)
    (folder / ("vocab.json" if layout == "hf" else "encoder.json")).write_text("{")
    with pytest.raises(ConversionError, match=r"vocabulary in .* cannot be read"):
        conversion.load_tokenizer(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def test_released_checkpoint_keeps_given_categories(tmp_path, fairseq_file):
    weights = small_weights("fairseq", segmentation=True)
    save_fairseq(weights, fairseq_file)
    assert not convert_ofa_checkpoint(fairseq_file, tmp_path / "without").has_words
    assert IFSegConfig.from_pretrained(tmp_path / "without").category_ids is None

    report = convert_ofa_checkpoint(fairseq_file, tmp_path / "out", categories=["cat", "dog"])
    assert report.has_words
    assert "trained on other words" in report.notes[0]  # the category means are random
    model = IFSegForSemanticSegmentation.from_pretrained(tmp_path / "out")
    processor = IFSegProcessor.from_pretrained(tmp_path / "out")
    words = processor(categories=["cat", "dog"], return_tensors="pt")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    pixels = fixture.pixel_values(64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).logits, model(pixel_values=pixels, **words).logits)

    means = weights["encoder.embed_tokens.weight"][words["category_ids"][0, :, 0]]
    save_fairseq({**weights, "decoder.seg_projection.weight": means}, fairseq_file)
    assert convert_ofa_checkpoint(fairseq_file, tmp_path / "match", categories=["cat", "dog"]).notes == []
    assert convert_ofa_checkpoint(fairseq_file, tmp_path / "swapped", categories=["dog", "cat"]).notes


def test_wrong_categories_are_refused(tmp_path, fairseq_file):
    with pytest.raises(ConversionError, match="gets its categories when it is trained"):
        convert_ofa_checkpoint(fairseq_file, tmp_path / "out", categories=["cat"])
    save_fairseq(small_weights("fairseq", segmentation=True), fairseq_file)
    with pytest.raises(ConversionError, match="cat"):
        convert_ofa_checkpoint(fairseq_file, tmp_path / "out", categories=["cat", "cat"])
    assert_nothing_written(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Pickles that would run code
# ---------------------------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Fills:
    """Pickles as a dict with the result of a call as a value."""

    def __init__(self, function, *arguments):
        self.item = ("key", Calls(function, *arguments))

    def __reduce__(self):
        return dict, (), None, None, iter([self.item])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "beside-weights"])
@pytest.mark.parametrize("kind", ["os", "subprocess", "eval", "torch", "items"])
def test_no_code_in_pickles_is_run(tmp_path, fairseq_file, kind, nested, zipped):
    marker = tmp_path / "source" / "marker"
    evil = {
        "os": Calls(os.system, f"touch {marker}"),
        "subprocess": Calls(subprocess.check_call, ["touch", str(marker)]),
        "eval": Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()"),
        "torch": Calls(torch.save, {}, str(marker)),
        "items": Fills(subprocess.check_call, ["touch", str(marker)]),
    }[kind]
    state = {"model": small_weights("fairseq"), "args": evil} if nested else evil
    torch.save(state, fairseq_file, _use_new_zipfile_serialization=zipped)
    try:
        report = convert_ofa_checkpoint(fairseq_file, tmp_path / "out")
    except ConversionError:
        assert_nothing_written(tmp_path)
    else:  # read inertly; the weights beside it are used
        assert nested
        assert report.ignored == ["args"]
    assert not marker.exists()

    torch.load(fairseq_file, weights_only=False)  # unrestricted loading does run the code
    assert marker.exists()


def test_refusal_names_the_function_called(tmp_path, fairseq_file):
    torch.save(Calls(os.system, "true"), fairseq_file)
    with pytest.raises(ConversionError, match=r"calls posix\.system|calls nt\.system"):
        convert_ofa_checkpoint(fairseq_file, tmp_path / "out")


class Option(enum.Enum):
    YES = "yes"


def test_unknown_classes_are_read_inertly_and_stay_untrusted(tmp_path, fairseq_file):
    state = {
        "model": small_weights("fairseq"),
        "cfg": argparse.Namespace(
            option=Option.YES, at=datetime.date(2022, 6, 1), path=fairseq_file, kind={int: "int"}
        ),
        "extra_state": {"loss": np.float64(2.5), "losses": np.ones(3), "random": random.Random(0), "tags": {1, "two"}},
        "last_optimizer_state": torch.optim.AdamW([torch.ones(2)]).state_dict(),
    }
    torch.save(state, fairseq_file)
    trusted = set(torch.serialization.get_safe_globals())
    report = convert_ofa_checkpoint(fairseq_file, tmp_path / "out")
    assert report.ignored == ["cfg", "extra_state", "last_optimizer_state"]
    assert set(torch.serialization.get_safe_globals()) == trusted
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        torch.load(fairseq_file, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# Sources that are damaged, or something else
# ---------------------------------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cut short"),
        (lambda path: path.write_bytes(b""), "cannot be read as a checkpoint"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
        (lambda path: path.write_text("<!DOCTYPE html><html></html>"), "web page"),
    ],
    ids=["truncated", "empty", "lfs", "html"],
)
def test_damaged_file(tmp_path, fairseq_file, damage, message, zipped):
    torch.save(small_weights("fairseq"), fairseq_file, _use_new_zipfile_serialization=zipped)
    damage(fairseq_file)
    with pytest.raises(ConversionError, match=message):
        convert_ofa_checkpoint(fairseq_file, tmp_path / "out")
    assert_nothing_written(tmp_path)


def test_flipped_bit(tmp_path, fairseq_file):
    content = bytearray(fairseq_file.read_bytes())
    content[len(content) // 2] ^= 1
    fairseq_file.write_bytes(content)
    with pytest.raises(ConversionError, match="checksum"):
        convert_ofa_checkpoint(fairseq_file, tmp_path / "out")
    assert_nothing_written(tmp_path)


def test_damaged_safetensors(tmp_path, hf_folder):
    (hf_folder / "pytorch_model.bin").unlink()
    save_file({name: tensor.clone() for name, tensor in small_weights("hf").items()}, hf_folder / "model.safetensors")
    convert_ofa_checkpoint(hf_folder, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    truncate(hf_folder / "model.safetensors")
    with pytest.raises(ConversionError, match="cut short"):
        convert_ofa_checkpoint(hf_folder, tmp_path / "out")
    assert_nothing_written(tmp_path)


def drop(name):
    return lambda weights: weights.pop(name)


def drop_all(prefix):
    return lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(prefix)]


def put(name, tensor):
    return lambda weights: weights.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("decoder.layers.1.fc1.weight"), r"Missing: decoder\.layers\.1\.fc1\.weight\."),
        (drop("encoder.embed_images.conv1.weight"), "This is no OFA checkpoint"),
        (drop("encoder.token_rel_pos_table_list.1.weight"), "Missing: encoder.token_rel_pos_table_list.1.weight"),
        (put("classification_heads.snli.weight", torch.ones(2)), r"Left over: classification_heads\.snli\.weight\."),
        (put("decoder.layers.0.fc1.bias", torch.ones(41)), r"decoder\.layers\.0\.fc1\.bias \(41,\) not \(40,\)"),
        (put("decoder.layers.0.fc1.bias", torch.full((40,), torch.nan)), r"finite .* decoder\.layers\.0\.fc1\.bias"),
        (put("decoder.layers.0.fc1.bias", torch.ones(40, dtype=torch.int)), "finite"),
        (put("decoder.layers.0.fc1.bias", torch.ones(40, device="meta")), "no plain tensors"),
        (put("decoder.output_projection.weight", torch.ones(9462, 16)), "not tied"),
        (put("encoder.layers.0.self_attn.c_attn", torch.ones(3)), "not a multiple"),
        (put("encoder.layers.0.self_attn_mid_layer_norm.bias", torch.ones(16)), "two tensors for each"),
        (put("encoder.embed_tokens.weight", torch.ones(77, 16)), "do not belong together"),
        (put("step", 3), "no plain tensors"),
        (put(5, torch.ones(3)), "no plain tensors"),
        (put("decoder.output_projection.weight", torch.ones(9462, 16).half()), "not tied"),
        (put("encoder.layers.0.self_attn.c_attn", torch.ones(0)), "No OFA model has the shapes"),
        (drop_all("encoder.embed_images.layer"), r"no OFA checkpoint: encoder\.embed_images\.layer1\.0\.conv3"),
    ],
)
def test_missing_extra_or_wrong_tensors_are_refused(tmp_path, fairseq_file, change, message):
    weights = small_weights("fairseq")
    change(weights)
    save_fairseq(weights, fairseq_file)
    with pytest.raises(ConversionError, match=message):
        convert_ofa_checkpoint(fairseq_file, tmp_path / "out")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        {"bert.embeddings.word_embeddings.weight": torch.ones(3, 4), "bert.pooler.dense.bias": torch.ones(4)},
        {"model": {"encoder.sentence_encoder.embed_tokens.weight": torch.ones(3, 4)}},
        {"model": {}},
        [torch.ones(3)],
        torch.ones(3),
    ],
    ids=["bert", "roberta", "empty", "list", "tensor"],
)
def test_other_kinds_of_checkpoints_are_refused(tmp_path, fairseq_file, other):
    torch.save(other, fairseq_file)
    with pytest.raises(ConversionError, match=r"no OFA checkpoint|holds no weights"):
        convert_ofa_checkpoint(fairseq_file, tmp_path / "out")
    assert_nothing_written(tmp_path)


def test_unsuitable_folders_are_refused(tmp_path, hf_folder):
    (hf_folder / "pytorch_model.bin").rename(hf_folder / "weights.bin")
    with pytest.raises(ConversionError, match="has no weights"):
        convert_ofa_checkpoint(hf_folder, tmp_path / "out")
    (hf_folder / "weights.bin").rename(hf_folder / "pytorch_model.bin")
    (hf_folder / "merges.txt").unlink()
    with pytest.raises(ConversionError, match="--tokenizer"):
        convert_ofa_checkpoint(hf_folder, tmp_path / "out")
    assert_nothing_written(tmp_path)
    write_vocabulary(hf_folder, "hf")
    convert_ofa_checkpoint(hf_folder, tmp_path / "out")
    with pytest.raises(ConversionError, match="already converted"):
        convert_ofa_checkpoint(tmp_path / "out", tmp_path / "again", tokenizer=hf_folder)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub and the disk
# ---------------------------------------------------------------------------------------------------------------------


def test_hub_id_is_downloaded_without_code(tmp_path, hf_folder, monkeypatch):
    asked = {}

    def download(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(hf_folder)

    monkeypatch.setattr(checkpoint_reader, "snapshot_download", download)
    convert_ofa_checkpoint("OFA-Sys/ofa-small", tmp_path / "out")
    assert asked["repo_id"] == "OFA-Sys/ofa-small"
    assert {"pytorch_model.bin", "vocab.json", "merges.txt"} <= set(asked["patterns"])
    assert not any(pattern.endswith(".py") or pattern == "*" for pattern in asked["patterns"])


def test_missing_sources(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(checkpoint_reader, "snapshot_download", offline)
    with pytest.raises(ConversionError, match=r"could not be downloaded from the Hub \(no network\)"):
        convert_ofa_checkpoint("OFA-Sys/ofa-base", tmp_path / "out")
    for source in ("nowhere", "some/where/ofa", "checkpoints/ofa_base.pt", tmp_path / "ofa"):
        with pytest.raises(ConversionError, match="There is no file or folder"):
            convert_ofa_checkpoint(source, tmp_path / "out")


def test_output_is_complete_or_absent(tmp_path, hf_folder, monkeypatch):
    occupied = tmp_path / "source"
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert_ofa_checkpoint(hf_folder, occupied)
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert_ofa_checkpoint(hf_folder, hf_folder / "pytorch_model.bin")

    def disk_full(self, folder, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(IFSegProcessor, "save_pretrained", disk_full)  # after the weights were written
        with pytest.raises(ConversionError, match="No space left"):
            convert_ofa_checkpoint(hf_folder, tmp_path / "out")
    assert_nothing_written(tmp_path)

    (tmp_path / "out").mkdir()  # empty: fine
    convert_ofa_checkpoint(hf_folder, tmp_path / "out")
    convert_ofa_checkpoint(hf_folder, tmp_path / "new" / "folders" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out", "source"]
