"""Size of the nano OFA."""

import torch

from ifseg_hf.modeling import OFAForConditionalGeneration
from ifseg_hf.nano.configuration import nano_config


def test_the_nano_model_has_under_32_megabytes():
    with torch.device("meta"):
        model = OFAForConditionalGeneration(nano_config(9000))
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 32e6
