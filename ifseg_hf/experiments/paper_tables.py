"""The paper's tables: which models to tune, what to evaluate them on, and what the paper reports.

A table is a list of rows; a row evaluates a model, which a step makes, or a baseline, or quotes a system of other
authors. The settings of training are those of the files in scripts/configs/.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ifseg_hf.experiments.ablations import ROWS


def _flags(settings: dict[str, Any]) -> str:
    """Flags of train.py for settings by name. `None`: no flag."""
    parts = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is False:
            parts.append(f"--no-{flag}")
        elif value is not None:
            parts += [f"--{flag}", str(value)]
    return shlex.join(parts)


PSEUDO_LABELS = "pseudo_label.py --data-dir {coco_dir}"
SELF_TRAINING = "train.py --config {configs}/images_coco_stuff_self_training.yaml"

# The command of each step, by the step's name; see plan.py. `TableSettings.values` has the values of the placeholders.
COMMANDS = {
    "unseen": "train.py --config {configs}/coco_stuff_unseen.yaml --model {ofa}",
    "coco": "train.py --config {configs}/coco_stuff.yaml --model {ofa}",
    "ade20k": "train.py --config {configs}/ade20k.yaml --model {ofa}",
    "coarse": "train.py --config {configs}/coco_stuff_coarse.yaml --model {ofa} --categories {coarse_words}",
    "coarse-of-fine": "train.py --config {configs}/coco_stuff_coarse.yaml --model {ofa}",
    # Table 4: images alone, then images with the labels of the seen categories, both from the model of Table 1.
    "unseen-labels": f"{PSEUDO_LABELS} --model {{unseen}} --dataset coco-stuff-unseen",
    "unseen-images": f"{SELF_TRAINING} --model {{unseen}} --dataset {{unseen-labels}}",
    "seen-labels": f"{PSEUDO_LABELS} --model {{unseen}} --dataset coco-stuff --keep-labels --unseen unseen",
    "seen-images": f"{SELF_TRAINING} --model {{unseen}} --dataset {{seen-labels}}",
    # Table 5
    "supervised": "train.py --config {configs}/images_ade20k.yaml --model {ofa} --data-dir {ade20k_dir}",
    # Table 7
    "coco-labels": f"{PSEUDO_LABELS} --model {{coco}} --dataset coco-stuff",
    "coco-images": f"{SELF_TRAINING} --model {{coco}} --dataset {{coco-labels}}",
    # Table 8: a hierarchy of words; masks of COCO whose names are not used.
    "ade20k-hierarchy": "train.py --config {configs}/ade20k.yaml --model {ofa} --categories ade20k-hierarchy",
    "mask-labels": "pseudo_label.py --model {coco} --images {coco_dir}/train2017 --masks "
    "{coco_dir}/stuffthingmaps_trainval2017/train2017 --ignore-index 255 --categories coco-stuff",
    "mask-images": "train.py --config {configs}/images_class_agnostic.yaml --model {coco} --dataset {mask-labels}",
    # Table 9: IFSeg+, which makes its own pseudo-labels later.
    "plus-labels": f"{PSEUDO_LABELS} --model {{seen-images}} --dataset coco-stuff --keep-labels --unseen unseen",
    "plus": "train.py --config {configs}/images_ifseg_plus.yaml --model {ofa} --dataset {plus-labels}",
    # Table 14
    "clipcap": "train.py --config {configs}/coco_stuff_unseen.yaml --model {clipcap_model}",
}
# Appendix B: the model of Table 1 with one change, as in the ablations on your own images.
CHANGES = ("max-cells-8", "max-cells-16", "fixed-grid", "no-cross-attention", "image-positions", "appendix-prompt")
COMMANDS |= {f"unseen-{name}": f"{COMMANDS['unseen']} {_flags(ROWS[name].settings)}" for name in CHANGES}
DATA_DIRS = {
    "coco-stuff": "{coco_dir}",
    "coco-stuff-unseen": "{coco_dir}",
    "coco-stuff-coarse": "{coco_dir}",
    "ade20k": "{ade20k_dir}",
}
BASELINES = ("clip", "maskclip")
SMOOTHED, PLAIN = (3, 25), (1, 0)  # neighbours and iterations


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        name: title of the row; paper: the number that the paper reports, in per cent, if it reports one.
        model: "ofa", "clip", "maskclip", or a step of [`COMMANDS`]; dataset: what the model is evaluated on. `None`: a
            system that this project does not have, whose number is quoted.
        smoothing: neighbours and iterations; metric: a key of [`ifseg_hf.evaluation.metrics.scores`].
    """

    name: str
    paper: float | None
    model: str | None = None
    dataset: str | None = None
    smoothing: tuple[int, int] = SMOOTHED
    metric: str = "mean_iou"


def _quoted(systems: Iterable[tuple[str, float]]) -> list[Row]:
    """Rows of systems that this project does not have."""
    return [Row(name, number) for name, number in systems]


def _image_free(dataset: str, ofa: float, clip: float, maskclip: float) -> list[Row]:
    """Rows of the baselines; `ofa`, `clip` and `maskclip` are the paper's numbers."""
    return [
        Row("CLIP", clip, "clip", dataset),
        Row("MaskCLIP", maskclip, "maskclip", dataset),
        Row("OFA, untuned", ofa, "ofa", dataset),
    ]


UNSEEN = "coco-stuff-unseen"
OPEN_VOCABULARY = [("LSeg+", 13.0), ("OpenSeg", 15.3), ("ZSSeg", 20.5)]
UNSUPERVISED = [("IIC", 0.6), ("PiCIE + H.", 4.6), ("TransFGU", 11.9), ("MaskCLIP+", 18.0)]
# Table 9: mIoU of the unseen and of the seen categories, and their harmonic mean.
ZERO_SHOT: list[tuple[str, float, float, float]] = [
    ("ZS5", 10.6, 34.9, 16.2),
    ("CaGNet", 13.4, 35.3, 32.6),
    ("SIGN", 15.2, 36.4, 21.4),
    ("SPNet", 26.9, 34.6, 30.3),
    ("STRICT", 30.3, 35.3, 32.6),
    ("ZSSeg", 43.6, 39.6, 41.5),
    ("MaskCLIP+", 54.7, 38.2, 45.0),
]
TABLES: dict[str, list[Row]] = {
    "1": [
        *_quoted([("MaskCLIP+", 48.7)]),
        *_image_free(UNSEEN, 6.8, 12.3, 24.8),
        Row("IFSeg", 55.6, "unseen", UNSEEN),
    ],
    "2": [
        *_quoted(OPEN_VOCABULARY),
        *_image_free("ade20k", 0.5, 3.7, 10.3),
        Row("IFSeg, tuned on COCO-Stuff's words (the text)", 16.8, "coco", "ade20k"),
        Row("IFSeg, tuned on ADE20K's words (the published script)", 16.8, "ade20k", "ade20k"),
    ],
    "3": [
        *_quoted(UNSUPERVISED),
        *_image_free("coco-stuff", 1.5, 4.6, 12.7),
        Row("IFSeg", 16.9, "coco", "coco-stuff"),
    ],
    "4": [
        Row("IFSeg", 55.6, "unseen", UNSEEN),
        Row("self-training on images", 56.2, "unseen-images", UNSEEN, PLAIN),
        Row("self-training on images and seen labels", 61.6, "seen-images", UNSEEN, PLAIN),
    ],
    "5": [
        *_quoted([("Semantic FPN", 40.4), ("UPerNet", 43.8), ("CLIP + Semantic FPN", 42.7)]),
        *_quoted([("DenseCLIP + Semantic FPN", 45.1)]),
        Row("IFSeg, supervised", 47.1, "supervised", "ade20k", PLAIN),
    ],
    "6": [
        *_quoted([("IIC", 2.4), ("PiCIE + H.", 14.4), ("TransFGU", 17.5), ("STEGO", 26.8)]),
        *_image_free("coco-stuff-coarse", 2.2, 6.6, 6.9),
        Row("IFSeg, fine words", 31.0, "coarse-of-fine", "coco-stuff-coarse"),
        Row("IFSeg, coarse words alone", 21.2, "coarse", "coco-stuff-coarse"),
    ],
    "7": [
        *_quoted(UNSUPERVISED),
        *_image_free("coco-stuff", 1.5, 4.5, 13.7),
        Row("IFSeg", 16.9, "coco", "coco-stuff"),
        Row("self-training on images", 18.4, "coco-images", "coco-stuff", PLAIN),
    ],
    "8": [
        *_quoted(OPEN_VOCABULARY),
        *_image_free("ade20k", 0.5, 3.9, 11.3),
        Row("IFSeg", 16.8, "coco", "ade20k"),
        Row("IFSeg, tuned on a hierarchy of ADE20K's words", 17.4, "ade20k-hierarchy", "ade20k"),
        Row("IFSeg, class-agnostic masks", 20.9, "mask-images", "ade20k", PLAIN),
    ],
    "9": [
        row
        for column, part, paper, metric in [
            (0, "unseen", 56.8, "mean_iou_unseen"),
            (1, "seen", 41.9, "mean_iou_seen"),
            (2, "harmonic mean", 48.2, "harmonic_mean_iou"),
        ]
        for row in (
            *_quoted((f"{name}, {part}", scores[column]) for name, *scores in ZERO_SHOT),
            Row(f"IFSeg+, {part}", paper, "plus", "coco-stuff", PLAIN, metric),
        )
    ],
    "10": [
        Row("no smoothing", 46.8, "unseen", UNSEEN, PLAIN),
        *(Row(f"k = 3, {n} iterations", paper, "unseen", UNSEEN, (3, n)) for n, paper in
          [(1, 51.2), (10, 54.9), (25, 55.6), (50, 55.5)]),
        *(Row(f"k = {k}, 25 iterations", paper, "unseen", UNSEEN, (k, 25)) for k, paper in
          [(2, 50.1), (5, 59.7), (8, 61.4)]),
    ],
    "11": [
        Row(f"{name}, {dataset}{'' if smoothing == SMOOTHED else ', not smoothed'}", paper, model, dataset, smoothing)
        for name, models, rows in [
            ("CLIP", ["clip"] * 3, [(SMOOTHED, [12.3, 3.7, 4.6]), (PLAIN, [11.6, 3.6, 4.4])]),
            ("MaskCLIP", ["maskclip"] * 3, [(SMOOTHED, [24.8, 10.3, 12.7]), (PLAIN, [23.7, 8.8, 10.8])]),
            ("IFSeg", ["unseen", "coco", "coco"], [(SMOOTHED, [54.6, 16.8, 16.9]), (PLAIN, [47.0, 14.0, 14.3])]),
        ]
        for smoothing, papers in rows
        for model, dataset, paper in zip(models, (UNSEEN, "ade20k", "coco-stuff"), papers, strict=True)
    ],
    "12": [
        Row(f"{name}, k = {k}", paper, model, UNSEEN, (k, 25))
        for name, model, papers in [
            ("S = 8", "unseen-max-cells-8", (55.8, 64.3)),
            ("S = 16", "unseen-max-cells-16", (57.8, 66.0)),
            ("S = 32", "unseen", (55.6, 61.4)),
            ("always 32 x 32", "unseen-fixed-grid", (47.7, 56.1)),
        ]
        for k, paper in zip((3, 8), papers, strict=True)
    ],
    "13": [
        Row("CLIP, ViT-B/16", 12.9, "clip", UNSEEN),
        Row("MaskCLIP, ViT-B/16", 37.0, "maskclip", UNSEEN),
        Row("IFSeg", 55.6, "unseen", UNSEEN),
    ],
    "14": [
        Row("CLIP, ViT-B/32", 4.8, "clip", UNSEEN),
        Row("MaskCLIP, ViT-B/32", 20.7, "maskclip", UNSEEN),
        Row("IFSeg, ClipCap", 25.8, "clipcap", UNSEEN),
    ],
    "external-words": [Row("tuned on ADE20K's words", 54.1, "ade20k", UNSEEN)],
}  # fmt: skip
TABLES["appendix-b"] = [
    *TABLES["10"],
    *TABLES["12"],
    Row("no cross-attention", 22.6, "unseen-no-cross-attention", UNSEEN),
    Row("decoder positions of the image (section 2.2)", None, "unseen-image-positions", UNSEEN),
    Row("prompt of Appendix E", None, "unseen-appendix-prompt", UNSEEN),
]
TITLES = {"external-words": "External words (Appendix A.1)", "appendix-b": "Appendix B"}
CLIPS = {"13": "openai/clip-vit-base-patch16", "14": "openai/clip-vit-base-patch32"}
"""The CLIP of a table's baselines, where it is on the Hub; the paper's other tables have a ResNet-101."""
NOTES = {
    "2": "The paper reports one number. Its text trains on COCO-Stuff's words, the published script on ADE20K's.",
    "7": "CLIP and MaskCLIP differ from Table 3 in the paper, too.",
    "8": "CLIP and MaskCLIP differ from Table 2 in the paper, too. The paper does not publish its hierarchy; ours has "
    "the synonyms of ADE20K's names.",
    "9": "The harmonic mean of CaGNet's two numbers is 19.4; the paper prints 32.6.",
    "10": "The text reports 47.0 without smoothing (Table 11), this table 46.8.",
    "11": "Where Table 1 has 55.6, the paper gives 54.6 here.",
    "appendix-b": "The paper has no number for other decoder positions and prompts: the published code has separate "
    "positions and another wording.",
}
