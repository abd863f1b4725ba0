"""The layout of the page and its events. The only module that imports Gradio."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported, and when it starts

import gradio as gr
from gradio.data_classes import ImageData

from ifseg_hf.app.images import PageError
from ifseg_hf.app.pictures import message, progress_bar
from ifseg_hf.app.segmentation import PostProcessing
from ifseg_hf.app.service import Request, Service, View, Visit
from ifseg_hf.data.vocabularies import join_names

__all__ = ["build_page", "theme_settings"]

ASSETS = Path(__file__).with_name("assets")
TITLE = "IFSeg: segmentation from words alone"
_FONTS = ["system-ui", "sans-serif"]  # of the system, since none is downloaded
_CACHE_SECONDS = 2 * 3600  # after which uploaded and written files are deleted
_NO_VOCABULARY = ("none: the words that you type", "")
_CLICK_LINK = "() => setTimeout(() => document.querySelector('#file a, #file button, #file').click(), 100)"


def theme_settings() -> dict[str, Any]:
    """The arguments of `launch` for the looks of the page."""
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=["monospace"]).set(
        # darker than Gradio's, for a contrast of at least 4.5
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_secondary_background_fill="*neutral_100",
        button_secondary_border_color="*neutral_300",
        button_secondary_text_color="*neutral_800",
    )
    return {"theme": theme, "css_paths": [ASSETS / "page.css"], "js": _asset("page.js")}


def build_page(service: Service) -> gr.Blocks:
    """Returns the page of a service; `launch(**theme_settings())` serves it."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, _CACHE_SECONDS)) as page:
        _Page(service).build(page)
    return page


class _Page:
    """Components and events of the page."""

    def __init__(self, service: Service):
        self.service = service

    # Layout -----------------------------------------------------------------------------------------------------------

    def build(self, page: gr.Blocks) -> None:
        self.visit = gr.State(Visit(), time_to_live=_CACHE_SECONDS)
        gr.HTML(
            f"<h1>{TITLE}</h1><p>Choose an image, type what to look for, and press Segment. The model can also "
            "be tuned on your words, which uses the words alone, and no image.</p>",
            elem_id="head",
        )
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="inputs"):
                self._inputs()
            with gr.Column(elem_id="results"):
                self._results()
            with gr.Column(elem_id="tuning"):
                self._tuning()
        self._events(page)

    def _inputs(self) -> None:
        self.image = gr.Image(
            label="Image",
            sources=["upload", "webcam", "clipboard"],
            type="filepath",
            height=280,
            placeholder="Drop an image here,\nor click to choose one",
            elem_id="image",
            buttons=[],
        )
        self.image.preprocess = _path  # unopened, so that a wrong file gets a plain sentence
        self.words = gr.Textbox(
            value=join_names(self.service.words),
            label="Words",
            info="separated by commas",
            placeholder="sky, road, car",
            max_lines=6,
            elem_id="words",
        )
        self.rest = gr.Checkbox(
            label="Everything else is background",
            info="always so for a single word",
            container=False,
            elem_id="rest",
        )
        self.segment = gr.Button("Segment", variant="primary", elem_id="segment")

    def _tuning(self) -> None:
        self.vocabulary = gr.Dropdown(
            choices=[_NO_VOCABULARY],
            value="",
            label="Tuned vocabularies",
            info="words that a model was tuned on before",
            elem_id="vocabulary",
            filterable=False,
        )
        with gr.Group():
            self.steps = gr.Slider(
                1,
                max(100, 2 * self.service.steps),
                value=self.service.steps,
                step=1,
                label="Steps of tuning",
                elem_id="steps",
            )
            self.tune = gr.Button("Tune on these words", elem_id="tune")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        self.progress = gr.HTML(elem_id="progress")

    def _results(self) -> None:
        self.note = gr.HTML(elem_id="note")
        self.viewer = gr.HTML(
            value=None,
            html_template=_asset("viewer.html"),
            js_on_load=_asset("viewer.js"),
            apply_default_css=False,
            elem_id="viewer",
        )
        neighbors, iterations = self.service.smoothing
        with gr.Row(elem_id="sliders"):
            self.iterations = gr.Slider(
                0, 50, value=iterations, step=1, label="Smoothing", info="how often to average",
                elem_id="iterations", min_width=150,
            )  # fmt: skip
            self.neighbors = gr.Slider(
                1, 20, value=neighbors, step=1, label="Similar patches", info="averaged each time", elem_id="neighbors",
                min_width=150,
            )  # fmt: skip
            self.threshold = gr.Slider(
                0, 1, value=0, step=0.01, label="Threshold", info="lowest probability", elem_id="threshold",
                min_width=150,
            )  # fmt: skip
        with gr.Row(elem_id="downloads"):
            self.downloads = {
                kind: gr.Button(text, interactive=False, elem_id=f"download-{kind}", min_width=120)
                for kind, text in (
                    ("mask", "Download mask"),
                    ("overlay", "Download overlay"),
                    ("model", "Download tuned model"),
                )
            }
        self.file = gr.DownloadButton("File", visible="hidden", elem_id="file")

    # Events -----------------------------------------------------------------------------------------------------------

    def _events(self, page: gr.Blocks) -> None:
        how = [self.neighbors, self.iterations, self.threshold]
        asked = [self.visit, self.image, self.words, self.rest, self.vocabulary, *how]
        shown = [self.visit, self.viewer, self.note, self.vocabulary, *self.downloads.values()]
        quiet: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4}

        page.load(self.on_load, self.visit, self.vocabulary, show_progress="hidden", **quiet)
        page.unload(self.on_unload)
        for event in (self.segment.click, self.words.submit):
            event(self.on_segment, asked, shown, show_progress="minimal", show_progress_on=self.viewer, **quiet)
        self.image.change(self.on_image, asked, shown, show_progress="minimal", show_progress_on=self.viewer, **quiet)
        self.vocabulary.select(  # `input` also comes when the list loses the focus, without a choice
            self.on_vocabulary, [self.visit, self.vocabulary], [self.words, self.rest], show_progress="hidden", **quiet
        ).then(self.on_image, asked, shown, show_progress="minimal", show_progress_on=self.viewer, **quiet)
        for slider in how:
            slider.change(
                self.on_slider,
                [self.visit, *how],
                self.viewer,
                trigger_mode="always_last",
                show_progress="hidden",
                **quiet,
            )
        for kind, button in self.downloads.items():
            button.click(
                self._on_download(kind), [self.visit, *how], [self.file, self.note], show_progress_on=button, **quiet
            ).success(fn=None, js=_CLICK_LINK)
        outputs = [self.progress, self.tune, self.stop, *shown]
        self.tune.click(
            self.on_tune, [self.steps, *asked], outputs, show_progress="hidden", api_visibility="private",
            concurrency_limit=None,
        )  # fmt: skip
        self.stop.click(self.on_stop, show_progress="hidden", **quiet)

    def on_load(self, visit: Visit) -> Any:
        return self._vocabularies(visit)

    def on_unload(self, request: gr.Request) -> None:
        self.service.runs.stop(request.session_hash)

    def on_segment(self, visit: Visit, *asked: Any) -> list[Any]:
        return self._shown(visit, self.service.segment(visit, _request(asked)))

    def on_image(self, visit: Visit, *asked: Any) -> list[Any]:
        """Segments a new image, or with another vocabulary, if there are an image and words."""
        request = _request(asked)
        if request.path and request.words.strip():
            return self.on_segment(visit, *asked)
        if request.path:
            return self._shown(visit, self.service.look(visit, request))
        visit.segmentation = None
        return self._shown(visit, View(None))

    def on_vocabulary(self, visit: Visit, folder: str) -> tuple[Any, Any]:
        vocabulary = self.service.vocabulary(visit, folder)
        if vocabulary is None:
            return gr.skip(), gr.skip()
        return join_names(vocabulary.words), vocabulary.background

    def on_slider(self, visit: Visit, neighbors: int, iterations: int, threshold: float) -> Any:
        if visit.segmentation is None:
            return gr.skip()
        return self.service.post_process(visit, PostProcessing(int(neighbors), int(iterations), threshold))

    def on_tune(self, request: gr.Request, steps: float, visit: Visit, *asked: Any) -> Iterator[list[Any]]:
        entered = _request(asked)
        nothing = [gr.skip()] * (4 + len(self.downloads))
        for state in self.service.tune(visit, request.session_hash, entered, int(steps)):
            picture = progress_bar(state.progress, state.sentence) if state.progress.steps else ""
            if state.error:
                picture = message(state.sentence, error=True)
            buttons = [gr.update(visible=not state.running), gr.update(visible=state.running)]
            if state.tuned is None:
                yield [picture, *buttons, *nothing]
                continue
            if entered.path:
                yield [picture, *buttons, *self.on_segment(visit, *asked)]
            else:
                yield [picture, *buttons, *self._shown(visit, View(None))]

    def on_stop(self, request: gr.Request) -> None:
        self.service.runs.stop(request.session_hash)

    def _on_download(self, kind: str) -> Callable[..., tuple[Any, Any]]:
        def on_download(visit: Visit, neighbors: int, iterations: int, threshold: float) -> tuple[Any, Any]:
            try:
                how = PostProcessing(int(neighbors), int(iterations), threshold)
                return str(self.service.download(visit, kind, how)), gr.skip()
            except PageError as error:
                return None, message(str(error), error=True)

        return on_download

    # What is shown ----------------------------------------------------------------------------------------------------

    def _shown(self, visit: Visit, view: View) -> list[Any]:
        """The values of visit, viewer, note, vocabularies and download buttons."""
        there = visit.segmentation is not None
        active = {"mask": there, "overlay": there, "model": visit.model is not None}
        buttons = [gr.update(interactive=active[kind]) for kind in self.downloads]
        note = message(*view.sentences, error=view.error)
        return [visit, view.picture, note, self._vocabularies(visit), *buttons]

    def _vocabularies(self, visit: Visit) -> Any:
        choices = [_NO_VOCABULARY, *self.service.vocabularies(visit)]
        chosen = str(visit.model or "")
        return gr.update(choices=choices, value=chosen if chosen in [value for _, value in choices] else "")


def _path(upload: ImageData | None) -> str | None:
    """The uploaded file."""
    return None if upload is None else upload.path


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _request(asked: tuple) -> Request:
    """The request of the components `asked`, without the visit."""
    path, words, rest, vocabulary, neighbors, iterations, threshold = asked
    how = PostProcessing(int(neighbors), int(iterations), threshold)
    return Request(path, words or "", bool(rest), vocabulary or "", how)
