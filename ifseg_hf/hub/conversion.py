"""Conversion of published OFA and IFSeg checkpoints to folders that `from_pretrained` loads.

There are three kinds of sources; the kind and the size of the model follow from the names and shapes of the tensors:

- OFA in the transformers format: a folder or Hub id with `pytorch_model.bin` or safetensors, vocab.json, merges.txt;
- OFA as saved by fairseq: a `.pt` file, whose vocabulary (dict.txt, encoder.json, vocab.bpe) is stored separately;
- a released IFSeg checkpoint: a fairseq `.pt` file that also has segmentation positions.

Every tensor of the source is either used or accounted for with a reason, and no code in a source is ever run.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import BartTokenizer, PreTrainedModel

from ifseg_hf.hub.checkpoint_reader import (
    ConversionError,
    first_sentence,
    listing,
    locate_checkpoint,
    read_json,
    read_weights,
)
from ifseg_hf.loading import no_progress_bars
from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation, OFAConfig, OFAForConditionalGeneration
from ifseg_hf.processing.image_processing_ifseg import IFSegImageProcessor
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.processing.tokenization_ofa import with_ofa_tokens
from ifseg_hf.training.recipes import published_recipe

TRANSFORMERS_VOCABULARY = ("vocab.json", "merges.txt")
_FAIRSEQ_VOCABULARY = ("dict.txt", "encoder.json", "vocab.bpe")

# Parts of fairseq names -> their names in the transformers format or, for segmentation positions, in this package.
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
# Names of tensors that the converted model does not need, and why.
_DERIVED = (
    (r"(encoder|decoder)\.version", "fairseq's format number"),
    (r"encoder\.embed_images\..*\.num_batches_tracked", "step counter of a batch norm, which is frozen here"),
    (r"(encoder|decoder)\.(token|image|seg)_rp_bucket", "relative positions, which the model computes"),
    (r"(encoder|decoder)\.(image|seg)_position_idx", "positions, which the model computes"),
    (r"decoder\.(bin_id_offset|seg_id_offset|region_prefix)", "token ids, which the tokenizer has"),
    ("|".join(map(re.escape, _CATEGORY_MEANS)), f"category means, rebuilt from {_EMBEDDING}"),
)


@dataclass
class ConversionReport:
    """Summary of a conversion: the model that was written, and the use of every tensor of the source.

    Args:
        output_dir: the folder to load with `from_pretrained`.
        architecture: name of the model's class.
        size: "tiny", "medium", "base", "large" or "huge"; "custom" if no published size has these shapes.
        parameters: number of parameters, tied ones counted once.
        has_words: whether the model has categories.
        used: name in the source -> name in the model.
        accounted: name in the source -> the reason why the tensor is not in the model.
        ignored: names of other entries in the source (training state, arguments).
        notes: remarks to show to the user.
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
    categories: list[str] | dict[str, list[str]] | None = None,
    prompt: str | None = None,
    max_shard_size: str | int = "1GB",
) -> ConversionReport:
    """Writes a checkpoint to a folder that `from_pretrained` loads, with its processor, and returns a report.

    OFA becomes an `OFAForConditionalGeneration`, from which training on category words starts; a released IFSeg
    checkpoint becomes an `IFSegForSemanticSegmentation`. Weights are saved in float32.

    Args:
        source: a folder or Hub id in the transformers format, or a fairseq `.pt` file (OFA's or IFSeg's).
        output_dir: a folder that does not exist yet or is empty. It appears only when it is complete.
        tokenizer: folder of the vocabulary (`vocab.json`, `merges.txt`, or `dict.txt`, `encoder.json`, `vocab.bpe`).
            Default: the folder of the source.
        categories: the words that a released IFSeg checkpoint was trained on, in their order. Its file does not
            contain them; without them, categories must be set before the model segments an image.
        prompt: replaces the prompt made of these categories.
        max_shard_size: largest weight file.

    Raises:
        ConversionError: the source is no OFA or IFSeg checkpoint, is damaged, would run code, or has missing or extra
            tensors; the output folder is not empty or cannot be written.
    """
    output_dir = check_output_dir(output_dir)
    path = locate_checkpoint(source, other_files=TRANSFORMERS_VOCABULARY)
    _check_not_converted(path)
    tokenizer_dir = Path(tokenizer) if tokenizer else path if path.is_dir() else path.parent
    vocabulary_files(tokenizer_dir)  # fails early: reading the weights can take minutes
    weights, ignored = read_weights(path)
    used, accounted = match_names(weights)
    state_dict = {target: weights[name] for name, target in used.items()}

    config = config_from_shapes(_shapes(state_dict))
    text_tokenizer = load_tokenizer(tokenizer_dir, model_max_length=config.max_position_embeddings)
    notes = _fit_to_vocabulary(config, state_dict, len(text_tokenizer), tokenizer_dir)
    _check_copies(weights, state_dict[_EMBEDDING])

    size = _size_name(config)
    config.tuning = published_recipe()
    model = empty_model(config, _shapes(state_dict))
    if categories and not isinstance(model, IFSegForSemanticSegmentation):
        raise ConversionError(
            "Categories are for a released IFSeg checkpoint only. OFA gets its categories when it is trained on them."
        )
    _fill(model, state_dict)
    image_processor = IFSegImageProcessor.for_ofa(config.image_size, config.d_model)
    processor = IFSegProcessor(image_processor, text_tokenizer)
    if categories:
        try:
            model.set_words(**processor.encode_categories(categories, prompt))
        except ValueError as error:
            raise ConversionError(str(error)) from error
        notes += _compare_category_means(weights, model.config.category_ids)

    save_converted(model, processor, output_dir, max_shard_size)
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


def _shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def _check_not_converted(path: Path) -> None:
    """Raises for a folder that this package has saved."""
    config_file = path / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    # A published OFA has the model_type "ofa" too, but no `trunk_type`.
    if config.get("model_type") == IFSegConfig.model_type or "trunk_type" in config:
        raise ConversionError(f"{path} is already converted: load it with from_pretrained.")


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes
# ---------------------------------------------------------------------------------------------------------------------


def match_names(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the use of every tensor: name -> name in the model, and name -> reason why it is not in the model.

    Names in the model are those of the OFA backbone, and `segmentation_positions.*`. Unknown names are returned
    unchanged; [`empty_model`] refuses them.
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
        raise ConversionError(f"The checkpoint has two tensors for each of these names: {listing(twice)}.")
    return used, accounted


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> OFAConfig:
    """The configuration of an OFA whose tensors have these shapes.

    Args:
        shapes: names as returned by [`match_names`] -> shapes.
    """

    def size(name: str, axis: int = 0) -> int:
        """A dimension of a tensor."""
        if len(shapes.get(name, ())) <= axis:
            raise ConversionError(
                f"This is no OFA checkpoint: {name} is missing or has too few dimensions. "
                f"Its first tensors are {listing(list(shapes)[:3])}."
            )
        return shapes[name][axis]

    def count(prefix: str) -> int:
        """The number of modules of a list whose name is `prefix`."""
        return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})

    def side(rows: int) -> int:
        """The side of the square grid with this number of positions."""
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
    grid_size = min(32, image_bucket_size)  # patches along a side of the images that the model segments
    if "segmentation_positions.embed_positions.weight" in shapes:
        grid_size = side(size("segmentation_positions.embed_positions.weight") - 1)
    patch_size = 2 ** (len(depths) + 1)  # the ResNet's stem divides by 4, every stage but the first by 2
    try:
        return OFAConfig(**sizes, image_size=grid_size * patch_size)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConversionError(f"No OFA model has the shapes of this checkpoint: {first_sentence(error)}") from error


def _size_name(config: OFAConfig) -> str:
    """The name of the published OFA size with this configuration, or "custom"."""
    for name in ("tiny", "medium", "base", "large", "huge"):
        if OFAConfig.preset(name, image_size=config.image_size).to_dict() == config.to_dict():
            return name
    return "custom"


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary
# ---------------------------------------------------------------------------------------------------------------------


def vocabulary_files(folder: Path) -> list[Path]:
    """The vocabulary files in a folder, preferably in the transformers format."""
    for names in (TRANSFORMERS_VOCABULARY, _FAIRSEQ_VOCABULARY):
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    raise ConversionError(
        f"{folder} has no vocabulary: it contains neither {' and '.join(TRANSFORMERS_VOCABULARY)} nor "
        f"{', '.join(_FAIRSEQ_VOCABULARY)}. Give the folder with these files as --tokenizer (tokenizer=)."
    )


def load_tokenizer(folder: Path, **kwargs) -> BartTokenizer:
    """OFA's tokenizer from a vocabulary in either format: BART's tokens, then `<code_N>` and `<bin_N>`.

    Args:
        folder: of the vocabulary files.
        **kwargs: for [`BartTokenizer`].
    """
    files = vocabulary_files(folder)
    try:
        if files[0].name == "vocab.json":
            vocab = json.loads(files[0].read_text(encoding="utf-8"))
        else:
            vocab = read_fairseq_vocabulary(files[0], files[1])
        # The first line is a version, every other line a pair of tokens; the last line may be empty.
        merges = [tuple(line.split(" ")) for line in files[-1].read_text(encoding="utf-8").split("\n")[1:] if line]
        tokenizer = BartTokenizer(vocab=vocab, merges=merges, **kwargs)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ConversionError(f"The vocabulary in {folder} cannot be read: {first_sentence(error)}") from error
    return with_ofa_tokens(tokenizer)


def read_fairseq_vocabulary(dictionary: Path, encoder: Path) -> dict[str, int]:
    """Token -> row of the embedding, from fairseq's files; the same as the content of `vocab.json`.

    The entries of `dict.txt` are in the order of the rows: numbers, which `encoder.json` maps to tokens, and a few
    padding words.
    """
    token_of = {str(number): token for token, number in json.loads(encoder.read_text(encoding="utf-8")).items()}
    entries = [line.rsplit(" ", 1)[0] for line in dictionary.read_text(encoding="utf-8").splitlines()]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(token_of.get(entry, entry) for entry in entries), "<mask>"]
    return {token: row for row, token in enumerate(tokens)}


def _fit_to_vocabulary(
    config: OFAConfig, state_dict: dict[str, torch.Tensor], tokens: int, tokenizer_dir: Path
) -> list[str]:
    """Drops one embedding row beyond the vocabulary and returns a note about it. Raises for other differences."""
    notes = []
    if config.vocab_size == tokens + 1:
        state_dict[_EMBEDDING] = state_dict[_EMBEDDING][:-1]
        config.vocab_size -= 1
        notes.append(f"row {config.vocab_size} of {_EMBEDDING} belongs to no token and was left out")
    if config.vocab_size != tokens:
        raise ConversionError(
            f"The vocabulary in {tokenizer_dir} has {tokens} tokens, but the checkpoint has embeddings of "
            f"{config.vocab_size}: they do not belong together."
        )
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def _check_copies(weights: Mapping[str, torch.Tensor], embedding: torch.Tensor) -> None:
    """Raises if a tensor that is tied to the embedding differs from it in the rows of the vocabulary."""
    rows, width = embedding.shape
    for name in _COPIES_OF_EMBEDDING:
        copy = weights.get(name)
        if copy is None:
            continue
        if copy.dtype != embedding.dtype or copy.shape[1:] != (width,) or not torch.equal(copy[:rows], embedding):
            raise ConversionError(
                f"{name} {tuple(copy.shape)} should equal {_EMBEDDING} ({rows}, {width}), but differs: a "
                "checkpoint whose embeddings are not tied cannot be converted without loss."
            )


def empty_model(config: OFAConfig, shapes: Mapping[str, tuple[int, ...]]) -> PreTrainedModel:
    """The model of a configuration, on the meta device. Raises unless its tensors have exactly these shapes.

    Args:
        shapes: names as returned by [`match_names`] -> shapes. With segmentation positions, the model is an
            `IFSegForSemanticSegmentation`.
    """
    segmentation = any(name.startswith(_SEGMENTATION) for name in shapes)
    with torch.device("meta"):
        if segmentation:
            model = IFSegForSemanticSegmentation(IFSegConfig.from_backbone_config(config, tuned=True))
        else:
            model = OFAForConditionalGeneration(config)
    expected = {
        name.removeprefix("backbone.").removeprefix("model."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    _compare(expected, shapes)
    return model


def _fill(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Sets the weights of the model to these tensors, in float32. Raises if one has values that are not finite."""
    unusable = [
        name
        for name, tensor in state_dict.items()
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all()
    ]
    if unusable:
        raise ConversionError(f"The checkpoint is damaged: values that are not finite numbers in {listing(unusable)}.")
    backbone = "backbone." if isinstance(model, IFSegForSemanticSegmentation) else ""
    tensors = {
        f"{backbone}{'' if name.startswith(_SEGMENTATION) else 'model.'}{name}": tensor.float().contiguous()
        for name, tensor in state_dict.items()
    }
    model.load_state_dict(tensors, strict=False, assign=True)  # tied weights are not in `tensors`
    model.tie_weights()
    model.eval()


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless names and shapes are the same; the message lists every difference."""
    parts = []
    if missing := [name for name in expected if name not in found]:
        parts.append(f"Missing: {listing(missing)}.")
    if left_over := [name for name in found if name not in expected]:
        parts.append(f"Left over: {listing(left_over)}.")
    common = [name for name in expected if name in found]
    if wrong := [f"{name} {found[name]} not {expected[name]}" for name in common if found[name] != expected[name]]:
        parts.append(f"Wrong shape: {listing(wrong)}.")
    if parts:
        raise ConversionError(
            f"The tensors of the checkpoint are not those of an OFA or IFSeg model. {' '.join(parts)}"
        )


def _compare_category_means(weights: Mapping[str, torch.Tensor], category_ids: list[list[int]]) -> list[str]:
    """A note if the category means in a released checkpoint are not the means of these categories' embeddings."""
    embedding = weights[_EMBEDDING]
    means = torch.stack([embedding[ids].float().mean(0) for ids in category_ids])
    for name in _CATEGORY_MEANS:
        stored = weights.get(name)
        if stored is not None and (stored.shape != means.shape or not torch.allclose(stored.float(), means, atol=1e-3)):
            return [
                f"{name} {tuple(stored.shape)} does not hold the category means of these {len(means)} words: was the "
                "checkpoint trained on other words, or on these in another order?"
            ]
    return []


def check_output_dir(output_dir: str | Path) -> Path:
    """The path of a folder that does not exist yet or is empty. Raises `ConversionError` for any other."""
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConversionError(f"{output_dir} exists and is not an empty folder. Give a new folder for the result.")
    return output_dir


def save_converted(
    model: PreTrainedModel, processor: IFSegProcessor, output_dir: Path, max_shard_size: str | int
) -> None:
    """Saves model and processor into a temporary folder, which is renamed to `output_dir` when it is complete."""
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as beside:
            folder = Path(beside, output_dir.name)
            with no_progress_bars():
                model.save_pretrained(folder, max_shard_size=max_shard_size)
            processor.save_pretrained(folder)
            if output_dir.exists():
                output_dir.rmdir()  # it is empty; renaming a folder to an existing one is not portable
            folder.rename(output_dir)
    except (OSError, SafetensorError) as error:
        raise ConversionError(
            f"{output_dir} could not be written ({first_sentence(error)}). It was not created; is the disk full?"
        ) from error


__all__ = [
    "TRANSFORMERS_VOCABULARY",
    "ConversionError",
    "ConversionReport",
    "check_output_dir",
    "config_from_shapes",
    "convert_ofa_checkpoint",
    "empty_model",
    "load_tokenizer",
    "match_names",
    "read_fairseq_vocabulary",
    "read_weights",
    "save_converted",
    "vocabulary_files",
]
