"""Reproduction of the paper's tables: their steps, and the paper's numbers beside ours.

Steps that rows and tables share run once.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download

from ifseg_hf.data.segmentation import load_segmentation_dataset
from ifseg_hf.data.vocabularies import join_names, read_categories
from ifseg_hf.experiments.paper_tables import BASELINES, CLIPS, COMMANDS, DATA_DIRS, NOTES, TABLES, TITLES, Row
from ifseg_hf.experiments.plan import ACCELERATE, Plan, Step, in_order, on_error_flag, shell, with_flag
from ifseg_hf.experiments.results import markdown_table
from ifseg_hf.pretrained import resolve_model
from ifseg_hf.training.config import read_settings


@dataclass
class TableSettings:
    """Table, models, data and folders.

    Args:
        table: a key of [`TABLES`].
        ofa: folder or Hub id of an OFA.
        data: folder that holds COCO (`val2017`, `stuffthingmaps_trainval2017`, ...) and ADE20K
            (`ADEChallengeData2016`), or their parent folders `coco-stuff` and `ade20k`.
        out: folder for the models and the results.
        configs: scripts/configs.
        clip: the CLIP of the baselines; clipcap: folder or Hub id of a converted ClipCap. `None`: their numbers are
            quoted, except where [`CLIPS`] has a CLIP.
        steps: steps of every training run, for a trial; limit: number of images to evaluate on, for a trial. `None`:
            as in the paper.
        on_error: "skip" leaves out images that cannot be read, in training, labelling and evaluation.
    """

    table: str
    ofa: str
    data: Path
    out: Path
    configs: Path
    clip: str | None = None
    clipcap: str | None = None
    steps: int | None = None
    limit: int | None = None
    on_error: str = "fail"

    def __post_init__(self):
        self.clip = self.clip or CLIPS.get(self.table)

    def measured(self, row: Row) -> bool:
        """Whether the model of a row is there, or is made; otherwise its number is quoted."""
        models: dict = {**dict.fromkeys(BASELINES, self.clip), "clipcap": self.clipcap}
        return row.model is not None and models.get(row.model, row.model) is not None

    def values(self) -> dict[str, str]:
        """The values of the placeholders in [`COMMANDS`] that are not names of steps."""
        coco = next((x for x in (self.data / "coco-stuff", self.data / "coco") if x.is_dir()), self.data)
        ade20k = next((x for x in (self.data / "ade20k",) if x.is_dir()), self.data)
        return {
            "configs": str(self.configs),
            "ofa": self.ofa,
            "clipcap_model": str(self.clipcap),
            "coco_dir": str(coco),
            "ade20k_dir": str(ade20k),
            "coarse_words": join_names(read_categories("coco-stuff-coarse")),
        }

    def plan(self) -> Plan:
        """The plan of all tables."""
        commands = {name: self._trial(x) if x.startswith("train.py") else x for name, x in COMMANDS.items()}
        return Plan(commands, self.values(), self.out, on_error=self.on_error)

    def _trial(self, command: str) -> str:
        """A command of train.py with the steps of a trial; without a trial, the command."""
        if self.steps is None:
            return command
        parts = shlex.split(command)
        file = parts[parts.index("--config") + 1].format(configs=self.configs)
        settings = read_settings(file)
        command = with_flag(command, "--steps", str(self.steps))
        if "online_after" in settings:
            share = settings["online_after"] * self.steps // settings["steps"]
            share = min(max(1, share), self.steps - 1)  # 0, never, in a run of one step
            command = with_flag(command, "--online-after", str(share))
        return command

    def check(self) -> None:
        """Raises `ValueError`, in one sentence, for data or a model that is missing, before anything runs."""
        values = self.values()
        rows = [row for row in TABLES[self.table] if self.measured(row)]
        for dataset in dict.fromkeys(str(row.dataset) for row in rows):
            load_segmentation_dataset(dataset, DATA_DIRS[dataset].format_map(values))
        used = {row.model for row in rows}
        models = [self.ofa] if used - {*BASELINES, "clipcap"} else []
        models += [str(self.clip)] if used & {*BASELINES} else []
        models += [str(self.clipcap)] if "clipcap" in used else []
        for model in models:
            check_model(model)

    def evaluation(self, model: str, dataset: str, smoothing: Sequence[tuple[int, int]]) -> Step:
        """The step that evaluates a model or baseline at several smoothing settings.

        The step runs every time, because `limit` may have changed; a complete evaluation ends at once.
        """
        plan, name = self.plan(), model
        if model in BASELINES:
            arguments = ["--baseline", model, "--model", str(self.clip)]
            name = f"{model}-{Path(str(self.clip)).name}"
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
        arguments += on_error_flag(self.on_error)
        settings = "-".join(f"{k}x{n}" for k, n in smoothing)
        folder = self.out / "evaluations" / f"{name}-on-{dataset}-{settings}"
        return Step("eval.py", tuple(arguments), folder)


def check_model(model: str) -> None:
    """Raises `ValueError`, in one sentence, for a model that is neither in a folder nor on the Hub."""
    try:
        if isinstance(resolve_model(model), str):
            hf_hub_download(model, "config.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f'The model "{model}" is not in the cache and cannot be downloaded: check its name and the network, or '
            f"give the folder of a model ({reason})"
        ) from error


def table_steps(settings: TableSettings) -> list[Step]:
    """The steps of the table in order: models first, then one evaluation per model and dataset."""
    plan = settings.plan()
    rows = [row for row in TABLES[settings.table] if settings.measured(row)]
    models = [plan.step(str(row.model)) for row in rows if row.model in COMMANDS]
    return in_order([*models, *_evaluations(settings).values()])


def _evaluations(settings: TableSettings) -> dict[tuple[str, str], Step]:
    """One evaluation for each model and dataset of the table, at all smoothing settings of their rows."""
    smoothing: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for row in TABLES[settings.table]:
        if settings.measured(row):
            smoothing.setdefault((str(row.model), str(row.dataset)), set()).add(row.smoothing)
    return {key: settings.evaluation(*key, sorted(values)) for key, values in smoothing.items()}


def table_results(settings: TableSettings) -> list[dict]:
    """Results of the table, whose steps are complete.

    Returns:
        A dict for each row: name, paper, ours and difference in per cent, whether the row is quoted, and the smoothing.
        `ours` and `difference` are None where nothing was measured, or the metric is undefined.
    """
    evaluations = _evaluations(settings)
    rows = []
    for row in TABLES[settings.table]:
        ours, smoothing = None, {}
        if settings.measured(row):
            results = read_results(evaluations[str(row.model), str(row.dataset)])["results"]
            smoothing = dict(zip(("smoothing_neighbors", "smoothing_iterations"), row.smoothing, strict=True))
            (result,) = [result for result in results if smoothing.items() <= result.items()]
            ours = None if result[row.metric] is None else round(100 * result[row.metric], 1)
        difference = None if ours is None or row.paper is None else round(ours - row.paper, 1)
        numbers = {"paper": row.paper, "ours": ours, "difference": difference}
        rows.append({"name": row.name, **numbers, "quoted": not settings.measured(row), **smoothing})
    return rows


def read_results(evaluation: Step) -> dict:
    """The content of results.json of a complete evaluation."""
    return json.loads((evaluation.output_dir / "results.json").read_text(encoding="utf-8"))


def comparison_table(table: str, rows: Sequence[dict]) -> str:
    """The paper's numbers, ours and the difference as a Markdown table with title and notes.

    Args:
        rows: the result of [`table_results`].
    """
    cells = [
        [
            f"{row['name']} (quoted)" if row["quoted"] else row["name"],
            *("-" if row[name] is None else f"{row[name]:.1f}" for name in ("paper", "ours")),
            "-" if row["difference"] is None else f"{row['difference']:+.1f}",
        ]
        for row in rows
    ]
    title = TITLES.get(table, f"Table {table}")
    parts = [f"{title}: mIoU in per cent", markdown_table(["", "paper", "ours", "difference"], cells)]
    if any(row["quoted"] for row in rows):
        parts.append("Quoted: the paper's number of a system that was not run here.")
    return "\n\n".join([*parts, *([NOTES[table]] if table in NOTES else [])]) + "\n"


def report(settings: TableSettings, table: str) -> str:
    """A report in Markdown: the table, the IoU of every category, the commands, and what they ran on.

    Args:
        table: the result of [`comparison_table`].
    """
    evaluations = _evaluations(settings)
    (model, dataset), last = list(evaluations.items())[-1]
    results = read_results(last)
    best = max(results["results"], key=lambda result: result["mean_iou"] or 0)
    ious = {name: scores["iou"] for name, scores in best["categories"].items()}
    cells = [[name, "-" if iou is None else f"{100 * iou:.1f}"] for name, iou in ious.items()]
    commands = "\n".join(shell(step.command, ACCELERATE) for step in table_steps(settings))
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"# IFSeg with {settings.ofa}\n\n{table}\n"
        f"## IoU of each category, {model} on {dataset}\n\n{markdown_table(['category', 'IoU'], cells)}\n\n"
        f"## Commands\n\n```\n{commands}\n```\n\n"
        f"{results['images']} images, {results['processes']} x {results['device']}; {versions}.\n"
    )
