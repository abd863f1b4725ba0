"""The files of a Space, downloaded from a Hub on loopback, start and serve the page with the model they name."""

import json
import os
import sys
import urllib.request

import pytest
from hub_client import environment, run
from hub_server import HubServer
from page_process import free_port, serve

DOWNLOAD = (
    "import sys, huggingface_hub as hub; hub.snapshot_download('alice/demo', repo_type='space', local_dir='space')"
)


def test_the_written_app_starts(tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    with HubServer({"hf_alice": "alice"}) as hub:
        env = environment(hub, tmp_path / "home")
        for command in (["-m", "ifseg_hf", "push", "--space", "alice/demo"], ["-c", DOWNLOAD]):
            done = run(*command, cwd=tmp_path, env=env)
            assert done.returncode == 0, done.stderr
        assert hub.unknown == []

    space, port = tmp_path / "space", free_port()
    # As on the Hub: the Space's own copy of the package, which says where it is, and Gradio's variables.
    own = {"HF_HUB_OFFLINE": "1", "IFSEG_CACHE": str(tmp_path / "cache"), "GRADIO_SERVER_PORT": str(port)}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = (
        "import runpy, ifseg_hf, ifseg_hf.modeling, ifseg_hf.processing as p; "
        "print(ifseg_hf.__file__, ifseg_hf.modeling.__file__, p.__file__, flush=True); "
        "runpy.run_path('app.py', run_name='__main__')"
    )
    url = f"http://127.0.0.1:{port}/"
    process = serve([sys.executable, "-c", code], {**kept, **own, "OMP_NUM_THREADS": "1"}, url, cwd=space)
    try:
        places = process.printed.splitlines()[0].split()
        modules = ("__init__.py", "modeling/__init__.py", "processing/__init__.py")
        assert places == [str(space / "ifseg_hf" / name) for name in modules]
        with urllib.request.urlopen(f"{url}config") as answer:
            config = json.load(answer)
        properties = [component["props"] for component in config["components"]]
        labels = {str(own.get("label") or own.get("value")) for own in properties}
        assert {"Image", "Words", "Segment", "Tuned vocabularies", "Tune on these words"} <= labels
    finally:
        process.terminate()
    assert process.wait(60) == 0
