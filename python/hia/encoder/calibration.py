"""Batch-norm statistics from data, for an encoder that was never trained.

Norms that use running statistics in training never move them: an encoder with a new one's mean 0 and variance 1 would
keep a scale that its activations don't have. Measured once over real images, they are what training starts from
("precise" statistics, Wu and Johnson, 2021: the moments of all images, not a moving average of batches).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..images.load import check_pixels, windows_of
from ..images.radiograph import Radiograph
from .encoder import Encoder, of_one_kind

CHUNK_PIXELS = 2**20  # images that are normed together; their activations are in memory at once


def norms_of(encoder: Encoder) -> list[nn.BatchNorm2d]:
    """Find the encoder's norms, in the order of its modules (SyncBatchNorm included)."""
    return [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def is_pristine(encoder: Encoder) -> bool:
    """Tell whether any norm's statistics are a new one's, mean 0 and variance 1, which no data gives exactly."""
    for norm in norms_of(encoder):
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None or mean.is_meta:
            continue
        if not bool(mean.any()) and bool((variance == 1).all()):
            return True
    return False


class _Moments:
    """Moments of what a norm is given, over all pixels of all images: [C] in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self.total, self.squares = (torch.zeros((), dtype=torch.float64) for _ in range(2))

    def add(self, _norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Take in [N, C, H, W]; a forward pre-hook."""
        x = args[0].detach()
        count = x.numel() // x.shape[1]
        mean = x.mean((0, 2, 3), dtype=torch.float32).double()
        spread = (x.float() - mean.float()[:, None, None]).square().mean((0, 2, 3)).double()
        self.count += count
        self.total = self.total.to(mean) + count * mean
        self.squares = self.squares.to(mean) + count * (spread + mean.square())

    def statistics(self, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Make the norm's: the mean, and the variance with Bessel's correction as PyTorch has it, in its dtype."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp_min(0)
        bessel = self.count / max(1, self.count - 1)
        return mean.to(norm.running_mean.dtype), (variance * bessel).to(norm.running_var.dtype)


@contextmanager
def _measuring(norms: Sequence[nn.BatchNorm2d], moments: Sequence[_Moments]) -> Iterator[None]:
    """Let the norms normalise by what they are given and hand it to ``moments``; as before afterwards."""
    modes = [norm.training for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    handles = [norm.register_forward_pre_hook(own.add) for norm, own in zip(norms, moments, strict=True)]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, training, buffers in zip(norms, modes, before, strict=True):
            norm.train(training)
            for name, buffer in buffers.items():
                if not torch.equal(norm.get_buffer(name), buffer):  # a write would drop what fold_weights() made
                    norm.get_buffer(name).copy_(buffer)


@torch.no_grad()
def calibrate(encoder: Encoder, runs: Sequence[Callable[[], object]]) -> None:
    """Measure every norm's statistics and set them, all or none.

    Args:
        encoder: whose norms are measured.
        runs: each runs the encoder on some images, which norms divide by their own moments; the statistics are those
            of all runs' pixels together.

    Raises:
        ValueError: a statistic that is not finite, from activations that overflow; nothing is set then.
    """
    norms = norms_of(encoder)
    moments = [_Moments() for _ in norms]
    with _measuring(norms, moments):
        for run in runs:
            run()
    names = {id(module): name for name, module in encoder.named_modules()}
    seen = [(norm, own.statistics(norm)) for norm, own in zip(norms, moments, strict=True) if own.count]
    for norm, statistics in seen:
        if not all(bool(torch.isfinite(values).all()) for values in statistics):
            raise ValueError(
                f"hia: images must give finite activations to calibrate, got statistics beyond "
                f"{norm.running_var.dtype} before encoder.{names[id(norm)]}; use fp32 or bf16"
            )
    for norm, (mean, variance) in seen:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.num_batches_tracked.fill_(1)


def pixels_and_windows(images: Any, windows: Any, smallest_side: int) -> tuple[list[Tensor], Tensor]:
    """Take images apart.

    Args:
        images: radiographs or tensors, as the caller gave them.
        windows: [n, 2] or None, which is right for radiographs.
        smallest_side: that the encoder takes, pixels.

    Returns:
        [H, W, 1 or 3] each, and [n, 2].

    Raises:
        TypeError, ValueError: no sequence of at least one image that the encoder takes, or windows that don't fit.
    """
    if not isinstance(images, Sequence):
        raise TypeError(f"hia.calibrate_encoder: images must be a list of images, got {type(images).__name__}")
    if len(images) == 0:
        raise ValueError("hia.calibrate_encoder: images must hold at least one image, got none")
    radiographs = [isinstance(image, Radiograph) for image in images]
    if any(radiographs) and (windows is not None or not all(radiographs)):
        raise ValueError(
            "hia.calibrate_encoder: images must be radiographs alone, whose windows are taken, or tensors alone with "
            f"windows, got {sum(radiographs)} radiographs of {len(images)} and "
            f"{'no windows' if windows is None else 'windows'}"
        )
    pixels = [image.pixels if isinstance(image, Radiograph) else image for image in images]
    for number, image in enumerate(pixels):
        check_pixels(f"images[{number}]", image, smallest_side)
    return pixels, windows_of(images, windows)


def chunks_of(encoder: Encoder, images: Sequence[Tensor]) -> list[list[int]]:
    """List which images go through together: of one size, at most ``CHUNK_PIXELS`` pixels, chunks evenly filled.

    Raises:
        ValueError: a chunk that gives one feature in all, which has no variance.
    """
    chunks = []
    for (shape, _), members in of_one_kind(images).items():
        height, width = shape[:2]
        count = math.ceil(len(members) / max(1, CHUNK_PIXELS // (height * width)))
        found = [members[len(members) * i // count : len(members) * (i + 1) // count] for i in range(count)]
        if encoder.halved(height) * encoder.halved(width) * len(found[0]) < 2:
            raise ValueError(
                f"hia.calibrate_encoder: images of one size must give more than one feature together, got one of "
                f"{height} x {width} pixels, a feature per {encoder.stride}; give several of that size, or larger ones"
            )
        chunks += found
    return chunks
