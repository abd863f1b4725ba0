"""Publishing of adapters: their files and their model card.

Imports neither torch nor transformers; see [`ifseg_hf.hub.publish`].
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ifseg_hf.hub.markdown import escape
from ifseg_hf.hub.model_folder import public_settings, read_json, read_settings
from ifseg_hf.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WORDS, EMBEDDED
from ifseg_hf.training.config import SETTINGS_FILE

__all__ = ["adapter_card", "adapter_content", "check_base", "is_adapter"]

_TEMPLATE = Path(__file__).with_name("adapter_card_template.md")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_base(base: Any) -> str:
    """Returns the name of a base model that others can load. Raises `ValueError` for a folder of this machine."""
    if base == EMBEDDED or (isinstance(base, str) and _HUB_ID.fullmatch(base) and not Path(base).is_dir()):
        return base
    raise ValueError(
        f'The adapter is for "{base}", a folder of this machine: publish this model first, and name its Hub id '
        "(--base-model owner/name of `ifseg push`)."
    )


def adapter_content(folder: Path, base_model: str | None = None) -> dict[str, Path | bytes]:
    """
    The files of an adapter to publish, by name, without card and training settings.

    Args:
        base_model: Hub id of the base model, which the published adapter then names.

    Raises:
        `ValueError`: a file is missing or damaged, or the base model is a folder of this machine.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    for name in (ADAPTER_WEIGHTS, ADAPTER_WORDS):
        if not (folder / name).is_file():
            raise ValueError(f'"{folder}" lacks {name}: make the adapter with `ifseg tune WORDS --lora`.')
    words = read_json(folder / ADAPTER_WORDS)
    if not isinstance(words, dict) or not isinstance(words.get("words"), dict) or not words["words"].get("id2label"):
        raise ValueError(f'"{folder / ADAPTER_WORDS}" holds no words: make the adapter again.')
    config["base_model_name_or_path"] = check_base(base_model or config.get("base_model_name_or_path"))
    files: dict[str, Path | bytes] = {name: folder / name for name in (ADAPTER_WEIGHTS, ADAPTER_WORDS)}
    if (folder / "README.md").is_file():
        files["README.md"] = folder / "README.md"
    return {**files, ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def adapter_card(folder: Path, repo_id: str, base_model: str | None = None) -> ModelCard:
    """Returns the model card of an adapter: usage, words, base model and settings."""
    config, words = read_json(folder / ADAPTER_CONFIG), read_json(folder / ADAPTER_WORDS)["words"]
    base = base_model or config["base_model_name_or_path"]
    settings: dict[str, Any] = public_settings(read_settings(folder))
    names = {int(label): name for label, name in words["id2label"].items()}
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="image-segmentation",
        license="apache-2.0",
        base_model=base,
        tags=["ifseg", "lora", "semantic-segmentation", "image-free", "arxiv:2303.14396", "arxiv:2202.03052"],
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=base if base == EMBEDDED else f"[{base}](https://huggingface.co/{base})",
        embedded=base == EMBEDDED,
        rank=config.get("r"),
        size=f"{(folder / ADAPTER_WEIGHTS).stat().st_size / 1e6:.1f}",
        words=[escape(names[label]) for label in sorted(names)],
        settings_file=SETTINGS_FILE,
        settings=[(name, escape(x)) for name, x in settings.items() if name != "categories" and x is not None],
    )
