"""transformers' common tests of configurations, models and training."""

import unittest
from unittest import mock

import torch
from checkpoints import SMALL
from transformers.testing_utils import torch_device
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from ifseg_hf.modeling import (
    IFSegConfig,
    IFSegForSemanticSegmentation,
    OFAConfig,
    OFAForConditionalGeneration,
    OFAModel,
)

BATCH, TOKENS, PIXELS = 3, 7, 32
PATCHES = (PIXELS // 16) ** 2
# Wide enough to learn a text by heart, and without what hinders that.
NO_DROPOUT = {"dropout": 0.0, "drop_path_rate": 0.0}
SETTINGS = {**SMALL, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **NO_DROPOUT}


class OFAModelTester:
    """Sizes and inputs of an OFA model: image and text go in, text comes out."""

    batch_size = BATCH
    seq_length = decoder_seq_length = TOKENS
    encoder_seq_length = key_length = PATCHES + TOKENS
    num_hidden_layers = SETTINGS["encoder_layers"]
    hidden_size = SETTINGS["d_model"]
    num_attention_heads = SETTINGS["encoder_attention_heads"]
    is_training = True
    causal_lm_class = OFAForConditionalGeneration

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> OFAConfig | IFSegConfig:
        return OFAConfig(**SETTINGS)

    def prepare_config_and_inputs_for_common(self) -> tuple[OFAConfig | IFSegConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {
            "input_ids": self.text(),
            "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long, device=torch_device),
            "pixel_values": floats_tensor([BATCH, 3, PIXELS, PIXELS]),
            "decoder_input_ids": self.text(),
            "decoder_attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long, device=torch_device),
        }

    @staticmethod
    def text() -> torch.Tensor:
        return ids_tensor([BATCH, TOKENS], SETTINGS["vocab_size"] - 3) + 3


class IFSegForSemanticSegmentationTester(OFAModelTester):
    """The same with the words of three categories, and the image's patches after `<s>` as the decoder's input."""

    decoder_seq_length = PATCHES + 1
    num_hidden_states_types = 2
    num_labels = 3

    def get_config(self) -> IFSegConfig:
        return IFSegConfig(backbone_config=OFAConfig(**SETTINGS))

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        categories = ids_tensor([BATCH, self.num_labels, 2], 100) + 3  # some tests shrink the vocabulary by 15
        return config, {
            "pixel_values": inputs["pixel_values"],
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "category_ids": categories,
            "category_mask": torch.ones_like(categories),
        }


class OFAModelTest(ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (OFAModel, OFAForConditionalGeneration)
    is_encoder_decoder = True
    model_tester = None
    additional_model_inputs = ["pixel_values"]
    test_can_init_all_missing_weights_before_2023 = True  # or it looks for a year of copyright in our files
    # OFA's decoder has positions and a layer norm for the image codes that it can generate; no text or image uses them.
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = OFAModelTester(self)
        as_in_json = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
        self.config_tester = ConfigTester(self, config_class=OFAConfig, **as_in_json)

    def _get_trainable_model_class(self):
        # Without generate(): after training the mixin continues a text, which an encoder-decoder starts anew.
        return type("OFAForTraining", (OFAForConditionalGeneration,), {"generate": property()})

    def test_config(self):
        self.config_tester.run_common_tests()


class IFSegForSemanticSegmentationTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (IFSegForSemanticSegmentation,)
    additional_model_inputs = ["input_ids", "category_ids", "category_mask"]
    test_can_init_all_missing_weights_before_2023 = True
    test_all_params_have_gradient = False  # the decoder's text positions take no part either

    def setUp(self):
        self.model_tester = IFSegForSemanticSegmentationTester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        # some tests add a text for the decoder, which reads the image's patches here
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}

    def test_model_outputs_equivalence(self):
        # it subtracts the outputs for a message, which torch refuses for bools such as patch_mask
        subtract = torch.Tensor.__sub__

        def subtract_bools_too(first, second):
            return subtract(*(x.int() if getattr(x, "dtype", None) == torch.bool else x for x in (first, second)))

        with mock.patch.object(torch.Tensor, "__sub__", subtract_bools_too):
            super().test_model_outputs_equivalence()
