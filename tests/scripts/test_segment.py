import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import small_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSemanticSegmentation, PreTrainedTokenizerFast, pipeline

from ifseg_hf.cli.segment import unique_stems
from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.processing import IFSegImageProcessor, IFSegProcessor, resize_scores
from scripts import SCRIPTS, load_script

SCRIPT = SCRIPTS / "segment.py"
segment = load_script("segment")


@pytest.fixture(scope="module")
def untuned(tmp_path_factory):
    """The folder of a small random model without words of its own."""
    folder = tmp_path_factory.mktemp("untuned")
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=120, **special)
    IFSegProcessor(IFSegImageProcessor(size={"shortest_edge": 64}), tokenizer).save_pretrained(folder)
    model = small_model(vocab_size=len(alphabet), max_position_embeddings=120)
    model.config.category_ids = model.config.prompt_ids = model.config.prompt = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(untuned, tmp_path_factory):
    """The folder of a small random model with the words "cat" and "wet grass"."""
    folder = tmp_path_factory.mktemp("tuned")
    processor = IFSegProcessor.from_pretrained(untuned)
    model = small_model(vocab_size=260, max_position_embeddings=120)
    model.set_words(**processor.encode_categories(["cat", "wet grass"]))
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def image(tmp_path):
    file = tmp_path / "image.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(file)
    return file


def run(*arguments) -> int:
    return segment.main([str(argument) for argument in arguments])


def test_writes_a_mask_and_an_overlay_with_the_models_words(tuned, image, tmp_path, capsys):
    assert run(image, "--model", tuned, "--output-dir", tmp_path / "out") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"image_mask.png", "image_overlay.png"}
    with Image.open(tmp_path / "out" / "image_mask.png") as mask:
        assert mask.size == (90, 60)
        assert json.loads(mask.text["categories"]) == ["cat", "wet grass"]
        assert np.asarray(mask).max() <= 1  # every pixel has a word
    with Image.open(tmp_path / "out" / "image_overlay.png") as overlay:
        assert overlay.height > 60
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"{image}: ")
    assert "%" in captured.out


def test_a_folder_stands_for_its_images(tuned, image, tmp_path, capsys):
    (tmp_path / "images" / "trip").mkdir(parents=True)
    for name in ("a.jpg", "trip/a.jpg", "trip/._a.jpg", "notes.txt"):
        (tmp_path / "images" / name).write_bytes(image.read_bytes())
    (tmp_path / "none").mkdir()
    assert run(image, f"{tmp_path}/images/", "--model", tuned, "--output-dir", tmp_path / "out") == 0
    assert {file.name for file in (tmp_path / "out").glob("*_mask.png")} == {
        "image_mask.png",
        "a_mask.png",
        "a-2_mask.png",
    }
    assert run(tmp_path / "none", "--model", tuned, "--output-dir", tmp_path / "out") == 1
    assert capsys.readouterr().err == f'segment.py: There is no image in "{tmp_path / "none"}".\n'


def test_other_words_and_settings(untuned, image, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("roof\nsea  side\ncloud\n")
    arguments = [image, "--model", untuned, "--untuned", "--output-dir", tmp_path, "--prompt", "what is this?"]
    settings = ["--smoothing-neighbors", 5, "--smoothing-iterations", 0]
    for categories in ("roof, sea  side, cloud", words):
        assert run(*arguments, "--categories", categories, *settings) == 0
        with Image.open(tmp_path / "image_mask.png") as mask:
            assert json.loads(mask.text["categories"]) == ["roof", "sea side", "cloud"]


@pytest.mark.parametrize("smoothing", [(None, None), (2, 1), (None, 0)])
def test_masks_are_the_pipelines(tuned, image, tmp_path, smoothing):
    neighbors, iterations = smoothing
    flags = [] if neighbors is None else ["--smoothing-neighbors", neighbors]
    flags += [] if iterations is None else ["--smoothing-iterations", iterations]
    assert run(image, "--model", tuned, "--output-dir", tmp_path, "--prompt", "what is this?", *flags) == 0
    pipe = pipeline("image-segmentation", model=str(tuned))
    segments = pipe(str(image), prompt="what is this?", smoothing_neighbors=neighbors, smoothing_iterations=iterations)
    with Image.open(tmp_path / "image_mask.png") as mask:
        labels = np.asarray(mask)
    for segment in segments:
        index = pipe.model.config.label2id[segment["label"]]
        assert np.array_equal(labels == index, np.asarray(segment["mask"]) == 255)


def test_masks_are_fitted_to_the_image_on_request(tuned, image, tmp_path):
    masks = []
    for name, flags in (("plain", []), ("fitted", ["--crf"])):
        assert run(image, "--model", tuned, "--output-dir", tmp_path / name, *flags) == 0
        masks.append(np.array(Image.open(tmp_path / name / "image_mask.png")))
    assert masks[0].shape == masks[1].shape == (60, 90)
    processor = IFSegProcessor.from_pretrained(tuned)
    model = AutoModelForSemanticSegmentation.from_pretrained(tuned).eval()
    picture = Image.open(image)
    with torch.no_grad():
        outputs = model(**processor(images=picture, return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, crf=True, images=picture)
    np.testing.assert_array_equal(masks[1], expected)


def test_one_word_alone_gets_a_background(untuned, image, tmp_path, capsys):
    arguments = [image, "cat", "--model", untuned, "--untuned", "--output-dir", tmp_path]
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert 'What is not "cat" is "background"; --background none: no background.' in captured.err.splitlines()
    with Image.open(tmp_path / "image_mask.png") as mask:
        assert json.loads(mask.text["categories"]) == ["cat", "background"]
    for background, names in (("none", ["cat"]), ("sky, sea", ["cat", "background"])):
        assert run(*arguments, "--background", background) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        with Image.open(tmp_path / "image_mask.png") as mask:
            assert json.loads(mask.text["categories"]) == names
            assert (np.asarray(mask) == 0).all() == (background == "none")


def test_pixels_below_the_threshold_have_no_word(tuned, image, tmp_path, capsys):
    segmenter = load_segmenter(tuned)
    (scores,) = segmenter.patch_scores(segmenter(segmenter.preprocess([np.array(Image.open(image))])))
    threshold = resize_scores(scores, (60, 90)).amax(0).median().item()
    assert run(image, "--model", tuned, "--output-dir", tmp_path, "--threshold", threshold) == 0
    assert "% without a word" in capsys.readouterr().out
    with Image.open(tmp_path / "image_mask.png") as mask:
        assert 0.3 < (np.asarray(mask) == 255).mean() < 0.7
    assert run(image, "--model", tuned, "--output-dir", tmp_path, "--threshold", 1) == 0
    assert "100.0 % without a word" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(image, "--model", tuned, "--threshold", 1.5)
    assert "must be from 0 to 1" in capsys.readouterr().err


def test_images_of_one_name_do_not_overwrite_each_other(tuned, image, tmp_path):
    other = tmp_path / "other" / "image.png"
    other.parent.mkdir()
    Image.new("RGB", (40, 70)).save(other)
    assert run(image, other, "--model", tuned, "--output-dir", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "image-2_mask.png") as mask:
        assert mask.size == (40, 70)
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_unique_stems():
    assert unique_stems(["a/x.jpg", "b/X.png", "x-2.jpg", "x.gif"]) == ["x", "X-2", "x-2-2", "x-3"]


def test_a_damaged_image_is_named_and_the_others_are_segmented(tuned, image, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(image.read_bytes()[:200])
    text = tmp_path / "text.png"
    text.write_text("no image")
    missing = tmp_path / "missing.jpg"
    assert run(broken, text, missing, image, "--model", tuned, "--output-dir", tmp_path / "out") == 1
    assert (tmp_path / "out" / "image_mask.png").is_file()
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    for line, name in zip(errors, ["broken.jpg", "text.png", "missing.jpg"], strict=True):
        assert line.startswith("segment.py: ")
        assert line.count(name) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "no model folder"),
        (["--categories", "cat, cat"], "twice"),
        (["--categories", "cat,, dog"], "empty"),
        (["--categories", "x" * 200], "positions"),
        ([], "not tuned for any words"),
    ],
)
def test_errors_are_one_line(untuned, image, tmp_path, capsys, arguments, message):
    assert run(image, "--model", untuned, "--untuned", "--output-dir", tmp_path / "out", *arguments) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize("wrong", [["--smoothing-neighbors", "0"], ["--smoothing-iterations", "-1"], ["--sizes"]])
def test_wrong_arguments_are_reported_before_torch_is_imported(image, wrong, tmp_path):
    command = [sys.executable, "-X", "importtime", str(SCRIPT), str(image), *wrong]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch" not in done.stderr.split("usage:")[0]


def test_as_a_program_from_any_folder(tuned, image, tmp_path):
    command = [sys.executable, str(SCRIPT), "image.jpg", "--model", str(tuned)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "outputs" / "image_overlay.png").is_file()


MEASURE = """
import resource, sys

import torch

from scripts import load_script

segment = load_script("segment")
small, large, model, out = sys.argv[1:]
peaks = []
for image in (small, large):
    assert segment.main([image, "--model", model, "--output-dir", out]) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_a_large_image_takes_little_memory(tuned, image, tmp_path):
    """At most 36 bytes a pixel, so that an image of 8000 x 6000 takes 1.7 GB above the memory of torch and a model."""
    pytest.importorskip("resource")
    width, height = 3200, 2400
    Image.open(image).resize((width, height)).save(tmp_path / "large.jpg")
    arguments = [image, tmp_path / "large.jpg", tuned, tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.splitlines()[-1]) < 36 * width * height
