"""The high-resolution encoder: raw pixels of any size to Z, N tokens of C channels (paper, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hia_kernels
from hia_kernels.ops.stem import stem_packed
from hia_kernels.ops.stem.functional import stem_reach

from ..config import HiAConfig
from ..folding import FoldingUnit
from ..renamed import renamed
from ..unit import unit_forward
from ..versions import WeightVersion, has_training_norm, tensors_of
from . import memory, strips
from .conv import EncoderConv
from .executor import ConvExecutor
from .folded import FoldedEncoder, fold_conv
from .memory import Budget
from .position import add_position
from .weights import load_resnet50

__all__ = ["Bottleneck", "Encoder", "ResNet50Encoder", "StridedEncoder", "build_encoder", "load_resnet50"]

BLOCKS = (3, 4, 6, 3)  # ResNet-50's bottlenecks a stage
EXPANSION = 4
BATCH_NORMS = ("running", "batch")
GROUP_PIXELS = 2**22  # images of one size are stacked up to this many pixels; a larger one fills a GPU by itself
CPU_GROUP_PIXELS = 2**20  # the same on the CPU, in training; beyond, a stack only takes more memory for its temporaries


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 with a residual; the stride is on the 3x3 convolution."""

    def __init__(self, channels: int, width: int, stride: int, bias: bool):
        super().__init__()
        out = width * EXPANSION
        self.stride = stride
        self.conv1 = EncoderConv(channels, width, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = EncoderConv(width, width, 3, stride=stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = EncoderConv(width, out, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                EncoderConv(channels, out, 1, stride=stride, bias=bias), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor, executor: ConvExecutor | None = None) -> Tensor:
        """Compute [N, H, W, C] -> [N, H', W', 4 * width], over x with folded weights and without ``downsample``."""
        executor = executor or ConvExecutor()
        y = executor(self.conv1, self.bn1, x)
        y = executor(self.conv2, self.bn2, y, scratch=True)
        residual = x
        if self.downsample is not None:  # last: the larger of the two is not there yet while conv2 runs
            residual = executor(self.downsample[0], self.downsample[1], x, activation="none")
            executor.advance(residual)
        return executor(self.conv3, self.bn3, y, residual)

    def pairs(self) -> Iterator[tuple[EncoderConv, nn.BatchNorm2d]]:
        """List each convolution and its norm."""
        yield from ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        if self.downsample is not None:
            yield self.downsample[0], self.downsample[1]


class Encoder(FoldingUnit[FoldedEncoder]):
    """Raw pixels to features; with running statistics an image's features never depend on its neighbours.

    Subclasses own ``conv1`` (3-channel stem), ``bn1`` and what :meth:`units` lists.

    Attributes:
        cuda_graphs: whether folded weights may be used through CUDA graphs, which keep their activations' memory.
    """

    conv1: EncoderConv
    bn1: nn.BatchNorm2d
    pool = 3
    stem_stride = 4
    cuda_graphs = True

    def __init__(self, config: HiAConfig):
        super().__init__()
        self.channels = config.encoder_channels
        self.stride = config.encoder_stride
        self.live_statistics = False
        self.position = config.position
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self._constants: dict[Any, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave folded weights and constants out of copies."""
        return {**super().__getstate__(), "_constants": {}}

    @property
    def smallest_side(self) -> int:
        """Return the pixels that an image needs along each axis."""
        return stem_reach(self.conv1.kernel_size[0], self.pool)

    def halved(self, side: int) -> int:
        """Count the features along an axis of so many pixels."""
        return -(-side // self.stride)

    def reset_parameters(self) -> None:
        """Initialise the convolutions as Kaiming does; a block's last norm starts at zero.

        The running statistics of an untrained norm scale nothing: sixteen blocks would double the variance sixteen
        times, and fp16 hosts would overflow.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def set_batch_norm(self, statistics: str) -> None:
        """Choose the statistics that batch-norm takes in training: "running", or those of the "batch".

        Raises:
            ValueError: neither of them.
        """
        if statistics not in BATCH_NORMS:
            raise ValueError(f"hia: batch_norm must be {' or '.join(map(repr, BATCH_NORMS))}, got {statistics!r}")
        self.live_statistics = statistics == "batch"
        self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode; batch-norm keeps its running statistics in training unless live ones were asked for."""
        super().train(mode)
        if not self.live_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @unit_forward
    def forward(self, pixels: Tensor, window: Tensor, max_activation_bytes: Budget | str = None) -> Tensor:
        """Encode one image.

        Args:
            pixels: [H, W, 1 or 3] uint8, uint16 or float.
            window: [2] fp32: the pixel values that mean black and white.
            max_activation_bytes: what activations may take, features included, pixels and weights not; an image that
                needs more goes through in strips, for inference with running statistics. None: no limit. "auto": what
                2^22 pixels take, on CUDA half of the free memory if that is more; for images larger than that, in
                calls that strips serve.

        Returns:
            [H', W', C] features, H' = ceil(H / stride), in the parameters' dtype; with ``position="sincos"`` where each
            stands is in them.

        Raises:
            ValueError: the budget can't hold a strip, or gradients or live statistics want the whole image.
        """
        budget = memory.budget_of(max_activation_bytes)
        return self._encode(pixels[None], window[None], self._executor(), budget)[0]

    def forward_many(
        self, images: Sequence[Tensor], windows: Tensor, max_activation_bytes: Budget | str = None
    ) -> list[Tensor]:
        """Encode images of any sizes: those of one size together, on the CPU only where gradients are recorded.

        Without gradients the CPU takes one after the other: each has the bits that it has alone. With live statistics,
        images of one size (and kind of pixel) are one batch everywhere: each such group has statistics of its own.

        Args:
            images: [H, W, 1 or 3] each, on any device.
            windows: [n, 2] fp32.
            max_activation_bytes: as in :meth:`forward`; for all that is encoded at once.

        Returns:
            One [H', W', C] map an image, in order; none is padded.

        Raises:
            ValueError: as :meth:`forward`; not one window an image; a budget that can't hold a group that must be one.
        """
        budget = memory.budget_of(max_activation_bytes)
        if tuple(windows.shape) != (len(images), 2):
            raise ValueError(f"hia: windows must have shape [{len(images)}, 2], got {list(windows.shape)}")
        return self.inside(self._encode_many, images, windows, budget)

    def _encode_many(self, images: Sequence[Tensor], windows: Tensor, budget: Budget) -> list[Tensor]:
        device = self.conv1.weight.device
        images, windows = [pixels.to(device, non_blocking=True) for pixels in images], windows.to(device)
        executor = self._executor()
        maps: dict[int, Tensor] = {}
        live = False if executor.weights else None  # what was folded holds while no norm takes live statistics
        limit = None if isinstance(budget, memory.AutoBudget) else budget
        for group in self._groups(images, limit, live=live):
            pixels, window = _stacked(images, group), _stacked(windows, group)
            maps.update(zip(group, self._encode(pixels, window, executor, budget), strict=True))
        return [maps[index] for index in range(len(images))]

    def weights(self) -> list[Tensor]:
        """List all parameters and statistics."""
        return tensors_of(self)

    def weight_version(self) -> WeightVersion:
        """Name the present state of parameters and statistics, and what is added to variances."""
        norms = (self.bn1, *(norm for unit in self.units() for _, norm in unit.pairs()))
        return (*super().weight_version(), *(norm.eps for norm in norms))

    def folding_bytes(self) -> int:
        """Count the bytes that folding takes at its peak: a copy of every weight."""
        return sum(tensor.nbytes for tensor in self.weights())

    def _made(self) -> FoldedEncoder:
        """Fold the norms and pack the weights."""
        constants = self._normalisation(self.conv1.weight.device)
        convs = {self.conv1: fold_conv(self.conv1, self.bn1, pack=False, stem=(*constants, self.pool))}
        for unit in self.units():
            convs.update({conv: fold_conv(conv, norm) for conv, norm in unit.pairs()})
        return FoldedEncoder(self.weight_version(), convs, constants)

    def _drop(self) -> None:
        self.drop_graphs()
        super()._drop()

    def drop_graphs(self) -> None:
        """Drop the CUDA graphs there are, and their memory."""
        if self._folded is not None:
            self._folded.graphs.clear()

    prepare, unprepare = renamed("prepare", "fold_weights"), renamed("unprepare", "unfold_weights")

    def units(self) -> Sequence[Any]:
        """List what follows the stem, in order."""
        raise NotImplementedError("Encoder is abstract: use build_encoder")

    def body(self, x: Tensor, executor: ConvExecutor | None = None, start: int = 0) -> Tensor:
        """Run what follows the stem, from unit ``start`` on: [N, H, W, C] -> [N, H', W', C']."""
        executor = executor or self._executor()
        elements = memory.workspace_elements(self.units()[start:], x.shape)
        with executor.within(elements, x.dtype, keep=start == 0):  # behind strips the image is a large one
            for unit in self.units()[start:]:
                x = unit(x, executor)
            return executor.released(x)

    def stem(self, pixels: Tensor, window: Tensor, executor: ConvExecutor) -> Tensor:
        """Run the stem: [N, H, W, CP], [N, 2] -> [N, H / stem_stride, W / stem_stride, width]."""
        mean, std = self._normalisation(pixels.device)
        if not self.bn1.training:
            weight, scale, shift = executor.folded(self.conv1, self.bn1)
            folded = executor.weights.get(self.conv1)
            packed = None if folded is None else folded.stem
            if packed is not None and packed.mean is mean and not packed.unsupported_reasons(pixels):
                return stem_packed(pixels, window, packed)
            return hia_kernels.stem(pixels, window, mean, std, weight, scale, shift, self.pool)
        low, high = window[:, :, None, None, None].unbind(1)
        x = (((pixels.float() - low) / (high - low)).clamp(0, 1) - mean) / std  # [N, H, W, 3]
        x = self.conv1.apply_to_stem(x.to(self.conv1.weight.dtype))
        x = F.relu(self.bn1(x))
        if self.pool == 3:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        return x.permute(0, 2, 3, 1).contiguous()

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and std on the device; they are made once, since copying them there makes the host wait."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # not the tensors of a trace
            return self._constant(self.image_mean, device), self._constant(self.image_std, device)
        key = (device, self.image_mean, self.image_std)
        if key not in self._constants:
            with torch.inference_mode(False):  # training saves them for its backward
                constants = self._constant(self.image_mean, device), self._constant(self.image_std, device)
            self._constants[key] = constants
        return self._constants[key]

    @staticmethod
    def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def takes_live_statistics(self) -> bool:
        """Tell whether any norm takes the statistics of what it is given."""
        return self.bn1.training or any(norm.training for unit in self.units() for _, norm in unit.pairs())

    def _executor(self) -> ConvExecutor:
        """Take the folded weights where no gradient is recorded and no norm takes live statistics."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or has_training_norm(self)  # of the norms there are now: others may have the same tensors
        ):
            return ConvExecutor()
        folded = self.count_call()
        if folded is None:
            return ConvExecutor()
        graphs = folded.graphs if self.cuda_graphs else None
        return ConvExecutor(folded.convs, folded.packed_serves(), graphs, folded.workspace_cache)

    def _encode(self, pixels: Tensor, window: Tensor, executor: ConvExecutor, budget: Budget) -> Tensor:
        """Encode images of one size, [N, H, W, CP], [N, 2] -> [N, H', W', C]; positions go on last, strips or not."""
        features = self._without_position(pixels, window, executor, budget)
        return features if self.position == "none" else add_position(features)

    def _without_position(self, pixels: Tensor, window: Tensor, executor: ConvExecutor, budget: Budget) -> Tensor:
        if isinstance(budget, memory.AutoBudget):
            budget = budget.of(self, pixels, GROUP_PIXELS)
        if budget is not None:
            executor.workspace_cache = None  # it may be larger than this image's budget
            images, height, width, _ = pixels.shape
            rows = memory.strip_rows(self, height, width, budget // images)
            if rows is not None:
                memory.check_inference(self, pixels, height, width, budget)
                return strips.encode_strips(self, pixels, window, executor, rows)
        count, rows = memory.head(self, *pixels.shape[1:3]) if executor.packed and pixels.shape[0] == 1 else (0, 0)
        if count:  # nothing here may hold a map that the body has done with
            return self.body(strips.encode_strips(self, pixels, window, executor, rows, count, True), executor, count)

        def whole(pixels: Tensor, window: Tensor) -> Tensor:
            return self.body(self.stem(pixels, window, executor), executor)

        if executor.graphs is None or budget is not None:
            return whole(pixels, window)
        return executor.graphs(whole, pixels, window, self.conv1.weight.dtype, GROUP_PIXELS)

    def _groups(self, images: Sequence[Tensor], budget: int | None, *, live: bool | None = None) -> list[list[int]]:
        """Group the indices of images to encode at once: of one size, and no more than the budget holds."""
        live = self.takes_live_statistics() if live is None else live
        on_cpu = self.conv1.weight.device.type == "cpu"
        if on_cpu and not live and not torch.is_grad_enabled():
            return [[index] for index in range(len(images))]
        alike = of_one_kind(images)
        if live:  # a limit would decide whose statistics an image sees
            self._check_live_groups(alike, budget)
            return list(alike.values())
        groups = []
        for (shape, _), members in alike.items():
            count = max(1, (CPU_GROUP_PIXELS if on_cpu else GROUP_PIXELS) // max(1, shape[0] * shape[1]))
            if budget is not None:
                count = max(1, min(count, budget // memory.activation_bytes(self, *shape[:2])))
            groups += [members[start : start + count] for start in range(0, len(members), count)]
        return groups

    def _check_live_groups(self, alike: dict[Any, list[int]], budget: int | None) -> None:
        for (shape, _), members in alike.items():
            features = self.halved(shape[0]) * self.halved(shape[1]) * len(members)
            # SyncBatchNorm's other ranks have features too
            if features < 2 and not any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
                raise ValueError(
                    f"hia: images of one size must give more than one feature together where batch-norm takes live "
                    f"statistics, got one of {shape[0]} x {shape[1]} pixels, a feature per {self.stride}"
                )
            needed = 0 if budget is None else len(members) * memory.activation_bytes(self, *shape[:2])
            if budget is not None and needed > budget:
                raise ValueError(
                    f"hia: max_activation_bytes must hold all {len(members)} images of {shape[0]} x {shape[1]} at once "
                    f"where batch-norm takes live statistics, {needed} bytes, got {budget}"
                )


def of_one_kind(images: Sequence[Tensor]) -> dict[tuple[torch.Size, torch.dtype], list[int]]:
    """Group the indices of images that can be stacked: by shape and dtype, in order."""
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, image in enumerate(images):
        alike.setdefault((image.shape, image.dtype), []).append(index)
    return alike


def _stacked(tensors: Sequence[Tensor] | Tensor, group: list[int]) -> Tensor:
    if len(group) == 1:
        return tensors[group[0]][None]
    return torch.stack([tensors[index] for index in group])


class StemConv(EncoderConv):
    """The stem's convolution; stride 2, which ``conv_norm_act`` doesn't do for 7 x 7."""

    def apply_to_stem(self, x: Tensor) -> Tensor:
        """Convolve, without a norm: [N, H, W, 3] -> [N, OC, OH, OW]."""
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

    def units(self) -> list[Bottleneck]:
        """List the sixteen bottlenecks."""
        return [block for stage in range(len(BLOCKS)) for block in self.get_submodule(f"layer{stage + 1}")]


class ConvUnit:
    """A convolution and its norm, which two lists own."""

    def __init__(self, conv: EncoderConv, norm: nn.BatchNorm2d):
        self.conv, self.norm, self.stride = conv, norm, conv.stride[0]

    def __call__(self, x: Tensor, executor: ConvExecutor) -> Tensor:
        out = executor(self.conv, self.norm, x)
        executor.advance(out)
        return out

    def pairs(self) -> Iterator[tuple[EncoderConv, nn.BatchNorm2d]]:
        """List each convolution and its norm."""
        yield self.conv, self.norm


class StridedEncoder(Encoder):
    """A 3 x 3 stride-2 stem without pool and four 3 x 3 convolutions of doubling width, all stride 2
    (output stride 32), or the last with stride 1 (output stride 16)."""

    pool = 1
    stem_stride = 2

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
            self.convs.append(EncoderConv(channels // 2, channels, 3, stride=stride, padding=1, bias=False))
            self.norms.append(nn.BatchNorm2d(channels))

    def units(self) -> list[ConvUnit]:
        """List the four convolutions."""
        return [ConvUnit(conv, norm) for conv, norm in zip(self.convs, self.norms, strict=True)]


def build_encoder(config: HiAConfig) -> Encoder:
    """Build the encoder that the config names."""
    encoder = ResNet50Encoder(config) if config.encoder == "resnet50" else StridedEncoder(config)
    encoder.reset_parameters()
    return encoder
