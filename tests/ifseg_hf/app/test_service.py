"""What the page does, without a browser: segmenting, tuning in another process, stopping, downloads."""

import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ifseg_hf
from ifseg_hf.app.images import PageError
from ifseg_hf.app.segmentation import PostProcessing
from ifseg_hf.app.service import Service, Visit
from ifseg_hf.app.tuning_run import Tuning, TuningRuns
from ifseg_hf.app.vocabularies import tuned_vocabularies
from ifseg_hf.cache import cache_entries, locked, shrink_cache

PREVIEW = "This is a preview: the model was not tuned on these words."


@pytest.fixture
def visit():
    return Visit()


def tune_now(service, words, **settings):
    """The vocabulary that the tuning in this process puts into the cache."""
    ifseg_hf.tune(words, model=service.name, steps=2, **settings)
    return tuned_vocabularies()[0]


# Segmenting -----------------------------------------------------------------------------------------------------------


def test_an_untuned_model_gives_a_preview(service, visit, request_for):
    view = service.segment(visit, request_for())
    assert view.sentences == (PREVIEW,)
    assert not view.error
    assert view.picture["names"] == ["sky", "grass"]
    assert visit.segmentation.size == (120, 90)


def test_a_single_word_has_a_background(service, visit, request_for):
    assert service.segment(visit, request_for("sky")).picture["names"] == ["sky", "background"]
    assert service.segment(visit, request_for(background=True)).picture["names"] == ["sky", "grass", "background"]


def test_five_hundred_words_are_segmented_with_a_sentence(service, visit, request_for):
    view = service.segment(visit, request_for(", ".join(f"word {i}" for i in range(500))))
    assert len(view.picture["names"]) == 500
    (sentence, _) = view.sentences
    assert sentence.startswith("The model reads the first ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": " "}, "Type at least one word, such as: sky, road, car."),
        ({"words": "cat, cat"}, 'The category "cat" is given twice.'),
        ({"words": "x" * 3000 + ", cat"}, "use a shorter prompt or name"),
        ({"path": None}, "Choose an image first"),
        ({"path": "/nowhere/a.jpg"}, '"a.jpg" cannot be read as an image'),
    ],
)
def test_errors_are_one_sentence_and_clear_the_picture(service, visit, request_for, changes, message):
    service.segment(visit, request_for())
    view = service.segment(visit, request_for(**changes))
    assert view.error
    assert view.picture is None
    (sentence,) = view.sentences
    assert message in sentence
    assert "\n" not in sentence
    assert visit.segmentation is None


def test_other_post_processing_runs_no_model(service, visit, request_for):
    assert service.post_process(visit, PostProcessing(1, 0)) is None
    first = service.segment(visit, request_for()).picture
    segmenter, _ = service.models.get(service.start)
    segmenter.model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    assert service.post_process(visit, PostProcessing(4, 3)) == first
    assert service.post_process(visit, PostProcessing(1, 0))["probe"] != first["probe"]
    assert service.post_process(visit, PostProcessing(4, 3, 1.0))["without"] == "100 %"
    service.download(visit, "mask", PostProcessing(4, 3, 1.0))
    service.download(visit, "overlay", PostProcessing(1, 0))


def test_a_new_image_without_words_is_looked_at(service, visit, request_for, tmp_path):
    assert service.look(visit, request_for("")).sentences == ("Now type words and press Segment.",)
    (tmp_path / "a.jpg").write_text("no image")
    view = service.look(visit, request_for("", path=str(tmp_path / "a.jpg")))
    assert view.error
    assert view.sentences == ('"a.jpg" is not an image: choose a JPEG, PNG or WebP file.',)


# Vocabularies ---------------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_used_for_its_words(service, visit, request_for, tmp_path):
    vocabulary = tune_now(service, ["sky", "grass"])
    with_background = tune_now(service, ["sky", "grass"], background="default")
    view = service.segment(visit, request_for("grass, sky"))
    assert view.sentences == ()
    assert view.picture["names"] == ["grass", "sky"]
    assert visit.model == vocabulary.folder
    assert service.segment(visit, request_for(background=True)).sentences == ()
    assert visit.model == with_background.folder
    assert service.segment(visit, request_for("sky, road")).sentences == (PREVIEW,)
    assert visit.model is None
    labels = [label for label, _ in service.vocabularies(visit)]
    assert labels == ["sky, grass (and background)", "sky, grass"]


def test_a_hierarchical_vocabulary_is_used_as_tuned(service, visit, request_for):
    vocabulary = tune_now(service, {"plant": ["grass", "tree"], "sky": ["sky", "cloud"]})
    request = request_for("plant, sky", vocabulary=str(vocabulary.folder))
    assert service.segment(visit, request).sentences == ()
    assert service.segment(visit, request_for("plant, sky")).sentences == (PREVIEW,)


def test_a_public_page_lists_own_vocabularies_only(small_nano, visit, request_for):
    service = Service(small_nano, public=True)
    vocabulary = tune_now(service, ["sky", "grass"])
    assert service.vocabularies(visit) == []
    assert service.vocabulary(visit, str(vocabulary.folder)) is None
    assert service.vocabulary(visit, "/etc") is None
    visit.tuned.append(vocabulary.folder)
    assert service.vocabularies(visit) == [("sky, grass", str(vocabulary.folder))]


def copies(vocabulary, count):
    """Copies of a tuned model in the cache, each used later than the one before."""
    folders = []
    for index in range(count):
        folders.append(vocabulary.folder.with_name(f"copy-{index}"))
        shutil.copytree(vocabulary.folder, folders[-1])
        os.utime(folders[-1], (1000 + index, 1000 + index))
    return folders


def test_a_public_page_deletes_unused_models_above_the_limit(small_nano, visit, request_for):
    service = Service(small_nano, public=True)
    vocabulary = tune_now(service, ["sky", "grass"])
    (size,) = [entry.size for entry in cache_entries()]
    oldest, *others = copies(vocabulary, 4)
    visit.tuned.append(oldest)
    service.cache_limit = 3 * size
    assert service.segment(visit, request_for(vocabulary=str(oldest))).sentences == ()
    assert visit.model == oldest
    os.utime(oldest, (1000, 1000))  # used longest ago, but in use
    assert list(service.tune(Visit(), "a", request_for("sky, road"), 2))[-1].tuned is not None
    left = {entry.folder for entry in cache_entries()}
    assert not {*others} & left
    assert {oldest, vocabulary.folder} <= left
    assert service.download(visit, "model", PostProcessing(4, 3)).is_file()
    visit.model = None
    Service(small_nano, public=True, cache_limit=size)
    assert oldest not in {entry.folder for entry in cache_entries()}


def test_a_private_page_deletes_no_models(small_nano):
    vocabulary = tune_now(Service(small_nano), ["sky", "grass"])
    copies(vocabulary, 2)
    Service(small_nano, cache_limit=1)
    assert len(cache_entries()) == 3


def test_models_being_written_are_not_deleted(small_nano):
    vocabulary = tune_now(Service(small_nano), ["sky", "grass"])
    first, second = copies(vocabulary, 2)
    (size, *_) = [entry.size for entry in cache_entries()]
    with locked(first):
        assert [entry.folder for entry in shrink_cache(2 * size)] == [second]
    assert [entry.folder for entry in shrink_cache(0, {vocabulary.folder})] == [first]
    assert [entry.folder for entry in shrink_cache(0)] == [vocabulary.folder]


def test_an_adapter_opens_with_its_words(service, tmp_path, visit, request_for):
    pytest.importorskip("peft", reason="peft is not installed")
    ifseg_hf.tune(["sky", "road"], model=service.name, lora=True, steps=2, output_dir=str(tmp_path / "street"))
    page = Service(str(tmp_path / "street"))
    assert (page.words, page.name) == (["sky", "road"], service.name)
    assert page.segment(visit, request_for("road, sky")).sentences == ()
    assert page.segment(visit, request_for("sky, grass")).sentences == (PREVIEW,)
    last = list(page.tune(visit, "a", request_for("sky, grass"), 2))[-1]
    assert last.tuned.words == ("sky", "grass")
    assert page.segment(visit, request_for("sky, grass")).sentences == ()


def test_a_tuned_model_opens_with_its_words(service, tmp_path, visit, request_for):
    ifseg_hf.tune(["sky"], model=service.name, steps=2, output_dir=str(tmp_path / "tuned"))
    tuned = Service(str(tmp_path / "tuned"))
    assert tuned.words == ["sky"]
    assert service.words == []
    assert tuned.segment(visit, request_for("sky")).sentences == ()


# Tuning ---------------------------------------------------------------------------------------------------------------


def test_tuning_shows_progress_and_is_kept(service, visit, request_for):
    states = list(service.tune(visit, "a", request_for(), 3))
    assert states[0].sentence == "Loading the model ..."
    last = states[-1]
    assert (last.running, last.error, last.sentence) == (False, False, "Tuned: 3 steps.")
    assert last.tuned.words == ("sky", "grass")
    assert len(last.progress.losses) == 3
    assert visit.tuned == [last.tuned.folder]
    (entry,) = cache_entries()
    assert entry.folder == last.tuned.folder
    assert ifseg_hf.tuning.tuned_model(Tuning({"model": service.name, "categories": ["sky", "grass"]}).config)
    assert service.segment(visit, request_for()).sentences == ()
    file = service.download(visit, "model", PostProcessing(4, 3))
    with zipfile.ZipFile(file) as archive:
        archive.extractall(file.parent)
        settings = json.loads(archive.read("sky-grass/training_config.json"))
        assert {"sky-grass/README.md", "sky-grass/modeling_ifseg.py"} <= set(archive.namelist())
    assert settings["categories"] == ["sky", "grass"]
    assert "output_dir" not in settings
    assert Service(str(file.parent / "sky-grass")).words == ["sky", "grass"]


def test_a_stopped_tuning_continues_later(service, visit, request_for):
    for state in service.tune(visit, "a", request_for(), 400):
        if state.progress.step >= 2:
            service.runs.stop("a")
    step = state.progress.step
    assert 2 <= step < 400
    assert state.sentence == f"Stopped after {step} of 400 steps. The same words and steps continue from there."
    (entry,) = cache_entries()
    assert not entry.complete
    assert visit.tuned == []
    steps = []
    for state in service.tune(visit, "a", request_for(), 400):
        steps.append(state.progress.step)
        if state.progress.step > step:
            service.runs.stop("a")
    assert steps[0] == step  # the log of the first part
    assert steps[-1] > step


def test_one_visitor_waits_for_another_and_can_stop_waiting(service, request_for):
    assert service.runs.slots.acquire(blocking=False)
    states = service.tune(Visit(), "b", request_for(), 3)
    assert next(states).sentence == "Waiting: somebody else is tuning."
    (again,) = service.tune(Visit(), "b", request_for(), 3)
    assert again.error
    assert again.sentence.startswith("This page is tuning already")
    service.runs.stop("b")
    assert list(states)[-1].sentence == "Stopped after 0 of 3 steps."
    service.runs.slots.release()
    assert service.runs.slots.acquire(blocking=False)


def test_a_closed_page_ends_its_tuning(service, visit, request_for):
    states = service.tune(visit, "a", request_for(), 400)
    next(states)
    tuning = service.runs._running["a"]
    assert tuning.is_running()
    states.close()
    for _ in range(600):
        if not tuning.is_running():
            break
        time.sleep(0.1)
    assert not tuning.is_running()
    assert tuning.result() == {"stopped": True}


@pytest.mark.parametrize(
    ("words", "steps", "message"),
    [("", 3, "Type at least one word"), ("sky, grass", 0, "steps=0"), ("x" * 3000 + ", cat", 3, "positions")],
)
def test_wrong_tunings_are_one_sentence(service, visit, request_for, words, steps, message):
    *_, state = service.tune(visit, "a", request_for(words), steps)
    assert state.error
    assert not state.running
    assert message in state.sentence
    assert cache_entries() == []
    assert service.runs._running == {}


def test_a_worker_that_dies_is_reported(service, visit, request_for, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("ifseg_hf.app.tuning_run.sys.executable", "false")
    *_, state = service.tune(visit, "a", request_for(), 3)
    assert state.error
    assert state.sentence.startswith("The tuning ended without a result (exit status 1)")


def test_all_tunings_are_stopped_at_the_end():
    runs, tunings = TuningRuns(), [Tuning.__new__(Tuning) for _ in range(2)]
    for index, tuning in enumerate(tunings):
        tuning.stopping, tuning._process = False, None
        runs.add(str(index), tuning)
    runs.stop_all()
    assert all(tuning.stopping for tuning in tunings)


# Downloads ------------------------------------------------------------------------------------------------------------


def test_downloads_have_the_size_of_the_image(service, visit, request_for, tmp_path, monkeypatch):
    monkeypatch.setattr("ifseg_hf.app.segmentation.SHOWN_PIXELS", 1000)
    service.segment(visit, request_for())
    assert visit.segmentation.image.size == (36, 27)
    how = PostProcessing(4, 3)
    with Image.open(service.download(visit, "mask", how)) as mask:
        assert mask.size == (120, 90)
        assert json.loads(mask.text["categories"]) == ["sky", "grass"]
        assert set(np.unique(mask)) <= {0, 1}
        assert Path(mask.filename).name == "field_mask.png"
    with Image.open(service.download(visit, "overlay", how)) as overlay:
        assert overlay.width >= 120
        assert overlay.height > 90  # with a legend below


def test_earlier_downloads_are_deleted(service, visit, request_for):
    service.segment(visit, request_for())
    first, second = (service.download(visit, "mask", PostProcessing(4, 3)) for _ in range(2))
    os.utime(first.parent, (0, 0))
    third = service.download(visit, "mask", PostProcessing(4, 3))
    assert [file.is_file() for file in (first, second, third)] == [False, True, True]


def test_downloads_that_are_not_there_are_one_sentence(service, visit, request_for, image_file):
    how = PostProcessing(4, 3)
    for kind in ("mask", "overlay", "model"):
        with pytest.raises(PageError, match="There is no"):
            service.download(visit, kind, how)
    service.segment(visit, request_for())
    Path(image_file).unlink()
    with pytest.raises(PageError, match="upload it again"):
        service.download(visit, "overlay", how)
    visit.model = Path("/nowhere/tuned-0123")
    with pytest.raises(PageError, match="deleted from the cache"):
        service.download(visit, "model", how)
