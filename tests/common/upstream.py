"""transformers' test mixins, which are in its source distribution but not in its wheel.

As a script, this file prints the folder of the source distribution of the installed version, which it downloads with
pip into a cache. `load` makes the folder `tests` in it importable as the package `transformers_tests`.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from unittest import mock

VARIABLE = "TRANSFORMERS_SOURCE"
"""The environment variable with that folder; without it the tests beside this file are not collected."""


def fetch() -> Path:
    """The folder of the source distribution of the installed transformers, from the cache or the package index."""
    name = f"transformers-{version('transformers')}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ifseg-hf"
    if (cache / name).is_dir():
        return cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        options = ["--quiet", "--no-binary", "transformers", "--no-deps", "--no-build-isolation", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, name.replace("-", "==")]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (archive,) = Path(folder).glob("transformers-*")
        with tarfile.open(archive) as file:
            tests = [member for member in file.getmembers() if member.name.startswith(f"{name}/tests/")]
            file.extractall(folder, tests, filter="data")
        try:
            (Path(folder) / name).rename(cache / name)
        except OSError:  # another process may have moved it first
            if not (cache / name).is_dir():
                raise
    return cache / name


def load(source: Path, files: Path):
    """Makes the tests importable, with stand-ins for modules that the source distribution lacks.

    Args:
        source: the folder that [`fetch`] returns.
        files: an empty folder for images and models, which transformers' tests would download from the Hub.
    """
    os.environ.setdefault("RUN_SLOW", "1")
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(files)
    (files / "reports").mkdir()
    processors = ["IFSegImageProcessor"]
    summary = {
        "IFSegForSemanticSegmentation": {"tokenizer_classes": ["AutoTokenizer"], "processor_classes": processors}
    }
    (files / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))

    import transformers
    from transformers.models.auto import modeling_auto

    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(source / "tests")]
    sys.modules["transformers_tests"] = package
    _stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in("transformers_tests.utils.test_configuration_utils", config_common_kwargs=_COMMON_SETTINGS)
    _stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: _local_image(url, files))

    # The lists of transformers' models: `_prepare_for_class` and other tests look up the names of classes in them.
    modeling_auto.MODEL_MAPPING_NAMES["ofa"] = "OFAModel"
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["ofa"] = "OFAForConditionalGeneration"
    modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["ifseg"] = "IFSegForSemanticSegmentation"
    # The tests would otherwise import a second copy of transformers, from the source distribution.
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        import transformers_tests.test_configuration_common
        import transformers_tests.test_pipeline_mixin  # noqa: F401


# A non-default value for each setting that every configuration has.
_COMMON_SETTINGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["OFAModel"],
    "id2label": {0: "grass"},
    "label2id": {"grass": 0},
    "problem_type": "regression",
}


def _stand_in(name: str, **attributes):
    """Registers a module called `name` with these attributes."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)


def _local_image(url: str, files: Path) -> str:
    """The path of a generated image in place of one from the Hub; no applicable test uses other media."""
    import numpy as np
    from PIL import Image

    path = files / url.rsplit("/", 1)[1]
    if path.suffix in (".jpg", ".png") and not path.exists():
        noise = np.random.default_rng(0).integers(0, 150, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path)
    return str(path)


if __name__ == "__main__":
    print(fetch())
