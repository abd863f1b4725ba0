"""transformers' common tests of image processors, processors and pipelines."""

import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_model import save_tiny_model
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers_tests import test_pipeline_mixin as pipeline_mixin
from transformers_tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from transformers_tests.test_processing_common import ProcessorTesterMixin

from ifseg_hf import (
    IFSegConfig,
    IFSegForSemanticSegmentation,
    IFSegImageProcessor,
    IFSegImageSegmentationPipeline,
    IFSegProcessor,
)
from ifseg_hf.modeling import IFSegSegmentationOutput
from ifseg_hf.processing.image_reading_ifseg import to_array


class IFSegImageProcessingTester(ImageProcessingTester):
    num_labels = 3

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 32, "longest_edge": 128})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return IMAGE_PROCESSOR_MAPPING[IFSegConfig]

    def expected_output_image_shape(self, images):
        sizes = []
        for image in images:
            height, width = to_array(image).shape[:2]
            scale = min(self.size["shortest_edge"] / min(height, width), self.size["longest_edge"] / max(height, width))
            sizes.append((int(height * scale + 0.5), int(width * scale + 0.5)))
        return self.num_channels, *map(max, zip(*sizes, strict=True))

    def prepare_post_process_semantic_segmentation_inputs(self):
        height, width = 5, 6
        outputs = IFSegSegmentationOutput(
            logits=torch.randn(self.batch_size, self.num_labels, height, width),
            image_features=torch.randn(self.batch_size, 8, height, width),
            patch_mask=torch.ones(self.batch_size, height, width, dtype=torch.bool),
        )
        return {"outputs": outputs}, {"num_labels": self.num_labels, "height": height, "width": width}


class IFSegImageProcessingTest(ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase):
    image_processor_tester_class = IFSegImageProcessingTester
    test_cast_dtype = True


class IFSegProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = IFSegProcessor

    @classmethod
    def _setup_from_components(cls):
        return IFSegProcessor.from_pretrained(save_tiny_model(Path(cls.tmpdirname)))


class ImageSegmentationPipelineTests:
    """In place of the class of this name in transformers' repository, which is not in the source distribution."""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **kwargs):
        words = IFSegProcessor(image_processor, tokenizer).encode_categories(["cat", "grass", "sky"])
        model.set_words(**words)
        pipeline = IFSegImageSegmentationPipeline(
            model=model,
            task="image-segmentation",
            tokenizer=tokenizer,
            image_processor=image_processor,
            dtype=dtype,
        )
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in [(50, 70), (40, 40)]]
        return pipeline, images

    def run_pipeline_test(self, pipeline, examples):
        for image, segments in zip(examples, pipeline(examples), strict=True):
            assert segments == pipeline(image)
            assert all(segment.keys() == {"label", "score", "mask"} for segment in segments)
            assert all(segment["mask"].size == image.size for segment in segments)
            assert (sum(np.asarray(segment["mask"]).astype(int) for segment in segments) == 255).all()


class IFSegPipelineTest(pipeline_mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"image-segmentation": IFSegForSemanticSegmentation}

    @classmethod
    def setUpClass(cls):
        folder = Path(pipeline_mixin.TRANSFORMERS_TINY_MODEL_PATH) / "ifseg" / "IFSegForSemanticSegmentation"
        save_tiny_model(folder)
        tests = f"{__name__}.{ImageSegmentationPipelineTests.__name__}"
        cls.enterClassContext(mock.patch.dict(pipeline_mixin.pipeline_test_mapping["image-segmentation"], test=tests))
        # the mixin looks for the classes of a model's processors in transformers itself
        cls.enterClassContext(mock.patch.object(transformers, "IFSegImageProcessor", IFSegImageProcessor, create=True))

    # timm, which the mixin asks for, is for other models of this task

    def test_pipeline_image_segmentation(self):
        self.run_task_tests("image-segmentation")

    def test_pipeline_image_segmentation_fp16(self):
        self.run_task_tests("image-segmentation", dtype="float16")
