"""The paper's ablations on images with masks: ways of tuning (Table 12, Appendix B) and of smoothing (Table 10).

A row is a model without tuning, or a way of tuning on words alone. It is evaluated at all smoothing settings in one
pass over the images. The result of each row and seed is a file, so an interrupted run is resumed row by row.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from accelerate import PartialState

from ifseg_hf.data.segmentation import SegmentationDataset
from ifseg_hf.evaluation.evaluate import COSINE, evaluate_segmenter, load_segmenter
from ifseg_hf.evaluation.report import Smoothing, setting_name
from ifseg_hf.experiments.plan import MARKERS, save_settings, write_text
from ifseg_hf.experiments.results import markdown_table, mean_and_deviation
from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.pretrained import ADAPTER_CONFIG, resolve_model
from ifseg_hf.training.config import LORA_RATE, TrainingConfig
from ifseg_hf.training.loop import train
from ifseg_hf.training.setup import DECODER_CHOICES

SMOOTHING: tuple[Smoothing, ...] = (  # Table 10
    (1, 0),
    (3, 1),
    (3, 10),
    (3, 25),
    (3, 50),
    (2, 25),
    (5, 25),
    (8, 25),
    (12, 4),  # the embedded model's
)
PIXEL_ACCURACY: tuple[Smoothing, ...] = ((1, 0), (3, 25), (12, 4))  # settings whose pixel accuracy is in the table, too
APPENDIX_PROMPT = "what is the segmentation of the image? object:"  # the wording in Appendix E
SETTINGS_FILE, TABLE_FILE = "ablations.json", "ablations.md"
OVERRIDDEN = ("categories", "output_dir", "model", "seed", "resume")  # settings of tuning that every row replaces


@dataclass(frozen=True)
class Row:
    """A model without tuning, or a way of tuning.

    Args:
        title: name in the table.
        tuned: whether the checkpoint is tuned. baseline: see [`load_segmenter`], of a model that is not tuned.
        settings: settings of [`TrainingConfig`] that differ from those of the row `tuned`.
    """

    title: str
    tuned: bool = True
    baseline: str | None = None
    settings: dict = field(default_factory=dict)


ROWS = {
    "cosine": Row("cosine of patches and words", tuned=False, baseline=COSINE),
    "untuned": Row("before tuning", tuned=False),
    "tuned": Row("tuned"),
    "max-cells-4": Row("S = 4", settings={"max_cells": 4}),
    "max-cells-8": Row("S = 8", settings={"max_cells": 8}),
    "max-cells-16": Row("S = 16", settings={"max_cells": 16}),
    "max-cells-full": Row("S = side of the word map", settings={"max_cells": None}),
    "fixed-grid": Row("always the full grid", settings={"max_cells": None, "random_cells": False}),
    "appendix-prompt": Row("the appendix's prompt", settings={"prompt": APPENDIX_PROMPT}),
    "no-unknown": Row('prompt without "unknown"', settings={"append_unknown": False}),
    "image-positions": Row("decoder positions of the image", settings={"decoder_positions": "image"}),
    "segmentation-positions": Row("separate decoder positions", settings={"decoder_positions": "segmentation"}),
    "lora-4": Row("LoRA, rank 4", settings={"lora": True, "lora_rank": 4}),
    "lora-16": Row("LoRA, rank 16", settings={"lora": True, "lora_rank": 16}),
    "lora-64": Row("LoRA, rank 64", settings={"lora": True, "lora_rank": 64}),
    "no-cross-attention": Row("no cross-attention", settings={"decoder_cross_attention": False}),
}


@dataclass
class Ablations:
    """Data, model and settings of the ablations.

    Args:
        source: name of the dataset in the table.
        data: images with masks; the categories are the words.
        model: folder or Hub id of the model before tuning.
        settings: settings of [`TrainingConfig`] for the row `tuned`, as [`read_settings`] returns them. Those in
            [`OVERRIDDEN`] have no effect.
        out: folder for the results. Several processes may share it if their rows or seeds differ.
        limit: evaluate only the first images, this many.
        keep_models: keep the tuned models, in the folder work/NAME-SEED/tuned of `out`.
        on_error: "skip" leaves out images that cannot be read; see [`evaluate_segmenter`].
    """

    source: str
    data: SegmentationDataset
    model: str
    settings: dict
    out: Path
    limit: int | None = None
    keep_models: bool = False
    on_error: str = "fail"

    @cached_property
    def config(self) -> IFSegConfig:
        """Configuration of the model before tuning."""
        return IFSegConfig.from_pretrained(resolve_model(self.model))

    def check(self, names: Sequence[str] | None = None) -> dict[str, Row]:
        """The rows to measure: all that apply to this model and these settings, or those in `names`.

        Raises `ValueError` for data, settings or rows that cannot be measured. Of an inapplicable row that `names`
        does not list, the reason is printed.
        """
        if len(self.data.names) < 2:
            raise ValueError("One category is not enough for segmentation: give at least two.")
        if self.training(ROWS["tuned"], self.out, 0).on_images:
            raise ValueError("The ablations tune on words alone: give settings of stage word-maps.")
        rows = {}
        for name in names or ROWS:
            reason = self.inapplicable(ROWS[name])
            if reason is None:
                rows[name] = ROWS[name]
            elif names:
                raise ValueError(f"There is no row {name} here: {reason}.")
            else:
                print(f"Without the row {name}: {reason}.")
        return rows

    def inapplicable(self, row: Row) -> str | None:
        """Why a row cannot be measured, or equals the row `tuned`; `None` if it is measured."""
        if not row.tuned or row == ROWS["tuned"]:
            return None
        if row.settings.get("lora") and importlib.util.find_spec("peft") is None:
            return "it needs peft"
        side = self.config.grid_size
        if (row.settings.get("max_cells") or 0) > side:
            return f"a word map of this model has {side} cells a side at most"
        given = {name: getattr(self.config.backbone_config, name, None) for name in DECODER_CHOICES}
        if any(given[name] is None for name in row.settings.keys() & given.keys()):
            return "it needs OFA as the backbone"
        given["max_cells"] = side
        configs = [self.training(x, self.out, 0).to_dict() for x in (row, ROWS["tuned"])]
        row_settings, tuned = ({**x, **{name: given[name] for name in given if x[name] is None}} for x in configs)
        return "it equals the row tuned" if row_settings == tuned else None

    def training(self, row: Row, output_dir: Path, seed: int) -> TrainingConfig:
        """Settings of a row's tuning; an interrupted run is resumed."""
        given = {
            "categories": self.data.names,
            "output_dir": str(output_dir),
            "model": self.model,
            "seed": seed,
            "resume": "latest",
        }
        config = TrainingConfig(**{**self.settings, **row.settings, **given})
        if row.settings.get("lora") and not self.settings.get("lora"):
            config.learning_rate *= LORA_RATE
        return config

    # Measurement ------------------------------------------------------------------------------------------------------

    def run(self, rows: dict[str, Row], seeds: Iterable[int]) -> str:
        """Measures each row with each seed, except those whose results are in `out`; returns [`report`].

        Raises `ValueError` if `out` holds results of another dataset, model or other settings.
        """
        self.save_settings()
        (self.out / "results").mkdir(exist_ok=True)
        for seed in seeds:
            for name, row in rows.items():
                # Cosine has no random weights, so every seed would give the same result.
                key = f"{name}-{0 if row.baseline else seed}"
                file, work = self.out / "results" / f"{key}.json", self.out / "work" / key
                if file.is_file():
                    continue
                print(f"\n{row.title}, seed {seed}:", flush=True)
                text = json.dumps(self.measure(row, seed, work), indent=1, ensure_ascii=False)
                write_text(file, f"{text}\n")
                write_text(self.out / TABLE_FILE, self.report())
                if not self.keep_models:
                    shutil.rmtree(work, ignore_errors=True)
        report = self.report()
        write_text(self.out / TABLE_FILE, report)
        return report

    def save_settings(self) -> None:
        """Writes the settings to `out`. Raises `ValueError` if it holds results with other settings."""
        labels = hashlib.sha256(self.data.labels.tobytes()).hexdigest()
        settings = {
            "dataset": self.source,
            "categories": self.data.names,
            "labels": labels,
            "model": self.model,
            "weights": weights_digest(self.model),
            "limit": self.limit,
            "training": {name: value for name, value in self.settings.items() if name not in OVERRIDDEN},
        }
        save_settings(self.out / SETTINGS_FILE, settings)

    def measure(self, row: Row, seed: int, work: Path) -> dict:
        """Tunes and evaluates a row. `work`: folder of the tuned model and the counts."""
        model, seconds = self.model, None
        if row.tuned:
            model, config = str(work / "tuned"), self.training(row, work / "tuned", seed)
            if not (work / "tuned" / (ADAPTER_CONFIG if config.lora else MARKERS["train.py"])).is_file():
                seconds = train(config).seconds
        device = PartialState(cpu=bool(self.settings.get("cpu"))).device
        segmenter = load_segmenter(model, row.baseline, device, seed=seed, untuned=not row.tuned)
        if not row.tuned:
            segmenter.set_words(self.data.names)
        evaluation = evaluate_segmenter(
            segmenter,
            self.data,
            SMOOTHING,
            state_dir=work / "counts",
            on_error=self.on_error,
            limit=self.limit,
            progress=True,
        )
        return {
            "images": evaluation.images,
            "tuning_seconds": seconds,
            "evaluation_seconds": evaluation.seconds,
            "results": evaluation.results(),
        }

    def report(self) -> str:
        """The table of all complete rows with a description of its columns, as Markdown."""
        results = read_results(self.out)
        images = max(result["images"] for seeds in results.values() for result in seeds.values())
        side = self.config.grid_size
        cells = self.training(ROWS["tuned"], self.out, 0).max_cells or side
        return (
            f"{self.source}, {images} images, {len(self.data.names)} categories: mean IoU in per cent, then pixel "
            "accuracy; mean and standard deviation over the seeds of tuning on words alone. Columns: neighbours k and "
            f"iterations n of smoothing. S: most cells a side of the random grids, {cells} unless the row says "
            f"otherwise; word maps have {side} patches a side.\n\n{ablation_table(results)}\n"
        )


def weights_digest(model: str) -> str | None:
    """Hash of the weights in a local folder, by which a resumed run notices another model; `None` for a Hub id."""
    path = Path(resolve_model(model))
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# Results --------------------------------------------------------------------------------------------------------------


def read_results(out: Path) -> dict[str, dict[int, dict]]:
    """Results by row and seed, of all rows in `out` that are complete."""
    results: dict[str, dict[int, dict]] = {name: {} for name in ROWS}
    for file in sorted((out / "results").glob("*.json")):
        name, _, seed = file.stem.rpartition("-")
        if name in results:
            results[name][int(seed)] = json.loads(file.read_text(encoding="utf-8"))
    return {name: seeds for name, seeds in results.items() if seeds}


def ablation_table(results: dict[str, dict[int, dict]]) -> str:
    """A Markdown table in per cent: a line for each row, mean and standard deviation over its seeds.

    Args:
        results: see [`read_results`].
    """
    columns = [(setting_name(*x), x, "mean_iou") for x in SMOOTHING]
    columns += [(f"pixels: {setting_name(*x)}", x, "overall_accuracy") for x in PIXEL_ACCURACY]
    rows = [
        [ROWS[name].title, str(len(seeds)), *(_cell(seeds.values(), setting, metric) for _, setting, metric in columns)]
        for name, seeds in results.items()
    ]
    return markdown_table(["model", "seeds", *(title for title, *_ in columns)], rows)


def _cell(results: Iterable[dict], setting: Smoothing, metric: str) -> str:
    """Mean and deviation of a metric in per cent, over the seeds where it is defined."""
    values = [result["results"][SMOOTHING.index(setting)][metric] for result in results]
    return mean_and_deviation([100 * value for value in values if value is not None])
