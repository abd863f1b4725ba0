"""The paper's tables as commands: which models to tune, what to evaluate them on, and what the paper reports.

A step makes a folder with one of the scripts; a row of a table evaluates one of these models, or a baseline. Steps that
rows and tables share run once, and a table that was stopped goes on where it was.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ifseg_hf.data.vocabularies import read_categories

WORD_MAPS = ("train.py", "--model", "{ofa}")
SELF_TRAINING = ("train.py", "--stage", "self-training", "--steps", "8000")
PSEUDO_LABELS = ("pseudo_label.py", "--data-dir", "{coco}", "--split", "train2017")
COARSE = ", ".join(read_categories("coco-stuff-coarse"))

# Each makes the folder of its name: script and arguments. {ofa}, {coco} and {ade20k} are what a person gives, {out} is
# the folder of all steps; a step that reads {out}/X follows step X.
STEPS: dict[str, tuple[str, ...]] = {
    "unseen": (*WORD_MAPS, "--categories", "coco-stuff-unseen"),
    "unseen-s8": (*WORD_MAPS, "--categories", "coco-stuff-unseen", "--max-cells", "8"),
    "unseen-s16": (*WORD_MAPS, "--categories", "coco-stuff-unseen", "--max-cells", "16"),
    "unseen-fixed": (*WORD_MAPS, "--categories", "coco-stuff-unseen", "--no-random-cells"),
    "coco": (*WORD_MAPS, "--categories", "coco-stuff"),
    "ade20k": (*WORD_MAPS, "--categories", "ade20k"),
    "coarse": (*WORD_MAPS, "--categories", COARSE),
    "coarse-of-fine": (*WORD_MAPS, "--categories", "coco-stuff-coarse"),
    # Table 4: photos alone, then with the labels of the seen categories
    "unseen-labels": (*PSEUDO_LABELS, "--model", "{out}/unseen", "--dataset", "coco-stuff-unseen"),
    "unseen-images": (*SELF_TRAINING, "--model", "{out}/unseen", "--dataset", "{out}/unseen-labels"),
    "seen-labels": (
        *(*PSEUDO_LABELS, "--model", "{out}/coco", "--dataset", "coco-stuff", "--keep-labels", "--unseen", "unseen"),
    ),
    "seen-images": (*SELF_TRAINING, "--model", "{out}/coco", "--dataset", "{out}/seen-labels"),
    # Table 5
    "supervised": (
        *("train.py", "--stage", "supervised", "--model", "{ofa}", "--dataset", "ade20k", "--data-dir", "{ade20k}"),
        *("--split", "training", "--steps", "80000", "--batch-size", "32"),
    ),
    # Table 7
    "coco-labels": (*PSEUDO_LABELS, "--model", "{out}/coco", "--dataset", "coco-stuff"),
    "coco-images": (*SELF_TRAINING, "--model", "{out}/coco", "--dataset", "{out}/coco-labels"),
    # Table 9: IFSeg+, whose own pseudo-labels take over after 15k steps
    "plus-labels": (
        *(*PSEUDO_LABELS, "--model", "{out}/seen-images", "--dataset", "coco-stuff", "--keep-labels"),
        *("--unseen", "unseen", "--smoothing-iterations", "0"),
    ),
    "plus": (
        *("train.py", "--stage", "self-training", "--model", "{ofa}", "--dataset", "{out}/plus-labels"),
        *("--steps", "81000", "--refresh-every", "15000"),
    ),
}  # fmt: skip
DATA_DIRS = {"coco-stuff": "{coco}", "coco-stuff-unseen": "{coco}", "coco-stuff-coarse": "{coco}", "ade20k": "{ade20k}"}
SMOOTHED, PLAIN = (3, 25), (1, 0)


@dataclass(frozen=True)
class Row:
    """A number of a table, in per cent.

    Args:
        name: what it is; paper: what the paper reports.
        model: "ofa", "clip", "maskclip", or one of [`STEPS`]; dataset: what it is evaluated on.
        smoothing: neighbours and iterations; metric: of [`ifseg_hf.evaluation.metrics.scores`].
    """

    name: str
    paper: float
    model: str
    dataset: str
    smoothing: tuple[int, int] = SMOOTHED
    metric: str = "mean_iou"


def _image_free(dataset: str, tuned: str, ofa: float, clip: float, maskclip: float, ifseg: float) -> list[Row]:
    return [
        Row("OFA, untuned", ofa, "ofa", dataset),
        Row("CLIP", clip, "clip", dataset),
        Row("MaskCLIP", maskclip, "maskclip", dataset),
        Row("IFSeg", ifseg, tuned, dataset),
    ]


UNSEEN = "coco-stuff-unseen"
TABLES: dict[str, list[Row]] = {
    "1": _image_free(UNSEEN, "unseen", 6.8, 12.3, 24.8, 55.6),
    "2": _image_free("ade20k", "coco", 0.5, 3.7, 10.3, 16.8),
    "3": _image_free("coco-stuff", "coco", 1.5, 4.6, 12.7, 16.9),
    "4": [
        Row("IFSeg", 55.6, "unseen", UNSEEN),
        Row("self-training on photos", 56.2, "unseen-images", UNSEEN, PLAIN),
        Row("self-training on photos and seen labels", 61.6, "seen-images", UNSEEN, PLAIN),
    ],
    "5": [Row("IFSeg, supervised", 47.1, "supervised", "ade20k", PLAIN)],
    "6": [
        *_image_free("coco-stuff-coarse", "coarse-of-fine", 2.2, 6.6, 6.9, 31.0),
        Row("IFSeg, coarse words alone", 21.2, "coarse", "coco-stuff-coarse"),
    ],
    "7": [
        Row("IFSeg", 16.9, "coco", "coco-stuff"),
        Row("self-training on photos", 18.4, "coco-images", "coco-stuff", PLAIN),
    ],
    "8": [Row("IFSeg", 16.8, "coco", "ade20k")],
    "9": [
        Row("IFSeg+, unseen", 56.8, "plus", "coco-stuff", PLAIN, "mean_iou_unseen"),
        Row("IFSeg+, seen", 41.9, "plus", "coco-stuff", PLAIN, "mean_iou_seen"),
        Row("IFSeg+, harmonic mean", 48.2, "plus", "coco-stuff", PLAIN, "harmonic_mean_iou"),
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
            ("S = 8", "unseen-s8", (55.8, 64.3)),
            ("S = 16", "unseen-s16", (57.8, 66.0)),
            ("S = 32", "unseen", (55.6, 61.4)),
            ("always 32 x 32", "unseen-fixed", (47.7, 56.1)),
        ]
        for k, paper in zip((3, 8), papers, strict=True)
    ],
    "external-words": [Row("tuned on ADE20K's words", 54.1, "ade20k", UNSEEN)],
}  # fmt: skip
NOTES = {
    "1": "The paper's CLIP and MaskCLIP have a ResNet-101, which transformers does not have. With ViT-B/16 it reports "
    "12.9 and 37.0 on the 15 unseen categories (Table 13).",
    "8": "The paper's 20.9 needs class-agnostic masks, and its 17.4 a hierarchy of ADE20K's words: neither is here.",
    "10": "The text reports 47.0 without smoothing (Table 11), this table 46.8.",
    "11": "The paper gives 54.6 here for what Table 1 has as 55.6.",
}
NOTES |= dict.fromkeys(("2", "3", "6", "11"), NOTES["1"]) | {"11": f"{NOTES['11']} {NOTES['1']}"}
BASELINES = ("clip", "maskclip")


@dataclass
class Reproduction:
    """What a person gives.

    Args:
        ofa: folder or Hub id of a converted OFA; clip: of a CLIP with a vision transformer.
        data: folder that holds COCO (`val2017`, `stuffthingmaps_trainval2017`, ...) and ADE20K
            (`ADEChallengeData2016`), or folders `coco-stuff` and `ade20k` that do.
        out: takes the models and the results.
        steps: of every training, in the place of the paper's; limit: photos to evaluate on; both for a trial.
    """

    ofa: str
    data: Path
    out: Path
    clip: str = "openai/clip-vit-base-patch16"
    steps: int | None = None
    limit: int | None = None

    def places(self) -> dict[str, str]:
        coco = next((x for x in (self.data / "coco-stuff", self.data / "coco") if x.is_dir()), self.data)
        ade20k = next((x for x in (self.data / "ade20k",) if x.is_dir()), self.data)
        return {"ofa": self.ofa, "coco": str(coco), "ade20k": str(ade20k), "out": str(self.out)}

    def step(self, name: str) -> list[str]:
        """The command that makes the folder of a step: script and arguments."""
        script, *arguments = (part.format(**self.places()) for part in STEPS[name])
        if script == "train.py":
            if self.steps is not None:
                arguments = _with(arguments, "--steps", str(self.steps))
                if "--refresh-every" in arguments:
                    arguments = _with(arguments, "--refresh-every", str(max(1, self.steps // 5)))
            arguments.append("--resume")
        return [script, *arguments, "--output-dir", str(self.out / name)]

    def evaluation(self, model: str, dataset: str, smoothing: Sequence[tuple[int, int]]) -> list[str]:
        """The command that evaluates a model, or baseline, at several smoothing settings."""
        command = ["eval.py", "--model", {"ofa": self.ofa}.get(model, str(self.out / model))]
        if model in BASELINES:
            command = ["eval.py", "--baseline", model, "--model", self.clip]
        command += ["--dataset", dataset, "--data-dir", DATA_DIRS[dataset].format(**self.places())]
        neighbors = sorted({k for k, n in smoothing if n}) or [1]
        iterations = sorted({n for _, n in smoothing})
        command += ["--smoothing-neighbors", ",".join(map(str, neighbors))]
        command += ["--smoothing-iterations", ",".join(map(str, iterations))]
        if self.limit is not None:
            command += ["--limit", str(self.limit)]
        settings = "-".join(f"{k}x{n}" for k, n in sorted(set(smoothing)))
        return [*command, "--output-dir", str(self.out / "evaluations" / f"{model}-on-{dataset}-{settings}")]

    def plan(self, table: str) -> list[list[str]]:
        """All commands of a table in their order."""
        rows, made = TABLES[table], {}

        def make(name: str) -> None:
            for needed in re.findall(r"\{out\}/([\w-]+)", " ".join(STEPS[name])):
                make(needed)
            made.setdefault(name, self.step(name))

        for row in rows:
            if row.model in STEPS:
                make(row.model)
        return [*made.values(), *(self.evaluation(*group) for group in _evaluations(rows))]


def _with(arguments: list[str], flag: str, value: str) -> list[str]:
    """The arguments with one flag's value replaced, or added."""
    if flag not in arguments:
        return [*arguments, flag, value]
    at = arguments.index(flag) + 1
    return [*arguments[:at], value, *arguments[at + 1 :]]


def _evaluations(rows: Sequence[Row]) -> list[tuple[str, str, list[tuple[int, int]]]]:
    """Model, data set and smoothing settings of each pass over a data set."""
    settings: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for row in rows:
        settings.setdefault((row.model, row.dataset), []).append(row.smoothing)
    return [(model, dataset, sorted(set(smoothing))) for (model, dataset), smoothing in settings.items()]


def reproduce(reproduction: Reproduction, table: str, run: Callable[[list[str]], None]) -> list[dict]:
    """Tunes and evaluates what a table needs.

    Args:
        table: one of [`TABLES`].
        run: runs a script of this project by its name with arguments, and raises if it fails. Not called for a step
            whose folder is complete.

    Returns:
        A dict for each row: name, paper, ours, difference (per cent), and the settings.
    """
    for command in reproduction.plan(table):
        output = Path(command[command.index("--output-dir") + 1])
        done = {"train.py": "config.json", "pseudo_label.py": "dataset.json"}.get(command[0])
        if done is None or not (output / done).is_file():
            run(command)
    results = []
    groups = {(model, dataset): smoothing for model, dataset, smoothing in _evaluations(TABLES[table])}
    for row in TABLES[table]:
        command = reproduction.evaluation(row.model, row.dataset, groups[row.model, row.dataset])
        told = json.loads((Path(command[-1]) / "results.json").read_text(encoding="utf-8"))["results"]
        wanted = dict(zip(("smoothing_neighbors", "smoothing_iterations"), row.smoothing, strict=True))
        (result,) = [result for result in told if wanted.items() <= result.items()]
        ours = None if result[row.metric] is None else round(100 * result[row.metric], 1)
        difference = None if ours is None else round(ours - row.paper, 1)
        results.append({"name": row.name, "paper": row.paper, "ours": ours, "difference": difference, **wanted})
    return results


def markdown(table: str, results: list[dict]) -> str:
    title = f"Table {table}" if table.isdigit() else "External words (Appendix A.1)"
    lines = [f"{title}: mIoU in per cent", "", "| | paper | ours | difference |", "|---|---|---|---|"]
    for result in results:
        ours = "-" if result["ours"] is None else f"{result['ours']:.1f} | {result['difference']:+.1f}"
        lines.append(
            f"| {result['name']} | {result['paper']:.1f} | {ours if result['ours'] is not None else '- | -'} |"
        )
    if table in NOTES:
        lines += ["", NOTES[table]]
    return "\n".join(lines) + "\n"


def shell(command: list[str]) -> str:
    """A command as a person would type it."""
    return shlex.join(["accelerate", "launch", f"scripts/{command[0]}", *command[1:]])
