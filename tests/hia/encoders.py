"""Small encoders with statistics and images to try them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import hia
from hia.cuda_graphs import GraphCache
from hia.encoder.encoder import Encoder, build_encoder
from tests.hia.hosts import text_config

WINDOW = torch.tensor([0.0, 255.0])


def encoder_of(seed: int = 0, **changes) -> Encoder:
    """Make an encoder in evaluation, fp32, its norms with weights and statistics of their own, without positions.

    No weights fold by themselves: a test says which of its calls are folded.
    """
    small = {"num_queries": 5, "encoder_width": 8, "dim": 32, "num_heads": 2, "position": "none", **changes}
    statistics = small.pop("batch_norm", "running")
    encoder = build_encoder(hia.HiAConfig.paper(text_config(), **small)).eval()
    encoder.set_batch_norm(statistics)
    encoder.set_auto_fold(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif "bn" in name or "downsample.1" in name or "norms" in name:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator) / 2)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)
    return encoder


def pixels_of(height: int, width: int, channels: int = 1, seed: int = 0) -> Tensor:
    """Draw uint8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, channels), generator=generator).to(torch.uint8)


def distance(x: Tensor, truth: Tensor) -> float:
    """Compute the relative root mean square of a difference."""
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


@contextmanager
def without_graphs(encoder: Encoder) -> Iterator[None]:
    """Let the encoder launch kernel by kernel."""
    encoder.cuda_graphs = False
    try:
        yield
    finally:
        del encoder.cuda_graphs


def sides_of(cache: GraphCache) -> list[int]:
    """List the heights of the images there is a graph for, the one used last behind the others."""
    return [key[0][0][1] for key in cache.keys]
