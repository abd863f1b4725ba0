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


def test_attributes_of_the_backbone_are_refused_outside_of_it():
    with pytest.raises(ValueError, match=r"d_model, dropout.*backbone_config=OFAConfig\(d_model="):
        IFSegConfig(d_model=16, dropout=0.0)


def test_unknown_preset():
    with pytest.raises(ValueError, match="tiny, medium, base, large, huge"):
        OFAConfig.preset("giant")
