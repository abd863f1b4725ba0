"""Experiments on images, as commands: training on masks, on pseudo-labels, and on the masks of some categories.

Every row of the result table is a model, trained once for each seed.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from ifseg_hf.data.vocabularies import join_names
from ifseg_hf.experiments.plan import Plan, Step, in_order, on_error_flag, save_settings
from ifseg_hf.experiments.results import markdown_table, mean_and_deviation
from ifseg_hf.training.log import read_log
from ifseg_hf.visualization.curves import draw_curves

ON_IMAGES = (
    "train.py --config {configs}/images_nano.yaml --steps {steps} --warmup-steps {warmup_steps} "
    "--batch-size {batch_size}"
)
ON_IMAGES_EVALUATED = f"{ON_IMAGES} --eval-steps {{eval_steps}} --eval-dataset {{dataset}}"

# The command of each step, by the step's name; see plan.py. `ImageExperiments.plan` has the values of the placeholders.
COMMANDS = {
    "image-free": "train.py --config {configs}/nano.yaml --model {model} --categories {words} --seed {seed}",
    "labels": "pseudo_label.py --model {image-free} --images {dataset}/train/images --categories {words} "
    "--min-confidence 0.3",
    "self-training": f"{ON_IMAGES_EVALUATED} --stage self-training --model {{image-free}} --dataset {{labels}} "
    "--seed {seed}",
    "supervised": f"{ON_IMAGES_EVALUATED} --model {{model}} --dataset {{dataset}} --seed {{seed}}",
    "from-scratch": f"{ON_IMAGES_EVALUATED} --model {{model}} --dataset {{dataset}} --from-scratch "
    "--learning-rate 1e-3 --seed {seed}",
    "seen-only": f"{ON_IMAGES} --model {{model}} --dataset {{dataset}} --unseen {{unseen}} --freeze words "
    "--seed {seed}",
    "unseen-labels": "pseudo_label.py --model {image-free} --dataset {dataset} --keep-labels --unseen {unseen}",
    "seen-and-unseen": f"{ON_IMAGES} --stage self-training --model {{model}} --dataset {{unseen-labels}} "
    "--freeze words --seed {seed}",
}
TITLES = {
    "image-free": "words alone, no image (`nano.yaml`), smoothed",
    "self-training": "self-training of the first row's model on images without masks",
    "supervised": "images and masks, from the checkpoint",
    "from-scratch": "images and masks, from random weights (`--from-scratch`)",
    "seen-only": "images and masks of the seen categories",
    "seen-and-unseen": "the same, and pseudo-labels of the unseen categories from the first row's model",
}
CURVES = {
    "supervised": "supervised, from the checkpoint",
    "from-scratch": "supervised, from random weights",
    "self-training": "self-training, no masks",
}
METRICS = ("mean_iou", "mean_iou_seen", "mean_iou_unseen", "harmonic_mean_iou")
SETTINGS_FILE = "experiments.json"


@dataclass
class ImageExperiments:
    """Dataset, model and sizes of the experiments.

    Args:
        dataset: a folder with dataset.json, train/ and val/; its categories are the words.
        unseen: categories whose masks some experiments do not use, with commas between them.
        out: folder for the models and the results. Several processes may share a folder if their seeds differ.
        configs: the folder of nano.yaml and images_nano.yaml.
        model: folder or Hub id of the model to start from.
        steps, batch_size: of the training runs on images.
        on_error: "skip" leaves out images that cannot be read, in training, labelling and evaluation.
    """

    dataset: str
    unseen: str
    out: Path
    configs: Path
    model: str
    steps: int
    batch_size: int
    on_error: str = "fail"

    def check(self) -> None:
        """Raises `ValueError` for a dataset that lacks a part which the experiments need."""
        folder = Path(self.dataset)
        for part in ("dataset.json", "train/images", "train/masks", "val/images", "val/masks"):
            if not (folder / part).exists():
                raise ValueError(f'"{folder}" has no {part}.')

    def save_settings(self) -> None:
        """Writes the settings to `out`. Raises `ValueError` if it holds experiments with other settings."""
        settings = {name: x for name, x in asdict(self).items() if name not in ("out", "configs", "on_error")}
        save_settings(self.out / SETTINGS_FILE, settings)

    def plan(self, seed: int) -> Plan:
        """The plan of all experiments with one seed."""
        dataset = json.loads((Path(self.dataset) / "dataset.json").read_text(encoding="utf-8"))
        values = {
            **{name: str(x) for name, x in asdict(self).items()},
            "words": join_names(dataset["categories"]),
            "warmup_steps": str(self.steps // 4),
            "eval_steps": str(max(1, self.steps // 3)),
            "seed": str(seed),
        }
        return Plan(COMMANDS, values, self.out, f"-{seed}", self.on_error)

    def steps_of(self, names: Iterable[str], seeds: Iterable[int]) -> list[Step]:
        """The steps of the experiments `names`, each a key of [`TITLES`], for every seed, in order."""
        steps = []
        for seed in seeds:
            plan = self.plan(seed)
            for name in names:
                model, folder = plan.step(name), self.out / "evaluations" / f"{name}-{seed}"
                arguments = ["--model", str(model.output_dir), "--dataset", self.dataset, "--unseen", self.unseen]
                arguments += on_error_flag(self.on_error)
                steps.append(Step("eval.py", tuple(arguments), folder, "results.json", (model,)))
        return in_order(steps)


def read_results(out: Path) -> dict[str, dict[int, dict]]:
    """Scores by experiment and seed, of all evaluations in `out` that are complete."""
    results: dict[str, dict[int, dict]] = {name: {} for name in TITLES}
    for name, seeds in results.items():
        for file in sorted((out / "evaluations").glob(f"{name}-*/results.json")):
            (scores,) = json.loads(file.read_text(encoding="utf-8"))["results"]
            seeds[int(file.parent.name.rpartition("-")[2])] = scores
    return {name: seeds for name, seeds in results.items() if seeds}


def seeds_table(results: dict[str, dict[int, dict]]) -> str:
    """A Markdown table in per cent: mean and standard deviation over the seeds of each experiment."""
    header = ["trained on", "seeds", "mIoU", "seen", "unseen", "harmonic mean"]
    rows = [[TITLES[name], str(len(seeds)), *_means(list(seeds.values()))] for name, seeds in results.items()]
    return markdown_table(header, rows) + "\n"


def _means(scores: Sequence[dict]) -> list[str]:
    """Each metric over the seeds that have it, in per cent."""
    return [mean_and_deviation([100 * x[metric] for x in scores if x[metric] is not None]) for metric in METRICS]


def draw_experiments(out: Path, results: dict[str, dict[int, dict]]) -> Path | None:
    """Draws curves.png: the runs that were evaluated during training, beside the level of the image-free model.

    Returns the file, or `None` if there are no such runs.
    """
    runs = {title: [out / f"{x}-{seed}" for seed in results[x]] for x, title in CURVES.items() if x in results}
    if not runs:
        return None
    free = [100 * scores["mean_iou"] for scores in results.get("image-free", {}).values()]
    logs = {title: [read_log(folder) for folder in folders] for title, folders in runs.items()}
    draw_curves(logs, out / "curves.png", {"image-free, smoothed": mean(free)} if free else {})
    return out / "curves.png"
