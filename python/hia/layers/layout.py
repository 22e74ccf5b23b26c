"""Rows of a batch's visual tokens, image by image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hia_kernels.core.varlen import cu_seqlens_from_lengths, to_device


@dataclass(frozen=True)
class CallLayout:
    """Row numbers in the flattened hidden states [B * S, D1] of one forward call.

    Attributes:
        instruction_rows: [A] int64, last instruction token of each of the A samples that have images.
        image_to_sample: [n] int64 in ``[0, A)``.
        visual_rows: [R] int64, image by image.
        cu_rows: [n + 1] int32, the images' shares of ``visual_rows``.
        max_rows: the largest share.
        copies: identical neighbours each sample has in the call's batch (beams, several return sequences).
        written_rows: [R * copies] int64: ``visual_rows`` of every copy; these themselves come first.
        row_counts: the images' shares of ``visual_rows`` as ints.
    """

    instruction_rows: Tensor
    image_to_sample: Tensor
    visual_rows: Tensor
    cu_rows: Tensor
    max_rows: int
    copies: int
    written_rows: Tensor
    row_counts: tuple[int, ...]

    def to(self, device: torch.device) -> CallLayout:
        """Copy to another device, in one piece; return itself if it is there already."""
        if self.visual_rows.device == device:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        together = to_device(torch.cat([tensor.to(torch.int64) for tensor in tensors.values()]), device)
        shares = together.split([tensor.shape[0] for tensor in tensors.values()])
        moved = {name: share.to(tensor.dtype) for (name, tensor), share in zip(tensors.items(), shares, strict=True)}
        return replace(self, **moved)


@dataclass(frozen=True)
class VisualLayout:
    """A batch's visual tokens as (sample, position), before it is known how the host batches them. On the CPU.

    Attributes:
        batch: samples.
        seq_len: padded prompt length, tokens.
        samples: [A] int64, the samples that have images.
        instruction: [A] int64, position of their last instruction token.
        image_to_sample: [n] int64 in ``[0, A)``.
        token_sample: [R] int64, image by image.
        token_position: [R] int64.
        rows_per_image: n counts.
    """

    batch: int
    seq_len: int
    samples: Tensor
    instruction: Tensor
    image_to_sample: Tensor
    token_sample: Tensor
    token_position: Tensor
    rows_per_image: tuple[int, ...]

    def image_order(self, copies: int) -> Tensor:
        """Find each copy's images, sample by sample, among n images of ``copies`` repeats: [n * copies] int64."""
        owned = [(self.image_to_sample == sample).nonzero().flatten() for sample in range(self.samples.shape[0])]
        return torch.cat([images * copies + copy for images in owned for copy in range(copies)])

    def for_call(self, batch: int, length: int, device: torch.device) -> CallLayout:
        """Compute the rows for hidden states [batch, length, D1].

        Raises:
            ValueError: ``batch`` is no multiple of the prompt's.
        """
        if batch % self.batch:
            raise ValueError(
                f"hia: the host's batch must be a multiple of the {self.batch} samples whose images were given, "
                f"got {batch}"
            )
        copies = batch // self.batch
        first = self.token_sample * (copies * length) + self.token_position
        return CallLayout(
            instruction_rows=self.samples * (copies * length) + self.instruction,
            image_to_sample=self.image_to_sample,
            visual_rows=first,
            cu_rows=cu_seqlens_from_lengths(self.rows_per_image),
            max_rows=max(self.rows_per_image),
            copies=copies,
            written_rows=torch.cat([first + copy * length for copy in range(copies)]),
            row_counts=tuple(self.rows_per_image),
        ).to(device)


def left_padded(attention_mask: Tensor, **inputs: Tensor | None) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Move padding from the right of each row to its left; decoding continues at the last column.

    Args:
        attention_mask: [B, S], 0 is padding.
        inputs: what goes with it: [B, S] tensors, and positions [B]; None stays None.

    Returns:
        The mask and the inputs, by name.
    """
    length = attention_mask.shape[1]
    trailing = attention_mask.flip(1).cumsum(1).eq(0).sum(1)  # [B]
    columns = (torch.arange(length, device=trailing.device) - trailing[:, None]) % length  # [B, S]
    moved: dict[str, Tensor | None] = {}
    for name, value in inputs.items():
        if value is None or value.shape[0] != trailing.shape[0]:
            moved[name] = value  # a wrong shape gets its error later
        elif value.dim() == 1:
            moved[name] = value + trailing.to(value.device)
        else:
            moved[name] = value.gather(1, columns.to(value.device)) if value.shape == columns.shape else value
    return attention_mask.gather(1, columns), moved


def build_layout(
    image_map: Tensor, instruction_index: Tensor, images: int, attention_mask: Tensor | None = None
) -> VisualLayout:
    """Check the maps and turn them into a layout.

    Args:
        image_map: [B, S] int64, the image's number where a visual token stands, -1 elsewhere.
        instruction_index: [B] int64, position of the last instruction token; not read for samples without images.
        images: how many images came with the batch.
        attention_mask: [B, S] or None; 0 is padding.

    Raises:
        ValueError: an image without visual tokens, a number without image, an image in two samples, an index
            outside the sequence or on padding. TypeError: wrong dtypes.
    """
    image_map, instruction_index = _checked(image_map, instruction_index, images)
    batch, seq_len = image_map.shape
    token_sample, token_position = (image_map >= 0).nonzero(as_tuple=True)
    numbers = image_map[token_sample, token_position]
    order = torch.argsort(numbers, stable=True)
    token_sample, token_position, numbers = token_sample[order], token_position[order], numbers[order]

    counts = torch.bincount(numbers, minlength=images)
    if (counts == 0).any():
        without = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"hia: image_map must give every image visual tokens, got none for images {without}")
    starts = torch.cumsum(counts, 0) - counts
    owner = token_sample[starts]  # [n]
    if not torch.equal(owner[numbers], token_sample):
        shared = numbers[owner[numbers] != token_sample].unique().tolist()
        raise ValueError(f"hia: image_map must keep an image within one sample, got images {shared} in several")
    samples, image_to_sample = torch.unique(owner, return_inverse=True)
    instruction = instruction_index[samples]
    _check_instruction(instruction, samples, seq_len, attention_mask)
    return VisualLayout(
        batch, seq_len, samples, instruction, image_to_sample, token_sample, token_position, tuple(counts.tolist())
    )


def _checked(image_map: Tensor, instruction_index: Tensor, images: int) -> tuple[Tensor, Tensor]:
    for name, tensor, rank in (("image_map", image_map, 2), ("instruction_index", instruction_index, 1)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
            got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"hia: {name} must be an int64 tensor, got {got}")
        if tensor.dim() != rank:
            shape = "[B, S]" if rank == 2 else "[B]"
            raise ValueError(f"hia: {name} must have shape {shape}, got {list(tensor.shape)}")
    if image_map.shape[0] != instruction_index.shape[0]:
        raise ValueError(
            f"hia: instruction_index must have shape [B] with B={image_map.shape[0]} like image_map, got "
            f"{list(instruction_index.shape)}"
        )
    image_map, instruction_index = image_map.cpu().long(), instruction_index.cpu().long()
    highest = int(image_map.max()) if image_map.numel() else -1
    if highest >= images or int(image_map.min()) < -1:
        raise ValueError(
            f"hia: image_map must hold -1 or an image's number in [0, {images}), got values from "
            f"{int(image_map.min())} to {highest}; the number of images must equal the number of placeholders"
        )
    return image_map, instruction_index


def _check_instruction(instruction: Tensor, samples: Tensor, seq_len: int, attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        attention_mask = attention_mask.cpu()  # once, instead of waiting for one value a sample
    for sample, position in zip(samples.tolist(), instruction.tolist(), strict=True):
        if not 0 <= position < seq_len:
            raise ValueError(f"hia: instruction_index must be in [0, {seq_len}), got {position} for sample {sample}")
        if attention_mask is not None and not bool(attention_mask[sample, position]):
            raise ValueError(
                f"hia: instruction_index must name a token, got position {position} of sample {sample}, which is "
                f"padding; give the last token of the instruction"
            )
