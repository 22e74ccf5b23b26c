"""The high-resolution encoder: raw pixels of any size to Z, N tokens of C channels (paper, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hia_kernels
from hia_kernels.ops.stem.functional import stem_reach

from .config import HiAConfig

BLOCKS = (3, 4, 6, 3)  # ResNet-50's bottlenecks a stage
EXPANSION = 4


def _statistics_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class FoldedConv(nn.Conv2d):
    """A convolution's parameters, in ``nn.Conv2d``'s names; its batch-norm is folded when it is applied."""

    def folded(self, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Per-channel scale and shift of the running statistics and of the convolution's bias, fp32 at least."""
        acc = _statistics_dtype(self.weight)
        scale = norm.weight.to(acc) * torch.rsqrt(norm.running_var.to(acc) + norm.eps)
        mean = norm.running_mean.to(acc) if self.bias is None else norm.running_mean.to(acc) - self.bias.to(acc)
        return scale, norm.bias.to(acc) - mean * scale

    def apply_to(
        self, x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, activation: str = "relu"
    ) -> Tensor:
        """[N, IH, IW, C] -> [N, OH, OW, OC]: convolution, batch-norm, residual, activation."""
        if norm.training:  # live statistics: the norm can't be folded before the convolution's output is known
            one = torch.ones_like(norm.weight, dtype=_statistics_dtype(self.weight))
            bias = torch.zeros_like(one) if self.bias is None else self.bias.to(one.dtype)
            y = hia_kernels.conv_norm_act(x, self.weight, one, bias, None, self.stride[0], "none")
            z = norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            z = z if residual is None else z + residual
            return (F.relu(z) if activation == "relu" else z).contiguous()
        scale, shift = self.folded(norm)
        return hia_kernels.conv_norm_act(x, self.weight, scale, shift, residual, self.stride[0], activation)


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 with a residual; the stride is on the 3x3 convolution."""

    def __init__(self, channels: int, width: int, stride: int, bias: bool):
        super().__init__()
        out = width * EXPANSION
        self.conv1 = FoldedConv(channels, width, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = FoldedConv(width, width, 3, stride=stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = FoldedConv(width, out, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(FoldedConv(channels, out, 1, stride=stride, bias=bias), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N, H', W', 4 * width]."""
        residual = x
        if self.downsample is not None:
            residual = self.downsample[0].apply_to(x, self.downsample[1], activation="none")
        y = self.conv1.apply_to(x, self.bn1)
        y = self.conv2.apply_to(y, self.bn2)
        return self.conv3.apply_to(y, self.bn3, residual)


class Encoder(nn.Module):
    """Raw pixels to features; one image at a time, so that an image's features never depend on its neighbours.

    Subclasses own ``conv1`` (3-channel stem), ``bn1`` and ``body``.
    """

    conv1: FoldedConv
    bn1: nn.BatchNorm2d
    pool = 3

    def __init__(self, config: HiAConfig):
        super().__init__()
        self.channels = config.encoder_channels
        self.live_statistics = config.batch_norm == "batch"
        self.image_mean, self.image_std = config.image_mean, config.image_std

    @property
    def smallest_side(self) -> int:
        """Pixels an image needs along each axis."""
        return stem_reach(self.conv1.kernel_size[0], self.pool)

    def reset_parameters(self) -> None:
        """Kaiming's initialisation of the convolutions; a block's last norm starts at zero.

        The running statistics of an untrained norm scale nothing: sixteen blocks would double the variance sixteen
        times, and fp16 hosts would overflow.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def train(self, mode: bool = True) -> Encoder:
        """Batch-norm keeps its running statistics in training unless the config asks for live ones."""
        super().train(mode)
        if not self.live_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, pixels: Tensor, window: Tensor) -> Tensor:
        """Encode one image.

        Args:
            pixels: [H, W, 1 or 3] uint8, uint16 or float.
            window: [2] fp32: the pixel values that mean black and white.

        Returns:
            [H', W', C] features, H' = ceil(H / stride), in the parameters' dtype.
        """
        x = self._stem(pixels[None], window[None])
        return self.body(x)[0]

    def body(self, x: Tensor) -> Tensor:
        """What follows the stem: [N, H, W, C] -> [N, H', W', C']."""
        raise NotImplementedError("Encoder is abstract: use build_encoder")

    def _stem(self, pixels: Tensor, window: Tensor) -> Tensor:
        mean = torch.tensor(self.image_mean, device=pixels.device)
        std = torch.tensor(self.image_std, device=pixels.device)
        if not self.bn1.training:
            scale, shift = self.conv1.folded(self.bn1)
            return hia_kernels.stem(pixels, window, mean, std, self.conv1.weight, scale, shift, self.pool)
        low, high = window[:, :, None, None, None].unbind(1)
        x = (((pixels.float() - low) / (high - low)).clamp(0, 1) - mean) / std  # [N, H, W, 3]
        x = self.conv1.apply_to_stem(x.to(self.conv1.weight.dtype))
        x = F.relu(self.bn1(x))
        if self.pool == 3:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        return x.permute(0, 2, 3, 1).contiguous()


class StemConv(FoldedConv):
    """The stem's convolution; stride 2, which ``conv_norm_act`` doesn't do for 7 x 7."""

    def apply_to_stem(self, x: Tensor) -> Tensor:
        """[N, H, W, 3] -> [N, OC, OH, OW], no norm."""
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, stride=2, padding=self.padding)


class ResNet50Encoder(Encoder):
    """ResNet-50 without its classifier; parameter names as in torchvision. Output stride 32, 32 * width channels."""

    def __init__(self, config: HiAConfig):
        super().__init__(config)
        width = config.encoder_width
        self.conv1 = StemConv(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(BLOCKS):
            planes = width * 2**stage
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layer.append(Bottleneck(channels, planes, stride, config.encoder_bias))
                channels = planes * EXPANSION
            self.add_module(f"layer{stage + 1}", layer)

    def body(self, x: Tensor) -> Tensor:
        """[N, H / 4, W / 4, width] -> [N, H / 32, W / 32, 32 * width]."""
        for stage in range(len(BLOCKS)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x


class StridedEncoder(Encoder):
    """A 3 x 3 stride-2 stem without pool and four 3 x 3 convolutions of doubling width, all stride 2
    (output stride 32), or the last with stride 1 (output stride 16)."""

    pool = 1

    def __init__(self, config: HiAConfig):
        super().__init__(config)
        width = config.encoder_width
        self.conv1 = StemConv(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for level in range(1, 5):
            stride = 1 if level == 4 and config.encoder_stride == 16 else 2
            channels = width * 2**level
            self.convs.append(FoldedConv(channels // 2, channels, 3, stride=stride, padding=1, bias=False))
            self.norms.append(nn.BatchNorm2d(channels))

    def body(self, x: Tensor) -> Tensor:
        """[N, H / 2, W / 2, width] -> [N, H / stride, W / stride, 16 * width]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv.apply_to(x, norm)
        return x


def build_encoder(config: HiAConfig) -> Encoder:
    """The encoder the config names."""
    encoder = ResNet50Encoder(config) if config.encoder == "resnet50" else StridedEncoder(config)
    encoder.reset_parameters()
    return encoder
