"""The paper's tables as commands: which models to tune, what to evaluate them on, and what the paper reports.

A table is a list of rows; a row evaluates a model, which a step makes, or a baseline. Steps that rows and tables share
run once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ifseg_hf.data.vocabularies import join_names, read_categories
from ifseg_hf.experiments.plan import Plan, Step, in_order, with_flag
from ifseg_hf.experiments.results import markdown_table

PSEUDO_LABELS = "pseudo_label.py --data-dir {coco_dir} --split train2017"
SELF_TRAINING = "train.py --stage self-training --steps 8000"

# The command of each step, by the step's name; see plan.py. `TableSettings.values` has the values of the placeholders.
COMMANDS = {
    "unseen": "train.py --model {ofa} --categories coco-stuff-unseen",
    "unseen-s8": "train.py --model {ofa} --categories coco-stuff-unseen --max-cells 8",
    "unseen-s16": "train.py --model {ofa} --categories coco-stuff-unseen --max-cells 16",
    "unseen-fixed": "train.py --model {ofa} --categories coco-stuff-unseen --no-random-cells",
    "coco": "train.py --model {ofa} --categories coco-stuff",
    "ade20k": "train.py --model {ofa} --categories ade20k",
    "coarse": "train.py --model {ofa} --categories {coarse_words}",
    "coarse-of-fine": "train.py --model {ofa} --categories coco-stuff-coarse",
    # Table 4: images alone, then images with the labels of the seen categories.
    "unseen-labels": f"{PSEUDO_LABELS} --model {{unseen}} --dataset coco-stuff-unseen",
    "unseen-images": f"{SELF_TRAINING} --model {{unseen}} --dataset {{unseen-labels}}",
    "seen-labels": f"{PSEUDO_LABELS} --model {{coco}} --dataset coco-stuff --keep-labels --unseen unseen",
    "seen-images": f"{SELF_TRAINING} --model {{coco}} --dataset {{seen-labels}}",
    # Table 5
    "supervised": "train.py --stage supervised --model {ofa} --dataset ade20k --data-dir {ade20k_dir} "
    "--split training --steps 80000 --batch-size 32",
    # Table 7
    "coco-labels": f"{PSEUDO_LABELS} --model {{coco}} --dataset coco-stuff",
    "coco-images": f"{SELF_TRAINING} --model {{coco}} --dataset {{coco-labels}}",
    # Table 9: IFSeg+, which makes its own pseudo-labels after 15,000 steps.
    "plus-labels": f"{PSEUDO_LABELS} --model {{seen-images}} --dataset coco-stuff --keep-labels --unseen unseen "
    "--smoothing-iterations 0",
    "plus": "train.py --stage self-training --model {ofa} --dataset {plus-labels} --steps 81000 --refresh-every 15000",
}
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
        name: title of the row; paper: the number that the paper reports, in per cent.
        model: "ofa", "clip", "maskclip", or a step of [`COMMANDS`]; dataset: what the model is evaluated on.
        smoothing: neighbours and iterations; metric: a key of [`ifseg_hf.evaluation.metrics.scores`].
    """

    name: str
    paper: float
    model: str
    dataset: str
    smoothing: tuple[int, int] = SMOOTHED
    metric: str = "mean_iou"


def _image_free(dataset: str, tuned: str, ofa: float, clip: float, maskclip: float, ifseg: float) -> list[Row]:
    """Rows of IFSeg and its baselines; `ofa`, `clip`, `maskclip` and `ifseg` are the paper's numbers."""
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
        Row("self-training on images", 56.2, "unseen-images", UNSEEN, PLAIN),
        Row("self-training on images and seen labels", 61.6, "seen-images", UNSEEN, PLAIN),
    ],
    "5": [Row("IFSeg, supervised", 47.1, "supervised", "ade20k", PLAIN)],
    "6": [
        *_image_free("coco-stuff-coarse", "coarse-of-fine", 2.2, 6.6, 6.9, 31.0),
        Row("IFSeg, coarse words alone", 21.2, "coarse", "coco-stuff-coarse"),
    ],
    "7": [
        Row("IFSeg", 16.9, "coco", "coco-stuff"),
        Row("self-training on images", 18.4, "coco-images", "coco-stuff", PLAIN),
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
    "1": "The paper's CLIP and MaskCLIP have a ResNet-101, which transformers lacks. With ViT-B/16 it reports "
    "12.9 and 37.0 on the 15 unseen categories (Table 13).",
    "8": "The paper's 20.9 needs class-agnostic masks, and its 17.4 a hierarchy of ADE20K's words; this project has "
    "neither.",
    "10": "The text reports 47.0 without smoothing (Table 11), this table 46.8.",
    "11": "Where Table 1 has 55.6, the paper gives 54.6 here.",
}
NOTES |= dict.fromkeys(("2", "3", "6", "11"), NOTES["1"]) | {"11": f"{NOTES['11']} {NOTES['1']}"}


@dataclass
class TableSettings:
    """Models, data and folders for a table.

    Args:
        ofa: folder or Hub id of a converted OFA; clip: of a CLIP with a vision transformer.
        data: folder that holds COCO (`val2017`, `stuffthingmaps_trainval2017`, ...) and ADE20K
            (`ADEChallengeData2016`), or their parent folders `coco-stuff` and `ade20k`.
        out: folder for the models and the results.
        steps: steps of every training run, for a trial; limit: number of images to evaluate on, for a trial. `None`:
            as in the paper.
    """

    ofa: str
    data: Path
    out: Path
    clip: str = "openai/clip-vit-base-patch16"
    steps: int | None = None
    limit: int | None = None

    def values(self) -> dict[str, str]:
        """The values of the placeholders in [`COMMANDS`] that are not names of steps."""
        coco = next((x for x in (self.data / "coco-stuff", self.data / "coco") if x.is_dir()), self.data)
        ade20k = next((x for x in (self.data / "ade20k",) if x.is_dir()), self.data)
        words = join_names(read_categories("coco-stuff-coarse"))
        return {"ofa": self.ofa, "coco_dir": str(coco), "ade20k_dir": str(ade20k), "coarse_words": words}

    def plan(self) -> Plan:
        """The plan of all tables."""
        commands = dict(COMMANDS)
        if self.steps is not None:
            for name, command in commands.items():
                if command.startswith("train.py"):
                    command = with_flag(command, "--steps", str(self.steps))
                    refresh = str(max(1, self.steps // 5))
                    commands[name] = with_flag(command, "--refresh-every", refresh, only_replace=True)
        return Plan(commands, self.values(), self.out)

    def evaluation(self, model: str, dataset: str, smoothing: Sequence[tuple[int, int]]) -> Step:
        """The step that evaluates a model or baseline at several smoothing settings.

        The step runs every time, because `limit` may have changed; a complete evaluation ends at once.
        """
        plan = self.plan()
        if model in BASELINES:
            arguments = ["--baseline", model, "--model", self.clip]
        elif model == "ofa":
            arguments = ["--model", self.ofa, "--untuned"]
        else:
            arguments = ["--model", str(plan.folder(model))]
        arguments += ["--dataset", dataset, "--data-dir", *plan.fill_in([DATA_DIRS[dataset]])]
        neighbors = sorted({k for k, n in smoothing if n}) or [1]
        iterations = sorted({n for _, n in smoothing})
        arguments += ["--smoothing-neighbors", ",".join(map(str, neighbors))]
        arguments += ["--smoothing-iterations", ",".join(map(str, iterations))]
        if self.limit is not None:
            arguments += ["--limit", str(self.limit)]
        name = "-".join(f"{k}x{n}" for k, n in smoothing)
        folder = self.out / "evaluations" / f"{model}-on-{dataset}-{name}"
        return Step("eval.py", tuple(arguments), folder)


def table_steps(table: str, settings: TableSettings) -> list[Step]:
    """The steps of a table, a key of [`TABLES`], in order: models first, then one evaluation per model and dataset."""
    plan = settings.plan()
    models = [plan.step(row.model) for row in TABLES[table] if row.model in COMMANDS]
    return in_order([*models, *_evaluations(table, settings).values()])


def _evaluations(table: str, settings: TableSettings) -> dict[tuple[str, str], Step]:
    """One evaluation for each model and dataset of a table, at all smoothing settings of their rows."""
    smoothing: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for row in TABLES[table]:
        smoothing.setdefault((row.model, row.dataset), set()).add(row.smoothing)
    return {key: settings.evaluation(*key, sorted(values)) for key, values in smoothing.items()}


def table_results(table: str, settings: TableSettings) -> list[dict]:
    """Results of a table whose steps are complete.

    Returns:
        A dict for each row: name, paper, ours and difference in per cent, and the smoothing. `ours` and `difference`
        are None where the metric is undefined.
    """
    evaluations = _evaluations(table, settings)
    rows = []
    for row in TABLES[table]:
        file = evaluations[row.model, row.dataset].output_dir / "results.json"
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        smoothing = dict(zip(("smoothing_neighbors", "smoothing_iterations"), row.smoothing, strict=True))
        (result,) = [result for result in results if smoothing.items() <= result.items()]
        ours = None if result[row.metric] is None else round(100 * result[row.metric], 1)
        difference = None if ours is None else round(ours - row.paper, 1)
        rows.append({"name": row.name, "paper": row.paper, "ours": ours, "difference": difference, **smoothing})
    return rows


def comparison_table(table: str, rows: Sequence[dict]) -> str:
    """The paper's numbers, ours and the difference as a Markdown table with title and notes.

    Args:
        rows: the result of [`table_results`].
    """
    title = f"Table {table}" if table.isdigit() else "External words (Appendix A.1)"
    cells = [
        [
            row["name"],
            f"{row['paper']:.1f}",
            "-" if row["ours"] is None else f"{row['ours']:.1f}",
            "-" if row["difference"] is None else f"{row['difference']:+.1f}",
        ]
        for row in rows
    ]
    parts = [f"{title}: mIoU in per cent", markdown_table(["", "paper", "ours", "difference"], cells)]
    return "\n\n".join([*parts, *([NOTES[table]] if table in NOTES else [])]) + "\n"
