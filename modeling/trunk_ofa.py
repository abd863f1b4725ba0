"""Image trunks of OFA: the published ResNet without its last stage."""

import torch
from torch import nn

from .configuration_ofa import OFAConfig


class OFAFrozenBatchNorm2d(nn.Module):
    """Batch norm that always uses its stored statistics, in training too, as OFA's fine-tuning does."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x is `x * scale + shift`; both (channels), in float32 at least."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        weight, bias, mean, var = (x if x.dtype == torch.float64 else x.float() for x in tensors)
        scale = weight * (var + 1e-5).rsqrt()
        return scale, bias - mean * scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale, shift = (x[:, None, None].to(hidden_states.dtype) for x in self.scale_and_shift())
        return hidden_states * scale + shift


def conv_norm(conv: nn.Module, norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    `norm(conv(hidden_states))`, in one pass over the image where the norm can be folded into the convolution.

    It cannot if the norm learns its statistics, if the convolution is wrapped by an adapter, or if accelerate loads the
    weights of either only when the module is called.
    """
    foldable = type(conv) is nn.Conv2d and type(norm) is OFAFrozenBatchNorm2d
    if not foldable or hasattr(conv, "_hf_hook") or hasattr(norm, "_hf_hook"):
        return norm(conv(hidden_states))
    scale, shift = norm.scale_and_shift()
    weight = (conv.weight * scale[:, None, None, None]).to(hidden_states.dtype)
    return nn.functional.conv2d(hidden_states, weight, shift.to(hidden_states.dtype), conv.stride, conv.padding)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size of an image at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class OFAResNetBlock(nn.Module):
    """A ResNet v1.5 bottleneck: 1x1, 3x3 (with the stride), 1x1, each with batch norm, plus a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        width = out_channels // 4
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = OFAFrozenBatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = OFAFrozenBatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = OFAFrozenBatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            norm = OFAFrozenBatchNorm2d(out_channels)
            self.downsample = nn.ModuleList([_conv(in_channels, out_channels, 1, stride), norm])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shortcut = hidden_states
        if self.downsample is not None:
            conv, norm = self.downsample
            shortcut = conv_norm(conv, norm, hidden_states)
        hidden_states = conv_norm(self.conv1, self.bn1, hidden_states).relu_()
        hidden_states = conv_norm(self.conv2, self.bn2, hidden_states).relu_()
        return conv_norm(self.conv3, self.bn3, hidden_states).add_(shortcut).relu_()


class OFAResNetTrunk(nn.Module):
    """A ResNet without its last stage, (batch, 3, H, W) -> (batch, channels, ceil(H / 16), ceil(W / 16))."""

    def __init__(self, config: OFAConfig):
        super().__init__()
        channels = config.trunk_embedding_size
        self.out_channels = config.trunk_hidden_sizes[-1]
        self.conv1 = _conv(3, channels, 7, stride=2)
        self.bn1 = OFAFrozenBatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (out_channels, depth) in enumerate(zip(config.trunk_hidden_sizes, config.trunk_depths, strict=True)):
            blocks = [OFAResNetBlock(channels, out_channels, stride=1 if i == 0 else 2)]
            blocks += [OFAResNetBlock(out_channels, out_channels, stride=1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            channels = out_channels
        self.stages = len(config.trunk_depths)
        # Convolutions are fastest with the channels last in memory. With 8 channels, which only small test models have,
        # their backward pass corrupts memory on AVX-512 (torch 2.13), whose vectors hold 16 numbers.
        widths = (config.trunk_embedding_size, *(width // 4 for width in config.trunk_hidden_sizes))
        self.channels_last = all(width % 16 == 0 for width in widths)

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory layout of the convolutions; a property, since `torch.save` cannot pickle it as an attribute."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (batch, 3, H, W), not {tuple(pixel_values.shape)}.")
        pixel_values = pixel_values.to(self.conv1.weight.dtype, memory_format=self.memory_format)
        hidden_states = self.maxpool(conv_norm(self.conv1, self.bn1, pixel_values).relu_())
        for i in range(self.stages):
            hidden_states = getattr(self, f"layer{i + 1}")(hidden_states)
        return hidden_states


# `trunk_type` of the configuration -> class. A trunk has `out_channels` and maps (batch, 3, H, W) to (batch,
# out_channels, h, w), one vector per patch.
TRUNKS = {"resnet": OFAResNetTrunk}

__all__ = ["TRUNKS", "OFAFrozenBatchNorm2d", "OFAResNetTrunk", "conv_norm"]
