"""Publishing of saved models on the Hub: weights, configuration, processor, code and model card in one commit.

Imports neither torch nor transformers, so that scripts reject a wrong repository id or a missing token at once.
"""

import json
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
    constants,
    metadata_update,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id

from ifseg_hf.hub.adapter_repository import adapter_card, adapter_content, is_adapter
from ifseg_hf.hub.model_card import model_card
from ifseg_hf.hub.model_folder import CARD_IMAGE, RESULTS_FILE, public_settings, read_json, read_results, read_settings
from ifseg_hf.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WORDS, EMBEDDED
from ifseg_hf.training.config import SETTINGS_FILE

# The files of a folder that are published besides weights and code. Checkpoints and logs of training are not.
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
    CARD_IMAGE,
    RESULTS_FILE,
)
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class HubError(RuntimeError):
    """The Hub refused a request or cannot be reached. The message is one line."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """Publishes a saved model in one commit, so that the repository never holds half a model. `folder` is not changed.

    Uploads weights, configuration, processor, code, the public training settings, the picture of the model card, if
    there is one, and a model card, which is the README.md of the folder or, without one, the card of [`model_card`]. Of
    an adapter, uploads its weights, its configuration, its words, the settings and a card that names the base model.
    Weight files in the repository that are not part of this model are deleted from the revision.

    Args:
        folder: folder of a saved model with its processor, such as training and conversion write, or of an adapter.
        repo_id: `owner/name`, or `name` for the owner of the token. The repository is created if it does not exist.
        private: whether a new repository is private. Default: the owner's default.
        revision: a branch, created if it does not exist. Default: `main`.
        commit_message: first line of the commit's message.
        token: default: the token of `hf auth login` or `HF_TOKEN`.
        base_model: for the card, the Hub id of the model that this model was trained or converted from. Default: the
            model in the training settings, if the Hub has it; for an adapter, the base model that it names.

    Returns:
        [`~huggingface_hub.CommitInfo`], with the addresses `commit_url` and `repo_url`.

    Raises:
        `ValueError`: the folder holds no model that can be published, or an id is malformed.
        [`HubError`]: the Hub refused the upload or cannot be reached. The message ends with the command to try again.
    """
    folder = Path(folder).expanduser()
    adapter = is_adapter(folder)
    content: dict[str, Any]
    if adapter:
        content = dict(adapter_content(folder, base_model))
    else:
        content = {file.name: file for file in files_to_publish(folder)}
    for name in (repo_id, base_model):
        if name is not None:
            check_repo_id(name)
    api = HfApi(token=token, library_name="ifseg_hf")
    try:
        repo_id = check_access(repo_id, token)
        settings = _published_settings(folder, api)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"{repo_id} exists and is public: make it private on the Hub first, or publish without private."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if "README.md" not in content:
            if adapter:
                card = adapter_card(folder, repo_id, base_model)
            else:
                card = model_card(folder, repo_id, revision, base_model or settings.get("model"))
            content["README.md"] = str(card).encode()
        if settings:
            content[SETTINGS_FILE] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
        # transformers prefers one weight file over several, so it would load one that an earlier model left there.
        # The configuration of a model and the files of an adapter exclude each other.
        other = ("config.json",) if adapter else (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WORDS)
        present = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in present if _WEIGHTS.fullmatch(name) or name in other]
        return api.create_commit(
            repo_id,
            [CommitOperationDelete(path_in_repo=name) for name in stale if name not in content]
            + [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content[name]) for name in sorted(content)],
            commit_message=commit_message or f"Upload IFSeg {'adapter' if adapter else 'model'}",
            revision=revision,
        )
    except Exception as error:  # huggingface_hub, its HTTP library and its transfer library raise different classes
        raise HubError(
            f"The upload to {repo_id} failed: {_one_line(error)} The model is still in {folder}. "
            f"To try again: {retry_command(folder, repo_id, private, revision, commit_message, base_model)}"
        ) from error


def check_repo_id(repo_id: str) -> None:
    """Raises `ValueError`, in one line, unless `repo_id` is a valid `name` or `owner/name`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'"{repo_id}" is not a repository id (owner/name): {_one_line(error)}') from None


def check_access(repo_id: str, token: str | None = None) -> str:
    """Returns `owner/name` if the token may write there, by one request to the Hub, before a long run starts.

    Raises:
        `ValueError`: the id is malformed.
        [`HubError`]: there is no token, the token may not write there, or the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {repo_id}: unset it.")
    try:
        user = HfApi(token=token, library_name="ifseg_hf").whoami()
    except LocalTokenNotFoundError:
        raise HubError(
            f"There is no token for an upload to {repo_id}: run `hf auth login` or set HF_TOKEN to a token with write "
            "permission (https://huggingface.co/settings/tokens)."
        ) from None
    except Exception as error:  # of huggingface_hub or its HTTP library
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        problem = "refuses the token" if refused else "cannot be reached"
        raise HubError(f"The Hub at {constants.ENDPOINT} {problem}: {_one_line(error)}") from error
    owner, _, name = repo_id.rpartition("/")
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(f"The token is read-only: create one with write permission to upload to {repo_id}.")
    # For tokens with other roles than "write", whoami does not list every owner that they may write for.
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    if role == "write" and owner and owner.lower() not in map(str.lower, owners):
        raise HubError(f"The token belongs to {', '.join(owners)}, not to {owner}, the owner of {repo_id}.")
    return f"{owner or user['name']}/{name}"


def add_results(repo_id: str, evaluation: dict[str, Any], token: str | None = None) -> str:
    """Adds the metrics of an evaluation to the model-index of a published model, replacing earlier values of the same.

    Args:
        repo_id: `owner/name` of a model on the Hub.
        evaluation: the content of the results.json that `ifseg evaluate` writes.

    Returns:
        The address of the commit. Raises [`HubError`] if the Hub refuses it or cannot be reached.
    """
    repo_id = check_access(repo_id, token)
    dataset = evaluation["dataset"].rstrip("/").rpartition("/")[2]  # without the folders of this machine
    results = []
    for setting in evaluation["results"]:
        smoothing = {name: setting[name] for name in ("smoothing_neighbors", "smoothing_iterations")}
        smoothed = "k={smoothing_neighbors}, {smoothing_iterations} iterations".format(**smoothing)
        method = "{} images, {}".format(
            evaluation["inference"], smoothed if smoothing["smoothing_iterations"] else "no smoothing"
        )
        results += [
            EvalResult(
                task_type="image-segmentation",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=evaluation["split"] or "validation",
                dataset_args={"images": evaluation["images"]},
                metric_type=name,
                metric_name=f"{name.replace('_', ' ').replace('iou', 'IoU')} ({method})",
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
    """The files of a saved model that are published unchanged: all except the training settings.

    Raises `ValueError` if a file that `from_pretrained(..., trust_remote_code=True)` needs is missing, or if the
    results of the folder are malformed.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("ifseg", "ofa"):
        raise ValueError(
            f'"{folder}" is not an IFSeg or OFA model: its config.json has model_type={config.get("model_type")}.'
        )
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.name in _FILES or file.suffix == ".py" or _WEIGHTS.fullmatch(file.name)
    ]
    names = {file.name for file in files}
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f'"{folder}" has no weights (model.safetensors).')
    if index := names & {"model.safetensors.index.json"}:
        shards = set(read_json(folder / index.pop())["weight_map"].values())
        files = [file for file in files if not file.name.endswith(".safetensors") or file.name in shards]
        names = {file.name for file in files}
        if missing := shards - names:
            raise ValueError(f'"{folder}" lacks {", ".join(sorted(missing))}, a part of the weights.')
    if not {"processor_config.json", "tokenizer_config.json"} <= names:
        raise ValueError(f'"{folder}" has no processor: save it there too, with processor.save_pretrained(folder).')
    classes = [*config.get("auto_map", {}).values()]
    classes += [task["impl"] for task in config.get("custom_pipelines", {}).values()]
    code = _missing_code(folder, {name.split(".")[0] for name in classes})
    if not classes or code:
        reason = f" ({', '.join(code)})" if code else ""
        raise ValueError(f'"{folder}" lacks the code of its model{reason}: import ifseg_hf and save the model again.')
    read_results(folder)
    return files


def _missing_code(folder: Path, modules: set[str]) -> list[str]:
    """The files that a folder lacks of these modules and all modules that they import from the folder."""
    missing: list[str] = []
    seen: set[str] = set()
    remaining = set(modules)
    while remaining:
        seen |= {name := remaining.pop()}
        file = folder / f"{name}.py"
        if not file.is_file():
            missing.append(file.name)
            continue
        imported = re.findall(r"^\s*from \.(\w+) import ", file.read_text(encoding="utf-8"), re.MULTILINE)
        remaining |= {*imported} - seen
    return sorted(missing)


def _published_settings(folder: Path, api: HfApi) -> dict[str, Any]:
    """The public training settings; {} for a model that was not trained by this package.

    They include `model`, the start of training, if it is the embedded checkpoint or on the Hub.
    """
    settings = read_settings(folder)
    published = public_settings(settings)
    start = settings.get("model")
    is_id = isinstance(start, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", start) and not Path(start).is_dir()
    if start == EMBEDDED or (is_id and api.repo_exists(start)):
        published["model"] = start
    return published


def retry_command(
    folder: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    commit_message: str | None,
    base_model: str | None,
) -> str:
    """The shell command that repeats an upload, to be run in the current directory."""
    settings = {"revision": revision, "commit_message": commit_message, "base_model": base_model}
    flags = [] if private is None else ["--private" if private else "--no-private"]
    for name, value in settings.items():
        flags += [] if value is None else [f"--{name.replace('_', '-')}", value]
    return shlex.join(["ifseg", "push", str(folder), repo_id, *flags])


def _one_line(error: BaseException) -> str:
    """The message of an error, and of the error that caused it, on one line that ends with a full stop."""
    complete = isinstance(error, (HfHubHTTPError, HubError))  # their messages include the cause
    errors = [error] if complete else [error, error.__cause__]
    messages = dict.fromkeys(str(x) or type(x).__name__ for x in errors if x is not None)
    return " ".join(" ".join(messages).split())[:600].rstrip(".") + "."


__all__ = [
    "HubError",
    "add_results",
    "check_access",
    "check_repo_id",
    "files_to_publish",
    "push_to_hub",
    "retry_command",
]
