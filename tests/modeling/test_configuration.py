import json
from random import Random

import pytest
from checkpoints import SMALL
from reference_outputs import fixture

from ifseg_hf.modeling import IFSegConfig, OFAConfig, OFAModel


@pytest.mark.parametrize("size", ["tiny", "medium", "base", "large", "huge"])
def test_presets_have_the_published_parameters(size):
    import torch

    with torch.device("meta"):
        model = OFAModel(OFAConfig.preset(size))
    published = {
        row["hf"]: row["shape"]
        for row in fixture.inventory(size)
        if row["hf"] and not row["segmentation"] and "output_projection" not in row["hf"]
    }
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published


def test_round_trip(tmp_path):
    config = IFSegConfig(
        backbone_config=OFAConfig(**SMALL),
        id2label={0: "cat", 1: "sky"},
        category_ids=[[5], [6, 7]],
        prompt_ids=[0, 5, 6, 7, 2],
    )
    config.save_pretrained(tmp_path)
    loaded = IFSegConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.label2id == {"cat": 0, "sky": 1}
    assert loaded.num_labels == 2
    assert loaded.grid_size == 4
    assert loaded.backbone_config.trunk_depths == (1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 15}, "encoder_attention_heads"),
        ({"trunk_depths": (1, 1)}, "differ in length"),
        ({"trunk_hidden_sizes": (8, 8, 10)}, "multiple of 4"),
        ({"trunk_type": "vgg"}, "choose resnet or efficientnet_lite"),
        ({"trunk_type": "efficientnet_lite"}, "seven stages"),
        ({"image_size": 70}, "multiple of 16"),
        ({"image_size": 256}, "image_bucket_size"),
        ({"decoder_positions": "sinus"}, "segmentation"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OFAConfig(**{**SMALL, **change})


VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    7,
    2**70,
    1.5,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "8",
    "segmentation",
    [],
    [1],
]
VALUES += [["a"], [[1]], [[1], [2]], [1, 1, 1], [0, 1, 2], {}, {"a": 1}, {0: "x"}, {"0": "x", 1: "y"}, {"0": "\ud800"}]
VALUES += [{0: ["x"]}, {1: 2}, {"model_type": []}, {"model_type": "ofa", "d_model": {}}]
GENERAL = ["id2label", "label2id", "num_labels", "dtype", "torch_dtype"]


def test_wrong_values_are_refused_by_name():
    """A thousand seeded configurations: each works, and so does its copy, or a `ValueError` names a changed value."""
    random = Random(0)
    refused = []
    for number in range(1000):
        kind = (OFAConfig, IFSegConfig)[number % 2]
        own = [*SMALL, "dropout", "drop_path_rate", "decoder_positions", "tuning", "trunk_type", "resnet_type"]
        if kind is IFSegConfig:
            own = ["backbone_config", "prompt", "prompt_ids", "category_ids", "word_ids", "word_categories", "tuned"]
        changed = {name: random.choice(VALUES) for name in random.sample([*own, *GENERAL], random.choice([1, 1, 2]))}
        settings = {**SMALL, **changed} if kind is OFAConfig else {"backbone_config": OFAConfig(**SMALL), **changed}
        try:
            config = kind(**settings)
            if kind is IFSegConfig:
                config.check_words()
            kind.from_dict(json.loads(config.to_json_string()))
        except ValueError as error:
            refused.append((changed, str(error)))
    for changed, message in refused:
        inner = [name for value in changed.values() if isinstance(value, dict) for name in value]
        related = [*changed, *map(str, inner), "category_ids", "model_type"]
        assert any(name in message for name in related), (changed, message)
    assert 400 < len(refused) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": [1]}, r"id2label=\[1\] should be a dict of names"),
        ({"d_model": {}}, r"d_model=\{\} should be an integer"),
        ({"image_size": "x"}, "image_size='x' should be an integer"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads=0: sizes are at least 1"),
        ({"id2label": {0: "\udc80"}}, "name of category 0, which is no text"),
        ({"dtype": "float31"}, "dtype='float31' is no dtype"),
        ({"dropout": 1.5}, "dropout=1.5: a rate"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(change, message):
    with pytest.raises(ValueError, match=message):
        OFAConfig(**{**SMALL, **change})


def test_names_are_in_the_order_of_their_numbers():
    """Not in that of the file, in which "10" may come before "2"."""
    names = {str(number): f"name {number}" for number in range(12)}
    config = IFSegConfig(backbone_config=OFAConfig(**SMALL), id2label=dict(sorted(names.items())))
    assert list(config.id2label.values()) == list(names.values())


def test_attributes_of_the_backbone_are_refused_outside_of_it():
    with pytest.raises(ValueError, match=r"d_model, dropout.*backbone_config=OFAConfig\(d_model="):
        IFSegConfig(d_model=16, dropout=0.0)


def test_unknown_preset():
    with pytest.raises(ValueError, match="tiny, medium, base, large, huge"):
        OFAConfig.preset("giant")
