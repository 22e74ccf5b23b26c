"""The released maths' projection of the features, which all layers share."""

from __future__ import annotations

from torch import Tensor, nn

import hia_kernels

from ..unit import Unit, unit_forward


class SharedProjection(Unit, nn.Linear):
    """Linear(C -> D1) in front of every layer's own projection. It is called, by whichever layer needs it."""

    @unit_forward
    def forward(self, tokens: Tensor) -> Tensor:
        """Project [T, C] -> [T, D1], where the tokens are."""
        weight, bias = (p.to(tokens.device) for p in (self.weight, self.bias))
        return hia_kernels.linear(tokens, weight, bias)

    def folded_into(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Fold this projection into the one behind it; run it :meth:`inside`.

        Args:
            weight: [D, D1] of the projection behind.
            bias: [D].

        Returns:
            [D, C] and [D] of both as one.
        """
        own_weight, own_bias = (p.to(weight.device) for p in (self.weight, self.bias))
        return hia_kernels.linear(weight, own_weight.mT), weight @ own_bias + bias
