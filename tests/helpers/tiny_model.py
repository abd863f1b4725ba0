"""A folder with a small random model and its processor, for training in tests."""

import json
from pathlib import Path

import torch
from checkpoints import SMALL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation, OFAConfig, OFAForConditionalGeneration
from ifseg_hf.processing import IFSegImageProcessor, IFSegProcessor


def save_tiny_model(folder: Path, model_class=IFSegForSemanticSegmentation, tuned: bool = False) -> str:
    """Saves a model for 4 x 4 word maps and 64 x 64 images, without words, whose tokenizer has a token for each byte.

    Args:
        tuned: of an IFSeg model, whether its configuration says that it was tuned, so that it may segment.

    Returns:
        The folder, as a string.
    """
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=120, **special)
    IFSegProcessor(IFSegImageProcessor(), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = OFAConfig(**{**SMALL, "vocab_size": len(alphabet), "max_position_embeddings": 120, "init_std": 0.2})
    if model_class is IFSegForSemanticSegmentation:
        config = IFSegConfig(backbone_config=config, tuned=tuned)
    model_class(config).save_pretrained(folder)
    return str(folder)


def save_untuned_backbone(folder: Path, recipe: dict) -> str:
    """Saves the backbone of [`save_tiny_model`], whose configuration carries a recipe of tuning. Returns the folder."""
    save_tiny_model(folder, OFAForConditionalGeneration)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tuning": recipe}))
    return str(folder)


def is_key_bias(name: str) -> bool:
    """Whether a parameter is the bias of keys, which has no effect on softmax: its gradient is rounding noise."""
    return name.endswith(("k_proj.bias", "pos_k_linear.bias"))
