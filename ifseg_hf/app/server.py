"""Starting the page: `ifseg app`, and the app.py of a Space."""

import importlib.util
import signal
import threading
from collections.abc import Callable

__all__ = ["AppError", "check_gradio", "launch"]


class AppError(RuntimeError):
    """The page cannot be started. The message is one line."""


def check_gradio() -> None:
    """Raises [`AppError`] if Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise AppError('The page needs Gradio: pip install "ifseg-hf[app]" (in a checkout: pip install -e ".[app]").')


def launch(
    model: str,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    trust_remote_code: bool = False,
    public: bool = False,
    on_start: Callable[[str], object] | None = None,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM.

    Args:
        model: folder or Hub id of the page's model.
        host: address to listen on. Default: GRADIO_SERVER_NAME, or 127.0.0.1, which only this machine reaches.
        port: default: GRADIO_SERVER_PORT, or the first free one from 7860.
        open_browser: open the page in a browser.
        trust_remote_code: run the code saved with a model of another backbone.
        public: for a page that strangers can open: a visitor sees only the vocabularies that they tuned, and the cache
            of tuned models is limited; see [`Service`].
        on_start: function of the address, called once the page is served.

    Raises:
        [`AppError`]: Gradio is missing or the port is taken; `ValueError`, `FileNotFoundError`: the model cannot be
            loaded.
    """
    check_gradio()
    from ifseg_hf.app.service import Service  # imports that take seconds, after the check

    service = Service(model, trust_remote_code, public)
    from ifseg_hf.app.page import build_page, theme_settings

    page = build_page(service)
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=open_browser,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            max_file_size="200mb",
            **theme_settings(),
        )
        if on_start is not None:
            on_start(address)
        while not stop.wait(1):
            pass
    except OSError as error:
        raise AppError(f"The page cannot be served: {' '.join(str(error).split())}") from error
    finally:
        service.runs.stop_all()
        page.close(verbose=False)
        for number, handler in before.items():
            signal.signal(number, handler)
