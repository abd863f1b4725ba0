"""Image trunks of OFA: the published ResNet without its last stage, and EfficientNet-Lite."""

import torch
from torch import nn

from .configuration_ofa import OFAConfig


class OFAFrozenBatchNorm2d(nn.Module):
    """Batch norm that always uses its stored statistics, in training too, as OFA's fine-tuning does."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x is `x * scale + shift`; both (channels), in float32 at least."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        weight, bias, mean, var = (x if x.dtype == torch.float64 else x.float() for x in tensors)
        scale = weight * (var + self.eps).rsqrt()
        return scale, bias - mean * scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale, shift = (x[:, None, None].to(hidden_states.dtype) for x in self.scale_and_shift())
        return hidden_states * scale + shift


class OFASameConv2d(nn.Conv2d):
    """
    A convolution with TensorFlow's SAME padding: (..., H, W) -> (..., ceil(H / stride), ceil(W / stride)).

    The padding depends on the size of the input. If its sum along an axis is odd, the end gets one pixel more.
    """

    def pad(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The input, padded where both sides of an axis differ, and the padding left to do, (vertical, horizontal)."""
        (top, bottom), (left, right) = (
            self._padding(*sizes)
            for sizes in zip(hidden_states.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        )
        if top == bottom and left == right:
            return hidden_states, (top, left)
        return nn.functional.pad(hidden_states, (left, right, top, bottom)), (0, 0)

    @staticmethod
    def _padding(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
        """Pixels before and behind an axis of `size` pixels."""
        last = (size - 1) // stride * stride  # where the last window starts
        padding = max(last + dilation * (kernel_size - 1) + 1 - size, 0)
        return padding // 2, padding - padding // 2

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states, padding = self.pad(hidden_states)
        return nn.functional.conv2d(
            hidden_states, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


def conv_norm(conv: nn.Module, norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    `norm(conv(hidden_states))`, in one pass over the image where the norm can be folded into the convolution.

    It cannot if the norm learns its statistics, if the convolution is wrapped by an adapter, or if accelerate loads the
    weights of either only when the module is called.
    """
    foldable = type(conv) in (nn.Conv2d, OFASameConv2d) and type(norm) is OFAFrozenBatchNorm2d
    if not foldable or hasattr(conv, "_hf_hook") or hasattr(norm, "_hf_hook"):
        return norm(conv(hidden_states))
    scale, shift = norm.scale_and_shift()
    weight = (conv.weight * scale[:, None, None, None]).to(hidden_states.dtype)
    padding = conv.padding
    if isinstance(conv, OFASameConv2d):
        hidden_states, padding = conv.pad(hidden_states)
    shift = shift.to(hidden_states.dtype)
    return nn.functional.conv2d(hidden_states, weight, shift, conv.stride, padding, conv.dilation, conv.groups)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size of an image at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class OFAImageTrunk(nn.Module):
    """
    Base class of the image trunks, which map (batch, 3, H, W) to (batch, out_channels, h, w), one vector per patch.

    Attributes:
        out_channels: channels of the output.
        channels_last: whether the convolutions run with the channels last in memory, where they are fastest.
    """

    out_channels: int
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory layout of the convolutions; a property, since `torch.save` cannot pickle it as an attribute."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The images as the first convolution reads them, (batch, 3, H, W); `ValueError` for another shape."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (batch, 3, H, W), not {tuple(pixel_values.shape)}.")
        return pixel_values.to(dtype, memory_format=self.memory_format)


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


class OFAResNetTrunk(OFAImageTrunk):
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
        # With the channels last, the backward pass of a strided 1x1 convolution of 8 channels, which only small test
        # models have, corrupts memory on AVX-512 (torch 2.13), whose vectors hold 16 numbers.
        widths = (config.trunk_embedding_size, *(width // 4 for width in config.trunk_hidden_sizes))
        self.channels_last = all(width % 16 == 0 for width in widths)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = self.prepare(pixel_values, self.conv1.weight.dtype)
        hidden_states = self.maxpool(conv_norm(self.conv1, self.bn1, pixel_values).relu_())
        for i in range(self.stages):
            hidden_states = getattr(self, f"layer{i + 1}")(hidden_states)
        return hidden_states


# Kernel size, stride and expansion of the stages of EfficientNet-Lite.
_LITE_STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
_LITE_EPS = 1e-3


def _conv_norm_relu6(conv: nn.Module, norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return nn.functional.relu6(conv_norm(conv, norm, hidden_states), inplace=True)


class OFAInvertedResidualBlock(nn.Module):
    """
    A MobileNetV2 block: 1x1 to `expansion` times the channels, depthwise (with the stride), 1x1; a shortcut if it fits.

    Each convolution has batch norm, the first two also ReLU6. At expansion 1 there is no first convolution. The
    shortcut fits where a block keeps size and channels.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        width = expansion * in_channels
        self.expand_conv = self.expand_norm = None
        if expansion > 1:
            self.expand_conv = _conv(in_channels, width, 1)
            self.expand_norm = OFAFrozenBatchNorm2d(width, _LITE_EPS)
        self.depthwise_conv = OFASameConv2d(width, width, kernel_size, stride, groups=width, bias=False)
        self.depthwise_norm = OFAFrozenBatchNorm2d(width, _LITE_EPS)
        self.project_conv = _conv(width, out_channels, 1)
        self.project_norm = OFAFrozenBatchNorm2d(out_channels, _LITE_EPS)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shortcut = hidden_states
        if self.expand_conv is not None:
            hidden_states = _conv_norm_relu6(self.expand_conv, self.expand_norm, hidden_states)
        hidden_states = _conv_norm_relu6(self.depthwise_conv, self.depthwise_norm, hidden_states)
        hidden_states = conv_norm(self.project_conv, self.project_norm, hidden_states)
        return hidden_states.add_(shortcut) if self.residual else hidden_states


class OFAEfficientNetLiteTrunk(OFAImageTrunk):
    """
    EfficientNet-Lite without head, (batch, 3, H, W) -> (batch, channels, ceil(H / 16), ceil(W / 16)).

    The channels are those of the fifth stage (stride 16), then those of the seventh (stride 32), resized bilinearly to
    the grid of the fifth.
    """

    def __init__(self, config: OFAConfig):
        super().__init__()
        channels = config.trunk_embedding_size
        self.out_channels = config.trunk_hidden_sizes[4] + config.trunk_hidden_sizes[6]
        self.stem_conv = OFASameConv2d(3, channels, 3, stride=2, bias=False)
        self.stem_norm = OFAFrozenBatchNorm2d(channels, _LITE_EPS)
        self.stages = nn.ModuleList()
        sizes = zip(_LITE_STAGES, config.trunk_hidden_sizes, config.trunk_depths, strict=True)
        for (kernel_size, stride, expansion), out_channels, depth in sizes:
            blocks = [OFAInvertedResidualBlock(channels, out_channels, kernel_size, stride, expansion)]
            for _ in range(depth - 1):
                blocks.append(OFAInvertedResidualBlock(out_channels, out_channels, kernel_size, 1, expansion))
            self.stages.append(nn.Sequential(*blocks))
            channels = out_channels
        # Safe at every width, unlike in the ResNet: no 1x1 convolution has a stride. Checked on AVX-512 with 4 to 1248
        # channels; forward and backward pass take three quarters of the time that they take with the channels first.
        self.channels_last = True

    def prepare(self, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        pixel_values = super().prepare(pixel_values, dtype)
        # cuDNN compiles channels-last depthwise convolutions again for every new image size: 0.26 s per convolution on
        # an H200 (torch 2.11). In the contiguous format, the first call takes 5 ms.
        return pixel_values.contiguous() if pixel_values.is_cuda else pixel_values

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.join(*self.stage_outputs(pixel_values))

    def stage_outputs(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the fifth stage (batch, channels, h, w), stride 16, and of the seventh, stride 32."""
        pixel_values = self.prepare(pixel_values, self.stem_conv.weight.dtype)
        hidden_states = _conv_norm_relu6(self.stem_conv, self.stem_norm, pixel_values)
        for stage in self.stages[:5]:
            hidden_states = stage(hidden_states)
        fine = hidden_states
        for stage in self.stages[5:]:
            hidden_states = stage(hidden_states)
        return fine, hidden_states

    @staticmethod
    def join(fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        """Joins the two [`stage_outputs`] along their channels, on the grid of the first."""
        # Joining both outputs is as good as dilating the last stages, and faster: a linear probe names 50.3 % of the
        # patches of COCO images (short side 384) in 0.16 s an image on one thread, 50.4 % in 0.27 s with dilation.
        coarse = nn.functional.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([fine, coarse], dim=1)


# `trunk_type` of the configuration -> class.
TRUNKS = {"resnet": OFAResNetTrunk, "efficientnet_lite": OFAEfficientNetLiteTrunk}

__all__ = [
    "TRUNKS",
    "OFAEfficientNetLiteTrunk",
    "OFAFrozenBatchNorm2d",
    "OFAImageTrunk",
    "OFAResNetTrunk",
    "OFASameConv2d",
    "conv_norm",
]
