"""Our port of the maths in the HiA authors' released code, to compare with.

Written from facts about that code (shapes, order of operations, parameter names, costs); no code was
copied, since it carries no licence. What is kept because it decides costs: two projections in a row
(C -> D1, then D1 -> D1 in each layer), textbook ``nn.MultiheadAttention`` that also returns its weights,
each LayerNorm computed once for the keys and once for the values, images one after the other, a
concatenation of the whole sequence per injection, unfused batch-norm behind convolutions with biases, NCHW.

What is not kept: its bugs. The instruction's index is given instead of taken as -1, any number of images
works, the queries are parameters, and hooks go when they should.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = (3, 4, 6, 3)
CHANNELS = 2048
NUM_HEADS = 8
NUM_QUERIES = 256
# what that code's images are normalised with: ImageNet's
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ReleasedBottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1, each with a bias and a batch-norm; the stride is on the 3x3 convolution."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.batch_norm1 = nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1)
        self.batch_norm2 = nn.BatchNorm2d(width)
        self.conv3, self.batch_norm3 = nn.Conv2d(width, out, 1), nn.BatchNorm2d(out)
        self.i_downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            self.i_downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Compute [N, C, H, W] -> [N, 4 * width, H', W']."""
        identity = x.clone()
        x = F.relu(self.batch_norm1(self.conv1(x)))
        x = F.relu(self.batch_norm2(self.conv2(x)))
        x = self.batch_norm3(self.conv3(x))
        if self.i_downsample is not None:
            identity = self.i_downsample(identity)
        return F.relu(x + identity)


class ReleasedResNet50(nn.Module):
    """ResNet-50 without its classifier: 2048 channels at ceil(H / 32) x ceil(W / 32)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.batch_norm1 = nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(BLOCKS):
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(ReleasedBottleneck(channels, width * 2**stage, 2 if stage and not block else 1))
                channels = width * 2**stage * 4
            self.add_module(f"layer{stage + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Encode [N, 3, H, W] -> [N, H' * W', 32 * width]."""
        x = F.relu(self.batch_norm1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(len(BLOCKS)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.flatten(2).transpose(1, 2)


class ReleasedInjection(nn.Module):
    """One layer's adapter: condition, extract, inject, and a LayerNorm after the sum."""

    def __init__(self, dim: int, num_heads: int = NUM_HEADS, num_queries: int = NUM_QUERIES) -> None:
        super().__init__()
        self.semantic_linear = nn.Linear(dim, dim)
        self.hr_linear = nn.Linear(dim, dim)
        self.hr_query_tokens = nn.Parameter(torch.randn(num_queries, dim))
        self.query_norm, self.feat_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_norm2, self.feat_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.hr_cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.injection_cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, visual: Tensor, instruction: Tensor, features: Tensor) -> Tensor:
        """Return what replaces one image's visual tokens.

        Args:
            visual: [1, K, D1] hidden states of the image's tokens.
            instruction: [1, 1, D1] hidden state of the instruction's last token.
            features: [1, N, D1] of the image, behind ``condition_linear``.

        Returns:
            [1, K, D1].
        """
        queries = self.hr_query_tokens + self.semantic_linear(instruction)  # [1, M, D1]
        features = self.hr_linear(features)
        extracted, _ = self.hr_cross_attn(self.query_norm(queries), self.feat_norm(features), self.feat_norm(features))
        update, _ = self.injection_cross_attn(
            self.query_norm2(visual), self.feat_norm2(extracted), self.feat_norm2(extracted)
        )
        return self.ffn_norm(visual + update)


class ReleasedTower(nn.Module):
    """Holds the encoder under the name it has in released checkpoints."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = ReleasedResNet50(width)


class ReleasedHiA(nn.Module):
    """Encoder, ``condition_linear`` and one :class:`ReleasedInjection` per chosen decoder layer.

    Args:
        hidden_size: D1 of the host.
        num_hidden_layers: L of the host; the layers are floor(j * L / (injections + 1)), j = 1..injections.
        injections: number of layers.
        encoder_width: channels of the encoder's stem; 64 there.
    """

    def __init__(
        self, hidden_size: int, num_hidden_layers: int, injections: int = 2, encoder_width: int = CHANNELS // 32
    ) -> None:
        super().__init__()
        self.spm = ReleasedTower(encoder_width)
        self.condition_linear = nn.Linear(32 * encoder_width, hidden_size)
        indices = [j * num_hidden_layers // (injections + 1) for j in range(1, injections + 1)]
        self.gate_Con = nn.ModuleDict({str(index): ReleasedInjection(hidden_size) for index in indices})

    @property
    def layer_indices(self) -> list[int]:
        """List the 0-based decoder layers whose output is changed."""
        return [int(index) for index in self.gate_Con]

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode [n, 3, H, W] normalised -> [n, N, D1]; the images share one size, as there."""
        return self.condition_linear(self.spm.stem(pixels))

    @contextmanager
    def attach(
        self, model: nn.Module, *, pixels: Tensor, image_rows: Sequence[slice], instruction_index: int
    ) -> Iterator[None]:
        """Hook into the decoder layers of a LLaVA for the forward passes inside the block (batch 1).

        Args:
            model: a ``LlavaForConditionalGeneration``.
            pixels: [n, 3, H, W] normalised.
            image_rows: for each image, in order, the rows its tokens have in the sequence.
            instruction_index: the row of the instruction's last token.

        Raises:
            ValueError: another number of images than of row ranges.
        """
        if pixels.shape[0] != len(image_rows):
            raise ValueError(
                f"ReleasedHiA.attach: image_rows must have one range per image ({pixels.shape[0]}), "
                f"got {len(image_rows)}"
            )
        features = self.encode(pixels)
        decoder = model.model.language_model.layers

        def hook_for(index: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = self._injected(self.gate_Con[str(index)], hidden, features, image_rows, instruction_index)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        handles: list[Any] = []
        try:
            for index in self.layer_indices:
                handles.append(decoder[index].register_forward_hook(hook_for(index)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _injected(
        layer: nn.Module, hidden: Tensor, features: Tensor, image_rows: Sequence[slice], instruction_index: int
    ) -> Tensor:
        """Inject: [1, S, D1] -> [1, S, D1]; a decode step, whose slice holds no visual token, passes unchanged."""
        if hidden.shape[1] <= max(rows.stop for rows in image_rows) - 1:
            return hidden
        instruction = hidden[:, instruction_index : instruction_index + 1]
        updates = [
            layer(hidden[:, rows], instruction, features[image : image + 1]) for image, rows in enumerate(image_rows)
        ]
        for rows, update in zip(image_rows, updates, strict=True):
            hidden = torch.cat([hidden[:, : rows.start], update, hidden[:, rows.stop :]], dim=1)
        return hidden


class ReleasedModel(nn.Module):
    """A host with the port on it, called like the host.

    Args:
        base: a ``LlavaForConditionalGeneration``.
        adapter: made for its sizes.
    """

    def __init__(self, base: nn.Module, adapter: ReleasedHiA) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(
        self, *, high_res_pixels: Tensor, image_rows: Sequence[slice], instruction_index: int, **inputs: Any
    ) -> Any:
        """Return the host's output for ``inputs``, with the adapter's arguments of :meth:`ReleasedHiA.attach`."""
        where = {"pixels": high_res_pixels, "image_rows": image_rows, "instruction_index": instruction_index}
        with self.adapter.attach(self.base, **where):
            return self.base(**inputs)


def build_released(base: nn.Module, injections: int = 2) -> ReleasedModel:
    """Build the port for this host, with random parameters, on its device and in its dtype."""
    text = base.config.text_config
    adapter = ReleasedHiA(text.hidden_size, text.num_hidden_layers, injections)
    weight = base.lm_head.weight
    return ReleasedModel(base, adapter.to(device=weight.device, dtype=weight.dtype)).eval()
