"""What tuning on words alone does for a small OFA: on mosaics of held-out photos and on street photos.

A model folder is evaluated before and after tuning, with the cosine baseline beside it, all through
[`ifseg_hf.evaluation.evaluate`]; and tuning is varied as the paper's ablations do (Appendix A.1 and B).
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
from ifseg_hf.experiments.image_experiments import over_seeds
from ifseg_hf.modeling.modeling_ofa import IFSegForConditionalGeneration
from ifseg_hf.nano.scenes import Photos

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
"""Makes a model of a folder that is tuned on the words alone: (folder, words, seed) -> its folder."""


def word_lists(photos: Photos, counts: list[int]) -> dict[int, list[str]]:
    """The first so many of the photos' names in one fixed random order."""
    order = random.Random(0).sample(photos.names, len(photos.names))
    for count in counts:
        if not 2 <= count <= len(order):
            raise ValueError(f"{count} words: choose from 2 to {len(order)}, the names of the photos.")
    return {count: order[:count] for count in counts}


def at_size(folder: str | Path, image_size: int, short_side: int, output: str | Path) -> Path:
    """A copy of a local model folder, in `output`, that is tuned on word maps of image_size / 16 cells a side.

    Photos are resized to `short_side`; if that makes another grid, the positions of the word maps are interpolated.
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


def count_pixels(
    folder: str | Path, data: SegmentationDataset, smoothing: Sequence[Smoothing], baseline: str | None = None
) -> Evaluation:
    """What a model of a folder says of the photos of `data`, in the data's own words."""
    segmenter = load_segmenter(folder, baseline)
    segmenter.set_words(data.names)
    return evaluate_segmenter(segmenter, data, smoothing)


# Before and after -----------------------------------------------------------------------------------------------------


def evaluate(
    folder: str | Path,
    data: SegmentationDataset,
    tune: Tune,
    seeds: Sequence[int],
    smoothing: Sequence[Smoothing] = SMOOTHING,
) -> dict:
    """Word IoUs, in per cent, of the cosine baseline, of the model before tuning, and after tuning with each seed.

    Returns:
        {"words": [...], "cosine": {setting: IoUs}, "before": {setting: IoUs}, "after": {setting: a list a seed}}, with
        settings as [`setting_name`] has them and nan for words that occur nowhere.
    """

    def ious(folder: str | Path, baseline: str | None = None) -> dict[str, list[float]]:
        told = count_pixels(folder, data, smoothing, baseline)
        return {setting_name(*x): (100 * np.array(told.scores(x)["per_category_iou"])).tolist() for x in smoothing}

    result = {"words": data.names, "cosine": ious(folder, COSINE), "before": ious(folder)}
    after = [ious(tune(folder, data.names, seed)) for seed in seeds]
    result["after"] = {name: [run[name] for run in after] for name in result["before"]}
    return result


def mean_iou(ious: Sequence[float]) -> float:
    return float(np.nanmean(ious))


def table(results: dict[str, dict]) -> str:
    """A Markdown table of mean IoUs: a row for each result, a number for each setting, mean over seeds ± deviation."""
    settings = list(next(iter(results.values()))["before"])
    kinds = " / ".join("raw" if name == "none" else name.split(",")[0] for name in settings)
    lines = [f"| scenes | cosine: {kinds} | before: raw | after tuning on words alone: {kinds} |", "|---|---|---|---|"]
    for name, result in results.items():
        cosine = " / ".join(f"{mean_iou(result['cosine'][setting]):.1f}" for setting in settings)
        after = [over_seeds([mean_iou(run) for run in result["after"][setting]]) for setting in settings]
        lines.append(f"| {name} | {cosine} | {mean_iou(result['before'][settings[0]]):.1f} | {' / '.join(after)} |")
    return "\n".join(lines)


def word_table(result: dict) -> str:
    """A Markdown table of each word's IoU without smoothing: cosine, before, after tuning (mean over seeds)."""
    lines = ["| word | cosine, raw | before, raw | after, raw |", "|---|---|---|---|"]
    after = np.mean(result["after"]["none"], axis=0)
    for word, *values in zip(result["words"], result["cosine"]["none"], result["before"]["none"], after, strict=True):
        lines.append(f"| {word} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return "\n".join(lines)


# The paper's ablations ------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """One way to tune.

    Args:
        settings: of [`TrainingConfig`] that differ from the others'.
        change: makes the model folder that tuning starts from another one, in place.
        words: `None` for the data's own, or fine names by category.
    """

    settings: dict = field(default_factory=dict)
    change: Callable[[Path], None] | None = None
    words: dict[str, list[str]] | None = None


def take_decoder_positions_of_the_image(folder: Path) -> None:
    """The paper's decoder positions in the place of the published implementation's (method: section 2.2)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "decoder_positions": "image"}), encoding="utf-8")


@torch.no_grad()
def silence_cross_attention(folder: Path) -> None:
    """Makes the decoder's cross-attention say nothing (Appendix B), and nothing that it could learn from.

    Everything behind the attention weights is zero. All gradients there are products with one of these zeros, but that
    of the last bias: what can still be learnt is one constant vector a layer, the same for every patch and photo.
    """
    model = IFSegForConditionalGeneration.from_pretrained(folder)
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
    """Tunings by name. `usual`: S, the largest side of random grids; `largest`: the side of the whole word map."""
    return {
        f"S = {usual}": Variant(),
        **{f"S = {side}": Variant({"max_cells": side}) for side in (2, 4, largest) if side != usual},
        "no noise on word maps": Variant({"word_noise": 0.0}),
        "the appendix' prompt": Variant({"prompt": APPENDIX_PROMPT}),
        "the paper's decoder positions": Variant(change=take_decoder_positions_of_the_image),
        "no cross-attention": Variant(change=silence_cross_attention),
    }


def ablate(
    folder: str | Path,
    data: SegmentationDataset,
    tune: Callable[..., str | Path],
    ways: dict[str, Variant],
    seeds: Sequence[int],
    scratch: str | Path,
    smoothing: Sequence[Smoothing] = SMOOTHING_GRID,
    log: Callable[[str], None] = print,
) -> dict[str, dict[str, list[float]]]:
    """Mean IoU in per cent before and after each of the `ways` of tuning: {name: {setting: one number a seed}}.

    Args:
        tune: as [`Tune`], with settings of [`TrainingConfig`] as further arguments.
        scratch: folder for the changed models.
    """

    def means(folder: str | Path) -> dict[str, float]:
        told = count_pixels(folder, data, smoothing)
        return {setting_name(*setting): 100 * told.scores(setting)["mean_iou"] for setting in smoothing}

    before = f"before tuning, {len(data.names)} words"
    results = {before: {setting: [mean] for setting, mean in means(folder).items()}}
    for number, (name, way) in enumerate(ways.items()):
        start = Path(folder)
        if way.change is not None:
            start = Path(shutil.copytree(folder, Path(scratch) / f"variant-{number}", dirs_exist_ok=True))
            way.change(start)
        runs = [means(tune(start, way.words or data.names, seed, **way.settings)) for seed in seeds]
        results[name] = {setting: [run[setting] for run in runs] for setting in runs[0]}
        log(ablation_table({name: results[name]}))
    return results


def ablation_table(results: dict[str, dict[str, list[float]]]) -> str:
    """A Markdown table: a row for each way of tuning, a column for each smoothing; mean over seeds ± deviation."""
    settings = list(next(iter(results.values())))
    lines = [f"| tuning | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
    for name, runs in results.items():
        lines.append(f"| {name} | " + " | ".join(over_seeds(runs[setting]) for setting in settings) + " |")
    return "\n".join(lines)
