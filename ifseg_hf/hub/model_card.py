"""The model card of a saved model, rendered from `model_card_template.md`."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ifseg_hf.hub.markdown import escape as _escape
from ifseg_hf.hub.model_folder import CARD_IMAGE, public_settings, read_json, read_results, read_settings
from ifseg_hf.training.config import SETTINGS_FILE

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_SEGMENTATION = "IFSegForSemanticSegmentation"


def model_card(
    folder: str | Path, repo_id: str, revision: str | None = None, base_model: str | None = None
) -> ModelCard:
    """The model card of a saved model: description, code examples, categories, training settings and results.

    Args:
        folder: folder of the model. The results in its `evaluation_results.json`, if there is one, become a table and
            the model-index; its `card_image.jpg`, if there is one, is shown below the title.
        repo_id, revision: where the model will be published; the code examples load it from there.
        base_model: Hub id, or the name of the checkpoint embedded in this package.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    settings = read_settings(folder)
    results = read_results(folder)
    segments = config.get("architectures") == [_SEGMENTATION]
    names = {int(label): name for label, name in config["id2label"].items()} if config.get("category_ids") else {}
    categories = [names[label] for label in sorted(names)]
    stage = settings.get("stage", "word-maps") if settings else None
    image_free = stage in (None, "word-maps")
    name = repo_id.split("/")[-1]
    base_model_on_hub = base_model if base_model and "/" in base_model else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation" if segments else "image-text-to-text",
        license="apache-2.0",
        base_model=base_model_on_hub,
        tags=[
            *("ifseg", "ofa", "semantic-segmentation"),
            *(["image-free"] if image_free else []),
            *("arxiv:2303.14396", "arxiv:2202.03052"),
        ],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        repo_id=repo_id,
        segments=segments,
        card_image=CARD_IMAGE if (folder / CARD_IMAGE).is_file() else None,
        stage=stage,
        base_model_link=f"[{base_model}](https://huggingface.co/{base_model})" if base_model_on_hub else base_model,
        location=json.dumps(repo_id) + (f", revision={json.dumps(revision)}" if revision else ""),
        categories_argument="" if categories else ', categories=["cat", "grass", "sky"]',
        crop_size=_crop_size(folder),
        categories=[_escape(category) for category in categories],
        fine_categories=_fine_categories(categories, settings) if image_free else None,
        settings_file=SETTINGS_FILE,
        settings=_setting_rows(settings),
        results=[
            tuple(map(_escape, (x.dataset_name, x.dataset_split, x.metric_name or x.metric_type, x.metric_value)))
            for x in results
        ],
    )


def _crop_size(folder: Path) -> int | None:
    """The side of the crops that the model was trained on; None for a model of whole images."""
    file = folder / "processor_config.json"
    processor = read_json(file) if file.is_file() else {}
    return processor.get("image_processor", {}).get("sliding_window")


def _fine_categories(categories: list[str], settings: dict[str, Any]) -> list[list[str]] | None:
    """The fine names of each category, as Markdown; None if training had no hierarchical vocabulary."""
    fine = settings.get("categories")
    if not isinstance(fine, dict):
        return None
    return [[_escape(word) for word in fine.get(category, [])] for category in categories]


def _setting_rows(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value, as Markdown, of every public setting that has a value. The categories have their own section."""
    public = public_settings(settings)
    return [(name, _escape(value)) for name, value in public.items() if name != "categories" and value is not None]


__all__ = ["model_card"]
