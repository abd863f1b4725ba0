"""A small random OFA in the layout of the published ones on the Hub: config.json, vocab.json, merges.txt, weights."""

import json
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel

from ifseg_hf import OFAConfig, OFAForConditionalGeneration

EXTRA_TOKENS = 8192 + 1000  # codes of image patches and bins of coordinates, which the vocabulary files lack
WORDS = ["cat", "dog", "grass", "sky", "wet"]


def merges_of(word: str) -> list[str]:
    """Merges that make one token of a word and one of the word after a space."""
    pairs = [f"{word[:i]} {word[i]}" for i in range(1, len(word))]
    return [*pairs, f"Ġ {word}"]


def write_vocabulary(folder: Path) -> int:
    """Writes BART's two files with every byte and a few words; returns the number of tokens."""
    merges = [merge for word in WORDS for merge in merges_of(word)]
    merges = list(dict.fromkeys(merges))
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    rows = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(rows)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return len(rows)


def published_config(vocab_size: int) -> dict:
    """The entries of a published `config.json`, for a narrow OFA with a ResNet-50."""
    return {
        "_name_or_path": "./OFA-small/",
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "add_type_embedding": True,
        "architectures": ["OFAModel"],
        "attention_dropout": 0.0,
        "attn_scale_factor": 2.0,
        "bos_token_id": 0,
        "classifier_dropout": 0.0,
        "code_image_size": 128,
        "code_layernorm_embedding": True,
        "d_model": 32,
        "decoder_attention_heads": 4,
        "decoder_drop_path_rate": 0.0,
        "decoder_ffn_dim": 64,
        "decoder_layerdrop": 0.0,
        "decoder_layers": 2,
        "decoder_normalize_before": True,
        "decoder_start_token_id": 0,
        "dropout": 0.1,
        "encoder_attention_heads": 4,
        "encoder_drop_path_rate": 0.0,
        "encoder_ffn_dim": 64,
        "encoder_layerdrop": 0.0,
        "encoder_layers": 3,
        "encoder_normalize_before": True,
        "entangle_position_embedding": False,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
        "image_bucket_size": 42,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "layernorm_embedding": True,
        "max_position_embeddings": 256,
        "model_type": "ofa",
        "normformer": True,
        "num_hidden_layers": 3,
        "pad_token_id": 1,
        "patch_layernorm_embedding": True,
        "resnet_drop_path_rate": 0.0,
        "resnet_model_path": None,
        "resnet_type": "resnet50",
        "scale_embedding": False,
        "share_decoder_input_output_embed": True,
        "token_bucket_size": 64,
        "torch_dtype": "float16",
        "transformers_version": "4.16.0.dev0",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def write_published_ofa(folder: Path) -> Path:
    """Writes an OFA as OFA-Sys publishes it, with half-precision weights, and returns the folder.

    Beside its parameters, `pytorch_model.bin` has copies of the embedding and buffers that the model can compute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config(write_vocabulary(folder) + EXTRA_TOKENS)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(0)
    model = OFAForConditionalGeneration(OFAConfig(**{**config, "init_std": 0.2}))
    weights = {name.removeprefix("model."): x.half() for name, x in model.state_dict().items() if "lm_head" not in name}
    embedding = weights["encoder.embed_tokens.weight"]
    weights["decoder.embed_tokens.weight"] = weights["decoder.output_projection.weight"] = embedding
    for stack in ("encoder", "decoder"):
        weights[f"{stack}.token_rp_bucket"] = torch.zeros(256, 256, dtype=torch.long)
        weights[f"{stack}.image_rp_bucket"] = torch.zeros(50, 50, dtype=torch.long)
    weights["decoder.image_position_idx"] = torch.zeros(1025, dtype=torch.long)
    for name in [name for name in weights if name.endswith("running_mean")]:
        weights[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder
