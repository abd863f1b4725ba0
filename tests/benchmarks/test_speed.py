"""What a photo and a training step cost, beside one 2048 x 2048 x 2048 matrix product on the same threads.

`make bench` prints the table; divide by the row `matrix product` to compare machines.
"""

import pytest
import torch
from torch import nn

from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation
from ifseg_hf.processing.post_processing_ifseg import segmentation_maps


def make_model(size: str, words: int) -> IFSegForSemanticSegmentation:
    torch.manual_seed(0)
    model = IFSegForSemanticSegmentation(IFSegConfig.preset(size))
    ids = torch.arange(1000, 1000 + words).tolist()
    model.set_words(dict(enumerate(map(str, ids))), [[i] for i in ids], [0, *range(100, 110), *ids, 2])
    return model.eval()


@pytest.mark.benchmark(group="unit", min_rounds=5, warmup=True)
def test_matrix_product(benchmark):
    a, b = torch.randn(2, 2048, 2048)
    benchmark(torch.mm, a, b)


@pytest.mark.benchmark(group="photo", min_rounds=3, warmup=True)
@pytest.mark.parametrize(
    ("size", "height", "width", "words"),
    [
        ("tiny", 512, 512, 15),
        ("tiny", 512, 683, 15),
        ("tiny", 512, 512, 171),
        ("base", 512, 512, 15),
    ],
)
def test_photo(benchmark, size, height, width, words):
    model = make_model(size, words)
    pixel_values = torch.randn(1, 3, height, width)

    @torch.no_grad()
    def segment():
        return segmentation_maps(model(pixel_values=pixel_values), [(height, width)])

    benchmark(segment)


@pytest.mark.benchmark(group="word-map step, batch 2", min_rounds=3, warmup=True)
@pytest.mark.parametrize(("size", "words"), [("tiny", 15), ("tiny", 171)])
def test_word_map_step(benchmark, size, words):
    model = make_model(size, words).train()
    model.freeze_for_word_maps()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    word_map = torch.randint(0, words, (2, 32, 32))
    labels = nn.functional.interpolate(word_map[None].float(), size=(512, 512))[0].long()

    def step():
        model(word_map=word_map, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    benchmark(step)
