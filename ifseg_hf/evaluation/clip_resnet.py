"""CLIP with a ResNet (Radford et al., 2021), read from OpenAI's files; transformers has vision transformers only."""

import io
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu, scaled_dot_product_attention
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

__all__ = ["CLIPResNet", "load_clip_resnet"]

HEAD_SIZE = 64  # of both towers, in every published size
STAGES = (1, 2, 3, 4)
# Entries beside the weights: sizes; and the positions of the attention pooling, whose grid is that of small images.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "visual.attnpool.positional_embedding")
_TEXT_PARTS = {
    "token_embedding.": "embeddings.token_embedding.",
    "ln_final.": "final_layer_norm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
}


class CLIPResNet(nn.Module):
    """
    CLIP's modified ResNet and its text transformer, with OpenAI's names of the image tower's parameters.

    Attributes:
        config (`CLIPTextConfig`): sizes of the text tower.
        visual ([`ModifiedResNet`]): image tower, with a stride of 32 pixels.
        text (`CLIPTextModelWithProjection`): text tower.
        logit_scale (`Tensor`, scalar): logarithm of the scale of cosines.

    Args:
        depths (four `int`): residual blocks of the stages: (3, 4, 6, 3) for RN50, (3, 4, 23, 3) for RN101.
        width (`int`): channels of the first stage, 64 for RN50 and RN101; the last stage has 32 times as many.
        text_config (`CLIPTextConfig`): sizes of the text tower; its `projection_dim` is that of the shared space.
        value_path (`bool`): MaskCLIP; see [`AttentionPooling`].
    """

    def __init__(self, depths: Iterable[int], width: int, text_config: CLIPTextConfig, value_path: bool = False):
        super().__init__()
        self.config = text_config
        self.visual = ModifiedResNet(depths, width, text_config.projection_dim, value_path)
        self.text = CLIPTextModelWithProjection(text_config)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device


class ModifiedResNet(nn.Module):
    """Image tower: a stem of three convolutions, bottleneck stages that shrink by average pooling, attention pooling.

    `forward` maps images float (batch, 3, H, W), H and W multiples of 32, to the last stage's features (batch, C, H/32,
    W/32) and to the patches in the space of the texts (batch, projection_dim, H/32, W/32).
    """

    def __init__(self, depths: Iterable[int], width: int, projection_dim: int, value_path: bool):
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for stage, depth in zip(STAGES, depths, strict=True):
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(Bottleneck(channels, width * 2 ** (stage - 1), stride))
                channels = 4 * width * 2 ** (stage - 1)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.attnpool = AttentionPooling(channels, projection_dim, value_path)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        x = relu(self.bn1(self.conv1(pixel_values)))
        x = relu(self.bn2(self.conv2(x)))
        x = avg_pool2d(relu(self.bn3(self.conv3(x))), 2)
        for stage in STAGES:
            x = getattr(self, f"layer{stage}")(x)
        return x, self.attnpool(x)


class Bottleneck(nn.Module):
    """Residual block in which convolutions have stride 1, and average pooling shrinks the input and its shortcut."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential()
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(avg_pool2d(x, self.stride))
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(avg_pool2d(x, self.stride)))
        return relu(x + shortcut)


class AttentionPooling(nn.Module):
    """
    CLIP's attention pooling with an output for each patch, without positions, as MaskCLIP's code has it.

    With `value_path` (MaskCLIP), the value and output projections are 1x1 convolutions: no patch reads another.
    Otherwise each patch attends to all patches and their mean. (batch, C, h, w) -> (batch, projection_dim, h, w).
    """

    def __init__(self, channels: int, projection_dim: int, value_path: bool):
        super().__init__()
        self.value_path = value_path
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, projection_dim)

    def forward(self, features: Tensor) -> Tensor:
        x = features.flatten(2).transpose(1, 2)
        if self.value_path:
            x = self.v_proj(x)
        else:
            x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
            projected = (layer(x).unflatten(2, (-1, HEAD_SIZE)) for layer in (self.q_proj, self.k_proj, self.v_proj))
            query, key, value = (heads.transpose(1, 2) for heads in projected)
            x = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)[:, 1:]
        return self.c_proj(x).transpose(1, 2).unflatten(2, features.shape[2:])


def load_clip_resnet(path: Path, value_path: bool = False) -> CLIPResNet:
    """
    Loads a CLIP with a ResNet in float32, without running any code of its file.

    Args:
        path (`Path`): OpenAI's file, such as `RN50.pt` or `RN101.pt`, which is a TorchScript archive; or its state dict
            with the same names, saved by `torch.save` or as safetensors.
        value_path (`bool`, defaults to `False`): MaskCLIP; see [`AttentionPooling`].

    Raises:
        `ValueError`: the file is damaged, would run code, or holds another model. The message is one line.
    """
    weights = _read_weights(path)
    if "visual.layer1.0.conv1.weight" not in weights:
        vision = "visual.class_embedding" in weights
        found = "a CLIP with a vision transformer: take it in transformers' format" if vision else "no CLIP"
        raise ValueError(f"it holds {found} (its first entries are {', '.join(list(weights)[:3]) or 'missing'}).")
    weights = {name: x.float() for name, x in weights.items() if name not in _NOT_WEIGHTS}
    try:
        text_config = _text_config(weights)
        model = CLIPResNet(_depths(weights), weights["visual.conv3.weight"].shape[0], text_config, value_path)
        tensors = _with_our_names(weights)
    except (KeyError, IndexError) as error:
        raise ValueError(f"its weights are incomplete ({error} is missing): download it again.") from error
    expected = {name: x for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    tensors = {name: x for name, x in tensors.items() if not name.endswith("num_batches_tracked")}
    different = sorted(expected.keys() ^ tensors.keys())
    different += [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if different:
        raise ValueError(f"its weights are not those of a CLIP with a ResNet: {', '.join(different[:3])} differ.")
    model.load_state_dict(tensors, strict=False)  # which lets the counts of batches stay
    return model.eval()


def _depths(weights: dict[str, Tensor]) -> list[int]:
    """Numbers of blocks of the four stages."""
    blocks = [re.match(r"visual\.layer(\d)\.(\d+)\.", name) for name in weights]
    return [max((int(x[2]) + 1 for x in blocks if x and int(x[1]) == stage), default=0) for stage in STAGES]


def _text_config(weights: dict[str, Tensor]) -> CLIPTextConfig:
    """Sizes of the text tower, from the shapes of its weights."""
    vocabulary, width = weights["token_embedding.weight"].shape
    layers = [re.match(r"transformer\.resblocks\.(\d+)\.", name) for name in weights]
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=1 + max(int(x[1]) for x in layers if x),
        num_attention_heads=width // HEAD_SIZE,
        max_position_embeddings=weights["positional_embedding"].shape[0],
        projection_dim=weights["text_projection"].shape[1],
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )


def _with_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their names in [`CLIPResNet`]."""
    tensors = {}
    for name, tensor in weights.items():
        if name == "logit_scale" or name.startswith("visual."):
            tensors[name] = tensor.reshape(()) if name == "logit_scale" else tensor
            continue
        if name == "text_projection":
            tensors["text.text_projection.weight"] = tensor.T
            continue
        target = "embeddings.position_embedding.weight" if name == "positional_embedding" else name
        for theirs, ours in _TEXT_PARTS.items():
            target = target.replace(theirs, ours)
        target = f"text.text_model.{target}"
        if ".in_proj_" in target:  # queries, keys and values, one below the other
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                tensors[target.replace(".in_proj_", f".{part}_proj.")] = rows
        else:
            tensors[target] = tensor
    return tensors


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises `ValueError`."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and _is_torchscript(path):
            return dict(_tensors_of(_read_torchscript(path)))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it is damaged, or holds more than tensors; no code in it was run.") from error
    except Exception as error:  # damaged files make the readers raise many classes
        raise ValueError(f"it cannot be read ({' '.join(str(error).split())[:200]}): download it again.") from error
    return {name: x for name, x in loaded.items() if isinstance(x, Tensor)} if isinstance(loaded, dict) else {}


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Object:
    """Stands in for every class and function of a TorchScript archive: it keeps attributes, and does nothing."""

    def __new__(cls, *args: Any):
        return object.__new__(cls)

    def __init__(self, *args: Any):
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _read_torchscript(path: Path) -> _Object:
    """The module in a TorchScript archive, read by torch's restricted unpickler from a copy without the code."""
    copied = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copied, "w") as copy:
        for name in archive.namelist():
            if not re.search(r"/(constants|code/)", name):
                copy.writestr(name, archive.read(name))
    copied.seek(0)
    names = get_unsafe_globals_in_checkpoint(copied)
    copied.seek(0)
    with safe_globals([(_Object, name) for name in names]):
        return torch.load(copied, map_location="cpu", weights_only=True)


def _tensors_of(module: Any, prefix: str = "") -> Iterable[tuple[str, Tensor]]:
    """Yields the tensors of a module and of the modules in it, with their names in a state dict."""
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Object):
            yield from _tensors_of(value, f"{prefix}{name}.")
