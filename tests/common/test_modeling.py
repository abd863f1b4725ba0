"""transformers' common tests of configurations, models and training."""

import unittest
from unittest import mock

import torch
from checkpoints import SMALL
from transformers import CLIPConfig, GPT2Config
from transformers.testing_utils import torch_device
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from ifseg_hf.modeling import (
    ClipCapConfig,
    Florence2SegmentationConfig,
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


class ClipCapTester(IFSegForSemanticSegmentationTester):
    """Sizes of a ClipCap, whose decoder reads a prefix of two embeddings for each patch."""

    encoder_seq_length = key_length = PATCHES + 1
    decoder_seq_length = decoder_key_length = 2

    def get_config(self) -> IFSegConfig:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
        ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
        clip = CLIPConfig(
            text_config={**sizes, **ends, "vocab_size": 514, "max_position_embeddings": 40},
            vision_config={**sizes, "image_size": PIXELS, "patch_size": 16},
            projection_dim=12,
        )
        gpt = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=20)
        gpt.bos_token_id = gpt.eos_token_id = 299
        sizes = {"prefix_length": 2, "image_size": PIXELS, "templates": ["a photo of a {}."], "dropout": 0.0}
        return IFSegConfig(backbone_config=ClipCapConfig(clip_config=clip, gpt_config=gpt, **sizes))


class Florence2Tester(IFSegForSemanticSegmentationTester):
    """Sizes of a Florence-2, whose encoder reads the mean of an image beside its patches."""

    encoder_seq_length = key_length = PATCHES + 1 + TOKENS
    decoder_seq_length = PATCHES

    def get_config(self) -> IFSegConfig:
        vision = {"depths": (1, 1), "embed_dim": (8, 16), "num_heads": (2, 2), "num_groups": (2, 2)}
        vision |= {
            "patch_size": (7, 3),
            "patch_stride": (8, 2),
            "patch_padding": (3, 1),
            "patch_prenorm": (False, True),
        }
        vision |= {"window_size": 2, "projection_dim": 32, "drop_path_rate": 0.0}
        names = ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "max_position_embeddings")
        names += ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim")
        text = {"model_type": "bart", "dropout": 0.0, **{name: SETTINGS[name] for name in names}}
        config = Florence2SegmentationConfig(vision_config=vision, text_config=text, image_size=PIXELS)
        return IFSegConfig(backbone_config=config)


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


class ClipCapForSemanticSegmentationTest(IFSegForSemanticSegmentationTest):
    def setUp(self):
        self.model_tester = ClipCapTester(self)


class Florence2ForSemanticSegmentationTest(IFSegForSemanticSegmentationTest):
    def setUp(self):
        self.model_tester = Florence2Tester(self)
