"""Evaluation of a small OFA before and after tuning on words alone, on mosaics of held-out images and street images.

Also evaluates the cosine baseline, and variants of the tuning as in the paper's ablations (Appendix A.1 and B).
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ifseg_hf.data.segmentation import SegmentationDataset
from ifseg_hf.evaluation.evaluate import COSINE, Evaluation, Smoothing, evaluate_segmenter, load_segmenter, setting_name
from ifseg_hf.experiments.results import markdown_table, mean_and_deviation
from ifseg_hf.modeling.modeling_ofa import OFAForConditionalGeneration
from ifseg_hf.nano.scenes import NamedImages, mosaic_data

LARGE_STREET_NAMES = ("sky", "building", "road", "pavement", "tree", "fence", "car")
COARSE_NAMES = {
    "animal": ["dog", "cat", "lion", "bear", "pig", "cow", "sheep", "elephant", "goose", "frog"],
    "vehicle": ["car", "truck", "boat", "train", "tractor", "school bus", "go-kart", "rickshaw", "gondola"],
    "food": ["ice cream", "pretzel", "cauliflower", "mushroom", "orange", "lemon", "banana", "pizza", "coffee"],
}
APPENDIX_PROMPT = "what is the segmentation of the image? object:"  # the wording in the paper, Appendix E
SMOOTHING: tuple[Smoothing, ...] = ((1, 0), (3, 25), (5, 25))
SMOOTHING_GRID: tuple[Smoothing, ...] = (
    (1, 0),
    (3, 1),
    (3, 10),
    (3, 25),
    (3, 50),
    (2, 25),
    (5, 25),
    (8, 25),
)  # Table 10

Tune = Callable[[str | Path, list[str] | dict[str, list[str]], int], str | Path]
"""Tunes the model of a folder on words alone: (folder, words, seed) -> folder of the tuned model."""


def word_lists(images: NamedImages, counts: list[int]) -> dict[int, list[str]]:
    """For each count, the first names of the images in one fixed random order."""
    order = random.Random(0).sample(images.names, len(images.names))
    for count in counts:
        if not 2 <= count <= len(order):
            raise ValueError(f"{count} words: choose from 2 to {len(order)}, the number of names.")
    return {count: order[:count] for count in counts}


def at_size(folder: str | Path, image_size: int, short_side: int, output: str | Path) -> Path:
    """Copies a local model folder to `output`, and sets the sizes of word maps and images.

    Word maps have `image_size` / 16 patches a side. Images are resized to a short side of `short_side`; positions are
    interpolated if their grid differs from that of word maps.
    """
    shutil.copytree(folder, output, dirs_exist_ok=True)
    for name, change in [
        ("config.json", {"image_size": image_size}),
        ("processor_config.json", {"size": {"shortest_edge": short_side, "longest_edge": 4 * short_side}}),
    ]:
        file = Path(output) / name
        content = json.loads(file.read_text(encoding="utf-8"))
        content.get("image_processor", content).update(change)
        file.write_text(json.dumps(content), encoding="utf-8")
    return Path(output)


def evaluate_folder(
    folder: str | Path, data: SegmentationDataset, smoothing: Sequence[Smoothing], baseline: str | None = None
) -> Evaluation:
    """The evaluation of the model in a folder on `data`, with the names of `data` as words."""
    segmenter = load_segmenter(folder, baseline)
    segmenter.set_words(data.names)
    return evaluate_segmenter(segmenter, data, smoothing)


# Before and after -----------------------------------------------------------------------------------------------------


def evaluate_scenes(
    folder: str | Path,
    data: SegmentationDataset,
    tune: Tune,
    seeds: Sequence[int],
    smoothing: Sequence[Smoothing] = SMOOTHING,
) -> dict:
    """IoU of each word in per cent, for the cosine baseline, before tuning, and after tuning with each seed.

    Returns:
        {"words": [...], "cosine": {setting: IoUs}, "before": {setting: IoUs}, "after": {setting: [IoUs, ...]}}, one
        list of IoUs per seed. Settings are named by [`setting_name`]; a word that does not occur has the IoU nan.
    """

    def ious(folder: str | Path, baseline: str | None = None) -> dict[str, list[float]]:
        evaluation = evaluate_folder(folder, data, smoothing, baseline)
        scores = {setting_name(*x): evaluation.scores(x)["per_category_iou"] for x in smoothing}
        return {name: (100 * np.array(values)).tolist() for name, values in scores.items()}

    result = {"words": data.names, "cosine": ious(folder, COSINE), "before": ious(folder)}
    after = [ious(tune(folder, data.names, seed)) for seed in seeds]
    result["after"] = {name: [run[name] for run in after] for name in result["before"]}
    return result


def mean_iou(ious: Sequence[float]) -> float:
    """Mean over the words that occur."""
    return float(np.nanmean(ious))


def scene_table(results: dict[str, dict]) -> str:
    """A Markdown table of mean IoUs: a row per result of [`evaluate_scenes`], a number per smoothing setting."""
    settings = list(next(iter(results.values()))["before"])
    titles = " / ".join("raw" if name == "none" else name.split(",")[0] for name in settings)
    header = ["scenes", f"cosine: {titles}", "before: raw", f"after tuning on words alone: {titles}"]
    rows = []
    for name, result in results.items():
        cosine = [f"{mean_iou(result['cosine'][setting]):.1f}" for setting in settings]
        before = f"{mean_iou(result['before'][settings[0]]):.1f}"
        after = [mean_and_deviation([mean_iou(run) for run in result["after"][setting]]) for setting in settings]
        rows.append([name, " / ".join(cosine), before, " / ".join(after)])
    return markdown_table(header, rows)


def word_table(result: dict) -> str:
    """A Markdown table of each word's IoU without smoothing: cosine, before, and mean over seeds after tuning."""
    columns = [result["cosine"]["none"], result["before"]["none"], np.mean(result["after"]["none"], axis=0)]
    rows = [
        [word, *(f"{value:.1f}" for value in values)] for word, *values in zip(result["words"], *columns, strict=True)
    ]
    return markdown_table(["word", "cosine, raw", "before, raw", "after, raw"], rows)


def compare_on_mosaics(
    folder: str | Path, images: NamedImages, counts: list[int], scenes: int, tune: Tune, seeds: Sequence[int]
) -> dict[str, dict]:
    """[`evaluate_scenes`] on `scenes` mosaics for each number of words in `counts`; prints each result."""
    results = {}
    for count, words in word_lists(images, counts).items():
        name = f"{scenes} mosaics, {count} words"
        data = mosaic_data(images, words, scenes, seed=count)
        results[name] = evaluate_scenes(folder, data, tune, seeds)
        print(scene_table({name: results[name]}), flush=True)
    return results


def compare_on_streets(
    folder: str | Path, streets: SegmentationDataset, tune: Tune, seeds: Sequence[int]
) -> dict[str, dict]:
    """[`evaluate_scenes`] on street images, with all words and with those of large objects; prints each result."""
    results = {}
    for words in (streets.names, list(LARGE_STREET_NAMES)):
        name = f"{len(streets.samples)} street images, {len(words)} words"
        results[name] = evaluate_scenes(folder, streets.select(words), tune, seeds)
        print(f"{scene_table({name: results[name]})}\n\n{word_table(results[name])}", flush=True)
    return results


# The paper's ablations ------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """A way of tuning.

    Args:
        settings: settings of [`TrainingConfig`] that differ from the usual tuning.
        change: function that changes a copy of the model folder before tuning.
        words: fine names by category; `None`: the names of the data.
    """

    settings: dict = field(default_factory=dict)
    change: Callable[[Path], None] | None = None
    words: dict[str, list[str]] | None = None


def use_image_decoder_positions(folder: Path) -> None:
    """Sets the paper's decoder positions (section 2.2) in place of the published implementation's."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "decoder_positions": "image"}), encoding="utf-8")


@torch.no_grad()
def silence_cross_attention(folder: Path) -> None:
    """Sets the output of the decoder's cross-attention to zero, so that tuning cannot use it (Appendix B).

    All parameters after the attention weights become zero. Their gradients are then zero, too, except for the last
    bias: tuning can only learn one constant vector per layer, the same for every patch and image.
    """
    model = OFAForConditionalGeneration.from_pretrained(folder)
    for layer in model.model.decoder.layers:
        last = layer.cross_attn
        for parameter in (
            last.c_attn,
            last.out_proj.weight,
            last.out_proj.bias,
            *layer.cross_attn_mid_layer_norm.parameters(),
        ):
            parameter.zero_()
    model.save_pretrained(folder)


def variants(usual: int, largest: int) -> dict[str, Variant]:
    """Ways of tuning by name. `usual`: S, the largest side of random grids; `largest`: the side of the word map."""
    return {
        f"S = {usual}": Variant(),
        **{f"S = {side}": Variant({"max_cells": side}) for side in (2, 4, largest) if side != usual},
        "no noise on word maps": Variant({"word_noise": 0.0}),
        "the appendix's prompt": Variant({"prompt": APPENDIX_PROMPT}),
        "the paper's decoder positions": Variant(change=use_image_decoder_positions),
        "no cross-attention": Variant(change=silence_cross_attention),
    }


def ablate(
    folder: str | Path,
    data: SegmentationDataset,
    tune: Callable[..., str | Path],
    tunings: dict[str, Variant],
    seeds: Sequence[int],
    scratch: str | Path,
    smoothing: Sequence[Smoothing] = SMOOTHING_GRID,
    log: Callable[[str], None] = print,
) -> dict[str, dict[str, list[float]]]:
    """Mean IoU in per cent before tuning and after each of `tunings`: {name: {setting: one number per seed}}.

    Args:
        tune: a [`Tune`] that also takes settings of [`TrainingConfig`] as keyword arguments.
        scratch: folder for the changed models.
    """

    def means(folder: str | Path) -> dict[str, float]:
        evaluation = evaluate_folder(folder, data, smoothing)
        return {setting_name(*setting): 100 * evaluation.scores(setting)["mean_iou"] for setting in smoothing}

    before = f"before tuning, {len(data.names)} words"
    results = {before: {setting: [mean] for setting, mean in means(folder).items()}}
    for number, (name, tuning) in enumerate(tunings.items()):
        start = Path(folder)
        if tuning.change is not None:
            start = Path(shutil.copytree(folder, Path(scratch) / f"variant-{number}", dirs_exist_ok=True))
            tuning.change(start)
        runs = [means(tune(start, tuning.words or data.names, seed, **tuning.settings)) for seed in seeds]
        results[name] = {setting: [run[setting] for run in runs] for setting in runs[0]}
        log(ablation_table({name: results[name]}))
    return results


def ablation_table(results: dict[str, dict[str, list[float]]]) -> str:
    """A Markdown table of mean IoUs: a row per way of tuning, a column per smoothing setting."""
    settings = list(next(iter(results.values())))
    rows = [[name, *(mean_and_deviation(runs[setting]) for setting in settings)] for name, runs in results.items()]
    return markdown_table(["tuning", *settings], rows)


def run_ablations(
    folder: str | Path,
    images: NamedImages,
    words: list[str],
    scenes: int,
    tune: Callable[..., str | Path],
    tunings: dict[str, Variant],
    seeds: Sequence[int],
    scratch: str | Path,
) -> dict[str, dict[str, list[float]]]:
    """[`ablate`] on `scenes` mosaics of `words`, then coarse categories with and without their fine names."""
    data = mosaic_data(images, words, scenes, seed=len(words))
    results = ablate(folder, data, tune, tunings, seeds, scratch)
    fine = [name for names in COARSE_NAMES.values() for name in names]
    data = mosaic_data(images, fine, scenes, seed=0).select(COARSE_NAMES)
    coarse = {
        f"{len(COARSE_NAMES)} coarse words alone": Variant(),
        f"the same, with {len(fine)} fine words": Variant(words=COARSE_NAMES),
    }
    return results | ablate(folder, data, tune, coarse, seeds, scratch)
