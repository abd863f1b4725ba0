"""The tokenizer of the nano OFA."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BartTokenizer

from ifseg_hf.processing.prompt_ifseg import CATEGORIES, PROMPT_TEMPLATE

CAPTION_PROMPT = "what does the image describe?"
INFILLING_PROMPT = 'what is the complete text of "{}"?'
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_tokenizer(names: list[str], max_length: int = 512) -> BartTokenizer:
    """Trains a byte-level BPE tokenizer that has one token for every word of the names and of the prompts.

    It encodes any text: other words become several tokens, at most one per byte. `max_length` is the number of tokens
    that the model accepts.
    """
    prompts = [part.strip() for part in PROMPT_TEMPLATE.split(CATEGORIES)]
    prompts += [CAPTION_PROMPT, INFILLING_PROMPT.format("a")]
    sentences = [*prompts, "a photo of a", "there is a in the image"]
    texts = [f" {text}" for text in names + sentences] + ['"', "?", ".", ","]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,  # larger than the result: every word gets its token
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return BartTokenizer(vocab=model["vocab"], merges=merges, model_max_length=max_length)
