"""Loading and saving models without reports on the screen; loading with an error where weights are missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ifseg_hf.modeling.configuration_ifseg import IFSegConfig
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation

__all__ = ["load_segmentation_model", "no_progress_bars", "quiet_loading"]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences the progress bars and load reports of transformers."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hides the progress bars of transformers, such as those of loading and saving weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_segmentation_model(path: str | Path, **kwargs) -> IFSegForSemanticSegmentation:
    """Returns the model of a checkpoint, of IFSeg or of a backbone, in float32.

    Args:
        path: folder or Hub id, as [`ifseg_hf.resolve_model`] returns it. Further arguments are those of
            `from_pretrained`.

    Raises:
        `ValueError`: the checkpoint lacks parameters other than the backbone's `new_parameters`, which would start
            with random values. Other errors are those of `from_pretrained`.
    """
    with quiet_loading():
        if not kwargs and (complete := _load_complete(path)) is not None:
            return complete
        model, report = IFSegForSemanticSegmentation.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **kwargs
        )
    new = tuple(f"backbone.{name}" for name in model.backbone.new_parameters)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(new))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"its weights are incomplete: {shown} missing.")
    return model


def _load_complete(path: str | Path) -> IFSegForSemanticSegmentation | None:
    """The model of a folder whose one file of weights has just the names and shapes of the model's; `None` for others.

    Equal to the result of `from_pretrained`, which takes 0.4 s longer for a small model: it compiles the renaming rules
    of all models in transformers.
    """
    file = Path(path) / SAFE_WEIGHTS_NAME
    if not file.is_file() or IFSegConfig.get_config_dict(path)[0].get("model_type") != IFSegConfig.model_type:
        return None
    config = IFSegConfig.from_pretrained(path)
    config.name_or_path = str(path)
    for part in (config, config.backbone_config):
        part.dtype = torch.float32
    with no_init_weights():
        model = IFSegForSemanticSegmentation(config)
    model.tie_weights()
    expected = {name: x for name, x in model.state_dict().items() if name not in model.all_tied_weights_keys}
    with safe_open(file, framework="pt") as saved:
        if set(saved.keys()) != set(expected):
            return None
        for name, tensor in expected.items():
            if saved.get_slice(name).get_shape() != list(tensor.shape):
                return None
            tensor.copy_(saved.get_tensor(name))
    return model.eval()
