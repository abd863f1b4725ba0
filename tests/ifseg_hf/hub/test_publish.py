"""Publishing to a Hub on loopback with the real huggingface_hub client, in separate processes."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from hub_client import (
    ROOT,
    code_blocks,
    environment,
    run,
    save_small_processor,
    save_supervised_model,
    save_tuned_model,
)
from hub_server import Blob, HubServer, Repository
from huggingface_hub import ModelCard
from PIL import Image
from tiny_model import save_tiny_model
from transformers import pipeline

from ifseg_hf import OFAForConditionalGeneration
from ifseg_hf.hub import publish
from ifseg_hf.hub.model_folder import CARD_IMAGE, RESULTS_FILE
from ifseg_hf.hub.publish import check_repo_id, files_to_publish
from ifseg_hf.training.config import SETTINGS_FILE

MODELING = "adapters configuration loss modeling"
PROCESSING = (
    "background dense_crf image_processing image_reading pipeline post_processing processing prompt segmenter "
    "sliding_window text"
)
OFA = "attention backbone bias_cache blockwise_bias configuration layers modeling outputs positions trunk"
CODE = {
    "backbone.py",
    "configuration_checks.py",
    "image_batches.py",
    "loading.py",
    "merged_labels.py",
    *(f"{name}_ofa.py" for name in OFA.split()),
}
CODE |= {f"{name}_ifseg.py" for name in f"{MODELING} {PROCESSING}".split()}
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
RESULT = {
    "task_type": "image-segmentation",
    "dataset_type": "alice/streets",
    "dataset_name": "Streets",
    "dataset_split": "validation",
    "metric_type": "mean_iou",
    "metric_name": "mIoU",
    "metric_value": 0.25,
}
# Calls functions of the library: their names and arguments come in as JSON, their results go out as JSON.
CALLS = """
import json, sys
from ifseg_hf.hub.publish import HubError, add_results, check_access, push_to_hub

results = []
for name, arguments in json.load(sys.stdin):
    try:
        result = globals()[name](**arguments)
        results.append(result if isinstance(result, str) else result.commit_url)
    except (HubError, ValueError) as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""
# Runs blocks of code separately: outputs what each printed, and the module of the class of each of its variables.
BLOCKS = """
import contextlib, importlib.util, io, json, sys

results = []
for block in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = {}
        exec(block, names)
    results.append([printed.getvalue(), {name: type(x).__module__ for name, x in names.items()}])
try:
    has_package = importlib.util.find_spec("ifseg_hf") is not None
except ModuleNotFoundError:
    has_package = False
print(json.dumps([results, has_package]))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_alice": "alice", "hf_carol": "carol"}, readers={"hf_read": "alice"}) as server:
        yield server
    assert server.unknown == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models by name."""
    root = tmp_path_factory.mktemp("saved")
    folders = {
        "tuned": save_tuned_model(root / "tuned", ["cat", "wet grass", "sky"]),
        "coarse": save_tuned_model(root / "coarse", {"a|b": ["cat", "dog"], "c*d": ["lily"]}, model=str(root / "ofa")),
        "ofa": root / "ofa",
        "wordless": root / "wordless",
        "supervised": save_supervised_model(root / "supervised"),
    }
    save_tiny_model(folders["ofa"], OFAForConditionalGeneration)
    save_tiny_model(folders["wordless"], tuned=True)
    save_small_processor(folders["ofa"])
    save_small_processor(folders["wordless"])
    (folders["coarse"] / RESULTS_FILE).write_text(json.dumps([RESULT]))
    return folders


@pytest.fixture(scope="module")
def published(hub, folders, tmp_path_factory):
    """The results of publishing all models, by name."""
    calls = {
        "tuned": {"folder": "tuned", "repo_id": "alice/ifseg-test", "commit_message": "Three words"},
        "again": {"folder": "tuned", "repo_id": "alice/ifseg-test"},
        "branch": {"folder": "coarse", "repo_id": "alice/ifseg-test", "revision": "coarse", "base_model": "ofa/base"},
        "private": {"folder": "coarse", "repo_id": "secret", "private": True},
        "public already": {"folder": "tuned", "repo_id": "alice/ifseg-test", "private": True},
        "ofa": {"folder": "ofa", "repo_id": "alice/ifseg-ofa-base"},
        "wordless": {"folder": "wordless", "repo_id": "alice/wordless"},
        "supervised": {"folder": "supervised", "repo_id": "alice/supervised"},
    }
    # One repository exists already, with other files.
    hub.repositories["alice/wordless"] = older = Repository(private=False)
    older.commit("main", {name: Blob(b"x", size=1) for name in ("model-00001-of-00002.safetensors", "notes")}, "Old")
    work = tmp_path_factory.mktemp("work")
    home = work / "home"
    requests = [("push_to_hub", {**x, "folder": str(folders[x["folder"]])}) for x in calls.values()]
    before = {name: contents(folder) for name, folder in folders.items()}
    done = run("-c", CALLS, cwd=work, env=environment(hub, home), input=json.dumps(requests))
    assert done.returncode == 0, done.stderr
    assert {name: contents(folder) for name, folder in folders.items()} == before
    return dict(zip(calls, json.loads(done.stdout), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read(hub: HubServer, repo: str, branch: str = "main") -> dict[str, str]:
    """The text files in a repository."""
    return {name: x.decode() for name, x in hub.files(repo, branch).items() if not name.endswith(".safetensors")}


def test_repository_holds_only_the_model(hub, folders, published):
    files = hub.files("alice/ifseg-test")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        SETTINGS_FILE,
        *CODE,
        *PROCESSOR,
    }
    for name in files.keys() - {".gitattributes", "README.md", SETTINGS_FILE}:
        assert files[name] == (folders["tuned"] / name).read_bytes(), name
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModelForSemanticSegmentation"] == "backbone_ofa.IFSegForSemanticSegmentation"
    assert config["custom_pipelines"]["image-segmentation"]["impl"] == "pipeline_ifseg.IFSegImageSegmentationPipeline"
    assert hub.repositories["alice/ifseg-test"].messages[:2] == ["initial commit", "Three words"]
    commit = hub.repositories["alice/ifseg-test"].branches["main"]
    assert published["tuned"] == published["again"] == f"{hub.url}/alice/ifseg-test/commit/{commit}"  # nothing changed


def test_weights_of_an_earlier_model_are_deleted(hub, published):
    files = hub.files("alice/wordless")
    assert {"model.safetensors", "notes"} <= set(files)
    assert "model-00001-of-00002.safetensors" not in files


def test_no_private_setting_or_path_is_published(hub, folders, published):
    for repo, repository in hub.repositories.items():
        for branch in repository.branches:
            for name, text in read(hub, repo, branch).items():
                for private in (str(folders["tuned"].parent), str(ROOT), "output_dir"):
                    assert private not in text, (repo, branch, name)
    settings = json.loads(hub.files("alice/ifseg-test")[SETTINGS_FILE])
    assert settings["model"] == "ifseg-ofa-nano"
    assert settings["steps"] == 7
    assert "model" not in json.loads(hub.files("alice/ifseg-test", "coarse")[SETTINGS_FILE])


def test_branches_and_private_repositories(hub, published):
    assert "/commit/" in published["branch"]
    assert set(hub.repositories["alice/ifseg-test"].branches) == {"main", "coarse"}
    assert hub.repositories["alice/secret"].private
    assert not hub.repositories["alice/ifseg-test"].private
    assert published["public already"].startswith("HubError")
    assert "alice/ifseg-test exists and is public" in published["public already"]


def test_cards_describe_their_models(hub, published):
    card = ModelCard(read(hub, "alice/ifseg-test")["README.md"])
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None  # the embedded model is no repository
    assert {"ifseg", "semantic-segmentation"} <= set(card.data.tags)
    assert card.data.eval_results is None
    assert "cat, wet grass, sky" in card.text
    assert "It started from ifseg-ofa-nano." in card.text
    assert "| steps | 7 |" in card.text
    assert "cpu" not in card.text

    card = ModelCard(read(hub, "alice/ifseg-test", "coarse")["README.md"])
    assert card.data.base_model == "ofa/base"
    assert r"- **a\|b**: cat, dog" in card.text
    assert r"- **c\*d**: lily" in card.text
    assert r"| Streets | validation | mIoU | 0.25 |" in card.text
    (result,) = card.data.eval_results  # read back from the model-index
    assert {name: getattr(result, name) for name in RESULT} == RESULT
    assert card.data.model_name == "ifseg-test"
    assert 'revision="coarse"' in card.text

    card = ModelCard(read(hub, "alice/ifseg-ofa-base")["README.md"])
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "## Categories" not in card.text


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("images") / "image.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("package", [False, True])
def test_code_of_cards_runs_as_printed(hub, folders, published, image, tmp_path, package):
    """In a fresh process with an empty cache, with and without the package."""
    shutil.copy(image, tmp_path)
    cards = [("alice/ifseg-test", "main"), ("alice/ifseg-test", "coarse"), ("alice/ifseg-ofa-base", "main")]
    cards += [("alice/wordless", "main"), ("alice/secret", "main"), ("alice/supervised", "main")]
    blocks = [(card, block) for card in cards for block in code_blocks(read(hub, *card)["README.md"])]
    assert len(blocks) == 2 * len(cards)
    blocks = [(card, block) for card, block in blocks if ("ifseg_hf" in block) == package]
    env = environment(hub, tmp_path / "home", package=package)
    done = run("-c", BLOCKS, cwd=tmp_path, env=env, input=json.dumps([block for _, block in blocks]))
    assert done.returncode == 0, done.stderr
    results, has_package = json.loads(done.stdout)
    assert has_package == package
    for ((repo, branch), _), (printed, modules) in zip(blocks, results, strict=True):
        if package:
            assert modules["model"].startswith("ifseg_hf.modeling"), repo
        elif repo == "alice/ifseg-ofa-base":
            assert modules["model"].startswith("transformers_modules.")
            assert {"inputs", "ids"} <= modules.keys()
            assert printed.endswith("\n")  # a sentence, which may be empty: the weights are random
        else:
            assert modules["segmenter"].startswith("transformers_modules.")
            folder = folders[{"main": "tuned", "coarse": "coarse"}[branch]]
            others = {"wordless": "wordless", "secret": "coarse", "supervised": "supervised"}
            folder = folders.get(others.get(repo.removeprefix("alice/")), folder)
            words = {"categories": ["cat", "grass", "sky"]} if repo == "alice/wordless" else {}
            expected = pipeline("image-segmentation", model=str(folder))(str(image), **words)
            assert printed == "".join(f"{x['label']} {x['score']} {x['mask'].size}\n" for x in expected)


def test_refusals_of_the_hub_are_errors_of_one_line(hub, folders, published, tmp_path):
    folder = shutil.copytree(folders["tuned"], tmp_path / "tuned")
    before, repositories = contents(folder), {name: dict(x.branches) for name, x in hub.repositories.items()}
    failed = "HubError: The upload to alice/new failed:"
    calls = {
        f"{failed} The Hub at {hub.url} refuses the token: Invalid user token.": {"token": "hf_wrong"},
        f"{failed} The token is read-only": {"token": "hf_read"},
        f"{failed} The token belongs to carol, not to alice": {"token": "hf_carol"},
        'ValueError: "alice/" is not a repository id (owner/name)': {"repo_id": "alice/"},
        'ValueError: "a/b/c" is not a repository id (owner/name)': {"repo_id": "a/b/c"},
        'ValueError: "x y" is not a repository id (owner/name)': {"base_model": "x y"},
        f'ValueError: "{tmp_path}" is not a model folder: config.json cannot be read': {"folder": str(tmp_path)},
    }
    requests = [("push_to_hub", {"folder": str(folder), "repo_id": "alice/new", **x}) for x in calls.values()]
    requests += [("check_access", {"repo_id": "new"}), ("check_access", {"repo_id": "alice/new", "token": "hf_wrong"})]
    done = run("-c", CALLS, cwd=tmp_path, env=environment(hub, tmp_path / "home"), input=json.dumps(requests))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results[-2] == "alice/new"
    assert results[-1].startswith(f"HubError: The Hub at {hub.url} refuses the token: Invalid user token.")
    assert results[0].endswith("ifseg push " + shlex.join([str(folder), "alice/new"]))  # the command to try again
    for expected, message in zip(calls, results, strict=False):
        assert message.startswith(expected)
        assert "\n" not in message
    assert contents(folder) == before
    assert {name: dict(x.branches) for name, x in hub.repositories.items()} == repositories


# scripts/train.py makes this check before it imports torch.
CHECK_ACCESS = """
import sys
from ifseg_hf.hub.publish import HubError, check_access
try:
    check_access("alice/new")
except HubError as error:
    print(error)
assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "There is no token for an upload to alice/new: run `hf auth login`"),
        ({"HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (
            {"HF_TOKEN": "hf_alice", "HF_ENDPOINT": "http://127.0.0.1:9"},
            "The Hub at http://127.0.0.1:9 cannot be reached",
        ),
    ],
)
def test_access_is_checked_without_importing_torch(hub, tmp_path, variables, message):
    env = environment(hub, tmp_path / "home", token=None, **variables)
    done = run("-c", CHECK_ACCESS, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(message)
    assert len(done.stdout.splitlines()) == 1


def test_the_picture_of_the_card_is_published_if_there_is_one(folders, tmp_path):
    folder = shutil.copytree(folders["tuned"], tmp_path / "pictured")
    (folder / "another.jpg").write_bytes(b"an image")
    assert not any(file.suffix == ".jpg" for file in files_to_publish(folder))
    (folder / CARD_IMAGE).write_bytes(b"the picture")
    assert [file.name for file in files_to_publish(folder) if file.suffix == ".jpg"] == [CARD_IMAGE]


def test_incomplete_folders_are_refused(folders, tmp_path):
    def copy_without(*names: str) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        folder = shutil.copytree(folders["tuned"], tmp_path / "copy")
        for name in names:
            (folder / name).unlink()
        return folder

    for missing, message in {
        "config.json": "is not a model folder: config.json cannot be read",
        "model.safetensors": "has no weights",
        "processor_config.json": "has no processor",
        "backbone_ofa.py": "lacks the code of its model",
        "modeling_ifseg.py": "lacks the code of its model",
        "trunk_ofa.py": "lacks the code of its model",
        "pipeline_ifseg.py": "lacks the code of its model",
    }.items():
        with pytest.raises(ValueError, match=message):
            files_to_publish(copy_without(missing))

    folder = copy_without()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors"):
        files_to_publish(folder)

    folder = copy_without()
    (folder / RESULTS_FILE).write_text('[{"metric": 1}]')
    with pytest.raises(ValueError, match="is not a list of evaluation results"):
        files_to_publish(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is not an IFSeg or OFA model"):
        files_to_publish(folder)


def test_repository_ids():
    check_repo_id("name")
    check_repo_id("owner/na.me-1_2")
    for wrong in ["", "a/b/c", "owner/", "/name", "a b", "owner/na--me", "owner/name.git", "./folder"]:
        with pytest.raises(ValueError, match=r"is not a repository id \(owner/name\)"):
            check_repo_id(wrong)


def test_results_are_added_to_a_card_or_replaced(hub, published, tmp_path):
    smoothed = {"smoothing_neighbors": 3, "smoothing_iterations": 25, "mean_iou": 0.41234, "mean_iou_seen": None}
    plain = {"smoothing_neighbors": 1, "smoothing_iterations": 0, "mean_iou": 0.3, "overall_accuracy": 0.5}
    evaluation = {"dataset": "some/where/streets", "split": None, "inference": "whole", "images": 7}
    later = {**evaluation, "results": [{**smoothed, "mean_iou": 0.5}]}
    requests = [
        ["add_results", {"repo_id": "alice/ifseg-test", "evaluation": results}]
        for results in ({**evaluation, "results": [smoothed, plain]}, later)
    ]
    requests.append(["add_results", {"repo_id": "alice/nowhere", "evaluation": later}])
    text = ModelCard(read(hub, "alice/ifseg-test")["README.md"]).text
    done = run("-c", CALLS, cwd=tmp_path, env=environment(hub, tmp_path / "home"), input=json.dumps(requests))
    assert done.returncode == 0, done.stderr
    first, second, third = json.loads(done.stdout)
    assert "/commit/" in first
    assert "/commit/" in second
    assert third.startswith("HubError: The results could not be added to alice/nowhere")
    card = ModelCard(read(hub, "alice/ifseg-test")["README.md"])
    assert card.text == text
    numbers = {(x.metric_type, x.metric_args["smoothing_neighbors"]): x.metric_value for x in card.data.eval_results}
    assert numbers == {("mean_iou", 3): 50.0, ("mean_iou", 1): 30.0, ("overall_accuracy", 1): 50.0}
    assert {x.dataset_name for x in card.data.eval_results} == {"streets"}


def test_retry_command_repeats_the_upload():
    command = publish.retry_command(Path("my words"), "alice/new", True, "v1", "It's new", None)
    options = ["--private", "--revision", "v1", "--commit-message", "It's new"]
    assert shlex.split(command) == ["ifseg", "push", "my words", "alice/new", *options]
