import json
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import small_model
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ifseg_hf.processing import IFSegImageSegmentationPipeline, IFSegProcessor


def make_image(height: int = 90, width: int = 120, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def model(small_processor):
    model = small_model(vocab_size=len(small_processor.tokenizer))
    with torch.no_grad():  # so that several categories win somewhere
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.set_words(**small_processor.encode_categories(["cat", "dog", "sky"]))
    return model.eval()


@pytest.fixture
def pipe(model, small_processor):
    return small_processor.pipeline(model)


@pytest.fixture
def log():
    """What transformers logs at WARNING and above."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


def labels_of(segments: list[dict]) -> set[str]:
    return {segment["label"] for segment in segments}


def same(first: list[dict], second: list[dict]) -> bool:
    return [(s["label"], np.asarray(s["mask"]).tobytes()) for s in first] == [
        (s["label"], np.asarray(s["mask"]).tobytes()) for s in second
    ] and np.allclose([s["score"] for s in first], [s["score"] for s in second], atol=1e-5)


@pytest.mark.parametrize("iterations", [0, 25])
def test_is_the_model_and_the_post_processing(pipe, model, small_processor, iterations, log):
    segments = pipe(make_image(), smoothing_iterations=iterations)
    with torch.no_grad():
        outputs = model(**small_processor(images=make_image(), return_tensors="pt"))
    (expected,) = small_processor.post_process_semantic_segmentation(
        outputs, [(90, 120)], smoothing_iterations=iterations
    )
    found = torch.full_like(expected, -1)
    for segment in segments:
        assert segment["mask"].size == (120, 90)
        assert segment["mask"].mode == "L"
        assert 0 < segment["score"] <= 1
        found[torch.from_numpy(np.array(segment["mask"])) == 255] = model.config.label2id[segment["label"]]
    assert torch.equal(found, expected)
    assert log == []


def test_smooths_by_default(pipe):
    assert same(pipe(make_image()), pipe(make_image(), smoothing_neighbors=3, smoothing_iterations=25))
    assert not same(pipe(make_image()), pipe(make_image(), smoothing_iterations=0))


def test_the_score_is_the_mean_probability(pipe, model, small_processor):
    from ifseg_hf.processing import patch_scores, resize_scores

    with torch.no_grad():
        outputs = model(**small_processor(images=make_image(), return_tensors="pt"))
    (scores,) = patch_scores(outputs)
    probabilities = resize_scores(scores, (90, 120))
    for segment in pipe(make_image()):
        mask = torch.from_numpy(np.array(segment["mask"])) == 255
        expected = probabilities[model.config.label2id[segment["label"]]][mask].mean()
        assert segment["score"] == pytest.approx(expected.item(), abs=1e-6)


def test_other_words(pipe, model):
    assert labels_of(pipe(make_image())) <= {"cat", "dog", "sky"}
    assert labels_of(pipe(make_image(), categories=["concrete wall", "grass"])) <= {"concrete wall", "grass"}
    assert labels_of(pipe(make_image(), categories=["grass"])) == {"grass"}
    assert labels_of(pipe(make_image(), categories={"animal": ["cat", "dog"]})) == {"animal"}
    # the same words as stored, in the same prompt
    assert same(pipe(make_image(), categories=["cat", "dog", "sky"]), pipe(make_image()))
    own = pipe(make_image(), prompt="which of these is it?")
    assert labels_of(own) <= {"cat", "dog", "sky"}
    assert not same(own, pipe(make_image()))
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "sky"}


def test_other_words_follow_the_stored_prompt(pipe, model, small_processor):
    model.set_words(**small_processor.encode_categories(["cat", "dog", "sky"], "a photo of", append_unknown=False))
    assert same(pipe(make_image(), categories=["cat", "dog", "sky"]), pipe(make_image()))


def test_words_given_at_construction(model, small_processor):
    pipe = small_processor.pipeline(model, categories=["grass"])
    assert labels_of(pipe(make_image())) == {"grass"}
    assert labels_of(pipe(make_image(), categories=["wall"])) == {"wall"}


def test_images_of_several_sizes_in_one_batch(pipe, log):
    images = [
        make_image(90, 120, 0),
        make_image(120, 90, 1),
        make_image(64, 64, 2),
        make_image(90, 120, 3),
        make_image(70, 200, 4),
    ]
    for kwargs in ({}, {"categories": ["grass", "concrete wall"]}):
        together = pipe(images, batch_size=2, **kwargs)
        for image, segments in zip(images, together, strict=True):
            assert same(segments, pipe(image, **kwargs))
        lazily = list(pipe((image for image in images), batch_size=3, **kwargs))
        assert all(same(*pair) for pair in zip(lazily, together, strict=True))
    assert log == []


def test_kinds_of_images(pipe, tmp_path):
    make_image().save(tmp_path / "a.png")
    expected = pipe(make_image())
    array = np.array(make_image())
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", array, torch.from_numpy(array).permute(2, 0, 1)]
    for kind in kinds:
        assert same(pipe(kind), expected)
    assert all(same(segments, expected) for segments in pipe(kinds))
    assert same(pipe(images=make_image()), expected)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("smoothing_neighbours", "Did you mean smoothing_neighbors?"), ("candidates", "The arguments are")],
)
def test_unknown_arguments_are_refused_by_name(pipe, model, small_processor, name, hint):
    message = re.escape(f"unexpected keyword argument '{name}'. {hint}")
    with pytest.raises(TypeError, match=message):
        pipe(make_image(), **{name: 1})
    with pytest.raises(TypeError, match=message):
        small_processor.pipeline(model, **{name: 1})
    with pytest.raises(TypeError, match=name):
        small_processor(images=make_image(), **{name: 1})


def test_floats_from_0_to_1_are_not_rescaled_on_request(pipe):
    expected = pipe(make_image(), smoothing_iterations=0)
    floats = pipe(np.asarray(make_image()) / 255, do_rescale=False, smoothing_iterations=0)
    assert labels_of(floats) == labels_of(expected)
    for one, other in zip(floats, expected, strict=True):  # images of 8 bits are resized in integers
        assert abs(one["score"] - other["score"]) < 0.002
        assert np.mean(np.asarray(one["mask"]) != np.asarray(other["mask"])) < 0.01


def test_an_empty_list_gives_an_empty_list(pipe):
    assert pipe([]) == pipe(images=[]) == []


def test_errors(pipe, model, small_processor, tmp_path):
    with pytest.raises(ValueError, match="semantic"):
        pipe(make_image(), subtask="panoptic")
    with pytest.raises(ValueError, match="twice"):
        pipe(make_image(), categories=["cat", "cat"])
    with pytest.raises(ValueError, match="not a word"):
        pipe([make_image(), make_image()], categories=[["cat"], ["dog"]])
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.jpg"):
        pipe(str(tmp_path / "a.jpg"))
    assert pipe(make_image(), subtask="semantic")
    wordless = IFSegImageSegmentationPipeline(
        model=small_model(vocab_size=len(small_processor.tokenizer)),
        image_processor=small_processor.image_processor,
        task="image-segmentation",
    )
    wordless.model.config.category_ids = None
    with pytest.raises(ValueError, match="no words yet"):
        wordless(make_image(), untuned=True)
    with pytest.raises(ValueError, match="tokenizer"):
        wordless(make_image(), categories=["cat"], untuned=True)


def test_a_model_never_tuned_is_refused_unless_it_is_meant(model, small_processor):
    model.config.category_ids = None
    pipe = small_processor.pipeline(model)
    for words in ({}, {"categories": ["cat", "grass"]}):
        with pytest.raises(ValueError, match=r"never tuned on words.*ifseg tune"):
            pipe(make_image(), **words)
    with pytest.raises(ValueError, match="never tuned"):
        small_processor.pipeline(model, categories=["cat", "grass"])
    assert labels_of(pipe(make_image(), categories=["cat", "grass"], untuned=True)) <= {"cat", "grass"}
    meant = small_processor.pipeline(model, untuned=True)
    assert labels_of(meant(make_image(), categories=["cat", "grass"])) <= {"cat", "grass"}
    with pytest.raises(ValueError, match="never tuned"):
        meant(make_image(), categories=["cat", "grass"], untuned=False)
    model.config.tuned = True  # as a converted IFSeg checkpoint, whose words are unknown
    assert labels_of(pipe(make_image(), categories=["cat", "grass"])) <= {"cat", "grass"}


def test_half_precision(pipe, model):
    model.to(torch.bfloat16)
    segments = pipe(make_image(), categories=["grass", "sky"])
    assert labels_of(segments) <= {"grass", "sky"}


def test_other_models_get_transformers_pipeline():
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=2
    )
    pipe = IFSegImageSegmentationPipeline(
        model=SegformerForSemanticSegmentation(config), image_processor=None, task="image-segmentation"
    )
    assert not isinstance(pipe, IFSegImageSegmentationPipeline)


REMOTE = """
import json, sys
sys.modules["ifseg_hf"] = None  # as where the package is not installed
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, pipeline

folder, again = sys.argv[1:]
for folder in (folder, again):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__name__ == "IFSegProcessor"
    assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "IFSegImageProcessor"
    processor(images=Image.open("image.png"), categories=["cat", "sky"], return_tensors="pt")
    pipe = pipeline("image-segmentation", model=folder, trust_remote_code=True)
    assert type(pipe).__name__ == "IFSegImageSegmentationPipeline", type(pipe)
    segments = pipe("image.png", categories=["cat", "sky"])
    print(json.dumps([(s["label"], s["score"]) for s in pipe("image.png") + segments]))
    pipe.model.config.to_json_string()
    if folder != again:
        pipe.save_pretrained(again)
"""


def test_runs_where_the_package_is_not_installed(pipe, model, small_processor, tmp_path):
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    small_processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "backbone_ofa.IFSegConfig",
        "AutoModelForSemanticSegmentation": "backbone_ofa.IFSegForSemanticSegmentation",
    }
    config["custom_pipelines"] = {
        "image-segmentation": {
            "impl": "pipeline_ifseg.IFSegImageSegmentationPipeline",
            "pt": ["AutoModelForSemanticSegmentation"],
        }
    }
    (folder / "config.json").write_text(json.dumps(config))
    make_image().save(tmp_path / "image.png")
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(folder), str(tmp_path / "again")],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[transformers]" not in done.stderr, done.stderr
    segments = pipe(make_image()) + pipe(make_image(), categories=["cat", "sky"])
    expected = [(segment["label"], segment["score"]) for segment in segments]
    first, second = map(json.loads, done.stdout.strip().splitlines())
    assert [label for label, _ in first] == [label for label, _ in expected]
    np.testing.assert_allclose([score for _, score in first], [score for _, score in expected], atol=1e-5)
    assert second == first


def test_saves_the_processor_too(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert isinstance(IFSegProcessor.from_pretrained(tmp_path), IFSegProcessor)
    assert "image-segmentation" in json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
