"""Conversion of published ClipCap checkpoints to folders that `from_pretrained` loads.

A ClipCap `.pt` file holds the mapping network (`clip_project.*`) and GPT-2 (`gpt.*`). CLIP and both tokenizers come
from their own checkpoints. Every tensor of the file is either used or accounted for, and no code in it is ever run.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer, GPT2Config, GPT2Tokenizer, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ifseg_hf.hub.checkpoint_reader import ConversionError, first_sentence, listing, locate_checkpoint, read_weights
from ifseg_hf.hub.conversion import ConversionReport, check_output_dir, save_converted
from ifseg_hf.modeling.backbone_clipcap import ClipCapConfig
from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.processing.image_processing_ifseg import IFSegImageProcessor
from ifseg_hf.processing.processing_ifseg import IFSegProcessor

__all__ = ["CLIP", "GPT2", "convert_clipcap_checkpoint"]

CLIP = "openai/clip-vit-base-patch32"
GPT2 = "openai-community/gpt2"
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
_PARTS = ("clip_project.", "gpt.")
# Names of tensors that the converted model does not need, and why.
_DERIVED = (
    (r"gpt\.transformer\.h\.\d+\.attn\.(bias|masked_bias)", "causal mask, which the model computes"),
    (r"gpt\.lm_head\.weight", "copy of gpt.transformer.wte.weight"),
)


def convert_clipcap_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    clip: str | Path = CLIP,
    gpt2: str | Path = GPT2,
    normalize_features: bool = False,
    patch_features: str = "clip",
    image_size: int = 512,
    max_shard_size: str | int = "1GB",
) -> ConversionReport:
    """Writes ClipCap as an `IFSegForSemanticSegmentation` without words, with its processor, and returns a report.

    Weights are saved in float32.

    Args:
        source: a published `.pt` file, such as `conceptual_weights.pt` or `coco_weights.pt`, with either mapping.
        output_dir: a folder that does not exist yet or is empty. It appears only when it is complete.
        clip: folder or Hub id of the `CLIPModel` whose features ClipCap was trained on, with its tokenizer.
        gpt2: folder or Hub id of GPT-2, of which configuration and tokenizer are used.
        normalize_features, patch_features, image_size: as in [`ClipCapConfig`].
        max_shard_size: largest weight file.

    Raises:
        ConversionError: a source is something else, is damaged, would run code, or has missing or extra tensors; the
            output folder is not empty or cannot be written.
    """
    output_dir = check_output_dir(output_dir)
    path = locate_checkpoint(source)
    if not path.is_file():
        raise ConversionError(f"{source} is a folder: give the path of ClipCap's .pt file.")
    weights, ignored = read_weights(path)
    used, accounted = _match_names(weights)
    _check_copy(weights)

    clip_model, clip_tokenizer = _load_clip(clip)
    gpt_config, tokenizer = _load_gpt2(gpt2)
    try:
        config = ClipCapConfig(
            clip_config=clip_model.config,
            gpt_config=gpt_config,
            normalize_features=normalize_features,
            patch_features=patch_features,
            image_size=image_size,
            **_mapping_sizes({name: tuple(tensor.shape) for name, tensor in weights.items()}, gpt_config.n_embd),
        )
    except ValueError as error:
        raise ConversionError(str(error)) from error
    _check_clip_size(weights, config)
    tensors = {f"backbone.{target}": weights[name] for name, target in used.items()}
    tensors |= {f"backbone.clip.{name}": tensor for name, tensor in clip_model.state_dict().items()}
    tensors["backbone.subwords.clip_merges"] = _merges(clip_tokenizer, config.clip_config.text_config.vocab_size, 2)
    tensors["backbone.subwords.gpt_merges"] = _merges(tokenizer, gpt_config.vocab_size, 1)
    model = _fill(config, tensors)

    image_processor = IFSegImageProcessor(
        size={"shortest_edge": image_size, "longest_edge": 4 * image_size},
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )
    save_converted(model, IFSegProcessor(image_processor, tokenizer), output_dir, max_shard_size)
    return ConversionReport(
        output_dir=output_dir,
        architecture=type(model).__name__,
        size=f"ClipCap, {config.mapping_type} mapping",
        parameters=model.num_parameters(),
        has_words=False,
        used={name: f"backbone.{target}" for name, target in used.items()},
        accounted=accounted,
        ignored=ignored,
    )


def _match_names(names: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """The use of every tensor: name -> name in the backbone, and name -> reason why it is not in the model."""
    if not any(name.startswith("clip_project.") for name in names):
        raise ConversionError(
            "This is no ClipCap checkpoint: it has no clip_project.*. "
            f"Its first tensors are {listing(list(names)[:3])}."
        )
    used, accounted = {}, {}
    for name in names:
        reason = next((reason for pattern, reason in _DERIVED if re.fullmatch(pattern, name)), None)
        if reason:
            accounted[name] = reason
        else:
            used[name] = name
    if other := [name for name in used if not name.startswith(_PARTS)]:
        raise ConversionError(f"The checkpoint has tensors that ClipCap does not have: {listing(other)}.")
    return used, accounted


def _check_copy(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises if GPT-2's output layer differs from its token embedding."""
    head, embedding = (weights.get(f"gpt.{name}.weight") for name in ("lm_head", "transformer.wte"))
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise ConversionError(
            "gpt.lm_head.weight should equal gpt.transformer.wte.weight, but differs: a GPT-2 whose embeddings are not "
            "tied cannot be converted without loss."
        )


def _mapping_sizes(shapes: Mapping[str, tuple[int, ...]], width: int) -> dict:
    """The settings of the mapping network whose tensors have these shapes, for GPT-2's width.

    The number of heads has no trace in the shapes: ClipCap has 8.
    """

    def rows(name: str) -> int:
        shape = shapes.get(f"clip_project.{name}", ())
        if not shape:
            raise ConversionError(f"This is no ClipCap checkpoint: clip_project.{name} is missing.")
        return shape[0]

    if "clip_project.prefix_const" not in shapes:
        return {"mapping_type": "mlp", "prefix_length": rows("model.2.weight") // width}
    layers = {name.split(".")[3] for name in shapes if name.startswith("clip_project.transformer.layers.")}
    return {
        "mapping_type": "transformer",
        "prefix_length": rows("prefix_const"),
        "mapping_length": rows("linear.weight") // width,
        "mapping_layers": len(layers),
        "mapping_mlp_ratio": rows("transformer.layers.0.mlp.fc1.weight") / width,
    }


def _check_clip_size(weights: Mapping[str, torch.Tensor], config: ClipCapConfig) -> None:
    """Raises if the mapping network reads features of another size than CLIP's."""
    first = weights["clip_project.model.0.weight" if config.mapping_type == "mlp" else "clip_project.linear.weight"]
    if first.shape[-1] != config.clip_config.projection_dim:
        raise ConversionError(
            f"The mapping network reads features of {first.shape[-1]} numbers, and this CLIP has "
            f"{config.clip_config.projection_dim}: it was trained with another CLIP (640: the ResNet RN50x4)."
        )


def _load_clip(source: str | Path) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """CLIP in float32, and its tokenizer."""
    path = locate_checkpoint(source, other_files=_TOKENIZER_FILES)
    try:
        model, report = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        tokenizer = CLIPTokenizer.from_pretrained(path)
    except Exception as error:  # missing and damaged files make the readers raise many classes
        raise ConversionError(f"{source} is no CLIP that can be loaded: {first_sentence(error)}.") from error
    if missing := report["missing_keys"]:
        raise ConversionError(
            f"{source} is no whole CLIPModel: {listing(list(missing)[:3])} of its weights is missing."
        )
    return model, tokenizer


def _load_gpt2(source: str | Path) -> tuple[GPT2Config, PreTrainedTokenizerBase]:
    """GPT-2's configuration, and its tokenizer, which pads with `<|endoftext|>`."""
    path = locate_checkpoint(source, other_files=_TOKENIZER_FILES)
    try:
        config = GPT2Config.from_pretrained(path)
        tokenizer = GPT2Tokenizer.from_pretrained(path, model_max_length=config.n_positions)
    except Exception as error:  # as in _load_clip
        raise ConversionError(f"{source} is no GPT-2 that can be loaded: {first_sentence(error)}.") from error
    if config.model_type != "gpt2":
        raise ConversionError(f"{source} is no GPT-2: its model type is {config.model_type}.")
    tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def _merges(tokenizer: PreTrainedTokenizerBase, vocab_size: int, copies: int) -> torch.Tensor:
    """A tokenizer's merges as pairs of token ids, int32 (merges, 2).

    Args:
        copies: symbols for each byte: 1, or 2 where bytes at the end of a word are symbols of their own.

    Raises `ConversionError` if the token ids are not those that follow from the merges.
    """
    vocabulary = tokenizer.get_vocab()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    rows = [[vocabulary.get(part, -1) for part in pair] for pair in pairs]
    made = [vocabulary.get("".join(pair)) for pair in pairs]
    first = 256 * copies
    parts_known = all(-1 not in row for row in rows)
    if made != list(range(first, first + len(made))) or vocab_size != first + len(made) + copies or not parts_known:
        raise ConversionError(
            f"The tokenizer's {len(vocabulary)} token ids do not follow from its {len(made)} merges: it is not the "
            f"published one of a model with {vocab_size} tokens."
        )
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 2)


def _fill(config: ClipCapConfig, tensors: dict[str, torch.Tensor]) -> IFSegForSemanticSegmentation:
    """The model with these weights, in float32. Raises unless they are exactly its own, and finite."""
    with torch.device("meta"):
        model = IFSegForSemanticSegmentation(IFSegConfig(backbone_config=config))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected = {name: shape for name, shape in expected.items() if name not in model.all_tied_weights_keys}
    parts = []
    if missing := expected.keys() - tensors.keys():
        parts.append(f"Missing: {listing(missing)}.")
    if left_over := tensors.keys() - expected.keys():
        parts.append(f"Left over: {listing(left_over)}.")
    wrong = [name for name in expected.keys() & tensors.keys() if tensors[name].shape != expected[name]]
    if wrong:
        shapes = (f"{name} {tuple(tensors[name].shape)} not {tuple(expected[name])}" for name in wrong)
        parts.append(f"Wrong shape: {listing(shapes)}.")
    if parts:
        raise ConversionError(f"The tensors of the checkpoint are not ClipCap's. {' '.join(parts)}")
    if damaged := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ConversionError(f"The checkpoint is damaged: values that are not finite numbers in {listing(damaged)}.")
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    model = IFSegForSemanticSegmentation(IFSegConfig(backbone_config=config))
    model.load_state_dict({name: x.contiguous() for name, x in tensors.items()}, strict=False)
    model.tie_weights()
    return model.eval()
