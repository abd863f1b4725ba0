"""Publishing of adapters to a Hub on loopback, and their use from there, in separate processes."""

import json
import shutil

import numpy as np
import pytest
from hub_client import environment, run
from hub_server import Blob, HubServer, Repository
from huggingface_hub import ModelCard
from PIL import Image

from ifseg_hf import IFSegProcessor
from ifseg_hf.adapters import add_lora, save_adapter
from ifseg_hf.hub.adapter_repository import adapter_content
from ifseg_hf.hub.publish import push_to_hub
from ifseg_hf.loading import load_segmentation_model
from ifseg_hf.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_WORDS, EMBEDDED, NANO
from ifseg_hf.training.config import SETTINGS_FILE, TrainingConfig

WORDS = ["sky", "wet|road", "car"]
# Prints the labels of a pipeline, and the reason why an adapter cannot be used without peft.
USE = """
import json, sys, ifseg_hf
from transformers import pipeline

pipe = pipeline("image-segmentation", model="alice/street-words")
pipe.load_adapter("alice/street-words", "again")
labels = [sorted(x["label"] for x in pipe(sys.argv[1], adapter=name)) for name in (None, "again")]
print(json.dumps([labels, pipe.model.config.id2label]))
"""
WITHOUT_PEFT = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "peft" else find_spec(name, package)
import ifseg_hf
from transformers import pipeline
try:
    pipeline("image-segmentation", model="alice/street-words")
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_alice": "alice"}) as server:
        yield server
    assert server.unknown == []


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter of the embedded model, as training writes it."""
    folder = tmp_path_factory.mktemp("saved") / "street"
    model = load_segmentation_model(NANO)
    model.set_words(**IFSegProcessor.from_pretrained(NANO).encode_categories(WORDS))
    add_lora(model, 4, EMBEDDED)
    save_adapter(model, folder)
    settings = TrainingConfig(WORDS, str(folder), lora=True, lora_rank=4, cpu=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings.to_dict()))
    (folder / "checkpoint-1").mkdir()
    return folder


@pytest.fixture(scope="module")
def published(hub, adapter, tmp_path_factory):
    """The output of `ifseg push` to a repository that held a model."""
    hub.repositories["alice/street-words"] = older = Repository(private=False)
    older.commit("main", {name: Blob(b"{}", size=2) for name in ("config.json", "model.safetensors", "notes")}, "Old")
    work = tmp_path_factory.mktemp("work")
    return run("-m", "ifseg_hf", "push", adapter, "alice/street-words", cwd=work, env=environment(hub, work / "home"))


def test_an_adapter_is_published_in_one_commit(hub, published):
    assert published.returncode == 0, published.stderr
    assert hub.repositories["alice/street-words"].messages == ["Old", "Upload IFSeg adapter"]
    assert set(hub.files("alice/street-words")) == {
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        ADAPTER_WORDS,
        SETTINGS_FILE,
        "README.md",
        "notes",
    }


def test_the_card_names_base_model_and_words(hub, published):
    card = ModelCard(hub.files("alice/street-words")["README.md"].decode())
    assert card.data.base_model == EMBEDDED
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "image-segmentation")
    assert "sky, wet\\|road, car" in card.content
    assert "--adapter alice/street-words" in card.content
    assert "| lora_rank | 4 |" in card.content


def test_an_adapter_is_used_from_the_hub(hub, published, tmp_path):
    image = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(image)
    env = environment(hub, tmp_path / "home")
    done = run("-c", USE, image, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    labels, names = json.loads(done.stdout.splitlines()[-1])
    assert labels[0] == labels[1] != []
    assert list(names.values()) == WORDS
    done = run("-m", "ifseg_hf", "segment", image, "--adapter", "alice/street-words", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "a_mask.png").is_file()
    done = run("-c", WITHOUT_PEFT, cwd=tmp_path, env=env)
    assert 'needs peft, which is not installed: pip install "ifseg-hf[peft]"' in done.stdout, done.stderr


def test_a_base_model_in_a_folder_needs_a_hub_id(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "own")
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    file = tmp_path / "own" / ADAPTER_CONFIG
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="a folder of this machine: publish this model first"):
        push_to_hub(tmp_path / "own", "alice/own")
    content = adapter_content(tmp_path / "own", "alice/base")
    assert json.loads(content[ADAPTER_CONFIG])["base_model_name_or_path"] == "alice/base"


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_WORDS])
def test_incomplete_adapters_are_not_published(adapter, tmp_path, name):
    shutil.copytree(adapter, tmp_path / "own")
    (tmp_path / "own" / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}"):
        push_to_hub(tmp_path / "own", "alice/own")
