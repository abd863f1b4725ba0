"""Publishing of the page `ifseg app` as a Space: README, requirements, app.py and this package, in one commit.

Imports neither torch nor transformers, as [`ifseg_hf.hub.publish`].
"""

import importlib.util
import re
from importlib.metadata import distribution, distributions
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCardData

from ifseg_hf.hub.publish import HubError, check_access
from ifseg_hf.pretrained import ADAPTER_CONFIG, EMBEDDED, resolve_model

__all__ = ["SDK_VERSION", "push_space", "space_files"]

SDK_VERSION = "6.31.0"
"""The version of Gradio that the page was tested with."""
PYTHON_VERSION = "3.11"
_TEMPLATE = Path(__file__).with_name("space_template.md")
_PACKAGES = {
    "ifseg_hf": "ifseg_hf",
    "ifseg_hf.modeling": "ifseg_hf/modeling",
    "ifseg_hf.processing": "ifseg_hf/processing",
}
_SUFFIXES = {".css", ".csv", ".html", ".jpg", ".js", ".json", ".md", ".py", ".safetensors", ".txt", ".typed", ".yaml"}
_APP = '''"""The page of this Space; see https://huggingface.co/docs/hub/spaces-sdks-gradio."""

from ifseg_hf.app.server import launch

if __name__ == "__main__":
    launch(model={model!r}, public=True, on_start=print)
'''


def push_space(
    repo_id: str,
    model: str = EMBEDDED,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Publishes the page as a Gradio Space in one commit.

    Args:
        repo_id: `owner/name` of the Space, or `name` for the owner of the token. It is created if it does not exist.
        model: Hub id of the model that the page opens with, or the embedded one.
        private: whether a new Space is private. Default: the owner's default.
        commit_message: first line of the commit's message.
        token: default: the token of `hf auth login` or `HF_TOKEN`.

    Raises:
        `ValueError`: an id is malformed, or the model is a folder of this machine.
        [`HubError`]: the Hub refused the upload, has no such model, or cannot be reached.
    """
    _check_model(model)
    repo_id = check_access(repo_id, token)
    api = HfApi(token=token, library_name="ifseg_hf")
    try:
        if model != EMBEDDED and not api.repo_exists(model):
            raise HubError(f'The Hub has no model "{model}": publish it first, with `ifseg push FOLDER {model}`.')
        adapter = model != EMBEDDED and api.file_exists(model, ADAPTER_CONFIG)
        files = space_files(repo_id.partition("/")[2], model, adapter)
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        there = api.list_repo_files(repo_id, repo_type="space")
        stale = [name for name in there if name.startswith("ifseg_hf/") and name not in files]  # of another version
        return api.create_commit(
            repo_id,
            [CommitOperationDelete(path_in_repo=name) for name in stale]
            + [CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in sorted(files)],
            commit_message=commit_message or "Upload the page of IFSeg",
            repo_type="space",
        )
    except HubError:
        raise
    except Exception as error:  # huggingface_hub, its HTTP library and its transfer library raise different classes
        raise HubError(f"The upload of the Space {repo_id} failed: {' '.join(str(error).split())[:600]}") from error


def space_files(name: str, model: str = EMBEDDED, adapter: bool = False) -> dict[str, bytes | Path]:
    """Returns the files of a Space by their paths in it, as contents or as files of this package.

    Args:
        name: of the Space. model: as for [`push_space`]. adapter: whether the model is an adapter, which needs peft.
    """
    files: dict[str, bytes | Path] = {
        "README.md": _readme(name, model).encode(),
        "requirements.txt": ("\n".join(_requirements(adapter)) + "\n").encode(),
        "app.py": _APP.format(model=model).encode(),
    }
    for licence in ("LICENSE", "NOTICE"):
        for installed in distributions(name="ifseg-hf"):  # also a wheel's metadata in a checkout, without licences
            text = installed.read_text(f"licenses/{licence}")
            if text:
                files[licence] = text.encode()
    for package, folder in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None  # this package has them
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*")):
            if file.suffix in _SUFFIXES and file.is_file():
                files[f"{folder}/{file.relative_to(root).as_posix()}"] = file
    return files


def _readme(name: str, model: str) -> str:
    """The README.md with the metadata that configures the Space."""
    data = SpaceCardData(
        title=name,
        emoji="🖼️",
        sdk="gradio",
        sdk_version=SDK_VERSION,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license="apache-2.0",
        short_description="Image segmentation from words alone",
        models=None if model == EMBEDDED else [model],
    )
    link = "the model embedded in the package" if model == EMBEDDED else f"[{model}](https://huggingface.co/{model})"
    body = _TEMPLATE.read_text(encoding="utf-8").replace("{{ title }}", name).replace("{{ model_link }}", link)
    return f"---\n{data.to_yaml().strip()}\n---\n{body}"


def _requirements(adapter: bool) -> list[str]:
    """The package's dependencies, with peft for an adapter; Gradio is installed by the Space itself."""
    lines = distribution("ifseg-hf").requires or []
    extra = [line.partition(";")[0].strip() for line in lines if adapter and 'extra == "peft"' in line]
    return [line for line in lines if ";" not in line] + extra  # extras have markers


def _check_model(model: str) -> None:
    """Raises `ValueError` unless the model is the embedded one or a possible Hub id."""
    if model == EMBEDDED:
        return
    if Path(model).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        try:
            resolve_model(model)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        raise ValueError(
            f'"{model}" is a folder of this machine, which a Space cannot read: publish it with the Space, as in '
            f"`ifseg push {model} me/my-words --space me/demo`."
        )
