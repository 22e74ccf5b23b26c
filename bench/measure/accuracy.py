"""Nothing is timed that isn't right: a provider's outputs and gradients against the reference's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hia_kernels.testing import EXACT, GRADIENT_SLACK, OUT_SLACK, UNIT_ROUNDOFF, analysed, mismatch, rel_rms

from ..providers.bound import Bound, Outputs, bind_function, bind_step, dout_like
from ..providers.layers import TEXTBOOK, our_step
from ..providers.plain import replacing_ops
from ..workloads import Inputs, Workload, op_entry, references

# Behind ReLUs and max-pools a rounding puts a share u of the activations on the other side of a kink; each then has
# another gradient altogether, which makes sqrt(u) of the encoder's, or nothing where by chance none was that close.
# Plain fp32 PyTorch against fp64 on ResNet-50 at 224 pixels, eager and released with three seeds each: 8e-7 to 4.2e-3,
# so its error in one run bounds nobody else's. In 16 bits so many flip that it does.
KINKED, KINK_SLACK = "dencoder", 32


@dataclass
class Truth:
    """The reference's results, in higher precision and as it is.

    Attributes:
        exact: by name; "out0", "out1" ... and, with gradients, "d" and the argument's or part's name. An op's know
            what roundings can do to each element; of a composite's, dozens of layers deep, that would bind nothing.
        plain: the same at the dtype.
        dtype: what is tested.
    """

    exact: dict[str, Tensor]
    plain: dict[str, Tensor]
    dtype: torch.dtype

    def check(self, results: dict[str, Tensor]) -> tuple[str | None, float]:
        """Say why these results aren't good enough (None if they are), and return the largest relative RMS error."""
        missing = sorted(set(self.exact) - set(results))
        if missing:
            return f"no result for {', '.join(missing)}", float("nan")
        worst = 0.0
        for name, exact in self.exact.items():
            slack = OUT_SLACK if name.startswith("out") else GRADIENT_SLACK
            problem = mismatch(name, results[name], exact, self.plain[name], dtype=self.dtype, slack=slack)
            if problem is not None and not self._flipped(name, results[name], exact):
                same = results[name].shape == exact.shape
                return problem, rel_rms(results[name], exact) if same else float("nan")
            worst = max(worst, rel_rms(results[name], exact))
        return None, worst

    def _flipped(self, name: str, result: Tensor, exact: Tensor) -> bool:
        """Tell whether kinks explain the difference."""
        comparable = name == KINKED and self.dtype == torch.float32 and result.shape == exact.shape
        return comparable and rel_rms(result, exact) <= KINK_SLACK * UNIT_ROUNDOFF[self.dtype] ** 0.5


def results_of(bound: Bound, like: dict[str, Tensor] | None, *, gradients: bool) -> dict[str, Tensor]:
    """Return outputs, and gradients if asked for, by the reference's names.

    Args:
        bound: the provider.
        like: results whose shapes tell how outputs are joined where a provider splits one; None takes them as
            they are.
        gradients: whether to take them.
    """
    bound.restore()
    with torch.set_grad_enabled(gradients):
        outs = bound.forward()
    joined = _joined(outs, like)
    results = {f"out{number}": out.detach().clone() for number, out in enumerate(joined)}
    if gradients:
        grads = torch.autograd.grad(joined, list(bound.leaves.values()), dout_like(joined), allow_unused=True)
        named = {name: grad for name, grad in zip(bound.leaves, grads, strict=True) if grad is not None}
        results |= bound.canonical({name: grad.detach() for name, grad in named.items()})
    return results


def _joined(outs: Outputs, like: dict[str, Tensor] | None) -> Outputs:
    """Join keys and values of two products, which are one output here."""
    if like is None or len(outs) == sum(name.startswith("out") for name in like):
        return outs
    return (torch.cat(outs, dim=-1),)


def truth_of(
    workload: Workload, inputs: Inputs, weights: dict[str, Tensor] | None, dtype: torch.dtype, *, gradients: bool
) -> Truth:
    """Run the reference twice."""
    wide = _cast(inputs, EXACT[dtype], dtype)
    if weights is None:
        wide = analysed(wide, dtype)
    exact = _reference(workload, wide, _cast(weights, EXACT[dtype], dtype), gradients)
    plain = _reference(workload, inputs, weights, gradients)
    return Truth({name: value for name, value in exact.items() if name in plain}, plain, dtype)


def _reference(
    workload: Workload, inputs: Inputs, weights: dict[str, Tensor] | None, gradients: bool
) -> dict[str, Tensor]:
    if weights is None:
        entry = op_entry(workload.op)
        bound = bind_function(entry.reference, inputs, entry.inputs.DIFFERENTIABLE, gradients=gradients)
        return results_of(bound, None, gradients=gradients)
    step = our_step(workload.case, {name: tensor.detach().clone() for name, tensor in weights.items()}, TEXTBOOK)
    with replacing_ops(references()):
        return results_of(bind_step(step, workload.op, inputs, gradients=gradients), None, gradients=gradients)


def _cast(values: dict[str, Any] | None, exact: torch.dtype, dtype: torch.dtype) -> Any:
    """Convert floating tensors to the exact dtype.

    Windows, means and deviations stay fp32 as the stem demands; scales and shifts of halves are fp32 already.
    """
    if values is None:
        return None
    fixed = ("window", "windows", "mean", "std")

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value):
            return tuple(convert(name, item) for item in value)
        if isinstance(value, torch.dtype) and value == dtype:  # an output's
            return exact
        if isinstance(value, Tensor) and value.is_floating_point() and name not in fixed:
            return value.to(exact)
        return value

    return {name: convert(name, value) for name, value in values.items()}
