"""Weights of the authors' released code in this project's names, for ``HiAConfig.released``."""

from __future__ import annotations

import re

from torch import Tensor

_LAYER = re.compile(r"(?:.*\.)?(?:layers\.(?P<a>\d+)\.gate_Con|gate_Con\.(?P<b>\d+))\.(?P<rest>.+)")
_ENCODER = re.compile(r"(?:.*\.)?spm\.stem\.(?P<rest>.+)")
_SHARED = re.compile(r"(?:.*\.)?condition_linear\.(?P<rest>weight|bias)")
_MODULES = {
    "semantic_linear": "extractor.condition",
    "hr_linear": "extractor.feature_projection",
    "query_norm": "extractor.query_norm",
    "feat_norm": "extractor.feature_norm",
    "query_norm2": "injection.visual_norm",
    "feat_norm2": "injection.extracted_norm",
    "ffn_norm": "injection.post_norm",
}
_ATTENTIONS = {"hr_cross_attn": "extractor", "injection_cross_attn": "injection"}


def convert_released(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the adapter's tensors of a released checkpoint; load with ``model.adapter.load_state_dict``.

    Names there: those of xmed-lab/HiA on GitHub (``model.layers.{l}.gate_Con.*``, ``condition_linear``,
    ``spm.stem.*``). Attention's ``in_proj`` is split into queries, and keys with values. Tensors of the LLM and
    of CLIP are left out.

    Args:
        tensors: state_dict, any prefix.

    Returns:
        Tensors by this project's names. Released checkpoints don't hold the learnable queries (they were no
        parameters there); strict loading then says so.

    Raises:
        ValueError: a tensor of the adapter that has no place here.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _LAYER.fullmatch(name):
            converted.update(_layer(f"layers.{match['a'] or match['b']}", match["rest"], tensor))
        elif match := _ENCODER.fullmatch(name):
            rest = match["rest"].replace("batch_norm", "bn").replace("i_downsample", "downsample")
            converted[f"encoder.{rest}"] = tensor
        elif match := _SHARED.fullmatch(name):
            converted[f"feature_projection.{match['rest']}"] = tensor
    return converted


def _layer(layer: str, rest: str, tensor: Tensor) -> dict[str, Tensor]:
    module, _, leaf = rest.partition(".")
    if module == "hr_query_tokens":
        return {f"{layer}.extractor.queries": tensor.reshape(tensor.shape[-2:])}
    if module in _MODULES:
        return {f"{layer}.{_MODULES[module]}.{leaf}": tensor}
    if module in _ATTENTIONS and leaf.startswith("out_proj."):
        return {f"{layer}.{_ATTENTIONS[module]}.{leaf}": tensor}
    if module in _ATTENTIONS and leaf.startswith("in_proj_"):
        kind, dim = leaf.removeprefix("in_proj_"), tensor.shape[0] // 3
        prefix = f"{layer}.{_ATTENTIONS[module]}"
        return {f"{prefix}.q_proj.{kind}": tensor[:dim], f"{prefix}.kv_proj.{kind}": tensor[dim:]}
    raise ValueError(f"hia.convert_released: tensors must be of the released adapter, got {layer}.gate_Con.{rest}")
