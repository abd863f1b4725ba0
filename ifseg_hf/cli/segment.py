"""`ifseg segment`: masks and overlays of images, after tuning on the words where that is needed."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ifseg_hf.cli.app import CommandError, one_line
from ifseg_hf.cli.options import (
    Adapter,
    Background,
    ImageModel,
    OnError,
    SmoothingIterations,
    SmoothingNeighbors,
    Threshold,
    TrustRemoteCode,
    Untuned,
    flag,
    option,
)
from ifseg_hf.data.image_files import IMAGE_ENDINGS, list_images
from ifseg_hf.data.vocabularies import VOCABULARIES, read_background, read_categories
from ifseg_hf.pretrained import EMBEDDED
from ifseg_hf.training.config import read_settings

__all__ = ["image_files", "segment", "split_arguments", "unique_stems"]

WORD_FILES = (".txt", ".yaml", ".yml", ".json")


def segment(
    ctx: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar='IMAGE... ["WORDS"]',
            help="image files or folders of images, and last the words to look for: comma-separated, a file of words "
            "or the name of a vocabulary (default: the model's own)",
        ),
    ],
    categories: Annotated[str | None, option("the words, if all other arguments are images")] = None,
    model: ImageModel = EMBEDDED,
    adapter: Adapter = None,
    prompt: Annotated[
        str | None, option("question before the words, or a template with {categories} (default: the model's own)")
    ] = None,
    background: Background = None,
    threshold: Threshold = None,
    config: Annotated[
        str | None,
        option(
            "YAML or JSON file with settings of tuning, such as the words and the background; flags override (default: "
            "the model's recipe)",
            metavar="FILE",
        ),
    ] = None,
    lora: Annotated[bool, flag("tune a LoRA adapter, a small file, in place of the whole model", "--lora")] = False,
    no_tune: Annotated[bool, flag("skip tuning, also if the model was tuned on other words", "--no-tune")] = False,
    untuned: Untuned = False,
    smoothing_neighbors: SmoothingNeighbors = None,
    smoothing_iterations: SmoothingIterations = None,
    on_error: OnError = "skip",
    crf: Annotated[bool, flag("fit the masks to the colours of the images (DenseCRF)", "--crf")] = False,
    trust_remote_code: TrustRemoteCode = False,
    output_dir: Annotated[Path, option("folder for the results (default: outputs)")] = Path("outputs"),
) -> int:
    """Segments images into words.

    \b
    ifseg segment street.jpg "sky, road, car"
    ifseg segment *.jpg --model tuned
    ifseg segment cat.jpg cat --threshold 0.5
    ifseg segment street.jpg --adapter me/street-words

    A model that is not tuned for the words is tuned on them first, without any image. This happens once: the result is
    kept in a cache, which `ifseg cache` lists and clears. What is not a single word is segmented as background, unless
    --background is none.

    Writes IMAGE_mask.png (pixel value = index of the word) and IMAGE_overlay.png (with a legend), and prints the share
    of the image that each word covers. An image that cannot be read is named and skipped, unless --on-error is fail;
    the status is then 1.
    """
    images, words = split_arguments(arguments, categories)
    try:
        settings = {} if config is None else read_settings(config)
        if ctx.get_parameter_source("model").name == "DEFAULT":  # type: ignore[union-attr]
            model = settings.get("model", model)
        words, prompt = words or settings.get("categories"), prompt or settings.get("prompt")
        background = settings.get("background") if background is None else background
        trust_remote_code = trust_remote_code or settings.get("trust_remote_code", False)
        names = None if words is None else read_categories(words)
        images = [file for image in images for file in image_files(image)]
    except ValueError as error:
        raise CommandError(error) from error
    try:
        base, adapter = _model_and_adapter(ctx, model, adapter)
        folder = _resolve(base, adapter)
        rest = _background(names, background, base or folder, trust_remote_code)
        if names is not None and adapter is None and not (no_tune or untuned):
            given = {"prompt": prompt, "trust_remote_code": trust_remote_code, "lora": lora or settings.get("lora")}
            given = {key: value for key, value in given.items() if value}
            folder = _tuned(base, names, {**settings, **given, "background": rest})
        segmenter = _load(folder, names, prompt, trust_remote_code, untuned, rest, adapter)
        if background is None and rest == "default":
            _report_background(names)
        output_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    how = {"neighbors": smoothing_neighbors, "iterations": smoothing_iterations, "crf": crf, "threshold": threshold}
    return _segment_images(segmenter, images, how, output_dir, ctx.command_path, on_error)


def _model_and_adapter(ctx: typer.Context, model: str, adapter: str | None) -> tuple[str | None, str | None]:
    """The model, `None` for the base model of the adapter, and the adapter, which may be given as the model."""
    if adapter is not None:
        source = ctx.get_parameter_source("model")
        return (model if source is not None and source.name == "COMMANDLINE" else None), adapter
    from ifseg_hf.adapters import find_adapter  # takes seconds

    if model != EMBEDDED and find_adapter(model) is not None:
        return None, model
    return model, None


def _resolve(model: str | None, adapter: str | None) -> Any:
    """The folder or Hub id of the model, or else of the base model of the adapter; a published OFA is converted first.

    Raises `ValueError` or `FileNotFoundError` where there is none.
    """
    from ifseg_hf.hub.published import resolve_checkpoint  # takes seconds

    if model is not None:
        return resolve_checkpoint(model)
    from ifseg_hf.adapters import base_of_adapter, require_adapter

    return resolve_checkpoint(base_of_adapter(require_adapter(adapter)))


def split_arguments(arguments: list[str], categories: str | None) -> tuple[list[str], str | None]:
    """Returns the images and the words among the arguments.

    The last argument is the words, unless `categories` has them, it is the only one, or it is an image: a URL, a
    file that exists or has a usual ending of images, or a folder whose path has a slash.
    """
    if categories is not None or len(arguments) == 1:
        return arguments, categories
    last = arguments[-1]
    ending = os.path.splitext(last)[1].lower()
    is_file = os.path.isfile(last) and ending not in WORD_FILES and last not in VOCABULARIES
    is_folder = "/" in last.replace(os.sep, "/") and os.path.isdir(last)
    if is_file or is_folder or "://" in last or ending in IMAGE_ENDINGS:
        return arguments, None
    return arguments[:-1], last


def image_files(image: str) -> list[str]:
    """Returns the images in a folder and its sub-folders, or the file or URL itself. Raises `ValueError`."""
    if not os.path.isdir(image):
        return [image]
    found = list(list_images(image).values())
    if not found:
        raise ValueError(f'There is no image in "{image}".')
    return found


def unique_stems(images: list[str]) -> list[str]:
    """Returns the stem of each image's file name, with a number appended where it would repeat an earlier one."""
    stems: list[str] = []
    for image in images:
        stem, number = Path(image).stem, 2
        while stem.lower() in (taken.lower() for taken in stems):
            stem, number = f"{Path(image).stem}-{number}", number + 1
        stems.append(stem)
    return stems


def _tuned(model: str, names: list[str] | dict[str, list[str]], settings: dict[str, Any]) -> Any:
    """The model, or the folder of the model tuned on the words if it is not tuned for them."""
    from ifseg_hf.training.errors import TrainingError, TrainingStopped
    from ifseg_hf.training.recipes import training_config
    from ifseg_hf.tuning import is_tuned_for, tuned_model

    if is_tuned_for(model, names, bool(settings.get("trust_remote_code")), settings.get("background")):
        return model
    try:
        own = {"model": model, "categories": names, "output_dir": ""}
        return tuned_model(training_config({**settings, **own}))
    except TrainingError as error:
        raise CommandError(error) from error
    except TrainingStopped as error:
        raise CommandError("stopped. The same command continues.", 128 + error.signal_number) from error


def _background(names: Any, background: Any, model: str, trust_remote_code: bool) -> str | list[str] | None:
    """The background words for the names; without names those in place of the model's own. Raises `ValueError`."""
    if names is None:
        return read_background(background)
    from ifseg_hf.tuning import choose_background

    return choose_background(names, background, model, trust_remote_code)


def _report_background(names: Any) -> None:
    from ifseg_hf.tuning import report_background

    report_background(names, "--background none")


def _load(
    folder: Any,
    names: Any,
    prompt: str | None,
    trust_remote_code: bool,
    untuned: bool,
    background: str | list[str] | None,
    adapter: str | None,
) -> Any:
    """The segmenter with its words. Raises `ValueError`."""
    from accelerate import PartialState

    from ifseg_hf.evaluation.segmenter import load_segmenter

    segmenter = load_segmenter(
        folder,
        device=PartialState().device,
        trust_remote_code=trust_remote_code,
        untuned=untuned,
        adapter=adapter,
    )
    if names is None and segmenter.model.config.category_ids is None:
        raise ValueError(f'{folder} was not tuned for any words: name some, as in "cat, grass".')
    if names is not None or prompt is not None or background is not None:
        segmenter.set_words(names, prompt, background)
    return segmenter


def _segment_images(
    segmenter: Any,
    images: list[str],
    how: dict[str, Any],
    output_dir: Path,
    program: str,
    on_error: str,
) -> int:
    """Writes mask and overlay of each image, and returns 1 if one could not be read.

    Args:
        how: arguments of the segmenter's `segment` beside the image.
    """
    import numpy as np
    from PIL import Image

    from ifseg_hf.processing.image_reading_ifseg import read_image, to_array
    from ifseg_hf.visualization.overlays import overlay, save_mask, shares

    names = list(segmenter.model.config.id2label.values())
    failed = 0
    for source, stem in zip(images, unique_stems(images), strict=True):
        try:
            if "://" not in source and not Path(source).is_file():
                raise FileNotFoundError("there is no such file")
            image = Image.fromarray(to_array(read_image(source)))
        except (OSError, ValueError) as error:
            message = one_line(error)
            print(f"{program}: {message if source in message else f'{source}: {message}'}", file=sys.stderr)
            failed = 1
            if on_error == "fail":
                break
            continue
        (mask,) = segmenter.segment([np.asarray(image)], **how)
        mask = mask.cpu().int()  # half the memory
        save_mask(mask, output_dir / f"{stem}_mask.png", names)
        overlay(image, mask, names).save(output_dir / f"{stem}_overlay.png")
        covered = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares(mask, names).items())
        if (mask < 0).any():
            none = 100 * (mask < 0).float().mean().item()
            covered += f"{', ' if covered else ''}{none:.1f} % without a word"
        print(f"{source}: {covered} -> {output_dir / stem}_overlay.png")
    return failed
