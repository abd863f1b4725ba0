"""From words to a mask in one call: [`tune`] and [`segment`], with a cache of tuned models."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ifseg_hf.adapters import refuse_adapter, split_adapter, words_of_adapter
from ifseg_hf.cache import cache_folder, entry_folder, locked
from ifseg_hf.data.vocabularies import read_background, read_categories
from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.hub.published import resolve_checkpoint
from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.pretrained import EMBEDDED, checkpoint_folder
from ifseg_hf.processing.pipeline_ifseg import IFSegImageSegmentationPipeline
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.remote_code import import_backbone
from ifseg_hf.training.config import INCOMPLETE, TrainingConfig, check_settings, checkpoints
from ifseg_hf.training.recipes import training_config

__all__ = ["choose_background", "is_tuned_for", "report_background", "segment", "tune", "tuned_model"]

Words = str | Sequence[str] | Mapping[str, Sequence[str]]


def tune(
    words: Words,
    model: str | Path = EMBEDDED,
    *,
    background: str | Sequence[str] | None = None,
    **settings: Any,
) -> IFSegImageSegmentationPipeline:
    """
    Returns a pipeline that segments images into words, after tuning a model on the words alone.

    ```python
    pipe = ifseg_hf.tune(["sky", "road", "car"])
    pipe("street.jpg")
    ```

    The tuned model is kept in the cache (`~/.cache/ifseg`, or `$IFSEG_CACHE`): a second call with the same model, words
    and settings loads it. An interrupted tuning is continued by the next call.

    Args:
        words: names of the categories, or fine names by category; as text, see
            [`ifseg_hf.data.vocabularies.read_categories`].
        model: folder or Hub id of the model to start from; a published OFA is converted first, once.
        background: words that are merged into one label, "background": "default" (sky, grass, wall, floor, ...), "none"
            or a list of words. Default: "default" for a single word, which would otherwise cover every image; "none"
            for several words.
        settings: of [`TrainingConfig`], over the recipe of the model. With `output_dir`, the tuned model is written
            there and not kept in the cache.

    Raises:
        `ValueError`: a word, the model or a setting is wrong; `TrainingError`: tuning cannot continue.
    """
    _convert_published(model)
    refuse_adapter(model)
    categories = read_categories(words)
    chosen = choose_background(categories, background)
    if background is None and chosen is not None:
        report_background(categories)
    own = {"model": str(model), "categories": categories, "background": chosen}
    config = training_config({"output_dir": "", **check_settings(settings), **own})
    if not config.output_dir:
        return _pipeline(tuned_model(config), config.trust_remote_code)
    from ifseg_hf.training import loop  # imports datasets, which takes seconds

    return _pipeline(Path(loop.train(config).output_dir), config.trust_remote_code)


def segment(
    image: Any,
    words: Words | None = None,
    model: str | Path = EMBEDDED,
    *,
    threshold: float | None = None,
    background: str | Sequence[str] | None = None,
    **settings: Any,
) -> list:
    """
    Segments an image, or a list of images, into words; tunes the model first if it is not tuned for them.

    ```python
    for found in ifseg_hf.segment("street.jpg", ["sky", "road", "car"]):
        print(found["label"], found["score"])  # and found["mask"], a PIL image
    ```

    Every call loads the model: for images that come one at a time, keep the pipeline that [`tune`] returns.

    Args:
        image: path, URL, PIL image or array, or a list of these.
        words: as for [`tune`]. Default: those that the model was tuned on.
        model: as for [`tune`], or the folder or Hub id of an adapter, which is used for any words without tuning.
        background, settings: as for [`tune`]. A model tuned on these words keeps its background.
        threshold: a probability from 0 to 1; pixels whose word has a lower one are in no mask. Default: every pixel is
            in a mask.

    Returns:
        The result of [`IFSegImageSegmentationPipeline`]: a dict with `label`, `score` and `mask` for each word that
        wins a pixel, in a list; for a list of images, a list of such lists.

    Raises:
        As [`tune`], and `ValueError` for an image that cannot be read.
    """
    _convert_published(model)
    trust, untouched = bool(settings.get("trust_remote_code")), settings.keys() <= {"trust_remote_code"}
    _, adapter = split_adapter(model)
    if words is None:
        pipe = _pipeline(adapter or checkpoint_folder(model), trust)
        if pipe.model.config.category_ids is None:
            raise ValueError(f'"{model}" was not tuned on any words: name some, as in words="cat, grass".')
        return pipe(image, threshold=threshold)
    categories = read_categories(words)
    chosen = choose_background(categories, background, model, trust)
    if untouched and (adapter is not None or is_tuned_for(model, categories, trust, chosen)):
        pipe = _pipeline(adapter or checkpoint_folder(model), trust)
    else:
        pipe = tune(categories, model, background=background, **settings)
    return pipe(image, categories=categories, background=chosen, threshold=threshold)


def _convert_published(model: str | Path) -> None:
    """Converts a published OFA, once. Raises `ValueError` for a model that is not there or cannot be converted."""
    try:
        resolve_checkpoint(model)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def choose_background(
    categories: list[str] | dict[str, list[str]],
    background: str | Sequence[str] | None = None,
    model: str | Path | None = None,
    trust: bool = False,
) -> str | list[str] | None:
    """Returns the background words as [`read_background`] does; `None` for "none".

    Without any, they are those of `model`, if it is tuned for the categories with a background; see [`is_tuned_for`].
    Otherwise a single category gets "default": it would else cover every image.
    """
    if background is None and model is not None:
        own = _background_of(model)
        if own and is_tuned_for(model, categories, trust, own):
            return own
    if background is None and len(categories) == 1:
        return "default"
    background = read_background(background)
    return None if background == "none" else background


def _background_of(model: str | Path) -> list[str] | None:
    """The background words in the configuration of a model; `None` without any."""
    _, adapter = split_adapter(model)
    try:
        if adapter is not None:
            return words_of_adapter(adapter).get("background")
        config = json.loads((checkpoint_folder(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # what reads the model says what is wrong with it
    return config.get("background") if isinstance(config, dict) else None


def report_background(categories: list[str] | dict[str, list[str]], how: str = 'background="none"') -> None:
    """Says on stderr that a single category got a background, and how to have none."""
    (name,) = categories
    print(f'What is not "{name}" is "background"; {how}: no background.', file=sys.stderr, flush=True)


def is_tuned_for(
    model: str | Path,
    categories: list[str] | dict[str, list[str]],
    trust: bool = False,
    background: str | list[str] | None = None,
) -> bool:
    """Whether a model carries just these words, in any order.

    Args:
        model: folder or Hub id of a model or an adapter. categories: as [`read_categories`] returns them.
        trust: run the code saved with the model, for a backbone that this package does not have.
        background: as [`choose_background`] returns it.

    Raises `ValueError` for a model that cannot be read, and for words that its tokenizer does not know.
    """
    base, adapter = split_adapter(model)
    folder = checkpoint_folder(base)
    try:
        import_backbone(folder, trust)
        config, processor = IFSegConfig.from_pretrained(folder), IFSegProcessor.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f'"{model}" is no IFSeg model: {" ".join(str(error).split())}'[:500]) from error
    encoded = processor.encode_categories(categories, background=background)  # also checks them
    own = config.to_dict() if adapter is None else words_of_adapter(adapter)
    if own.get("category_ids") is None:
        return False
    parts = ("category_ids", "word_ids", "background")
    return all(sorted(encoded.get(part) or []) == sorted(own.get(part) or []) for part in parts)


def tuned_model(config: TrainingConfig) -> Path:
    """Returns the folder of a model tuned as `config` says: from the cache, or tuned now and put there.

    The folder appears when it is complete. If another process is tuning the same, its result is waited for. Messages
    and progress go to stderr. The `output_dir`, `resume` and Hub settings of `config` are not used.

    Raises:
        `ValueError`: a wrong setting, or several processes. `TrainingError`, `TrainingStopped`: see [`train`]; the
            next call continues from the last checkpoint.
    """
    if config.on_images or config.dataset is not None:
        raise ValueError("The cache holds models tuned on words alone: give an output_dir to train with a dataset.")
    entry = entry_folder(checkpoint_folder(config.model), config)
    if not entry.is_dir():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("Several processes cannot tune into the cache: run `ifseg tune` with --output-dir first.")
        with locked(entry):
            if not entry.is_dir():
                _tune_into(entry, config)
    with suppress(OSError):  # in a cache of another user
        os.utime(entry)  # the time of its last use
    return entry


def _tune_into(entry: Path, config: TrainingConfig) -> None:
    """Tunes, or continues an interrupted tuning, beside a folder of the cache, and gives the result its name."""
    work = entry.with_name(entry.name + INCOMPLETE)
    config = replace(
        config, output_dir=str(work), resume="latest" if checkpoints(work) else None, checkpoints_total_limit=1
    )
    try:
        _train(config)
    except ValueError:
        shutil.rmtree(work, ignore_errors=True)
        if config.resume is None:
            raise
        _train(replace(config, resume=None))  # the checkpoint was damaged, or of another device's precision
    for checkpoint in checkpoints(work).values():
        shutil.rmtree(checkpoint)
    work.rename(entry)


def _train(config: TrainingConfig) -> None:
    """Trains with messages on stderr, the first of which says that this happens once. Raises as `train`."""
    from ifseg_hf.training import loop  # imports datasets, which takes seconds

    config.check()
    names = list(config.categories or ())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    print(
        f"Tuning {config.model} on words alone: {shown}. This happens once: the result is kept in {cache_folder()}.",
        file=sys.stderr,
        flush=True,
    )
    with redirect_stdout(sys.stderr):
        loop.train(config, report=False)


def _pipeline(folder: Path, trust_remote_code: bool = False) -> IFSegImageSegmentationPipeline:
    """The pipeline of a tuned model, on the GPU if there is one."""
    segmenter = load_segmenter(folder, trust_remote_code=trust_remote_code)
    return segmenter.processor.pipeline(segmenter.model)
