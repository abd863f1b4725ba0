"""A small random CLIP, GPT-2 and ClipCap checkpoint, in the layouts of the published ones."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ifseg_hf.modeling.templates_clip import PROMPT_TEMPLATES

PATCH, FEATURE, WIDTH, PREFIX, MAPPING = 32, 12, 16, 3, 4
WORDS = ["cat", "wet grass", "sky", "traffic light", "cup"]
BYTES = list(bytes_to_unicode().values())


def learned_merges(texts: list[str], suffix: str = "", count: int = 60) -> list[tuple[str, str]]:
    """Merges of a byte-level byte-pair encoding that is trained on texts."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if suffix:  # as CLIP's: without spaces
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), tokenizer.pre_tokenizer])
    size = 256 * (1 + bool(suffix)) + count
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=BYTES, end_of_word_suffix=suffix, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def clip_tokenizer() -> CLIPTokenizer:
    merges = learned_merges([template.format(word) for template in PROMPT_TEMPLATES for word in WORDS], "</w>", 150)
    tokens = [*BYTES, *(f"{byte}</w>" for byte in BYTES), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def gpt2_tokenizer() -> GPT2Tokenizer:
    merges = learned_merges([f"a {word} in the scene" for word in WORDS])
    tokens = [*BYTES, *map("".join, merges), "<|endoftext|>"]
    return GPT2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def scale_up(model: torch.nn.Module):
    """Adds noise to every weight, so that each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.2 * torch.randn_like(parameter)


def mapping_weights(mapping: str) -> dict[str, torch.Tensor]:
    """Random weights of a mapping network, under the published names."""
    size = PREFIX * WIDTH
    if mapping == "mlp":
        shapes = {"model.0.weight": (size // 2, FEATURE), "model.0.bias": (size // 2,)}
        shapes |= {"model.2.weight": (size, size // 2), "model.2.bias": (size,)}
    else:
        shapes = {"linear.weight": (MAPPING * WIDTH, FEATURE), "linear.bias": (MAPPING * WIDTH,)}
        shapes["prefix_const"] = (PREFIX, WIDTH)
        for layer in range(2):
            start = f"transformer.layers.{layer}"
            for norm in ("norm1", "norm2"):
                shapes |= {f"{start}.{norm}.weight": (WIDTH,), f"{start}.{norm}.bias": (WIDTH,)}
            shapes |= {f"{start}.attn.to_queries.weight": (WIDTH, WIDTH)}
            shapes |= {f"{start}.attn.to_keys_values.weight": (2 * WIDTH, WIDTH)}
            shapes |= {f"{start}.attn.project.weight": (WIDTH, WIDTH), f"{start}.attn.project.bias": (WIDTH,)}
            shapes |= {f"{start}.mlp.fc1.weight": (2 * WIDTH, WIDTH), f"{start}.mlp.fc1.bias": (2 * WIDTH,)}
            shapes |= {f"{start}.mlp.fc2.weight": (WIDTH, 2 * WIDTH), f"{start}.mlp.fc2.bias": (WIDTH,)}
    return {f"clip_project.{name}": 0.5 * torch.randn(shape) for name, shape in shapes.items()}


@dataclass
class ClipCapSources:
    """Folders of CLIP and GPT-2, and ClipCap's files by mapping."""

    clip: Path
    gpt2: Path
    files: dict[str, Path]


def save_sources(folder: Path, positions: int = 120) -> ClipCapSources:
    """Saves CLIP and GPT-2 with their tokenizers, and a ClipCap file for each mapping.

    Args:
        positions: longest text of GPT-2 in tokens.
    """
    torch.manual_seed(0)
    words_of_clip, words_of_gpt2 = clip_tokenizer(), gpt2_tokenizer()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": len(words_of_clip) - 2, "eos_token_id": len(words_of_clip) - 1}
    text = {**sizes, **ends, "vocab_size": len(words_of_clip), "max_position_embeddings": 50}
    vision = {**sizes, "image_size": 2 * PATCH, "patch_size": PATCH}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=FEATURE))
    last = len(words_of_gpt2) - 1
    config = GPT2Config(vocab_size=last + 1, n_embd=WIDTH, n_layer=2, n_head=8, n_positions=positions)
    config.bos_token_id = config.eos_token_id = last
    gpt2 = GPT2LMHeadModel(config)
    for model, tokenizer, name in [(clip, words_of_clip, "clip"), (gpt2, words_of_gpt2, "gpt2")]:
        scale_up(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    scale_up(gpt2)  # ClipCap tunes it
    weights = {f"gpt.{name}": tensor for name, tensor in gpt2.state_dict().items()}
    for layer in range(2):  # buffers of older versions of transformers
        weights[f"gpt.transformer.h.{layer}.attn.bias"] = torch.ones(
            1, 1, positions, positions, dtype=torch.bool
        ).tril()
        weights[f"gpt.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    files = {}
    for mapping in ("mlp", "transformer"):
        files[mapping] = folder / f"{mapping}_weights.pt"
        torch.save({**mapping_weights(mapping), **weights}, files[mapping])
    return ClipCapSources(folder / "clip", folder / "gpt2", files)
