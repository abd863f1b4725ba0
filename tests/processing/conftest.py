"""A tokenizer small enough to make on the spot, processors with it and with the published one, and a segmenter."""

import numpy as np
import pytest
import torch
from checkpoints import small_model
from reference_outputs import BPE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BartTokenizer, PreTrainedTokenizerFast

from ifseg_hf.processing import IFSegImageProcessor, IFSegProcessor, IFSegSegmenter


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding with 400 tokens, any text allowed, 64 positions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["what is the segmentation map of the image? object: cat dog concrete wall grass sky unknown"] * 20, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )


@pytest.fixture
def small_processor(small_tokenizer) -> IFSegProcessor:
    return IFSegProcessor(IFSegImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}), small_tokenizer)


@pytest.fixture
def segmenter(small_processor) -> IFSegSegmenter:
    """A small random model in training mode, with the words cat, dog and sky."""
    model = small_model(vocab_size=len(small_processor.tokenizer)).train()
    with torch.no_grad():  # so that several categories win somewhere
        for parameter in model.parameters():
            parameter.mul_(1.5)
    segmenter = IFSegSegmenter(model, small_processor)
    segmenter.set_words(["cat", "dog", "sky"])
    return segmenter


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """Images of 80 x 150 and 100 x 70 pixels."""
    coarse = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    return [coarse[0].repeat(20, 0).repeat(30, 1), coarse[1].repeat(25, 0).repeat(14, 1)]


@pytest.fixture(scope="session")
def published_processor() -> IFSegProcessor:
    """OFA's vocabulary, which is not part of the project."""
    if BPE is None:
        pytest.skip("needs the published vocabulary files")
    tokenizer = BartTokenizer(vocab=str(BPE / "vocab.json"), merges=str(BPE / "merges.txt"), model_max_length=1024)
    return IFSegProcessor(IFSegImageProcessor(), tokenizer)
