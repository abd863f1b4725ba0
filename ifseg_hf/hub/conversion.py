"""Published checkpoints, as they are downloaded, to a folder that `from_pretrained` loads.

Three kinds of source are understood. Which one it is, and how large the model is, the tensors themselves say:

- OFA in the transformers format: a folder or Hub id with `pytorch_model.bin` or safetensors, vocab.json, merges.txt;
- OFA as fairseq saved it: a `.pt` file, whose vocabulary (dict.txt, encoder.json, vocab.bpe) is kept elsewhere;
- a released IFSeg checkpoint: a fairseq `.pt` with segmentation positions besides.

Every tensor of the source is either used or accounted for with a reason, and no code in a source is ever run.
"""

import json
import pickle
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import BartTokenizer, PreTrainedModel

from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.modeling.modeling_ofa import IFSegForConditionalGeneration
from ifseg_hf.processing.image_processing_ifseg import IFSegImageProcessor
from ifseg_hf.processing.processing_ifseg import IFSegProcessor

# Weight files of a folder, in order of preference.
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_TRANSFORMERS_VOCABULARY = ("vocab.json", "merges.txt")
_FAIRSEQ_VOCABULARY = ("dict.txt", "encoder.json", "vocab.bpe")
# OFA's tokens after BART's: codes of image patches and bins of coordinates.
_EXTRA_TOKENS = [f"<code_{i}>" for i in range(8192)] + [f"<bin_{i}>" for i in range(1000)]

# Parts of a fairseq name and what they are called in the transformers format, or here (segmentation positions).
_RENAMES = {
    ".encoder_attn.": ".cross_attn.",
    ".encoder_attn_layer_norm.": ".cross_attn_layer_norm.",
    ".attn_ln.": ".self_attn_mid_layer_norm.",
    ".self_attn_ln.": ".self_attn_mid_layer_norm.",
    ".cross_attn_ln.": ".cross_attn_mid_layer_norm.",
    ".ffn_layernorm.": ".ffn_layer_norm.",
    "decoder.embed_seg_positions.": "segmentation_positions.embed_positions.",
    "decoder.seg_pos_ln.": "segmentation_positions.layer_norm.",
    "decoder.seg_rel_pos_table_list.": "segmentation_positions.rel_pos_tables.",
}
_SEGMENTATION = "segmentation_positions."
_EMBEDDING = "encoder.embed_tokens.weight"
_COPIES_OF_EMBEDDING = (
    "decoder.embed_tokens.weight",
    "decoder.output_projection.weight",
    "encoder.embed_tokens_bag.weight",
)
_CATEGORY_MEANS = (
    "encoder.seg_embed_tokens.weight",
    "decoder.seg_embed_tokens.weight",
    "decoder.seg_projection.weight",
)
# Names that hold nothing the converted model would not compute by itself, and why.
_DERIVED = (
    (r"(encoder|decoder)\.version", "fairseq's format number"),
    (r"encoder\.embed_images\..*\.num_batches_tracked", "step counter of a batch norm, which is frozen here"),
    (r"(encoder|decoder)\.(token|image|seg)_rp_bucket", "relative positions, which the model computes"),
    (r"(encoder|decoder)\.(image|seg)_position_idx", "positions, which the model computes"),
    (r"decoder\.(bin_id_offset|seg_id_offset|region_prefix)", "token ids, which the tokenizer holds"),
    ("|".join(map(re.escape, _CATEGORY_MEANS)), f"category means, rebuilt from {_EMBEDDING}"),
)


class ConversionError(ValueError):
    """A source that cannot be converted, or an output that cannot be written. Nothing has been left behind."""


@dataclass
class ConversionReport:
    """What `convert_ofa_checkpoint` wrote and what became of every tensor of the source.

    Args:
        output_dir: the folder to load with `from_pretrained`.
        architecture: name of the model's class.
        size: "tiny", "medium", "base", "large" or "huge"; "custom" where no published size has these shapes.
        parameters: number of parameters, tied ones counted once.
        has_words: whether the model carries the words that it was trained for.
        used: name in the source -> name in the result.
        accounted: name in the source -> why it is not in the result.
        ignored: what the source holds beside the weights (training state, arguments), by name.
        notes: remarks for a person to read.
    """

    output_dir: Path
    architecture: str
    size: str
    parameters: int
    has_words: bool
    used: dict[str, str]
    accounted: dict[str, str]
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert_ofa_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    tokenizer: str | Path | None = None,
    categories: list[str] | None = None,
    prompt: str | None = None,
    max_shard_size: str | int = "1GB",
) -> ConversionReport:
    """Returns a report on the folder written at `output_dir`: weights in float32, configuration and processor.

    OFA becomes an `IFSegForConditionalGeneration`, which is also what training on words starts from; a released IFSeg
    checkpoint becomes an `IFSegForSemanticSegmentation`.

    Args:
        source: a folder or Hub id in the transformers format, or a fairseq `.pt` file (OFA's or IFSeg's).
        output_dir: a folder that does not exist yet or is empty. It appears only when it is complete.
        tokenizer: folder of the vocabulary (`vocab.json`, `merges.txt`, or `dict.txt`, `encoder.json`, `vocab.bpe`);
            by default where the source is.
        categories: the words that a released IFSeg checkpoint was trained for, in their order. Its file does not name
            them; without them the model must be given words before its first photo.
        prompt: replaces the prompt of these categories.
        max_shard_size: largest weight file.

    Raises:
        ConversionError: the source is not one of these, is damaged, would run code, or has a tensor too few or too
            many; the output is not empty or cannot be written.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConversionError(f"{output_dir} exists and is not an empty folder. Give a new folder for the result.")

    path = _locate(source)
    tokenizer_dir = Path(tokenizer) if tokenizer else path if path.is_dir() else path.parent
    _vocabulary_files(tokenizer_dir)  # before minutes are spent on the weights
    weights, ignored = read_weights(path)
    used, accounted = match_names(weights)
    state_dict = {target: weights[name] for name, target in used.items()}
    notes = []

    config = config_from_shapes({name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    text_tokenizer = load_tokenizer(tokenizer_dir, model_max_length=config.max_position_embeddings)
    if config.vocab_size == len(text_tokenizer) + 1:
        state_dict[_EMBEDDING] = state_dict[_EMBEDDING][:-1]
        config.vocab_size -= 1
        notes.append(f"row {config.vocab_size} of {_EMBEDDING} belongs to no token and was left out")
    if config.vocab_size != len(text_tokenizer):
        raise ConversionError(
            f"The vocabulary in {tokenizer_dir} has {len(text_tokenizer)} tokens, but the checkpoint embeds "
            f"{config.vocab_size}: they do not belong together."
        )
    _check_copies(weights, state_dict[_EMBEDDING])

    size = _size_name(config)
    model = empty_model(config, {name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    if categories and not isinstance(model, IFSegForSemanticSegmentation):
        raise ConversionError(
            "Categories are for a released IFSeg checkpoint. OFA gets its words when it is trained on them."
        )
    _fill(model, state_dict)
    image_processor = IFSegImageProcessor(
        size={"shortest_edge": config.image_size, "longest_edge": 4 * config.image_size}
    )
    processor = IFSegProcessor(image_processor, text_tokenizer)
    if categories:
        try:
            model.set_words(**processor.encode_categories(categories, prompt))
        except ValueError as error:
            raise ConversionError(str(error)) from error
        notes += _compare_category_means(weights, model.config.category_ids)

    _write(model, processor, output_dir, max_shard_size)
    return ConversionReport(
        output_dir=output_dir,
        architecture=type(model).__name__,
        size=size,
        parameters=model.num_parameters(),
        has_words=bool(categories),
        used=used,
        accounted=accounted,
        ignored=ignored,
        notes=notes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _locate(source: str | Path) -> Path:
    """The local file or folder of a source; a Hub id is downloaded, weights and vocabulary only."""
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise ConversionError(f"There is no file or folder {source}.")
    patterns = [*_WEIGHT_FILES, "model-*.safetensors", "pytorch_model-*.bin", *_TRANSFORMERS_VOCABULARY, "config.json"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # network, authorisation, a name the Hub does not know: all the same to the caller
        raise ConversionError(
            f"There is no folder {source} here, and it could not be downloaded from the Hub ({_first_sentence(error)})."
        ) from error


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Returns the tensors of a checkpoint by name, and the names of what its file holds besides.

    Args:
        path: a folder in the transformers format, or one weight file.

    Raises:
        ConversionError: no weights there, a damaged file, or one that would run code.
    """
    if path.is_file():
        return _read_file(path)
    config_file = path / "config.json"
    if config_file.is_file() and _read_json(config_file).get("model_type") == IFSegConfig.model_type:
        raise ConversionError(f"{path} is converted already: load it with from_pretrained.")
    file = next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)
    if file is None:
        raise ConversionError(
            f"{path} has no weights: none of {', '.join(_WEIGHT_FILES)} is there. "
            "Of a fairseq checkpoint, name the .pt file itself."
        )
    if file.suffix != ".json":
        return _read_file(file)
    shard_of = _read_json(file).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ConversionError(f"{file} is no list of weight files: it has no weight_map.")
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted({Path(str(shard)).name for shard in shard_of.values()}):
        if not (path / shard).is_file():
            raise ConversionError(f"{file} names {shard}, which is missing. Download the folder again.")
        weights.update(_read_file(path / shard)[0])
    if weights.keys() != shard_of.keys():
        difference = _listing(weights.keys() ^ shard_of.keys())
        raise ConversionError(f"{file} and the weight files beside it name different tensors: {difference}.")
    return weights, []


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of one weight file, and the names of what it holds besides."""
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except ConversionError:
        raise
    except Exception as error:  # whatever a damaged file does to its reader
        raise ConversionError(
            f"{path} cannot be read as a checkpoint ({_first_sentence(error)}). It may be cut short, damaged, or a "
            "different kind of file (a Git LFS pointer, a web page): download it again."
        ) from error
    ignored = []
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):  # fairseq: weights beside training state
        ignored = sorted(str(name) for name in loaded if name != "model")
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not loaded:
        raise ConversionError(f"{path} holds no weights: expected names with tensors, or fairseq's `model` entry.")
    if strange := [name for name, value in loaded.items() if not isinstance(name, str) or not _is_plain_tensor(value)]:
        raise ConversionError(
            f"{path} holds entries that are no plain tensors, so it is no OFA checkpoint: {_listing(strange)}."
        )
    return dict(loaded), ignored


def _is_plain_tensor(value) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_nested or value.is_quantized)
    )


class _Inert:
    """Stands for every class and function that a file names and torch does not trust. It does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _read_pickle(path: Path):
    """The content of a file written by `torch.save`, read by torch's restricted unpickler.

    It makes tensors and containers only, and refuses all else: also the Namespace that fairseq saves beside the
    weights. So every name that it would refuse is bound to a class that does nothing. What stays refused (the modules
    that torch blocks, and all but tensors in the format before PyTorch 1.6) is refused before it is called.
    """
    arguments = {}
    inert = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # Mapping the file instead of reading it spares the memory of an optimizer's state.
            arguments["mmap"] = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        if damaged is not None:
            raise ConversionError(f"{path} is damaged: the checksum of {damaged} is wrong. Download it again.")
        inert = [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]
    try:
        with safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, **arguments)
    except pickle.UnpicklingError as error:
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConversionError(
                f"{path} was refused: it calls for {name[1]}, and a checkpoint must not run code. Nothing of it was "
                "run. If you know where the file comes from, save its weights alone there, and convert that."
            ) from error
        # The message of torch advises to read the file without this protection; only its last part is the reason.
        reason = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
        raise pickle.UnpicklingError(reason[1] if reason else "not written by torch.save") from None


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is no JSON file ({_first_sentence(error)}). Download it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__} where names with values are expected.")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes
# ---------------------------------------------------------------------------------------------------------------------


def match_names(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the use of every tensor: name -> name in the model, and name -> why it is not in the model.

    Names of the model are those of `IFSegModel`, and `segmentation_positions.*`. A name that means nothing here is
    passed on unchanged, and found to be left over by the model.
    """
    used, accounted = {}, {}
    for name in names:
        reason = next((reason for pattern, reason in _DERIVED if re.fullmatch(pattern, name)), None)
        if name in _COPIES_OF_EMBEDDING:
            accounted[name] = f"copy of {_EMBEDDING}"
        elif reason:
            accounted[name] = reason
        else:
            target = name
            for old, new in _RENAMES.items():
                target = target.replace(old, new)
            used[name] = target
    twice = [name for name, count in Counter(used.values()).items() if count > 1]
    if twice:
        raise ConversionError(f"The checkpoint holds tensors under two names each: {_listing(twice)}.")
    return used, accounted


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> IFSegConfig:
    """The configuration of a model with these tensors: names as `match_names` gives them -> shapes."""

    def size(name: str, axis: int = 0) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise ConversionError(
                f"This is no OFA checkpoint: {name} is missing or has too few dimensions. "
                f"It begins with {_listing(list(shapes)[:3])}."
            )
        return shapes[name][axis]

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})

    def side(rows: int) -> int:  # of a grid with that many positions
        return round(rows**0.5)

    trunk = "encoder.embed_images"
    depths = []
    while count(f"{trunk}.layer{len(depths) + 1}."):
        depths.append(count(f"{trunk}.layer{len(depths) + 1}."))
    image_bucket_size = side(size("encoder.embed_image_positions.weight") - 1)
    sizes = {
        "vocab_size": size(_EMBEDDING),
        "d_model": size(_EMBEDDING, 1),
        "encoder_layers": count("encoder.layers."),
        "decoder_layers": count("decoder.layers."),
        "encoder_attention_heads": size("encoder.layers.0.self_attn.c_attn"),
        "decoder_attention_heads": size("decoder.layers.0.self_attn.c_attn"),
        "encoder_ffn_dim": size("encoder.layers.0.fc1.weight"),
        "decoder_ffn_dim": size("decoder.layers.0.fc1.weight"),
        "max_position_embeddings": size("encoder.embed_positions.weight") - 2,  # fairseq's two unused rows
        "token_bucket_size": (size("encoder.token_rel_pos_table_list.0.weight") + 1) // 2,
        "image_bucket_size": image_bucket_size,
        "trunk_embedding_size": size(f"{trunk}.conv1.weight"),
        "trunk_hidden_sizes": tuple(size(f"{trunk}.layer{i + 1}.0.conv3.weight") for i in range(max(1, len(depths)))),
        "trunk_depths": tuple(depths),
    }
    grid_size = min(32, image_bucket_size)  # of the photos that segmentation positions are made for
    if "segmentation_positions.embed_positions.weight" in shapes:
        grid_size = side(size("segmentation_positions.embed_positions.weight") - 1)
    try:
        patch_size = IFSegConfig(**sizes, image_size=0).patch_size
        return IFSegConfig(**sizes, image_size=grid_size * patch_size)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConversionError(f"No model has the shapes of this checkpoint: {_first_sentence(error)}") from error


def _size_name(config: IFSegConfig) -> str:
    """Name of the published size that a configuration without words has, or "custom"."""
    for name in ("tiny", "medium", "base", "large", "huge"):
        if IFSegConfig.preset(name, image_size=config.image_size).to_dict() == config.to_dict():
            return name
    return "custom"


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary
# ---------------------------------------------------------------------------------------------------------------------


def _vocabulary_files(folder: Path) -> list[Path]:
    """The files of the vocabulary in a folder, of the transformers format where both are there."""
    for names in (_TRANSFORMERS_VOCABULARY, _FAIRSEQ_VOCABULARY):
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    raise ConversionError(
        f"{folder} has no vocabulary: neither {' and '.join(_TRANSFORMERS_VOCABULARY)} nor "
        f"{', '.join(_FAIRSEQ_VOCABULARY)} are there. Name the folder that has them with --tokenizer (tokenizer=)."
    )


def load_tokenizer(folder: Path, **kwargs) -> BartTokenizer:
    """OFA's tokenizer from the vocabulary of either format: BART's tokens, then `<code_N>` and `<bin_N>`."""
    files = _vocabulary_files(folder)
    try:
        if files[0].name == "vocab.json":
            vocab = json.loads(files[0].read_text(encoding="utf-8"))
        else:
            vocab = _fairseq_vocabulary(files[0], files[1])
        # Every line but the first, which is a version, is a pair. The last may be empty.
        merges = [tuple(line.split(" ")) for line in files[-1].read_text(encoding="utf-8").split("\n")[1:] if line]
        tokenizer = BartTokenizer(vocab=vocab, merges=merges, **kwargs)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ConversionError(f"The vocabulary in {folder} cannot be read: {_first_sentence(error)}") from error
    tokenizer.add_tokens(_EXTRA_TOKENS)
    return tokenizer


def _fairseq_vocabulary(dictionary: Path, encoder: Path) -> dict[str, int]:
    """The content of `vocab.json` from fairseq's files.

    The order of `dict.txt` gives the rows of the embedding. Its entries are numbers, which `encoder.json` translates to
    tokens, and a few words that fill up.
    """
    token_of = {str(number): token for token, number in json.loads(encoder.read_text(encoding="utf-8")).items()}
    entries = [line.rsplit(" ", 1)[0] for line in dictionary.read_text(encoding="utf-8").splitlines()]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(token_of.get(entry, entry) for entry in entries), "<mask>"]
    return {token: row for row, token in enumerate(tokens)}


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def _check_copies(weights: Mapping[str, torch.Tensor], embedding: torch.Tensor) -> None:
    """Raises where a tensor that is tied to the embedding differs from it, rows past the vocabulary aside."""
    rows, width = embedding.shape
    for name in _COPIES_OF_EMBEDDING:
        copy = weights.get(name)
        if copy is None:
            continue
        if copy.dtype != embedding.dtype or copy.shape[1:] != (width,) or not torch.equal(copy[:rows], embedding):
            raise ConversionError(
                f"{name} {tuple(copy.shape)} should repeat {_EMBEDDING} ({rows}, {width}), but its values differ: a "
                "checkpoint whose embeddings are not tied cannot be converted without loss."
            )


def empty_model(config: IFSegConfig, shapes: Mapping[str, tuple[int, ...]]) -> PreTrainedModel:
    """Returns the model of a configuration on the meta device; raises unless these are exactly its tensors.

    Args:
        shapes: names as `match_names` gives them -> shapes. Segmentation positions among them decide on the class.
    """
    segmentation = any(name.startswith(_SEGMENTATION) for name in shapes)
    with torch.device("meta"):
        model = (IFSegForSemanticSegmentation if segmentation else IFSegForConditionalGeneration)(config)
    expected = {
        name.removeprefix(f"{model.base_model_prefix}."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    _compare(expected, shapes)
    return model


def _fill(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Puts these tensors in the place of the model's, as float32. Raises where one holds no finite numbers."""
    unusable = [
        name
        for name, tensor in state_dict.items()
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all()
    ]
    if unusable:
        raise ConversionError(f"The checkpoint is damaged: values that are not finite numbers in {_listing(unusable)}.")
    tensors = {
        name if name.startswith(_SEGMENTATION) else f"{model.base_model_prefix}.{name}": tensor.float().contiguous()
        for name, tensor in state_dict.items()
    }
    model.load_state_dict(tensors, strict=False, assign=True)  # tied names are missing, and follow
    model.tie_weights()
    model.eval()


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless both have the same names with the same shapes; the message lists every difference."""
    parts = []
    if missing := [name for name in expected if name not in found]:
        parts.append(f"Missing: {_listing(missing)}.")
    if left_over := [name for name in found if name not in expected]:
        parts.append(f"Left over: {_listing(left_over)}.")
    common = [name for name in expected if name in found]
    if wrong := [f"{name} {found[name]} not {expected[name]}" for name in common if found[name] != expected[name]]:
        parts.append(f"Of another shape than the rest asks for: {_listing(wrong)}.")
    if parts:
        raise ConversionError(f"The checkpoint is not exactly an OFA or IFSeg model. {' '.join(parts)}")


def _compare_category_means(weights: Mapping[str, torch.Tensor], category_ids: list[list[int]]) -> list[str]:
    """A remark where the category means in a released checkpoint are not those of the words that it was given."""
    embedding = weights[_EMBEDDING]
    means = torch.stack([embedding[ids].float().mean(0) for ids in category_ids])
    for name in _CATEGORY_MEANS:
        stored = weights.get(name)
        if stored is not None and (stored.shape != means.shape or not torch.allclose(stored.float(), means, atol=1e-3)):
            return [
                f"{name} {tuple(stored.shape)} holds other category means than those of these {len(means)} words: "
                "were others trained, or in another order?"
            ]
    return []


def _write(model: PreTrainedModel, processor: IFSegProcessor, output_dir: Path, max_shard_size: str | int) -> None:
    """Saves both into a folder beside the output, which takes its place when everything is written."""
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as beside:
            folder = Path(beside, output_dir.name)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            processor.save_pretrained(folder)
            if output_dir.exists():
                output_dir.rmdir()  # empty, as was checked; renaming onto it is not portable
            folder.rename(output_dir)
    except (OSError, SafetensorError) as error:
        raise ConversionError(
            f"{output_dir} could not be written ({_first_sentence(error)}). Nothing was left there; is the disk full?"
        ) from error


def _first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, for a message of one line."""
    return re.split(r"\.?\n|\. |\.$", str(error).strip())[0] or type(error).__name__


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names)))
