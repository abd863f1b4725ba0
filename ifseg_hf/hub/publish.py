"""Sharing on the Hub: a saved model becomes a repository with its processor, its code and a model card.

Nothing heavy is imported here, and nothing of this package before it is needed, so that a script can run this file by
itself and refuse a wrong repository id or a missing token before it imports torch.
"""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    metadata_update,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id

RESULTS_FILE = "evaluation_results.json"
"""In a model's folder: a list of what `huggingface_hub.EvalResult` takes, one dict a number, for the model card."""

# What is published of a folder besides the weights and the code. A folder of training may hold more (checkpoints to
# resume from, logs), which is nobody else's.
_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "README.md",
    RESULTS_FILE,
)
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# Settings that say something about the machine or the person and nothing about the model. `model` is told apart.
_PRIVATE_SETTINGS = {"output_dir", "model", "data_dir", "cpu", "dataloader_workers", "report_to"}
_PRIVATE_SETTINGS |= {"eval_steps", "eval_dataset", "checkpointing_steps", "checkpoints_total_limit", "resume"}
_PRIVATE_SETTINGS |= {"push_to_hub", "hub_private", "hub_revision", "hub_commit_message"}
_SEGMENTATION = "IFSegForSemanticSegmentation"


class HubError(RuntimeError):
    """What the Hub refused, or that it can't be reached. The message is one line for a person."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """Publishes a saved model, in one commit: people see all of it or nothing. Nothing in `folder` is changed.

    Weights, configuration, processor, code, the settings that it was trained with (without those about the machine)
    and a model card, which is the README.md of the folder or, where it has none, the one of [`model_card`]. Weight
    files in the repository that are not part of this model are deleted from the revision.

    Args:
        folder: of `save_pretrained`, with its processor; training and conversion write such folders.
        repo_id: `owner/name` or, for one's own, `name`. The repository is made if there is none.
        private: whether a new repository is; by default the owner's default.
        revision: a branch, made if there is none. By default `main`.
        commit_message: its first line.
        token: by default the one of `hf auth login` or `HF_TOKEN`.
        base_model: Hub id of what the model was tuned or converted from, for the card. By default the one in the
            settings it was trained with, if the Hub has it.

    Returns:
        [`~huggingface_hub.CommitInfo`], whose `commit_url` and `repo_url` a person can open.

    Raises:
        `ValueError`: the folder holds no model that can be published, or an id is malformed.
        [`HubError`]: the Hub refused something or can't be reached. The message holds the command that tries again.
    """
    folder = Path(folder).expanduser()
    files = files_to_publish(folder)
    for name in (repo_id, base_model):
        if name is not None:
            check_repo_id(name)
    api = HfApi(token=token, library_name="ifseg_hf")
    try:
        repo_id = check_access(repo_id, token)
        settings = _published_settings(folder, api)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id} exists and is public: make it private there first, or publish for everybody.")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        content: dict[str, Any] = {file.name: file for file in files}
        if "README.md" not in content:
            card = model_card(folder, repo_id, revision, base_model or settings.get("model"))
            content["README.md"] = str(card).encode()
        if settings:
            content[_settings_file()] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
        # transformers prefers one weight file over several, so one that is left over from before would be loaded.
        stale = [name for name in api.list_repo_files(repo_id, revision=revision) if _WEIGHTS.fullmatch(name)]
        return api.create_commit(
            repo_id,
            [CommitOperationDelete(path_in_repo=name) for name in stale if name not in content]
            + [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content[name]) for name in sorted(content)],
            commit_message=commit_message or "Upload IFSeg model",
            revision=revision,
        )
    except Exception as error:  # huggingface_hub, its HTTP library and its transfer library each have their own
        raise HubError(
            f"The upload to {repo_id} failed: {_one_line(error)} Nothing is lost: the model is in {folder}. "
            f"To try again: {_command(folder, repo_id, private, revision, commit_message, base_model)}"
        ) from error


def check_repo_id(repo_id: str) -> None:
    """Raises `ValueError`, in one line, unless it is `name` or `owner/name` as the Hub has them."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'"{repo_id}" is no repository id (owner/name): {_one_line(error)}') from None


def check_access(repo_id: str, token: str | None = None) -> str:
    """Returns `owner/name` after one question to the Hub; meant for the first second of a long run.

    Raises:
        `ValueError`: the id is malformed.
        [`HubError`]: there is no token, it may not write there, or the Hub can't be reached.
    """
    check_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {repo_id}: unset it.")
    try:
        user = HfApi(token=token, library_name="ifseg_hf").whoami()
    except LocalTokenNotFoundError:
        raise HubError(
            f"There is no token to upload to {repo_id} with: run `hf auth login` or set HF_TOKEN "
            "(https://huggingface.co/settings/tokens, of the kind that may write)."
        ) from None
    except Exception as error:  # of huggingface_hub or its HTTP library
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        what = "refuses the token" if refused else "can't be reached"
        raise HubError(f"The Hub at {constants.ENDPOINT} {what}: {_one_line(error)}") from error
    owner, _, name = repo_id.rpartition("/")
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(f"The token may only read: make one that may write to upload to {repo_id}.")
    # Other kinds of tokens than "write" don't tell all the owners that they may write for.
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    if role == "write" and owner and owner.lower() not in map(str.lower, owners):
        raise HubError(f"The token is one of {', '.join(owners)}, which is not {owner}, the owner of {repo_id}.")
    return f"{owner or user['name']}/{name}"


def add_results(repo_id: str, evaluation: dict, token: str | None = None) -> str:
    """Adds the numbers of an evaluation to the card (model-index) of a published model; the same number is replaced.

    Args:
        repo_id: `owner/name`, of a model that is there.
        evaluation: what scripts/eval.py writes as results.json.

    Returns:
        Where the commit can be seen. Raises [`HubError`] if the Hub refuses it or can't be reached.
    """
    repo_id = check_access(repo_id, token)
    dataset = evaluation["dataset"].rstrip("/").rpartition("/")[2]  # nobody needs to know in which folder it was
    results = []
    for setting in evaluation["results"]:
        smoothing = {name: setting[name] for name in ("smoothing_neighbors", "smoothing_iterations")}
        smoothed = "k={smoothing_neighbors}, {smoothing_iterations} iterations".format(**smoothing)
        how = f"{evaluation['inference']} photos, " + (
            smoothed if smoothing["smoothing_iterations"] else "no smoothing"
        )
        results += [
            EvalResult(
                task_type="image-segmentation",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=evaluation["split"] or "validation",
                dataset_args={"images": evaluation["images"]},
                metric_type=name,
                metric_name=f"{name.replace('_', ' ').replace('iou', 'IoU')} ({how})",
                metric_value=round(100 * value, 2),
                metric_args={"inference": evaluation["inference"], **smoothing},
            )
            for name, value in setting.items()
            if ("mean_" in name or "accuracy" in name) and value is not None
        ]
    try:
        index = eval_results_to_model_index(repo_id.partition("/")[2], results)
        message = f"Add results on {dataset}"
        return metadata_update(repo_id, {"model-index": index}, overwrite=True, token=token, commit_message=message)
    except Exception as error:  # as in push_to_hub
        raise HubError(f"The results could not be added to {repo_id}: {_one_line(error)}") from error


def files_to_publish(folder: Path) -> list[Path]:
    """The files of a saved model, without the settings of its training.

    Raises `ValueError` if it lacks something that `from_pretrained(..., trust_remote_code=True)` needs, or holds
    results that are none.
    """
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "ifseg":
        raise ValueError(f'"{folder}" holds no IFSeg model: the model_type in config.json is another.')
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.name in _FILES or file.suffix == ".py" or _WEIGHTS.fullmatch(file.name)
    ]
    names = {file.name for file in files}
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f'"{folder}" holds no weights (model.safetensors).')
    if index := names & {"model.safetensors.index.json"}:
        shards = set(_read_json(folder / index.pop())["weight_map"].values())
        files = [file for file in files if not file.name.endswith(".safetensors") or file.name in shards]
        names = {file.name for file in files}
        if missing := shards - names:
            raise ValueError(f'"{folder}" lacks {", ".join(sorted(missing))}, a part of the weights.')
    if not {"processor_config.json", "tokenizer_config.json"} <= names:
        raise ValueError(f'"{folder}" holds no processor: save it there, too, with processor.save_pretrained(folder).')
    classes = [*config.get("auto_map", {}).values()]
    classes += [task["impl"] for task in config.get("custom_pipelines", {}).values()]
    code = {f"{name.split('.')[0]}.py" for name in classes}
    if not classes or not code <= names:
        raise ValueError(f'"{folder}" lacks the code of its model: save the model again with `import ifseg_hf` before.')
    _read_results(folder)
    return files


def model_card(
    folder: str | Path, repo_id: str, revision: str | None = None, base_model: str | None = None
) -> ModelCard:
    """The model card of a saved model: what it is, code that uses it, its words, its training and its results.

    Args:
        folder: of the model. [`RESULTS_FILE`] in it, if there is one, becomes the table of results and the model-index.
        repo_id, revision: where people will find the model; the code names them.
        base_model: Hub id, or the name of the checkpoint embedded in this package.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    settings = _read_json(folder / _settings_file()) if (folder / _settings_file()).is_file() else {}
    results = _read_results(folder)
    segments = config.get("architectures") == [_SEGMENTATION]
    words = list(config["id2label"].values()) if config.get("category_ids") else []
    name = repo_id.split("/")[-1]
    stage = settings.get("stage", "word-maps") if settings else None
    free = ["image-free"] if stage in (None, "word-maps") else []

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation" if segments else "image-text-to-text",
        license="apache-2.0",
        base_model=base_model if base_model and "/" in base_model else None,
        tags=["ifseg", "ofa", "semantic-segmentation", *free, "arxiv:2303.14396", "arxiv:2202.03052"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    where = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    parts = [f"# {name}", _summary(segments, bool(words), stage, base_model)]
    code = _segmentation_code(where, words, _sliding_window(folder)) if segments else _ofa_code(where, repo_id)
    parts += ["## Use", *code]
    if words:
        parts += ["## Words", _words(words, settings.get("categories") if free else None)]
    if settings:
        parts += ["## Training", _training(settings)]
    if results:
        parts += ["## Results", _results(results)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


# The parts of the card -----------------------------------------------------------------------------------------------


_STAGES = {
    "word-maps": "It was tuned on the words below alone, with no photo and no mask.",
    "supervised": "It was trained on photos and their masks.",
    "self-training": "It was trained on photos with labels that are a model's own guesses, all or some of them.",
}


def _summary(segments: bool, has_words: bool, stage: str | None, base_model: str | None) -> str:
    method = "[IFSeg](https://arxiv.org/abs/2303.14396) (image-free semantic segmentation)"
    if not segments:
        return (
            "[OFA](https://arxiv.org/abs/2202.03052), a vision-language model, in the form that "
            f"{method} starts from: it writes text about photos, and becomes a segmentation model when it is tuned on "
            "words alone."
        )
    text = f"A model of {method}: it segments photos into words"
    text += "." if has_words else ", which are named when it is called."
    if stage is not None:
        text += f" {_STAGES[stage]}"
    if base_model:
        link = f"[{base_model}](https://huggingface.co/{base_model})" if "/" in base_model else base_model
        text += f" It started from {link}."
    return text


def _segmentation_code(where: str, words: list[str], crop: int | None) -> list[str]:
    named = "" if words else ', categories=["cat", "grass", "sky"]'
    window = "from ifseg_hf.processing import sliding_window_outputs\n" if crop else ""
    call = f"sliding_window_outputs(model, **inputs, crop={crop})" if crop else "model(**inputs)"
    parts = [
        "With transformers alone, which then runs the code in this repository:",
        f"""```python
from transformers import pipeline

segmenter = pipeline("image-segmentation", model={where}, trust_remote_code=True)
for segment in segmenter("photo.jpg"{named}):
    print(segment["label"], segment["score"], segment["mask"].size)
```""",
        "With the package `ifseg_hf` installed, which has that code:",
        f"""```python
import torch
from ifseg_hf import IFSegForSemanticSegmentation, IFSegProcessor
{window}from PIL import Image

model = IFSegForSemanticSegmentation.from_pretrained({where})
processor = IFSegProcessor.from_pretrained({where})
photo = Image.open("photo.jpg")
inputs = processor(images=photo{named}, return_tensors="pt")
with torch.no_grad():
    outputs = {call}
(mask,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(photo.height, photo.width)])
```""",
        (
            "Without `categories` it looks for its own words; others can be named in either way of using it."
            if words
            else "The model has no words of its own: name them in every call."
        ),
    ]
    if crop:
        parts.append(
            f"It was trained on crops of {crop} x {crop} pixels. Both ways take a photo in such crops, which overlap, "
            "and average what it says of them; so were its numbers made. "
            '`segmenter("photo.jpg", inference="whole")` takes the photo at once.'
        )
    return parts


def _ofa_code(where: str, repo_id: str) -> list[str]:
    return [
        "Tuning on words takes the package `ifseg_hf`:",
        f"""```bash
accelerate launch scripts/train.py --model {repo_id} --categories "cat, grass, sky" --output-dir tuned
```""",
        "or, in a loop of one's own:",
        f"""```python
from ifseg_hf import IFSegForSemanticSegmentation, IFSegProcessor

processor = IFSegProcessor.from_pretrained({where})
model = IFSegForSemanticSegmentation.from_pretrained({where})
model.set_words(**processor.encode_categories(["cat", "grass", "sky"]))
```""",
        "Text about a photo, with transformers alone, which then runs the code in this repository:",
        f"""```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({where}, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained({where}, trust_remote_code=True)
photo = processor(images=Image.open("photo.jpg"), return_tensors="pt")
question = processor.tokenizer(" what does the image describe?", return_tensors="pt")
ids = model.generate(**photo, input_ids=question["input_ids"], max_new_tokens=20)
print(processor.tokenizer.batch_decode(ids, skip_special_tokens=True))
```""",
    ]


def _words(words: list[str], categories: Any) -> str:
    if not isinstance(categories, dict):
        return ", ".join(map(_escape, words))
    lines = [f"- **{_escape(word)}**: {', '.join(map(_escape, categories.get(word, [])))}" for word in words]
    return "Each was tuned as the finer words behind it.\n\n" + "\n".join(lines)


def _training(settings: dict) -> str:
    rows = {name: x for name, x in _public(settings).items() if name != "categories" and x is not None}
    lines = [f"| {name} | {_escape(str(x))} |" for name, x in rows.items()]
    return "\n".join([f"`scripts/train.py` with ({_settings_file()}):\n", "| setting | value |", "|---|---|", *lines])


def _results(results: list[EvalResult]) -> str:
    lines = [
        f"| {_escape(result.dataset_name)} | {_escape(result.dataset_split or '')} | "
        f"{_escape(result.metric_name or result.metric_type)} | {_escape(str(result.metric_value))} |"
        for result in results
    ]
    return "\n".join(["| data | split | metric | value |", "|---|---|---|---|", *lines])


def _escape(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", text)


# The files of a folder -----------------------------------------------------------------------------------------------


def _settings_file() -> str:
    from ifseg_hf.training.config import SETTINGS_FILE

    return SETTINGS_FILE


def _sliding_window(folder: Path) -> int | None:
    """The side of the crops that a model was trained on, if it was."""
    file = folder / "processor_config.json"
    processor = _read_json(file) if file.is_file() else {}
    return processor.get("image_processor", {}).get("sliding_window")


def _published_settings(folder: Path, api: HfApi) -> dict:
    """The settings of the training without what is about the machine; {} if there was none.

    The model it started from stays if others can find it: the checkpoint in this package, or one on the Hub.
    """
    from ifseg_hf.pretrained import EMBEDDED

    file = folder / _settings_file()
    if not file.is_file():
        return {}
    settings = _read_json(file)
    start = settings.get("model")
    published = _public(settings)
    is_id = isinstance(start, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", start) and not Path(start).is_dir()
    if start == EMBEDDED or (is_id and api.repo_exists(start)):
        published["model"] = start
    return published


def _public(settings: dict) -> dict:
    """The settings that are no private ones and no paths of this machine."""
    return {
        name: x
        for name, x in settings.items()
        if name not in _PRIVATE_SETTINGS
        and not (isinstance(x, str) and Path(x).expanduser().is_absolute())
        and not (name == "dataset" and x and Path(x).is_dir())  # a folder of one's own; benchmarks keep their names
    }


def _read_results(folder: Path) -> list[EvalResult]:
    if not (folder / RESULTS_FILE).is_file():
        return []
    try:
        return [EvalResult(**result) for result in _read_json(folder / RESULTS_FILE)]
    except (TypeError, ValueError) as error:
        raise ValueError(f'"{folder / RESULTS_FILE}" is no list of results: {_one_line(error)}') from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f'"{file.parent}" holds no model: {file.name} can\'t be read ({error.strerror}).') from None
    except ValueError:
        raise ValueError(f'"{file}" is not JSON.') from None


# What a person is told -----------------------------------------------------------------------------------------------


def _command(
    folder: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    commit_message: str | None,
    base_model: str | None,
) -> str:
    """What to type to try again, in the directory that this process runs in."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "push_to_hub.py"
    settings = {"revision": revision, "commit_message": commit_message, "base_model": base_model}
    given: dict[str, Any] = {name: x for name, x in settings.items() if x is not None}
    if not script.is_file():  # an installation, which has no scripts
        given |= {} if private is None else {"private": private}
        arguments = "".join(f", {name}={x!r}" for name, x in given.items())
        call = f"import ifseg_hf.hub.publish; ifseg_hf.hub.publish.push_to_hub({str(folder)!r}, {repo_id!r}{arguments})"
        return shlex.join(["python", "-c", call])
    flags = [] if private is None else ["--private" if private else "--no-private"]
    for name, x in given.items():
        flags += [f"--{name.replace('_', '-')}", x]
    return shlex.join(["python", os.path.relpath(script), str(folder), repo_id, *flags])


def _one_line(error: BaseException) -> str:
    """The message of an error on one line that ends like a sentence, with that of the error behind it."""
    whole = isinstance(error, (HfHubHTTPError, HubError))  # these say all of it themselves
    links = [error] if whole else [error, error.__cause__]
    texts = dict.fromkeys(str(link) or type(link).__name__ for link in links if link is not None)
    return " ".join(" ".join(texts).split())[:600].rstrip(".") + "."
