"""How well a small OFA segments scenes: before and after tuning on words alone, and by cosine similarity only.

The cosine baseline compares every projected patch (`image_proj` of the trunk's features) with the words' embeddings:
what pre-training alone gives without encoder, decoder and tuning.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation, IFSegSegmentationOutput
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.scenes import Photos, Streets

LARGE_STREET_NAMES = ("sky", "building", "road", "pavement", "tree", "fence", "car")
TEMPERATURE = 0.1  # of the cosine baseline, which matters only where smoothing averages probabilities


def word_lists(photos: Photos, counts: list[int]) -> dict[int, list[str]]:
    """The first so many of the photos' names in one fixed random order."""
    order = random.Random(0).sample(photos.names, len(photos.names))
    for count in counts:
        if not 2 <= count <= len(order):
            raise ValueError(f"{count} words: choose from 2 to {len(order)}, the names of the photos.")
    return {count: order[:count] for count in counts}


def street_samples(streets: Streets, words: list[str]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Photos and maps of word indices; everything that is none of the words is -100."""
    index = np.full(256, -100)
    for i, word in enumerate(words):
        index[streets.names.index(word)] = i
    return [(image, index[mask]) for image, mask in zip(streets.images, streets.masks, strict=True)]


@torch.no_grad()
def cosine_outputs(model: IFSegForSemanticSegmentation, inputs: dict) -> IFSegSegmentationOutput:
    """Cosine similarity of projected patches with the model's own words, in the place of its logits."""
    encoder = model.model.encoder
    features = encoder.embed_images(inputs["pixel_values"])
    patches = normalize(encoder.image_proj(features.permute(0, 2, 3, 1)), dim=-1)
    words = normalize(model.embed_words(*model._padded(model.config.category_ids, features.device))[0], dim=-1)
    logits = (patches @ words.T).permute(0, 3, 1, 2) / TEMPERATURE
    return IFSegSegmentationOutput(logits=logits, image_features=features)


@torch.no_grad()
def model_outputs(model: IFSegForSemanticSegmentation, inputs: dict) -> IFSegSegmentationOutput:
    return model(pixel_values=inputs["pixel_values"])


def confusion_matrices(
    model: IFSegForSemanticSegmentation,
    processor: IFSegProcessor,
    samples: list[tuple[np.ndarray, np.ndarray]],
    neighbors: list[int],
    outputs_of: Callable = model_outputs,
    batch: int = 8,
) -> dict[int, np.ndarray]:
    """Pixels by (true word, predicted word), int64 (N, N), for each number of smoothing neighbours (0: none)."""
    count = len(model.config.category_ids)
    matrices = {k: np.zeros((count, count), np.int64) for k in neighbors}
    for start in range(0, len(samples), batch):
        images, targets = zip(*samples[start : start + batch], strict=True)
        inputs = processor(images=list(images), return_tensors="pt")
        outputs = outputs_of(model, inputs)
        sizes = [target.shape for target in targets]
        for k in neighbors:
            maps = processor.post_process_semantic_segmentation(
                outputs, sizes, smoothing_neighbors=k or 3, smoothing_iterations=25 if k else 0
            )
            for target, guess in zip(targets, maps, strict=True):
                inside = target >= 0
                pairs = target[inside] * count + guess.numpy()[inside]
                matrices[k] += np.bincount(pairs, minlength=count**2).reshape(count, count)
    return matrices


def word_ious(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of every word in per cent, (N,); nan for words that occur nowhere."""
    right = np.diag(matrix)
    either = matrix.sum(0) + matrix.sum(1) - right
    return np.where(matrix.sum(1) > 0, 100 * right / np.maximum(either, 1), np.nan)


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


def with_words(folder: str | Path, processor: IFSegProcessor, words: list[str]) -> IFSegForSemanticSegmentation:
    """The model of a folder for these words, untuned: what is not in the checkpoint is new, from seed 0."""
    torch.manual_seed(0)
    model = IFSegForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
    model.set_words(**processor.encode_categories(words))
    return model.eval()


def evaluate(
    folder: str | Path,
    samples: list[tuple[np.ndarray, np.ndarray]],
    words: list[str],
    tune: Callable[[str | Path, list[str], int], str | Path],
    seeds: list[int],
    neighbors: tuple[int, ...] = (0, 3, 5),
) -> dict:
    """Word IoUs of the cosine baseline, of the model before tuning, and after tuning with each seed.

    Args:
        tune: makes a model of `folder` that is tuned on the words alone, (folder, words, seed) -> its folder.

    Returns:
        {"words": [...], "cosine": {k: IoUs}, "before": {k: IoUs}, "after": {k: one list of IoUs a seed}}
    """
    processor = IFSegProcessor.from_pretrained(folder)
    untuned = with_words(folder, processor, words)

    def ious(model, outputs_of=model_outputs):
        matrices = confusion_matrices(model, processor, samples, list(neighbors), outputs_of)
        return {k: word_ious(matrix).tolist() for k, matrix in matrices.items()}

    result = {"words": words, "cosine": ious(untuned, cosine_outputs), "before": ious(untuned)}
    after = []
    for seed in seeds:
        tuned = IFSegForSemanticSegmentation.from_pretrained(tune(folder, words, seed), dtype=torch.float32).eval()
        after.append(ious(tuned))
    result["after"] = {k: [run[k] for run in after] for k in neighbors}
    return result


def mean_iou(ious: list[float]) -> float:
    return float(np.nanmean(ious))


def table(results: dict[str, dict], neighbors: tuple[int, ...] = (0, 3, 5)) -> str:
    """A Markdown table of mean IoUs: a row for each result, cells raw / k=3 / k=5, mean over seeds ± deviation."""
    kinds = " / ".join("raw" if k == 0 else f"k={k}" for k in neighbors)
    lines = [f"| scenes | cosine: {kinds} | before: raw | after tuning on words alone: {kinds} |", "|---|---|---|---|"]
    for name, result in results.items():
        cosine = " / ".join(f"{mean_iou(result['cosine'][k]):.1f}" for k in neighbors)
        after = []
        for k in neighbors:
            runs = [mean_iou(run) for run in result["after"][k]]
            after.append(f"{np.mean(runs):.1f} ± {np.std(runs):.1f}" if len(runs) > 1 else f"{np.mean(runs):.1f}")
        lines.append(f"| {name} | {cosine} | {mean_iou(result['before'][0]):.1f} | {' / '.join(after)} |")
    return "\n".join(lines)


def word_table(result: dict, k: int = 3) -> str:
    """A Markdown table of each word's IoU: cosine, before, after tuning (mean over seeds), at `k` neighbours."""
    how = "raw" if k == 0 else f"k={k}"
    lines = [f"| word | cosine, {how} | before, {how} | after, {how} |", "|---|---|---|---|"]
    after = np.mean(result["after"][k], axis=0)
    for word, *values in zip(result["words"], result["cosine"][k], result["before"][k], after, strict=True):
        lines.append(f"| {word} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return "\n".join(lines)
