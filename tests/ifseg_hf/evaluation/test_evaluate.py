"""The evaluation loop: batches, interruptions and further smoothing settings change no number."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model
from torch.nn.functional import cosine_similarity

from ifseg_hf.data.image_files import SampleError
from ifseg_hf.data.segmentation import load_segmentation_dataset
from ifseg_hf.evaluation import evaluate as evaluation
from ifseg_hf.evaluation.cosine import TEMPERATURE
from ifseg_hf.evaluation.evaluate import _comparison, _Sample, evaluate_segmenter, load_segmenter
from ifseg_hf.evaluation.metrics import scores
from ifseg_hf.evaluation.report import results_table
from ifseg_hf.modeling import OFAForConditionalGeneration
from ifseg_hf.processing import IFSegProcessor
from ifseg_hf.processing.sliding_window_ifseg import sliding_window_outputs
from ifseg_hf.visualization.colors import word_colors

NAMES = ["cat", "grass", "sky"]
SIZES = [(40, 56), (56, 40), (40, 56), (33, 90), (40, 56), (56, 40), (40, 56)]  # height, width
SMOOTHING = [(3, 25), (1, 0), (3, 2), (2, 25)]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """A folder of images and masks of several sizes: noise, so that an image's prediction has several categories."""
    folder = tmp_path_factory.mktemp("streets")
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for i, size in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        mask = rng.choice(np.array([0, 1, 2, 7], np.uint8), size)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    (folder / "dataset.json").write_text(json.dumps({"categories": NAMES, "ignore_index": 7}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    processor = IFSegProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 256}
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def segmenter(model):
    segmenter = load_segmenter(model, untuned=True)
    segmenter.set_words(NAMES)
    return segmenter


def matrices_one_by_one(segmenter, data, smoothing) -> dict:
    """Each image alone, through processor and model, counted pixel by pixel."""
    matrices = {setting: np.zeros((3, 3), np.int64) for setting in smoothing}
    for row in data.samples:
        image, truth = data.read(row)
        outputs = segmenter.model(**segmenter.processor(images=image, return_tensors="pt"))
        for k, n in smoothing:
            (labels,) = segmenter.processor.post_process_semantic_segmentation(
                outputs, [truth.shape], smoothing_neighbors=k, smoothing_iterations=n
            )
            inside = truth >= 0
            np.add.at(matrices[k, n], (truth[inside], labels.numpy()[inside]), 1)
    return matrices


def test_counts_equal_those_of_single_images(segmenter, streets):
    data = load_segmentation_dataset(str(streets))
    with torch.no_grad():
        expected = matrices_one_by_one(segmenter, data, SMOOTHING)
    assert len({tuple(matrix.ravel()) for matrix in expected.values()}) > 1  # smoothing changes something here
    assert min(len(np.unique(matrix.nonzero()[1])) for matrix in expected.values()) > 1
    for batch_size in (1, 3):
        result = evaluate_segmenter(segmenter, data, SMOOTHING, batch_size=batch_size)
        assert result.images == len(SIZES)
        assert all((result.matrices[setting] == expected[setting]).all() for setting in SMOOTHING)
    assert result.scores((3, 2)) == scores(expected[3, 2])
    unsmoothed = result.results()[1]
    assert unsmoothed["smoothing_iterations"] == 0
    assert unsmoothed["categories"]["sky"]["iou"] == round(scores(expected[1, 0])["per_category_iou"][2], 6)
    assert "| none |" in results_table(result.results())


@pytest.mark.parametrize(("limit", "most"), [(0, 1), (8 * 60, 3), (2**20, 4)])
def test_the_images_that_wait_are_limited_by_their_bytes(limit, most, monkeypatch):
    """Images of six sizes, 60 bytes each with their masks; never more than the limit and one image are in memory."""
    monkeypatch.setattr(evaluation, "_BUFFERED", limit)
    alive = 0

    def samples():
        nonlocal alive
        for index in range(24):
            height, width = ((1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1))[index % 6]
            image, truth = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.int16)
            alive += image.nbytes + truth.nbytes
            assert alive <= max(limit, 0) + 60
            yield evaluation._Sample(index, str(index), image, truth)

    seen, sizes = [], []
    for batch in evaluation._equal_sizes(samples(), 4, lambda count: None):
        assert len({sample.image.shape for sample in batch}) == 1
        seen += [sample.index for sample in batch]
        sizes.append(len(batch))
        alive -= sum(sample.bytes for sample in batch)
    assert sorted(seen) == list(range(24))
    assert max(sizes) == most


class Interrupted:
    """A segmenter that is interrupted before it has segmented more than `limit` images."""

    def __init__(self, segmenter, limit: int | None = None):
        self.segmenter, self.limit, self.seen = segmenter, limit, 0
        self.model, self.preprocess = segmenter.model, segmenter.preprocess
        self.smoothing, self.inference = segmenter.smoothing, segmenter.inference
        self.background = segmenter.background

    def __call__(self, inputs):
        if self.limit is not None and self.seen + len(inputs["pixel_values"]) > self.limit:
            raise KeyboardInterrupt
        self.seen += len(inputs["pixel_values"])
        return self.segmenter(inputs)


def test_resumes_after_interruptions_and_counts_no_image_twice(segmenter, streets, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SAVE_EVERY", 0.0)
    data = load_segmentation_dataset(str(streets))
    whole = evaluate_segmenter(Interrupted(segmenter), data)
    for limit in (2, 1):  # interrupted twice
        with pytest.raises(KeyboardInterrupt):
            evaluate_segmenter(Interrupted(segmenter, limit), data, batch_size=1, state_dir=tmp_path)
    last = Interrupted(segmenter)
    result = evaluate_segmenter(last, data, state_dir=tmp_path)
    assert last.seen == len(SIZES) - 3
    assert result.images == len(SIZES)
    assert (result.matrices[3, 25] == whole.matrices[3, 25]).all()
    # finished: nothing runs again
    last = Interrupted(segmenter, 0)
    again = evaluate_segmenter(last, data, state_dir=tmp_path)
    assert (again.matrices[3, 25] == whole.matrices[3, 25]).all()


def test_a_folder_holds_one_evaluation(segmenter, streets, tmp_path):
    data = load_segmentation_dataset(str(streets))
    evaluate_segmenter(segmenter, data, state_dir=tmp_path)
    with pytest.raises(ValueError, match="another smoothing"):
        evaluate_segmenter(segmenter, data, [(2, 1)], state_dir=tmp_path)
    with pytest.raises(ValueError, match="another names"):
        evaluate_segmenter(segmenter, data.select({"dog": ["cat"], "grass": ["grass"]}), state_dir=tmp_path)
    with torch.no_grad():
        segmenter.model.backbone.model.encoder.layer_norm.bias[0] += 1
    with pytest.raises(ValueError, match="another model"):
        evaluate_segmenter(segmenter, data, state_dir=tmp_path)
    (part,) = tmp_path.glob("part-*.npz")
    part.write_bytes(part.read_bytes()[:100])
    with torch.no_grad():
        segmenter.model.backbone.model.encoder.layer_norm.bias[0] -= 1
    with pytest.raises(ValueError, match="is damaged: delete it"):
        evaluate_segmenter(segmenter, data, state_dir=tmp_path)


def test_damaged_images_are_named_or_skipped(segmenter, streets, tmp_path):
    folder = tmp_path / "streets"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for part in ("images", "masks"):
        for i in range(3):
            (folder / part / f"{i}.png").write_bytes((streets / part / f"{i}.png").read_bytes())
    (folder / "images" / "1.png").write_bytes(b"no image")
    (folder / "dataset.json").write_bytes((streets / "dataset.json").read_bytes())
    data = load_segmentation_dataset(str(folder))
    with pytest.raises(SampleError, match=r"1\.png"):
        evaluate_segmenter(segmenter, data, state_dir=tmp_path / "fails")
    for _ in range(2):  # the second run finds all of it counted
        result = evaluate_segmenter(segmenter, data, on_error="skip", state_dir=tmp_path / "skips")
        assert result.images == 2
        assert len(result.skipped) == 1
        assert "1.png" in result.skipped[0]
    (folder / "images" / "0.png").write_bytes(b"")
    (folder / "masks" / "2.png").unlink()
    with pytest.raises(ValueError, match="No image could be counted"):
        evaluate_segmenter(segmenter, data, on_error="skip")


def test_settings_out_of_range_are_refused(segmenter, streets):
    data = load_segmentation_dataset(str(streets))
    for wrong in ([], [(0, 3)], [(3, -1)]):
        with pytest.raises(ValueError, match="smoothing="):
            evaluate_segmenter(segmenter, data, wrong)
    with pytest.raises(ValueError, match="on_error"):
        evaluate_segmenter(segmenter, data, on_error="maybe")


def test_models_trained_on_crops_are_evaluated_in_crops_without_smoothing(model, streets, tmp_path):
    processor = IFSegProcessor.from_pretrained(model)
    processor.image_processor.sliding_window, processor.image_processor.smoothing_iterations = 48, 0
    segmenter = evaluation.IFSegSegmenter(load_segmenter(model).model, processor, untuned=True)
    segmenter.set_words(NAMES)
    data = load_segmentation_dataset(str(streets))
    result = evaluate_segmenter(segmenter, data)
    assert list(result.matrices) == [(1, 0)]
    expected = np.zeros((3, 3), np.int64)
    for row in data.samples:
        image, truth = data.read(row)
        outputs = sliding_window_outputs(segmenter.model, **processor(images=image, return_tensors="pt"), crop=48)
        (labels,) = processor.post_process_semantic_segmentation(outputs, [truth.shape])
        np.add.at(expected, (truth[truth >= 0], labels.numpy()[truth >= 0]), 1)
    assert (result.matrices[1, 0] == expected).all()
    whole = evaluate_segmenter(evaluation.IFSegSegmenter(segmenter.model, processor, "whole"), data)
    assert (whole.matrices[1, 0] != expected).any()


def test_pixels_below_the_threshold_are_wrong_and_predicted_as_nothing(segmenter, streets, tmp_path):
    data = load_segmentation_dataset(str(streets))
    settings = [(3, 2), (1, 0)]
    every = evaluate_segmenter(segmenter, data, settings)
    folders = {"state_dir": tmp_path / "state", "predictions_dir": tmp_path / "predictions"}
    some = evaluate_segmenter(segmenter, data, settings, threshold=0.4, **folders)
    expected = {setting: np.zeros((3, 4), np.int64) for setting in settings}
    for row in data.samples:
        image, truth = data.read(row)
        for k, n in settings:
            (labels,) = segmenter.segment([image], k, n, threshold=0.4)
            inside = truth >= 0
            np.add.at(expected[k, n], (truth[inside], labels.numpy()[inside]), 1)  # -1 is the last column
    for setting in settings:
        matrix = some.matrices[setting]
        assert (matrix == expected[setting]).all()
        assert matrix[:, 3].any()
        assert (matrix[:, :3] <= every.matrices[setting]).all()
        assert (matrix.sum(1) == every.matrices[setting].sum(1)).all()
    found = some.scores((3, 2))
    right, true = np.diag(expected[3, 2]), expected[3, 2].sum(1)
    assert found["per_category_accuracy"] == (right / true).tolist()
    assert found["per_category_iou"] == (right / (true + expected[3, 2].sum(0)[:3] - right)).tolist()
    assert found["overall_accuracy"] == right.sum() / true.sum()
    assert (np.asarray(Image.open(tmp_path / "predictions" / "0.png")) == 255).any()
    assert "| cat |" in results_table(some.results())
    with pytest.raises(ValueError, match="another threshold"):
        evaluate_segmenter(segmenter, data, settings, threshold=0.5, state_dir=tmp_path / "state")
    with pytest.raises(ValueError, match="threshold=2"):
        evaluate_segmenter(segmenter, data, threshold=2)


@pytest.mark.parametrize("baseline", [None, "cosine"])
def test_a_background_beyond_the_categories_is_a_prediction_of_none(baseline, model, streets):
    data = load_segmentation_dataset(str(streets))
    segmenter = load_segmenter(model, baseline, untuned=baseline is None)
    segmenter.set_words(NAMES, background=["wall", "dog"])
    matrix = evaluate_segmenter(segmenter, data, [(3, 0)]).matrices[1, 0]
    assert matrix.shape == (3, 4)
    assert matrix.sum() == evaluate_segmenter(segmenter, data, [(3, 1)]).matrices[3, 1].sum()
    named = data.select({"cat": ["cat"], "background": ["grass", "sky"]})
    segmenter.set_words(named.names, background=["wall", "dog"])
    matrix = evaluate_segmenter(segmenter, named, [(3, 0)]).matrices[1, 0]
    assert matrix[:, 2].sum() == 0  # the words are merged into the category of this name


def test_set_words_keeps_the_prompt_of_the_model(segmenter):
    words = segmenter.processor.encode_categories(NAMES, prompt="which things?", append_unknown=False)
    segmenter.model.set_words(**words)
    segmenter.set_words(["dog", "tree"])
    expected = segmenter.processor.encode_categories(["dog", "tree"], "which things?", append_unknown=False)
    assert segmenter.model.config.prompt_ids == expected["prompt_ids"]
    assert segmenter.model.config.category_ids == expected["category_ids"]


@torch.no_grad()
def test_cosine_compares_projected_patches_with_words(model, streets):
    segmenter = load_segmenter(model, "cosine")
    segmenter.set_words(NAMES)
    image, _ = load_segmentation_dataset(str(streets)).read(load_segmentation_dataset(str(streets)).samples[0])
    inputs = segmenter.preprocess([image])
    logits = segmenter(inputs).logits
    plain = segmenter.model(**inputs)
    patch = segmenter.model.backbone.model.encoder.image_proj(plain.image_features[0, :, 1, 2])
    ids = segmenter.processor.encode_categories(NAMES)["category_ids"]
    for index, row in enumerate(ids):
        word = segmenter.model.get_input_embeddings()(torch.tensor(row)).mean(0)
        expected = cosine_similarity(patch, word, dim=0) / TEMPERATURE
        torch.testing.assert_close(logits[0, index, 1, 2], expected, atol=1e-4, rtol=0)


def test_an_untuned_ofa_is_loaded_with_equal_weights_every_time(tmp_path):
    save_tiny_model(tmp_path, OFAForConditionalGeneration)
    prints = {evaluation.fingerprint(load_segmenter(tmp_path)) for _ in range(2)}
    assert len(prints) == 1


def test_a_model_never_tuned_gets_no_words_unless_it_is_meant(model):
    with pytest.raises(ValueError, match="never tuned on words"):
        load_segmenter(model).set_words(NAMES)
    load_segmenter(model, untuned=True).set_words(NAMES)
    load_segmenter(model, "cosine").set_words(NAMES)  # needs no tuning


def test_only_new_parameters_may_be_missing_and_nothing_is_printed(tmp_path, capsys):
    save_tiny_model(tmp_path / "ofa", OFAForConditionalGeneration)
    capsys.readouterr()
    load_segmenter(tmp_path / "ofa")  # without segmentation positions, as every OFA
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    weights = load_file(tmp_path / "ofa" / "model.safetensors")
    lost = next(name for name in weights if name.endswith("image_proj.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "ofa" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are incomplete: .*image_proj\.weight missing"):
        load_segmenter(tmp_path / "ofa")


def test_models_that_cannot_be_loaded_are_named(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_segmenter("nowhere")
    with pytest.raises(ValueError, match="no IFSeg model that can be loaded"):
        load_segmenter(tmp_path)
    with pytest.raises(ValueError, match="no baseline"):
        load_segmenter(model, "clop")
    with pytest.raises(ValueError, match="baselines segment whole images"):
        load_segmenter(model, "cosine", inference="slide")


def test_predictions_and_overlays_are_saved(segmenter, streets, tmp_path):
    data = load_segmentation_dataset(str(streets))
    evaluate_segmenter(
        segmenter, data, limit=3, predictions_dir=tmp_path / "maps", overlays_dir=tmp_path / "seen", overlays=2
    )
    assert sorted(file.name for file in (tmp_path / "maps").iterdir()) == ["0.png", "1.png", "2.png"]
    assert sorted(file.name for file in (tmp_path / "seen").iterdir()) == ["0.png", "1.png"]
    image, truth = data.read(data.samples[1])
    with torch.no_grad():
        outputs = segmenter.model(**segmenter.processor(images=image, return_tensors="pt"))
    (labels,) = segmenter.processor.post_process_semantic_segmentation(outputs, [truth.shape])
    assert (np.asarray(Image.open(tmp_path / "maps" / "1.png")) == labels.numpy()).all()


def test_the_comparison_shows_image_ground_truth_and_prediction():
    """The legends have room for eleven categories on an image of CamVid's size."""
    names = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
    image = np.full((360, 480, 3), 90, np.uint8)
    truth = np.repeat(np.arange(480) * 11 // 480, 360).reshape(480, 360).T
    comparison = np.asarray(_comparison(_Sample(0, "a", image, truth), torch.full((360, 480), 3), names))
    assert comparison.shape[0] < 1.6 * 360
    assert 3 * 480 < comparison.shape[1] < 3.3 * 480
    third = comparison.shape[1] // 3
    colors = np.array(word_colors(names), np.uint8)
    parts = np.split(comparison, [third, 2 * third], axis=1)
    swatches = [[(part == color).all(2).sum() > 100 for color in colors] for part in parts]
    assert not any(swatches[0])
    assert all(swatches[1])
    assert [name for name, there in zip(names, swatches[2], strict=True) if there] == ["road"]
