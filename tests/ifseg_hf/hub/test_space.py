"""The page as a Space, published on a Hub on loopback."""

import hashlib

import pytest
import yaml
from hub_client import ROOT, environment, run, save_tuned_model
from hub_server import HubServer

from ifseg_hf.hub.publish import HubError
from ifseg_hf.hub.space import SDK_VERSION, push_space, space_files
from ifseg_hf.pretrained import ADAPTER_CONFIG, NANO


@pytest.fixture
def hub():
    with HubServer({"hf_alice": "alice"}) as server:
        yield server
    assert server.unknown == []


def push(hub, tmp_path, *arguments):
    return run("-m", "ifseg_hf", "push", *arguments, cwd=tmp_path, env=environment(hub, tmp_path / "home"))


def front_matter(readme: bytes) -> dict:
    _, text, _ = readme.decode().split("---\n", 2)
    return yaml.safe_load(text)


def test_the_page_is_published_in_one_commit(hub, tmp_path):
    done = push(hub, tmp_path, "--space", "alice/demo", "--private")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["alice/demo"]
    assert done.stdout == f"Published: {hub.url}/spaces/alice/demo/commit/{repository.branches['main']}\n"
    assert repository.private
    assert repository.sdk == "gradio"
    assert repository.messages == ["initial commit", "Upload the page of IFSeg"]
    files = hub.files("alice/demo")
    metadata = front_matter(files["README.md"])
    assert metadata["sdk"] == "gradio"
    assert metadata["sdk_version"] == SDK_VERSION
    assert metadata["app_file"] == "app.py"
    assert "models" not in metadata
    required = files["requirements.txt"].decode().splitlines()
    assert "torch>=2.6" in required
    assert not any("extra" in line or "gradio" in line for line in required)
    assert b"launch(model='ifseg-ofa-nano'" in files["app.py"]
    compile(files["app.py"], "app.py", "exec")
    weights = files["ifseg_hf/nano/model.safetensors"]
    assert hashlib.sha256(weights).digest() == hashlib.sha256((NANO / "model.safetensors").read_bytes()).digest()
    assert {"ifseg_hf/app/assets/viewer.js", "ifseg_hf/modeling/modeling_ofa.py", "LICENSE"} <= set(files)


def test_a_model_and_a_space_that_opens_with_it(hub, tmp_path):
    folder = save_tuned_model(tmp_path / "tuned", ["cat", "sky"])
    done = push(hub, tmp_path, folder, "my-words", "--space", "alice/demo")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "model.safetensors" in hub.files("alice/my-words")
    files = hub.files("alice/demo")
    assert b"launch(model='alice/my-words'" in files["app.py"]
    assert front_matter(files["README.md"])["models"] == ["alice/my-words"]

    old = {**files, "ifseg_hf/old.py": b"", "mine.py": b""}
    repository = hub.repositories["alice/demo"]
    blob = type(repository.commits[repository.branches["main"]]["app.py"])
    repository.commit("main", {name: blob(content, size=len(content)) for name, content in old.items()}, "edit")
    done = push(hub, tmp_path, "--space", "demo", "--model", "alice/my-words")
    assert done.returncode == 0, done.stderr
    assert set(hub.files("alice/demo")) == {*files, "mine.py"}  # the files of an earlier version are deleted
    assert b"peft" not in files["requirements.txt"]

    hub.repositories["alice/my-words"].commit("main", {ADAPTER_CONFIG: blob(b"{}", size=2)}, "become an adapter")
    done = push(hub, tmp_path, "--space", "demo", "--model", "alice/my-words")
    assert done.returncode == 0, done.stderr
    assert b"peft>=" in hub.files("alice/demo")["requirements.txt"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give the folder of a model and a repository id"),
        (["tuned"], 2, "give the folder of a model and a repository id"),
        (["--model", "alice/words"], 2, "give the folder of a model"),
        (["tuned", "alice/words", "--model", "alice/words"], 2, "--model is for --space without a folder"),
        (["--space", "a/b/c"], 2, "is not a repository id"),
        (["--space", "alice/demo", "--model", "nowhere"], 2, 'no model folder "nowhere"'),
        (["--space", "alice/demo", "--model", "."], 2, "is a folder of this machine"),
        (["--space", "alice/demo", "--model", "alice/missing"], 1, 'The Hub has no model "alice/missing"'),
        (["--space", "bob/demo"], 1, "The token belongs to alice, not to bob"),
    ],
)
def test_errors_are_one_line(hub, tmp_path, arguments, status, message):
    done = push(hub, tmp_path, *arguments)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith("ifseg push: ")
    assert message in line
    assert hub.repositories == {}


def test_the_sdk_is_the_tested_version_of_gradio():
    assert f"gradio=={SDK_VERSION}\n" in (ROOT / "constraints.txt").read_text()


def test_no_file_of_the_package_is_left_out(tmp_path):
    names = set(space_files("demo"))
    for folder in ("modeling", "processing"):
        assert {f"ifseg_hf/{file.relative_to(ROOT)}" for file in (ROOT / folder).glob("*.py")} <= names
    ignored = {"__pycache__", ".pyc"}
    package = [file for file in (ROOT / "ifseg_hf").rglob("*") if file.is_file()]
    expected = {str(file.relative_to(ROOT)) for file in package if not ignored & {*file.parts, file.suffix}}
    assert expected <= names


def test_offline_nothing_is_published(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push_space("alice/demo")
