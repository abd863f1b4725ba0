"""What photos add to words alone, as commands: training on masks, on pseudo-labels, on the masks of some categories.

A step makes a folder with one of the scripts, once for each seed; a row of the table is a model among them.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from ifseg_hf.visualization.curves import draw_curves

ON_PHOTOS = (
    *("train.py", "--config", "{configs}/photos_nano.yaml", "--short-side", "192", "--steps", "{steps}"),
    *("--warmup-steps", "{warmup_steps}", "--batch-size", "{batch_size}"),
)
EVALUATED = ("--eval-steps", "{eval_steps}", "--eval-dataset", "{dataset}")

# Each makes the folder of its name and seed: script and arguments. A step that reads {out}/X-{seed} follows step X.
STEPS: dict[str, tuple[str, ...]] = {
    "image-free": (*("train.py", "--config", "{configs}/nano.yaml", "--model", "{model}", "--categories", "{words}"),),
    "labels": (
        *("pseudo_label.py", "--model", "{out}/image-free-{seed}", "--images", "{dataset}/train/images"),
        *("--categories", "{words}", "--min-confidence", "0.3"),
    ),
    "self-training": (
        *(*ON_PHOTOS, *EVALUATED, "--stage", "self-training", "--model", "{out}/image-free-{seed}"),
        *("--dataset", "{out}/labels-{seed}", "--learning-rate", "1e-4"),
    ),
    "supervised": (*ON_PHOTOS, *EVALUATED, "--model", "{model}", "--dataset", "{dataset}"),
    "from-scratch": (*ON_PHOTOS, *EVALUATED, "--model", "{model}", "--dataset", "{dataset}", "--from-scratch"),
    "seen-only": (
        *(*ON_PHOTOS, "--model", "{model}", "--dataset", "{dataset}", "--unseen", "{unseen}", "--freeze", "words"),
    ),
    "unseen-labels": (
        *("pseudo_label.py", "--model", "{out}/image-free-{seed}", "--dataset", "{dataset}", "--keep-labels"),
        *("--unseen", "{unseen}"),
    ),
    "seen-and-unseen": (
        *(*ON_PHOTOS, "--stage", "self-training", "--model", "{model}", "--dataset", "{out}/unseen-labels-{seed}"),
        *("--freeze", "words"),
    ),
}
EXPERIMENTS = {
    "image-free": "words alone, no photo (`nano.yaml`), smoothed",
    "self-training": "self-training from it on photos without masks",
    "supervised": "photos and masks, from the checkpoint",
    "from-scratch": "photos and masks, from random weights (`--from-scratch`)",
    "seen-only": "photos and masks of the seen categories",
    "seen-and-unseen": "the same, and pseudo-labels of the unseen from the first row",
}
CURVES = {
    "supervised": "supervised, from the checkpoint",
    "from-scratch": "supervised, from random weights",
    "self-training": "self-training, no masks",
}
SCORES = ("mean_iou", "mean_iou_seen", "mean_iou_unseen", "harmonic_mean_iou")
DONE = {"train.py": "config.json", "pseudo_label.py": "dataset.json", "eval.py": "results.json"}


@dataclass
class Experiments:
    """What a person gives.

    Args:
        dataset: a folder with dataset.json, train/ and val/; its categories are the words.
        unseen: those of which some experiments see no mask, with commas between them.
        out: takes the models and the results. Several programs may work there at once, each on other seeds.
        configs: the folder of nano.yaml and photos_nano.yaml.
        model: to start from; steps, batch_size: of the runs on photos.
    """

    dataset: str
    unseen: str
    out: Path
    configs: Path
    model: str
    steps: int
    batch_size: int

    def check(self) -> None:
        """Raises `ValueError`, in one line, for another data set than these experiments need."""
        folder = Path(self.dataset)
        for part in ("dataset.json", "train/images", "train/masks", "val/images", "val/masks"):
            if not (folder / part).exists():
                raise ValueError(f'"{folder}" has no {part}.')

    def words(self) -> list[str]:
        return json.loads((Path(self.dataset) / "dataset.json").read_text(encoding="utf-8"))["categories"]

    def begin(self) -> None:
        """Raises `ValueError` if the folder holds experiments of other settings."""
        told = {name: x for name, x in asdict(self).items() if name not in ("out", "configs")}
        file = self.out / "experiments.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != told:
            raise ValueError(
                f'"{self.out}" holds experiments with other settings ({file.name}): choose another folder.'
            )
        self.out.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(told, indent=1, ensure_ascii=False) + "\n")

    def step(self, name: str, seed: int) -> list[str]:
        """The command that makes the folder of a step: script and arguments."""
        places = {
            **{key: str(x) for key, x in asdict(self).items()},
            "words": ", ".join(self.words()),
            "warmup_steps": str(self.steps // 4),
            "eval_steps": str(max(1, self.steps // 3)),
            "seed": str(seed),
        }
        script, *arguments = (part.format(**places) for part in STEPS[name])
        if script == "train.py":
            arguments += ["--seed", str(seed), "--resume"]
        return [script, *arguments, "--output-dir", str(self.out / f"{name}-{seed}")]

    def evaluation(self, name: str, seed: int) -> list[str]:
        command = ["eval.py", "--model", str(self.out / f"{name}-{seed}"), "--dataset", self.dataset]
        return [*command, "--unseen", self.unseen, "--output-dir", str(self.out / "evaluations" / f"{name}-{seed}")]

    def plan(self, names: Sequence[str], seeds: Sequence[int]) -> list[list[str]]:
        """All commands in their order."""
        commands: list[list[str]] = []

        def make(name: str, seed: int) -> None:
            for needed in re.findall(r"\{out\}/([\w-]+)-\{seed\}", " ".join(STEPS[name])):
                make(needed, seed)
            if (command := self.step(name, seed)) not in commands:
                commands.append(command)

        for seed in seeds:
            for name in names:
                make(name, seed)
                commands.append(self.evaluation(name, seed))
        return commands


def run_experiments(
    experiments: Experiments, names: Sequence[str], seeds: Sequence[int], run: Callable[[list[str]], None]
) -> None:
    """Runs what is not done yet.

    Args:
        run: runs a script of this project by its name with arguments, and raises if it fails.
    """
    for command in experiments.plan(names, seeds):
        if not (Path(command[-1]) / DONE[command[0]]).is_file():
            run(command)


def results(out: Path) -> dict[str, dict[int, dict]]:
    """For each experiment the scores of each seed that is done, whoever ran it."""
    found: dict[str, dict[int, dict]] = {name: {} for name in EXPERIMENTS}
    for name, seeds in found.items():
        for file in sorted((out / "evaluations").glob(f"{name}-*/results.json")):
            (scores,) = json.loads(file.read_text(encoding="utf-8"))["results"]
            seeds[int(file.parent.name.rpartition("-")[2])] = scores
    return {name: seeds for name, seeds in found.items() if seeds}


def markdown(found: dict[str, dict[int, dict]]) -> str:
    """A table in per cent: mean and standard deviation over the seeds."""
    lines = ["| trained on | seeds | mIoU | seen | unseen | harmonic mean |", "|---|---|---|---|---|---|"]
    for name, seeds in found.items():
        cells = [
            over_seeds([100 * scores[key] for scores in seeds.values() if scores[key] is not None]) for key in SCORES
        ]
        lines.append(f"| {EXPERIMENTS[name]} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def over_seeds(values: Sequence[float]) -> str:
    """Mean and standard deviation (that of a sample) of one number a seed, as tables have it."""
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def draw(out: Path, found: dict[str, dict[int, dict]]) -> Path | None:
    """curves.png: the runs that were evaluated on their way, and the image-free model as the level to compare with."""
    runs = {title: [out / f"{name}-{seed}" for seed in found[name]] for name, title in CURVES.items() if name in found}
    if not runs:
        return None
    free = [100 * scores["mean_iou"] for scores in found.get("image-free", {}).values()]
    draw_curves(runs, out / "curves.png", {"image-free, smoothed": mean(free)} if free else {})
    return out / "curves.png"


def write(file: Path, text: str) -> None:
    """As a whole or not at all: another program may be writing it, too."""
    incomplete = file.with_name(f"{file.name}.{os.getpid()}.incomplete")
    incomplete.write_text(text, encoding="utf-8")
    incomplete.replace(file)


def shell(command: list[str]) -> str:
    """A command as a person would type it."""
    return shlex.join(["python", f"scripts/{command[0]}", *command[1:]])


__all__ = ["EXPERIMENTS", "Experiments", "markdown", "over_seeds", "run_experiments"]
