"""Adapters of a segmentation model: transformers' own, each with the words that it was tuned on.

An adapter's folder or repository has peft's files, `adapter_config.json` and `adapter_model.safetensors`, and beside
them [`WORDS_FILE`], which peft ignores.
"""

import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available, logging

from .loading import Float32PreTrainedModel

WORDS_FILE = "ifseg_words.json"
WORDS = (  # attributes of the configuration that `set_words` sets
    "id2label",
    "category_ids",
    "prompt_ids",
    "prompt",
    "word_ids",
    "word_categories",
    "background",
    "category_labels",
)
PEFT_MISSING = 'An adapter needs peft, which is not installed: pip install "ifseg-hf[peft]" (or pip install peft).'
DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
CONFIG_FILE = "config.json"
SAMPLES = 64  # values of each parameter in the digest of a base model


class AdaptablePreTrainedModel(Float32PreTrainedModel):
    """
    A model with words whose adapters bring their own: the words change with the active adapter.

    The adapters share the weights of the model; each adds its own small ones. Switching between them changes the
    configuration, so that a model must not be used by several threads at once.

    Attributes:
        find_base: returns what `from_pretrained` loads for the base model that an adapter names. `ifseg_hf` sets a
            function that knows the embedded model and converts published checkpoints.
    """

    find_base: Callable[[str], str | os.PathLike] = staticmethod(str)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a model; of an adapter's folder or Hub id, its base model with the adapter and its words.

        Raises `ValueError` as [`load_adapter`] does, and `ImportError` for an adapter without peft.
        """
        source = pretrained_model_name_or_path
        base = None if kwargs.get("adapter_kwargs") else _base_of_adapter(source, kwargs)
        if base is None:
            return super().from_pretrained(source, *args, **kwargs)
        if not is_peft_available():
            raise ImportError(PEFT_MISSING)
        download = {name: kwargs[name] for name in DOWNLOAD if name in kwargs}
        name = kwargs.pop("adapter_name", None)
        own = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        loaded = super().from_pretrained(cls.find_base(base), *args, **own)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_adapter(str(source), name, **download)
        model.eval()
        return loaded

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """
        Loads an adapter with its words and makes it the active one.

        Args:
            peft_model_id: folder or Hub id of the adapter.
            adapter_name: name for [`set_adapter`]. Default: "default".
            *args, **kwargs: of transformers' [`~integrations.PeftAdapterMixin.load_adapter`]. An adapter without
                words, from another program, does not change the words of the model.

        Raises:
            `ImportError` without peft; `ValueError` for an adapter of another model or with damaged words.
        """
        if not is_peft_available():
            raise ImportError(PEFT_MISSING)
        name = adapter_name or "default"
        source = None if peft_model_id is None else str(peft_model_id)
        saved = None if source is None else _read_words(source, {**(kwargs.get("adapter_kwargs") or {}), **kwargs})
        words = None
        if saved is not None:
            words = self._checked_words(saved.get("words"), source)
            self._check_base(saved.get("base_weights"), source)
        if words is None:
            loaded = super().load_adapter(source, name, *args, **kwargs)
        else:
            loaded = self._load_complete(source, name, *args, **kwargs)
            self.adapter_words[name] = words
        for parameter in self._adapter_parameters(name):  # a file may hold them in half precision
            parameter.data = parameter.data.to(self.dtype)
        self.set_adapter(name)
        return loaded

    def _load_complete(self, source: str, name: str, *args, **kwargs):
        """Loads an adapter without reports on the screen. Raises `ValueError` where its weights are not complete."""
        if name in getattr(self, "peft_config", {}):
            raise ValueError(
                f'The model has an adapter "{name}" already: choose another name, or delete_adapter first.'
            )
        before = self.active_adapters() if getattr(self, "peft_config", None) else [name]
        problem = None
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # transformers would list the weights of the model as missing
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
                loaded = super().load_adapter(source, name, *args, **kwargs)
            missing = [key for key in loaded.missing_keys if _is_of_adapter(key, name)]
            if missing or loaded.mismatched_keys:
                problem = f"{len(missing)} tensors are missing" if missing else "its tensors have other shapes"
        except (RuntimeError, ValueError, KeyError) as error:
            problem = " ".join(str(error).split())
        finally:
            logging.set_verbosity(verbosity)
        if problem is not None:
            if name in getattr(self, "peft_config", {}):
                super().set_adapter(before[0])  # peft deletes no adapter while none is active
                self.delete_adapter(name)
            raise ValueError(f'The weights of the adapter "{source}" do not fit this model: {problem}.')
        return loaded

    def _adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter."""
        return [parameter for key, parameter in self.named_parameters() if _is_of_adapter(key, name)]

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Makes a loaded adapter the active one, with its words. Raises `ValueError` for an unknown name."""
        super().set_adapter(adapter_name)
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            if self.peft_config[name].inference_mode:  # transformers lets every active adapter train
                for parameter in self._adapter_parameters(name):
                    parameter.requires_grad_(False)
            if name in self.adapter_words:
                self.set_words(**self.adapter_words[name])

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Deletes adapters, with their words. Raises `ValueError` for an unknown name."""
        super().delete_adapter(adapter_names)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.adapter_words.pop(name, None)

    @contextmanager
    def use_adapter(self, adapter_name: str | None) -> Iterator[None]:
        """Makes an adapter the active one inside of the block; `None` changes nothing."""
        if adapter_name is None:
            yield
            return
        if not getattr(self, "peft_config", None):
            raise ValueError(f'There is no adapter "{adapter_name}": load one with load_adapter first.')
        before, words = self.active_adapters(), self.words
        self.set_adapter(adapter_name)
        try:
            yield
        finally:
            if before:
                self.set_adapter(before if len(before) > 1 else before[0])
            self.set_words(**words)

    @property
    def words(self) -> dict:
        """The words of the configuration, as the arguments of `set_words`."""
        return {name: copy.deepcopy(getattr(self.config, name)) for name in WORDS}

    @property
    def adapter_words(self) -> dict[str, dict]:
        """Words by the name of the loaded adapter, as the arguments of `set_words`."""
        return self.__dict__.setdefault("_adapter_words", {})

    def save_words(self, folder: str | os.PathLike) -> None:
        """Writes the words of the model, and a digest of its weights without adapters, to an adapter's folder."""
        saved = {"words": self.words, "base_weights": base_digest(self)}
        text = json.dumps(saved, indent=1, ensure_ascii=False)
        (Path(folder) / WORDS_FILE).write_text(f"{text}\n", encoding="utf-8")

    def _checked_words(self, words: object, source: str) -> dict:
        """The words of an adapter as arguments of `set_words`. Raises `ValueError` where they are damaged."""
        problem = f'The words of the adapter "{source}" ({WORDS_FILE}) are damaged: '
        if not isinstance(words, dict) or not {"id2label", "category_ids", "prompt_ids"} <= words.keys() <= set(WORDS):
            raise ValueError(f"{problem}expected {', '.join(WORDS[:3])}, ... and nothing else.")
        try:
            backbone = copy.deepcopy(self.config.backbone_config)
            config = type(self.config)(backbone_config=backbone, **words)
            config.check_words()
            ids = [*config.prompt_ids, *(x for row in [*config.category_ids, *(config.word_ids or [])] for x in row)]
            if min(ids) < 0 or max(ids) >= self.config.vocab_size:
                raise ValueError(f"the token ids are not those of a vocabulary of {self.config.vocab_size}.")
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{problem}{' '.join(str(error).split())}") from error
        return {name: getattr(config, name) for name in WORDS}

    def _check_base(self, digest: str | None, source: str) -> None:
        """Raises `ValueError` if the adapter was tuned on other weights; compared in float32 only."""
        if digest is None or self.dtype != torch.float32 or any(p.is_meta for p in self.parameters()):
            return
        if digest != base_digest(self):
            raise ValueError(
                f'The adapter "{source}" was tuned on another model than this one: load it with the model that its '
                "adapter_config.json names."
            )


def _is_of_adapter(key: str, name: str) -> bool:
    """Whether a parameter, by its name in the model, belongs to a LoRA adapter."""
    return re.search(rf"\.(lora_\w+|modules_to_save)\.{re.escape(name)}(\.|$)", key) is not None


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, without those of adapters and of parts that adapters replace."""
    new = tuple(f"backbone.{name}" for name in model.backbone.new_parameters)
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith(new):
            continue
        found[name.replace(".base_layer.", ".")] = parameter
    return found


def base_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights without adapters: names, shapes, and values at evenly spaced places."""
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        flat = parameter.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), device="cpu", dtype=torch.float64).long()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _base_of_adapter(source: str | os.PathLike | None, download: dict) -> str | None:
    """The model that an adapter with words names, of a folder or Hub id; `None` for a model. Raises `ValueError`."""
    if source is None or os.path.isfile(os.path.join(source, download.get("subfolder") or "", CONFIG_FILE)):
        return None
    options = {name: download[name] for name in DOWNLOAD if download.get(name) is not None}
    try:
        file = find_adapter_config_file(str(source), **options)
    except (OSError, ValueError):
        return None  # which transformers reports
    if file is None or _read_words(str(source), download) is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f'The adapter "{source}" names no base model in its {Path(file).name}.') from None


def _read_words(source: str, download: dict) -> dict | None:
    """The content of an adapter's words file, of a folder or Hub id; `None` without one. Raises `ValueError`."""
    if os.path.isdir(source):
        file = os.path.join(source, download.get("subfolder") or "", WORDS_FILE)
        file = file if os.path.isfile(file) else None
    else:
        options = {name: download[name] for name in DOWNLOAD if download.get(name) is not None}
        try:
            file = cached_file(source, WORDS_FILE, **options)
        except OSError:
            file = None
    if file is None:
        return None
    try:
        saved = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f'The words of the adapter "{source}" ({WORDS_FILE}) cannot be read.')
    return saved


__all__ = ["PEFT_MISSING", "WORDS_FILE", "AdaptablePreTrainedModel", "base_digest", "base_parameters"]
