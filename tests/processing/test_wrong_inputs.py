"""Inputs of wrong types, shapes and values: the processor works, or raises an error that was written for it."""

import traceback
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image

IMAGES = [
    Image.new("RGB", (9, 7)),
    Image.new("L", (1, 1)),
    Image.new("I;16", (8, 8), 70),
    Image.new("F", (8, 8)),
    Image.new("CMYK", (5, 5)),
    Image.new("PA", (6, 6)),
    Image.new("RGB", (0, 5)),
    np.zeros((8, 8, 3), np.uint8),
    np.zeros((3, 8, 8), np.float32),
    np.zeros((8, 8, 2), np.uint8),
    np.zeros((0, 8, 3), np.uint8),
    np.full((8, 8, 3), np.nan),
    np.full((8, 8), 1000),
    np.zeros((8, 8, 3), complex),
    np.array(["a", "b"]),
    np.array(5.0),
    np.zeros((2, 3, 8, 8), np.uint8),
    np.zeros((1, 1, 1, 8, 8)),
    torch.zeros(3, 8, 8),
    torch.zeros(8, 8, dtype=torch.bool),
    torch.zeros(3, 8, 8, dtype=torch.bfloat16),
]
OTHERS = [
    None,
    0,
    1,
    -3,
    1.5,
    float("nan"),
    True,
    "",
    "cat",
    "nowhere.png",
    "http://",
    b"\xff\xd8",
    (),
    [],
    {},
    [None],
    [[]],
]
OTHERS += [
    {"a": 1},
    {"a": ["b"]},
    {1: ["b"]},
    {"a": []},
    ["a", "a"],
    ["a", 1],
    [["a"], "b"],
    "\udc80",
    ["\udc80"],
    object(),
]
MAPS = [np.zeros((8, 8), np.uint8), np.zeros((7, 9), np.int64), np.zeros((8, 8)), torch.zeros(8, 8, dtype=torch.int32)]
SIZES = [
    {"shortest_edge": 16},
    {"height": 8, "width": 8},
    {"height": 8},
    {"shortest_edge": 0},
    {"shortest_edge": -1},
    8,
    (8, 8),
]
SIZES += [
    {"shortest_edge": "x"},
    {"shortest_edge": 1.5},
    {"longest_edge": 16, "shortest_edge": 8},
    {"max_height": 8},
    {},
]
NAMES = ["do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad", "pad_size"]
NAMES += [
    "do_reduce_labels",
    "ignore_index",
    "return_tensors",
    "input_data_format",
    "resample",
    "smoothing_iterations",
    "x",
]

NAMED = ("An image is a PIL image, a path, an array or a tensor, not", "got an unexpected keyword argument")


def draw(random: Random, usual: list):
    """A usual value, one of another kind, or a list of values."""
    kind = random.random()
    if kind < 0.8:
        return random.choice(usual)
    if kind < 0.9:
        return random.choice(OTHERS)
    return [random.choice(usual if random.random() < 0.8 else OTHERS) for _ in range(random.randrange(4))]


def inputs(random: Random) -> dict:
    given = {"images": draw(random, IMAGES)} if random.random() < 0.9 else {}
    if random.random() < 0.3:
        given["categories"] = draw(random, [["cat", "dog"], {"pet": ["cat", "dog"]}, [["cat"], ["dog"]]])
    if random.random() < 0.2:
        given["prompt"] = draw(random, ["what?", "{categories}", "{"])
    if random.random() < 0.2:
        given["segmentation_maps"] = draw(random, MAPS)
    if random.random() < 0.1:
        given["text"] = draw(random, ["what?", ["a", "b"]])
    if random.random() < 0.3:
        given["size"] = draw(random, SIZES)
    for name in random.sample(NAMES, random.choice([0, 0, 0, 1, 2])):
        given[name] = draw(random, [True, False, "pt", "np", 0.5, [0.5, 0.5, 0.5], {"height": 16, "width": 16}])
    return given


def test_wrong_inputs_are_refused_by_name(small_processor):
    """A thousand seeded inputs: each works or is refused in a sentence, never by an error from inside."""
    random, refused, leaks = Random(0), 0, Counter()
    for _ in range(1000):
        given = inputs(random)
        try:
            small_processor(**given)
        except (ValueError, StrictDataclassFieldValidationError) as error:  # the second is transformers', with the name
            refused += 1
            if type(error) is ValueError and "\n" in str(error):
                leaks[f"{error}"] += 1
        except Exception as error:
            if isinstance(error, TypeError) and any(text in str(error) for text in NAMED):
                refused += 1
                continue
            frame = traceback.extract_tb(error.__traceback__)[-1]
            leaks[f"{type(error).__name__}: {error} in {Path(frame.filename).name}:{frame.lineno}"] += 1
    assert leaks == {}
    assert 300 < refused < 900
