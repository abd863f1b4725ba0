"""More words than the prompt has room for: it holds the first, and all are predicted."""

import time

import numpy as np
import torch
from checkpoints import small_model

from ifseg_hf.processing import IFSegSegmenter
from ifseg_hf.processing.prompt_ifseg import PromptEncoder

MANY = [f"{first} {second}" for first in "abcdefghijklmnopqrstuvwxyz" for second in range(50)][:1203]


def test_1203_names_are_predicted_in_one_pass(small_processor):
    model = small_model(vocab_size=len(small_processor.tokenizer))
    segmenter = IFSegSegmenter(model, small_processor)
    segmenter.set_words(MANY)
    limit = small_processor.tokenizer.model_max_length
    assert len(model.config.prompt_ids) <= limit < sum(map(len, model.config.category_ids))
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    outputs = segmenter(segmenter.preprocess([image]))
    assert outputs.logits.shape[1] == 1203
    (labels,) = segmenter.segment([image], iterations=0)
    assert labels.shape == (64, 96)
    assert ((labels >= 0) & (labels < 1203)).all()

    last = PromptEncoder(small_processor.tokenizer).encode(MANY[-3:])
    rows = model.pad_words(last["category_ids"], "cpu")
    prompt = torch.tensor([model.config.prompt_ids])
    with torch.no_grad():
        alone = model(**segmenter.preprocess([image]), input_ids=prompt, category_ids=rows[0], category_mask=rows[1])
    torch.testing.assert_close(outputs.logits[:, -3:], alone.logits)


def test_word_maps_have_all_words(small_processor):
    model = small_model(vocab_size=len(small_processor.tokenizer))
    model.set_words(**small_processor.encode_categories(MANY, background=["wall", "grass"]))
    grid = model.config.grid_size
    word_map = torch.tensor([0, 1202, 1204]).repeat(grid * grid)[: grid * grid].view(1, grid, grid)
    labels = torch.tensor(model.config.word_categories)[word_map]
    outputs = model(word_map=word_map, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.shape[1] == 1204
    assert outputs.loss.isfinite()


def test_time_to_encode_grows_linearly(small_processor):
    def seconds(names: list[str]) -> float:
        started = time.perf_counter()
        small_processor.encode_categories(names)
        return time.perf_counter() - started

    few, many = ([f"word {index}" for index in range(count)] for count in (500, 5000))
    shortest = min(seconds(few) for _ in range(3))
    assert min(seconds(many) for _ in range(2)) < 40 * shortest  # a quadratic cost would be 100 times
