"""The hosts Table 3 is about, built from configs: LLaVA-13B, LLaVA-NeXT-13B, and a small LLaVA for real runs.

No weights are downloaded: under fake tensors there are none, and in real runs they are random, which
changes neither memory nor time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

PATCH = 14
BASE_RESOLUTION = 336

# Llama-2-13b-hf, as printed in scaleapi/llm-engine (Apache-2.0), model-engine/tests/unit/domain/
# test_llm_use_cases.py; mlc-ai/mlc-llm (Apache-2.0), model_preset.py "llama2_13b", agrees but for the early
# context of 2048.
LLAMA2_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}
# openai/clip-vit-large-patch14-336: open_clip's ViT-L-14-336-quickgelu.json (width 1024, 24 layers, patch 14,
# image 336) with its defaults mlp_ratio 4 and head_width 64.
CLIP_VIT_L_14_336: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": BASE_RESOLUTION,
    "patch_size": PATCH,
    "projection_dim": 768,
}
# ours: the same architecture at a size whose prefill takes seconds on two cores
SMALL_LLM: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}
SMALL_VIT: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": BASE_RESOLUTION,
    "patch_size": PATCH,
    "projection_dim": 384,
}
# LLaVA-NeXT: up to five tiles of 336, the whole image and a grid of at most four
GRID_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class HostSpec:
    """A host's shapes.

    Attributes:
        name: for output.
        text: fields of a ``LlamaConfig``.
        vision: fields of a ``CLIPVisionConfig``.
    """

    name: str
    text: dict[str, Any] = field(default_factory=lambda: dict(LLAMA2_13B))
    vision: dict[str, Any] = field(default_factory=lambda: dict(CLIP_VIT_L_14_336))

    @property
    def context(self) -> int:
        """Return the tokens that the LLM was trained to read."""
        return int(self.text.get("max_position_embeddings", 4096))

    @property
    def image_token(self) -> int:
        """Return the id of the image placeholder: the first one behind the LLM's vocabulary."""
        return int(self.text["vocab_size"])


LLAVA_13B = HostSpec("LLaVA-13B (LLaMA-2-13B, CLIP ViT-L/14-336)")
SMALL_LLAVA = HostSpec("small LLaVA", SMALL_LLM, SMALL_VIT)


def host_from_file(path: str | Path) -> HostSpec:
    """Read LLaVA with another LLM from a LLaMA ``config.json``.

    Raises:
        ValueError: no JSON object, another model type, or missing fields.
        OSError: unreadable.
    """
    path = Path(path)
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--host-config: {path} must be a JSON file, got: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--host-config: {path} must hold a JSON object, got {type(fields).__name__}")
    if fields.get("model_type", "llama") != "llama":
        raise ValueError(f"--host-config: model_type must be 'llama', got {fields['model_type']!r} in {path}")
    missing = [name for name in REQUIRED if name not in fields]
    if missing:
        raise ValueError(f"--host-config: {path} must hold {', '.join(REQUIRED)}, got none for {', '.join(missing)}")
    wanted = {name: fields[name] for name in LLAMA2_13B if name in fields}
    return HostSpec(f"LLaVA ({path.stem}, CLIP ViT-L/14-336)", {**LLAMA2_13B, **_kv_heads(fields), **wanted})


def _kv_heads(fields: dict[str, Any]) -> dict[str, Any]:
    """Return as many key-value heads as heads, as transformers does where the config names none."""
    return {"num_key_value_heads": fields["num_attention_heads"]}


def build_llava(spec: HostSpec, dtype: torch.dtype, attention: str) -> LlavaForConditionalGeneration:
    """Build LLaVA-1.5's architecture in eval mode, on the default device."""
    config = LlavaConfig(**_config_fields(spec))
    return LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention).eval()


def build_llava_next(spec: HostSpec, dtype: torch.dtype, attention: str) -> LlavaNextForConditionalGeneration:
    """Build LLaVA-NeXT's architecture in eval mode, on the default device."""
    config = LlavaNextConfig(**_config_fields(spec), image_grid_pinpoints=GRID_PINPOINTS)
    return LlavaNextForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention).eval()


def _config_fields(spec: HostSpec) -> dict[str, Any]:
    # one token more than the LLM's vocabulary, padded to 64 rows as LLaVA-1.5's checkpoints are
    rows = -(-(spec.image_token + 1) // 64) * 64
    return {
        "text_config": LlamaConfig(**{**spec.text, "vocab_size": rows}),
        "vision_config": CLIPVisionConfig(**spec.vision),
        "image_token_index": spec.image_token,
    }


def visual_tokens(resolution: int) -> int:
    """Return the tokens of a square image behind CLIP (patch 14, class token dropped)."""
    return (resolution // PATCH) ** 2


@torch.no_grad()
def interpolate_positions(model: nn.Module, resolution: int) -> None:
    """Give CLIP position embeddings for ``resolution``: bicubic, from the grid it was made with; in place.

    Raises:
        ValueError: a resolution below one patch.
    """
    if resolution < PATCH:
        raise ValueError(f"interpolate_positions: resolution must be at least {PATCH}, got {resolution}")
    tower = model.model.vision_tower
    embeddings = getattr(tower, "vision_model", tower).embeddings
    trained = getattr(embeddings, "trained_positions", embeddings.position_embedding.weight)
    embeddings.trained_positions = trained.data  # no parameter: the next resolution starts from here again
    side, trained_side = resolution // PATCH, math.isqrt(trained.shape[0] - 1)
    table = resampled_positions(trained.data, trained_side, side) if side != trained_side else trained.data
    embeddings.position_embedding = nn.Embedding(*table.shape, _weight=table).requires_grad_(False)
    embeddings.image_size = resolution
    embeddings.num_patches, embeddings.num_positions = side * side, side * side + 1
    embeddings.position_ids = torch.arange(side * side + 1, device=table.device)[None]


def resampled_positions(table: Tensor, old_side: int, side: int) -> Tensor:
    """Resample [1 + old_side**2, C] to [1 + side**2, C]: the class token's row, then the grid, bicubic."""
    class_row, grid = table[:1], table[1:]
    grid = grid.float().T.reshape(1, -1, old_side, old_side)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([class_row, grid[0].flatten(1).T.to(table.dtype)])


def parameter_count(module: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
