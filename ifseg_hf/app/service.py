"""What the page does, without Gradio: segmenting, post-processing, tuning, and the state of one visitor."""

import os
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ifseg_hf.adapters import split_adapter
from ifseg_hf.app.downloads import new_folder, write_mask, write_model, write_overlay
from ifseg_hf.app.images import PageError, UploadedImage, read_upload
from ifseg_hf.app.pictures import viewer_data
from ifseg_hf.app.segmentation import Models, PostProcessing, Segmentation, segment_image
from ifseg_hf.app.tuning_run import Progress, Tuning, TuningRuns
from ifseg_hf.app.vocabularies import Vocabulary, choose_model, read_vocabulary, tuned_vocabularies
from ifseg_hf.app.words import background_of, prompt_note, read_words
from ifseg_hf.cache import shrink_cache
from ifseg_hf.hub.published import resolve_checkpoint
from ifseg_hf.training.recipes import training_config

__all__ = ["Request", "Service", "TuningState", "View", "Visit"]

PUBLIC_CACHE = 5_000_000_000
"""Bytes of tuned models that a public page keeps."""
_POLL = 0.25  # seconds between two looks at the progress of a tuning


@dataclass(eq=False)
class Visit:
    """The state of one visitor of the page, equal to itself alone.

    Attributes:
        segmentation: of the image that is shown, if there is one.
        model: folder of the tuned model in use; `None` for the page's model.
        tuned: folders of the models that this visitor tuned.
    """

    segmentation: Segmentation | None = None
    model: Path | None = None
    tuned: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What a visitor has entered.

    Attributes:
        path: the uploaded image, if there is one.
        words: as typed. rest_is_background: whether what is no word is background.
        vocabulary: folder of the chosen vocabulary, or "".
        how: the post-processing.
    """

    path: str | None
    words: str
    rest_is_background: bool
    vocabulary: str
    how: PostProcessing


@dataclass(frozen=True)
class View:
    """What is shown: the viewer's data (see [`viewer_data`]) or `None`, and sentences, which may be errors."""

    picture: dict[str, Any] | None
    sentences: tuple[str, ...] = ()
    error: bool = False


@dataclass(frozen=True)
class TuningState:
    """A tuning's progress, with a sentence in place of steps and time left; and, at its end, the tuned vocabulary."""

    progress: Progress
    sentence: str = ""
    running: bool = True
    error: bool = False
    tuned: Vocabulary | None = None


class Service:
    """The page's model and its visitors' tunings.

    Args:
        model: folder or Hub id of the page's model; a published OFA is converted first. Of an adapter, its base model
            is what visitors tune.
        trust_remote_code: run the code saved with a model of another backbone.
        public: list only the vocabularies that a visitor tuned, not all in the cache, and delete tuned models that no
            visitor uses, those used longest ago first, once there are more than `cache_limit` bytes of them.

    Raises:
        `ValueError` or `FileNotFoundError`: the model cannot be loaded.
    """

    def __init__(
        self, model: str, trust_remote_code: bool = False, public: bool = False, cache_limit: int = PUBLIC_CACHE
    ):
        self.trust_remote_code, self.public = trust_remote_code, public
        self.start = resolve_checkpoint(model)
        self.name = str(split_adapter(model)[0])  # what visitors tune
        self.models = Models(PartialState().device, trust_remote_code)
        segmenter, _ = self.models.get(self.start)
        self.smoothing = segmenter.smoothing
        config = segmenter.model.config
        background = len(config.background or ())
        self.words = [config.id2label[i] for i in range(len(config.category_ids) - background)] if self.is_tuned else []
        self.steps = training_config({"output_dir": "", "model": self.name, "categories": ["cat", "dog"]}).steps
        self._downloads = tempfile.TemporaryDirectory(prefix="ifseg-")  # deleted at the end of the process
        self.cache_limit = cache_limit if public else None
        self._visits: weakref.WeakSet[Visit] = weakref.WeakSet()
        self._choosing = threading.Lock()  # held while a model in the cache is chosen, or others are deleted
        self.runs = TuningRuns(slots=max(1, (os.cpu_count() or 1) // 4))
        self._shrink_cache()

    @property
    def is_tuned(self) -> bool:
        """Whether the page's model carries words that it was tuned on."""
        config = self.models.get(self.start)[0].model.config
        return config.is_tuned and config.category_ids is not None

    # Vocabularies -----------------------------------------------------------------------------------------------------

    def vocabularies(self, visit: Visit) -> list[tuple[str, str]]:
        """Returns label and folder of the vocabularies that the visitor may choose from, last used first."""
        found = [x for x in tuned_vocabularies() if not self.public or x.folder in visit.tuned]
        return [(x.label if x.model == self.name else f"{x.label} [{x.model}]", str(x.folder)) for x in found]

    def vocabulary(self, visit: Visit, folder: str) -> Vocabulary | None:
        """Returns the vocabulary in a folder, if the visitor may choose it."""
        if folder not in [listed for _, listed in self.vocabularies(visit)]:
            return None
        return read_vocabulary(Path(folder))

    # Images -----------------------------------------------------------------------------------------------------------

    def segment(self, visit: Visit, request: Request) -> View:
        """Runs a model on the image, keeps its outputs in the visit, and returns what is shown."""
        visit.segmentation = None
        if not request.path:
            return View(None, ("Choose an image first: drop one on the page, or take one with the camera.",), True)
        try:
            upload = read_upload(request.path)
            return self._segment(visit, request, upload)
        except PageError as error:
            return View(None, (str(error),), True)
        except (OSError, ValueError) as error:
            return View(None, (" ".join(str(error).split()),), True)

    def look(self, visit: Visit, request: Request) -> View:
        """Reads a new image without segmenting it, and returns what is shown."""
        visit.segmentation = None
        try:
            note = read_upload(request.path).note
            return View(None, tuple(filter(None, (note, "Now type words and press Segment."))))
        except PageError as error:
            return View(None, (str(error),), True)

    def _segment(self, visit: Visit, request: Request, upload: UploadedImage) -> View:
        words = read_words(request.words)
        background = background_of(words, request.rest_is_background)
        with self._choosing:
            chosen = self.vocabulary(visit, request.vocabulary)
            choice = choose_model(self.start, self.name, words, background, chosen, self.trust_remote_code)
            self._use(visit, Path(choice.folder) if choice.folder != self.start else None)
        own = None if choice.own_words else words
        rest = None if choice.own_words else background
        visit.segmentation = segment_image(
            self.models, choice.folder, upload.image, request.path, own, rest, choice.tuned
        )
        segmenter, _ = self.models.get(choice.folder)
        notes = [upload.note]
        if len(words) > 20:
            notes.append(prompt_note(lambda names: segmenter.encode_words(names, background="none"), words))
        if not choice.tuned:
            notes.append("This is a preview: the model was not tuned on these words.")
        return View(viewer_data(visit.segmentation, request.how), tuple(filter(None, notes)))

    def _use(self, visit: Visit, model: Path | None) -> None:
        """Notes that a visitor uses a tuned model in the cache."""
        visit.model = model
        self._visits.add(visit)
        if model is not None:
            with suppress(OSError):  # in a cache of another user
                os.utime(model)

    def _shrink_cache(self) -> None:
        """Deletes tuned models above the limit, but none that a visitor uses or tunes."""
        if self.cache_limit is not None:
            with self._choosing:
                used = {visit.model for visit in self._visits if visit.model is not None}
                shrink_cache(self.cache_limit, used | self.runs.folders())

    def post_process(self, visit: Visit, how: PostProcessing) -> dict[str, Any] | None:
        """Returns the viewer's data with other post-processing, from the kept outputs: no model is run."""
        return None if visit.segmentation is None else viewer_data(visit.segmentation, how)

    # Tuning -----------------------------------------------------------------------------------------------------------

    def tune(self, visit: Visit, session: str, request: Request, steps: int) -> Iterator[TuningState]:
        """Tunes on the words in another process; yields the state until it ends or [`stop`] is called."""
        nothing = Progress(0, max(1, steps))
        try:
            words = read_words(request.words)
            settings: dict[str, Any] = {"model": self.name, "categories": words, "steps": steps}
            settings["background"] = background_of(words, request.rest_is_background)
            if self.trust_remote_code:
                settings["trust_remote_code"] = True
            tuning = Tuning({name: value for name, value in settings.items() if value is not None})
            self.runs.add(session, tuning)
        except (OSError, ValueError) as error:
            yield TuningState(nothing, " ".join(str(error).split()), running=False, error=True)
            return
        try:
            yield from self._run(visit, tuning)
        finally:
            tuning.stop()  # no effect after its end
            self.runs.remove(session)
            self._shrink_cache()

    def _run(self, visit: Visit, tuning: Tuning) -> Iterator[TuningState]:
        while not self.runs.slots.acquire(timeout=_POLL):
            if tuning.stopping:
                break
            yield TuningState(tuning.progress(), "Waiting: somebody else is tuning.")
        else:
            try:
                tuning.start()
                while tuning.is_running():
                    progress = tuning.progress()
                    sentence = "" if progress.step else "Loading the model ..."
                    yield TuningState(progress, "Stopping after this step ..." if tuning.stopping else sentence)
                    time.sleep(_POLL)
            finally:
                self.runs.slots.release()
        yield self._end(visit, tuning)

    def _end(self, visit: Visit, tuning: Tuning) -> TuningState:
        result, progress = tuning.result(), tuning.progress()
        if "error" in result:
            return TuningState(progress, result["error"], running=False, error=True)
        if "folder" not in result:
            again = " The same words and steps continue from there." if progress.step else ""
            sentence = f"Stopped after {progress.step} of {progress.steps} steps.{again}"
            return TuningState(progress, sentence, running=False)
        folder = Path(result["folder"])
        visit.tuned.append(folder)
        self._use(visit, folder)
        sentence = f"Tuned: {progress.steps} steps."
        return TuningState(progress, sentence, running=False, tuned=read_vocabulary(folder))

    # Downloads --------------------------------------------------------------------------------------------------------

    def download(self, visit: Visit, kind: str, how: PostProcessing) -> Path:
        """Returns a new file with the mask, the overlay or the tuned model. Raises [`PageError`]."""
        folder = new_folder(Path(self._downloads.name))
        if kind == "model":
            if visit.model is None:
                raise PageError("There is no tuned model yet: tune on the words first.")
            return write_model(visit.model, folder)
        if visit.segmentation is None:
            raise PageError("There is no mask yet: segment an image first.")
        write = {"mask": write_mask, "overlay": write_overlay}[kind]
        return write(visit.segmentation, how, folder)
