"""Publishing against a Hub on loopback, spoken to by the real huggingface_hub client in processes of their own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import ROOT, code_blocks, environment, run, save_small_processor, save_tuned_model
from hub_server import Blob, HubServer, Repository
from huggingface_hub import ModelCard
from PIL import Image
from tiny_model import save_tiny_model
from transformers import pipeline

from ifseg_hf import IFSegForConditionalGeneration, IFSegProcessor
from ifseg_hf.evaluation.evaluate import load_segmenter
from ifseg_hf.hub.publish import RESULTS_FILE, check_repo_id, files_to_publish, model_card
from ifseg_hf.processing import segmentation_maps

CODE = {"configuration_ifseg.py", "modeling_ifseg.py", "modeling_ofa.py"}
PROCESSING = "image_processing pipeline post_processing processing prompt segmenter sliding_window"
CODE |= {f"{name}_ifseg.py" for name in PROCESSING.split()}
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
# Calls of the library, as JSON in and out: one process does them all.
CALLS = """
import json, sys
from ifseg_hf.hub.publish import HubError, add_results, check_access, push_to_hub

told = []
for name, arguments in json.load(sys.stdin):
    try:
        result = globals()[name](**arguments)
        told.append(result if isinstance(result, str) else result.commit_url)
    except (HubError, ValueError) as error:
        told.append(f"{type(error).__name__}: {error}")
print(json.dumps(told))
"""
# Blocks of code, each on its own; what each printed.
BLOCKS = """
import contextlib, importlib.util, io, json, sys

told = []
for block in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = {}
        exec(block, names)
    told.append([printed.getvalue(), {name: type(x).__module__ for name, x in names.items()}])
try:
    has_package = importlib.util.find_spec("ifseg_hf") is not None
except ModuleNotFoundError:
    has_package = False
print(json.dumps([told, has_package]))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_alice": "alice", "hf_carol": "carol"}, readers={"hf_read": "alice"}) as server:
        yield server
    assert server.unknown == []


def save_supervised_model(folder: Path) -> Path:
    """As training on crops of photos leaves it."""
    save_tuned_model(folder, ["cat", "wet grass", "sky"])
    processor = IFSegProcessor.from_pretrained(folder)
    processor.image_processor.sliding_window, processor.image_processor.smoothing_iterations = 32, 0
    processor.save_pretrained(folder)
    settings = json.loads((folder / "word_map_training.json").read_text())
    settings |= {"stage": "supervised", "dataset": "photos"}
    (folder / "word_map_training.json").write_text(json.dumps(settings))
    return folder


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
    save_tiny_model(folders["ofa"], IFSegForConditionalGeneration)
    save_tiny_model(folders["wordless"])
    save_small_processor(folders["ofa"])
    save_small_processor(folders["wordless"])
    (folders["coarse"] / RESULTS_FILE).write_text(json.dumps([RESULT]))
    return folders


@pytest.fixture(scope="module")
def published(hub, folders, tmp_path_factory):
    """The Hub after all of the models are there; what each call returned."""
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
    # One repository is older than its model.
    hub.repositories["alice/wordless"] = older = Repository(private=False)
    older.commit("main", {name: Blob(b"x", size=1) for name in ("model-00001-of-00002.safetensors", "notes")}, "Old")
    work = tmp_path_factory.mktemp("work")
    home = work / "home"
    asked = [("push_to_hub", {**x, "folder": str(folders[x["folder"]])}) for x in calls.values()]
    before = {name: contents(folder) for name, folder in folders.items()}
    done = run("-c", CALLS, cwd=work, env=environment(hub, home), input=json.dumps(asked))
    assert done.returncode == 0, done.stderr
    assert {name: contents(folder) for name, folder in folders.items()} == before
    return dict(zip(calls, json.loads(done.stdout), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read(hub: HubServer, repo: str, branch: str = "main") -> dict[str, str]:
    """The text files in a repository."""
    return {name: x.decode() for name, x in hub.files(repo, branch).items() if not name.endswith(".safetensors")}


def test_a_repository_holds_the_model_and_nothing_else(hub, folders, published):
    files = hub.files("alice/ifseg-test")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "word_map_training.json",
        *CODE,
        *PROCESSOR,
    }
    for name in files.keys() - {".gitattributes", "README.md", "word_map_training.json"}:
        assert files[name] == (folders["tuned"] / name).read_bytes(), name
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModelForSemanticSegmentation"] == "modeling_ifseg.IFSegForSemanticSegmentation"
    assert config["custom_pipelines"]["image-segmentation"]["impl"] == "pipeline_ifseg.IFSegImageSegmentationPipeline"
    assert hub.repositories["alice/ifseg-test"].messages[:2] == ["initial commit", "Three words"]
    commit = hub.repositories["alice/ifseg-test"].branches["main"]
    assert published["tuned"] == published["again"] == f"{hub.url}/alice/ifseg-test/commit/{commit}"  # nothing changed


def test_weights_left_over_from_before_go(hub, published):
    files = hub.files("alice/wordless")
    assert {"model.safetensors", "notes"} <= set(files)
    assert "model-00001-of-00002.safetensors" not in files


def test_nothing_of_the_machine_is_published(hub, folders, published):
    for repo, repository in hub.repositories.items():
        for branch in repository.branches:
            for name, text in read(hub, repo, branch).items():
                for private in (str(folders["tuned"].parent), str(ROOT), "output_dir"):
                    assert private not in text, (repo, branch, name)
    settings = json.loads(hub.files("alice/ifseg-test")["word_map_training.json"])
    assert settings["model"] == "ifseg-ofa-nano"
    assert settings["steps"] == 7
    assert "model" not in json.loads(hub.files("alice/ifseg-test", "coarse")["word_map_training.json"])


def test_branches_and_private_repositories(hub, published):
    assert "/commit/" in published["branch"]
    assert set(hub.repositories["alice/ifseg-test"].branches) == {"main", "coarse"}
    assert hub.repositories["alice/secret"].private
    assert not hub.repositories["alice/ifseg-test"].private
    assert published["public already"].startswith("HubError")
    assert "alice/ifseg-test exists and is public" in published["public already"]


def test_a_card_says_what_it_is(hub, published):
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
    assert "## Words" not in card.text


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photos") / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("package", [False, True])
def test_the_code_of_a_card_runs_as_printed(hub, folders, published, photo, tmp_path, package):
    """In a fresh process and cache, with the package and without."""
    shutil.copy(photo, tmp_path)
    cards = [("alice/ifseg-test", "main"), ("alice/ifseg-test", "coarse"), ("alice/ifseg-ofa-base", "main")]
    cards += [("alice/wordless", "main"), ("alice/secret", "main"), ("alice/supervised", "main")]
    blocks = [(card, block) for card in cards for block in code_blocks(read(hub, *card)["README.md"])]
    assert len(blocks) == 2 * len(cards)
    blocks = [(card, block) for card, block in blocks if ("ifseg_hf" in block) == package]
    env = environment(hub, tmp_path / "home", package=package)
    done = run("-c", BLOCKS, cwd=tmp_path, env=env, input=json.dumps([block for _, block in blocks]))
    assert done.returncode == 0, done.stderr
    told, has_package = json.loads(done.stdout)
    assert has_package == package
    for ((repo, branch), _), (printed, modules) in zip(blocks, told, strict=True):
        if package:
            assert modules["model"].startswith("ifseg_hf.modeling"), repo
        elif repo == "alice/ifseg-ofa-base":
            assert modules["model"].startswith("transformers_modules.")
            assert printed.startswith("[")  # a sentence of some kind
        else:
            assert modules["segmenter"].startswith("transformers_modules.")
            folder = folders[{"main": "tuned", "coarse": "coarse"}[branch]]
            others = {"wordless": "wordless", "secret": "coarse", "supervised": "supervised"}
            folder = folders.get(others.get(repo.removeprefix("alice/")), folder)
            words = {"categories": ["cat", "grass", "sky"]} if repo == "alice/wordless" else {}
            expected = pipeline("image-segmentation", model=str(folder))(str(photo), **words)
            assert printed == "".join(f"{x['label']} {x['score']} {x['mask'].size}\n" for x in expected)


def test_what_the_hub_refuses_is_told_in_a_line(hub, folders, published, tmp_path):
    folder = shutil.copytree(folders["tuned"], tmp_path / "tuned")
    before, repositories = contents(folder), {name: dict(x.branches) for name, x in hub.repositories.items()}
    failed = "HubError: The upload to alice/new failed:"
    calls = {
        f"{failed} The Hub at {hub.url} refuses the token: Invalid user token.": {"token": "hf_wrong"},
        f"{failed} The token may only read": {"token": "hf_read"},
        f"{failed} The token is one of carol, which is not alice": {"token": "hf_carol"},
        'ValueError: "alice/" is no repository id (owner/name)': {"repo_id": "alice/"},
        'ValueError: "a/b/c" is no repository id (owner/name)': {"repo_id": "a/b/c"},
        'ValueError: "x y" is no repository id (owner/name)': {"base_model": "x y"},
        f'ValueError: "{tmp_path}" holds no model: config.json can\'t be read': {"folder": str(tmp_path)},
    }
    asked = [("push_to_hub", {"folder": str(folder), "repo_id": "alice/new", **x}) for x in calls.values()]
    # For a script before a long run: the same without a folder.
    asked += [("check_access", {"repo_id": "new"}), ("check_access", {"repo_id": "alice/new", "token": "hf_wrong"})]
    done = run("-c", CALLS, cwd=tmp_path, env=environment(hub, tmp_path / "home"), input=json.dumps(asked))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told[-2] == "alice/new"
    assert told[-1].startswith(f"HubError: The Hub at {hub.url} refuses the token: Invalid user token.")
    assert told[0].endswith("alice/new")  # the command that tries again
    for expected, message in zip(calls, told, strict=False):
        assert message.startswith(expected)
        assert "\n" not in message
    assert contents(folder) == before
    assert {name: dict(x.branches) for name, x in hub.repositories.items()} == repositories


# Without torch, in a second: this is what scripts/train.py runs before anything else.
ALONE = """
import sys
from ifseg_hf.hub.publish import HubError, check_access
try:
    check_access("alice/new")
except HubError as error:
    print(error)
assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "There is no token to upload to alice/new with: run `hf auth login`"),
        ({"HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (
            {"HF_TOKEN": "hf_alice", "HF_ENDPOINT": "http://127.0.0.1:9"},
            "The Hub at http://127.0.0.1:9 can't be reached",
        ),
    ],
)
def test_what_is_missing_is_told_before_torch_is_imported(hub, tmp_path, variables, told):
    env = environment(hub, tmp_path / "home", token=None, **variables)
    done = run("-c", ALONE, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(told)
    assert len(done.stdout.splitlines()) == 1


def test_a_folder_that_is_not_whole_is_refused(folders, tmp_path):
    def copy_without(*names: str) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        folder = shutil.copytree(folders["tuned"], tmp_path / "copy")
        for name in names:
            (folder / name).unlink()
        return folder

    for missing, told in {
        "config.json": "holds no model: config.json can't be read",
        "model.safetensors": "holds no weights",
        "processor_config.json": "holds no processor",
        "modeling_ifseg.py": "lacks the code of its model",
        "pipeline_ifseg.py": "lacks the code of its model",
    }.items():
        with pytest.raises(ValueError, match=told):
            files_to_publish(copy_without(missing))

    folder = copy_without()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors"):
        files_to_publish(folder)

    folder = copy_without()
    (folder / RESULTS_FILE).write_text('[{"metric": 1}]')
    with pytest.raises(ValueError, match="is no list of results"):
        files_to_publish(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds no IFSeg model"):
        files_to_publish(folder)


def test_repository_ids():
    check_repo_id("name")
    check_repo_id("owner/na.me-1_2")
    for wrong in ["", "a/b/c", "owner/", "/name", "a b", "owner/na--me", "owner/name.git", "./folder"]:
        with pytest.raises(ValueError, match=r"is no repository id \(owner/name\)"):
            check_repo_id(wrong)


def test_results_are_added_to_a_card_and_replaced(hub, published, tmp_path):
    smoothed = {"smoothing_neighbors": 3, "smoothing_iterations": 25, "mean_iou": 0.41234, "mean_iou_seen": None}
    plain = {"smoothing_neighbors": 1, "smoothing_iterations": 0, "mean_iou": 0.3, "overall_accuracy": 0.5}
    evaluation = {"dataset": "some/where/streets", "split": None, "inference": "whole", "images": 7}
    later = {**evaluation, "results": [{**smoothed, "mean_iou": 0.5}]}
    asked = [
        ["add_results", {"repo_id": "alice/ifseg-test", "evaluation": told}]
        for told in ({**evaluation, "results": [smoothed, plain]}, later)
    ]
    asked.append(["add_results", {"repo_id": "alice/nowhere", "evaluation": later}])
    text = ModelCard(read(hub, "alice/ifseg-test")["README.md"]).text
    done = run("-c", CALLS, cwd=tmp_path, env=environment(hub, tmp_path / "home"), input=json.dumps(asked))
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


def test_the_code_of_a_model_of_crops_does_what_its_numbers_need(folders, photo, monkeypatch):
    """Both blocks, on the model in its folder: what the evaluation of it does."""
    monkeypatch.chdir(photo.parent)
    card = model_card(folders["supervised"], str(folders["supervised"]))
    assert "trained on crops of 32 x 32 pixels" in card.text
    alone, package = code_blocks(card.content)
    names = {}
    exec(package, names)
    segmenter = load_segmenter(folders["supervised"])
    assert segmenter.inference == "slide"
    outputs = segmenter(segmenter.preprocess([np.asarray(Image.open(photo))]))
    assert torch.equal(names["mask"], segmentation_maps(outputs, [(60, 90)], iterations=0)[0])
    whole = names["processor"].post_process_semantic_segmentation(names["model"](**names["inputs"]), [(60, 90)])
    assert not torch.equal(names["mask"], whole[0])
    used = {}
    exec(alone, used)
    for segment in used["segmenter"](str(photo)):
        category = names["model"].config.label2id[segment["label"]]
        assert (np.asarray(segment["mask"]) > 0).tolist() == (names["mask"] == category).tolist()


@pytest.mark.parametrize(
    ("stage", "told"), [("supervised", "photos and their masks"), ("self-training", "own guesses")]
)
def test_a_card_of_a_model_of_photos_does_not_call_it_image_free(folders, tmp_path, stage, told):
    folder = shutil.copytree(folders["tuned"], tmp_path / "photos")
    settings = json.loads((folder / "word_map_training.json").read_text())
    settings |= {"stage": stage, "dataset": str(tmp_path), "categories": {"cat": ["lion"], "wet grass": [], "sky": []}}
    (folder / "word_map_training.json").write_text(json.dumps(settings))
    card = model_card(folder, "alice/photos")
    assert told in card.text
    assert "no photo and no mask" not in card.text
    assert "image-free" not in card.data.tags
    assert "finer words" not in card.text
    assert str(tmp_path) not in card.text


def test_words_are_text_in_a_card(folders, tmp_path):
    folder = shutil.copytree(folders["tuned"], tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "a_b*", "1": "<i>", "2": "[x](y)"}
    (folder / "config.json").write_text(json.dumps(config))
    assert r"a\_b\*, \<i\>, \[x\](y)" in model_card(folder, "alice/odd").text
