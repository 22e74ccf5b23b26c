"""The parameters of the encoder's convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hia_kernels


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the scales and shifts that go with ``weight``."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class EncoderConv(nn.Conv2d):
    """A convolution's parameters, in ``nn.Conv2d``'s names. Its batch-norm is folded into it when it is applied."""

    def folded(self, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Compute each channel's scale and shift from the norm's running statistics and the bias, in fp32 or fp64."""
        acc = statistics_dtype(self.weight)
        scale = norm.weight.to(acc) * torch.rsqrt(norm.running_var.to(acc) + norm.eps)
        mean = norm.running_mean.to(acc) if self.bias is None else norm.running_mean.to(acc) - self.bias.to(acc)
        return scale, norm.bias.to(acc) - mean * scale

    def with_live_statistics(self, x: Tensor, norm: nn.Module, residual: Tensor | None, activation: str) -> Tensor:
        """Convolve, then normalise by the result's own statistics: [N, IH, IW, C] -> [N, OH, OW, OC]."""
        one = torch.ones(self.out_channels, dtype=statistics_dtype(self.weight), device=self.weight.device)
        bias = torch.zeros_like(one) if self.bias is None else self.bias.to(one.dtype)
        y = hia_kernels.conv_norm_act(x, self.weight, one, bias, None, self.stride[0], "none")
        z = norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        z = z if residual is None else z + residual
        return (F.relu(z) if activation == "relu" else z).contiguous()
