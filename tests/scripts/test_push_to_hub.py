"""`scripts/push_to_hub.py` as a command, with a Hub on loopback."""

import shlex
import shutil

import pytest
from hub_client import SCRIPT, environment, run, save_tuned_model
from hub_server import HubServer, Refused
from PIL import Image

from ifseg_hf.hub.model_folder import CARD_IMAGE
from scripts import load_script

WORDS = ["cat", "wet grass", "sky"]
# A client with an empty cache, which verifies what it downloads.
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("alice/ifseg-test"))
"""


@pytest.fixture
def hub():
    with HubServer({"hf_alice": "alice"}) as server:
        yield server
    assert server.unknown == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tuned_model(tmp_path_factory.mktemp("saved") / "my words", WORDS)


@pytest.mark.parametrize("xet", [False, True])
def test_large_files_are_uploaded_by_lfs_and_by_xet(hub, folder, tmp_path, xet):
    """Both protocols of huggingface_hub: Xet if its library is installed, which is the default, and Git LFS."""
    if xet:
        pytest.importorskip("hf_xet")
        hub.xet_folder = tmp_path / "xet"
        hub.xet_folder.mkdir()
    variables = {"HF_HUB_DISABLE_XET": "0" if xet else "1"}
    env = environment(hub, tmp_path / "home", **variables)
    message = ["--commit-message", "Three words"]
    done = run(SCRIPT, folder, "alice/ifseg-test", "--private", *message, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["alice/ifseg-test"]
    assert done.stdout == f"Published: {hub.url}/alice/ifseg-test/commit/{repository.branches['main']}\n"
    assert repository.private
    assert repository.messages[-1] == "Three words"
    assert len(repository.messages) == 2  # one commit for everything
    stored = [request.rpartition("/")[0] for request in hub.requests if "/large/" in request or "/verify/" in request]
    assert stored == ([] if xet else ["PUT /large", "POST /verify"])

    done = run("-c", DOWNLOAD, cwd=tmp_path, env=environment(hub, tmp_path / "other home", **variables))
    assert done.returncode == 0, done.stderr
    copy = done.stdout.strip()
    for name in ("model.safetensors", "config.json", "modeling_ifseg.py", "tokenizer.json"):
        with open(f"{copy}/{name}", "rb") as file:
            assert file.read() == (folder / name).read_bytes()


def test_the_picture_of_the_card_is_drawn_and_published(hub, folder, tmp_path):
    """`--card-image`, whose picture goes to the folder, the repository and the card; and a folder with its own card."""
    folder = shutil.copytree(folder, tmp_path / "model")
    Image.new("RGB", (90, 60), (90, 120, 200)).save(tmp_path / "street.png")
    command = [SCRIPT, folder, "alice/ifseg-test", "--card-image", "street.png"]
    done = run(*command, cwd=tmp_path, env=environment(hub, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    files = hub.files("alice/ifseg-test")
    assert files[CARD_IMAGE] == (folder / CARD_IMAGE).read_bytes()
    text = files["README.md"].decode()
    assert text.index("# ifseg-test\n") < text.index(f"]({CARD_IMAGE})") < text.index("An [IFSeg]")
    assert "street" not in text
    (folder / "README.md").write_text("# A card of mine\n")
    done = run(*command, cwd=tmp_path, env=environment(hub, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert f"README.md does not show the picture: add ![segmented image]({CARD_IMAGE}) to it." in done.stderr
    assert hub.files("alice/ifseg-test")["README.md"] == b"# A card of mine\n"


def test_a_missing_card_image_is_an_error_before_the_upload(hub, folder, tmp_path):
    command = [SCRIPT, folder, "alice/ifseg-test", "--card-image", "nowhere.jpg"]
    done = run(*command, cwd=tmp_path, env=environment(hub, tmp_path / "home"))
    assert done.returncode == 2
    assert 'push_to_hub.py: There is no image "nowhere.jpg" for the model card.' in done.stderr
    assert "alice/ifseg-test" not in hub.repositories
    assert not (folder / CARD_IMAGE).exists()


@pytest.mark.slow
def test_retry_command_works_after_a_failed_upload(folder, tmp_path):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with HubServer({"hf_alice": "alice"}) as hub:
        hub.refuse = lambda request: "die" if request.startswith("PUT /large/") else None
        command = [SCRIPT, folder, "alice/ifseg-test", "--private", "--revision", "v1", "--commit-message", "It's new"]
        done = run(*command, cwd=tmp_path, env=environment(hub, tmp_path / "home"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("push_to_hub.py: "))
    assert message.startswith("push_to_hub.py: The upload to alice/ifseg-test failed: ")
    assert f"The model is still in {folder}. To try again: ifseg push " in message
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    repository = hub.repositories["alice/ifseg-test"]
    assert repository.messages == ["initial commit"]  # no partial upload

    hub.refuse = None
    with hub:  # the same Hub reopens at the same address
        program, *command = shlex.split(message.split("To try again: ")[1])
        assert program == "ifseg"
        done = run("-m", "ifseg_hf", *command, cwd=tmp_path, env=environment(hub, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert hub.unknown == []
    assert repository.messages[-1] == "It's new"
    assert hub.files("alice/ifseg-test", "v1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert set(hub.files("alice/ifseg-test")) == {".gitattributes"}


def test_refused_commit(hub, folder, tmp_path):
    hub.refuse = lambda request: Refused(403, "", "Storage quota exceeded") if "/commit/" in request else None
    done = run(SCRIPT, folder, "alice/ifseg-test", cwd=tmp_path, env=environment(hub, tmp_path / "home"))
    assert done.returncode == 1
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("push_to_hub.py: "))
    assert "Storage quota exceeded" in message
    assert message.endswith("alice/ifseg-test")


def test_wrong_folder(tmp_path, capsys):
    assert load_script("push_to_hub").main([str(tmp_path), "alice/ifseg-test"]) == 2
    message = "config.json cannot be read (No such file or directory)."
    assert capsys.readouterr().err == f'push_to_hub.py: "{tmp_path}" is not a model folder: {message}\n'
