"""Tiles of the Triton kernels of ``conv_norm_act``: what serves where nothing was measured, and what is worth a try."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from ...core import tuning
from ...core.tuning import cdiv

MULTIPROCESSORS = 132  # of an H100 or H200; a constant, so that the order of a sum depends on no device
MAX_SPLITS = 8
MIN_STEPS_PER_SPLIT = 6  # a split of fewer steps costs more than it hides
# of a multiprocessor in a cycle: multiply-adds in 16 bits; bytes out of L2, alone and with all others at it
PRODUCTS, ALONE, TOGETHER = 2048, 36, 25
ANOTHER_KERNEL = 4000  # cycles until a kernel that waits for the one before it is at work
TILES = ((128, 256), (128, 128), (128, 64), (64, 64))


def block_sizes(pixels, c, oc, kernel, itemsize, device, *, max_splits=1, narrow=True):
    """Choose as :func:`blocks_for`, on the device's generation."""
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return dict(blocks_for(pixels, c, oc, kernel, itemsize, generation, bool(torch.version.hip), max_splits, narrow))


@lru_cache(maxsize=4096)
def blocks_for(pixels, c, oc, kernel, itemsize, generation, is_hip, max_splits, narrow):
    """Choose tile, warps and splits of a convolution from one image's sizes: batching must change no bit.

    Before Hopper, a product's operands are in registers too: with four warps, the 128 x 64 tile of a 1 x 1 convolution
    with a residual would spill, so it gets eight.

    Args:
        pixels: of one image's output.
        c: channels in.
        oc: channels out.
        kernel: its side.
        itemsize: bytes of an element.
        generation: major compute capability.
        is_hip: whether an AMD GPU runs it.
        max_splits: of the sum; 1 where nothing adds them up.
        narrow: at most 128 channels, because the epilogue needs registers of its own.
    """
    if itemsize == 4:  # no matrix instructions: a smaller tile of sums in registers
        blocks = {"BLOCK_M": 64, "BLOCK_OC": min(64, max(16, tuning.bucket(oc))), "BLOCK_C": 16}
        splits = min(max_splits, _splits(pixels, c, oc, kernel, blocks))
        return {**blocks, "SPLITS": splits, "num_warps": 4, "num_stages": 3}
    block_c = min(64, max(16, tuning.bucket(c)))
    steps = _steps(c, kernel, block_c)
    widest = 128 if narrow or generation != 9 or is_hip else 256  # 128 x 256 would spill elsewhere
    if steps == 1:  # memory is the limit, and in a block nothing overlaps: several small ones have to
        widest = 64
    widest = min(widest, max(16, tuning.bucket(oc)))
    block_m, block_oc, splits = cheapest_tile(pixels, oc, steps, block_c, widest, max_splits)
    four_warps = 4096 if kernel == 1 and generation < 9 else 8192  # elements of a tile that four warps hold
    return {
        "BLOCK_M": block_m,
        "BLOCK_OC": block_oc,
        "BLOCK_C": block_c,
        "SPLITS": splits,
        "num_warps": 8 if block_m * block_oc > four_warps else 4,
        "num_stages": 2 if is_hip else max(2, min(4, steps)),
    }


@cache
def cheapest_tile(pixels, oc, steps, block_c, widest, max_splits):
    """Choose BLOCK_M, BLOCK_OC and splits of a convolution in 16 bits by :func:`cycles`."""
    tiles = dict.fromkeys((block_m, min(block_oc, widest)) for block_m, block_oc in TILES)
    splits = [1, *range(2, 1 + min(max_splits, steps // MIN_STEPS_PER_SPLIT))]
    choices = [(*tile, count) for tile in tiles for count in splits]
    return min(choices, key=lambda choice: cycles(pixels, oc, steps, block_c, *choice))


def cycles(pixels, oc, steps, block_c, block_m, block_oc, splits):
    """Estimate a convolution's time by its slowest part: L2, one multiprocessor's share of it, or the products.

    Device memory is left out: it serves every tile alike.
    """
    blocks, steps = _tiles(pixels, oc, block_m, block_oc) * splits, cdiv(steps, splits)
    read = steps * (block_m + block_oc) * block_c * 2  # bytes of a block
    written = block_m * block_oc * (2 if splits == 1 else 4)
    rounds = cdiv(blocks, MULTIPROCESSORS)  # blocks of the busiest multiprocessor
    together = blocks * (read + written) / (MULTIPROCESSORS * TOGETHER)
    alone = rounds * max((read + written) / ALONE, steps * block_m * block_oc * block_c / PRODUCTS)
    reduced = ANOTHER_KERNEL + splits * pixels * oc * 4 / (MULTIPROCESSORS * TOGETHER) if splits > 1 else 0
    return max(together, alone) + reduced


def _steps(c, kernel, block_c):
    return kernel * kernel * cdiv(c, block_c)


def _tiles(pixels, oc, block_m, block_oc):
    return cdiv(pixels, block_m) * cdiv(oc, block_oc)


def _splits(pixels, c, oc, kernel, blocks):
    """Count the splits of fp32's sums, where an image's tiles alone leave multiprocessors idle."""
    tiles = _tiles(pixels, oc, blocks["BLOCK_M"], blocks["BLOCK_OC"])
    wanted = min(MAX_SPLITS, 2 * MULTIPROCESSORS // tiles, _steps(c, kernel, blocks["BLOCK_C"]) // MIN_STEPS_PER_SPLIT)
    return 1 if wanted < 2 else 1 << (wanted.bit_length() - 1)


def is_even(c, oc, blocks):
    """Return the constexprs that tell whether blocks fill the channels, so that these need no masks."""
    return {"IS_EVEN_C": c % blocks["BLOCK_C"] == 0, "IS_EVEN_OC": oc % blocks["BLOCK_OC"] == 0}


def tuning_key(mode, pixels, c, oc, kernel, stride, dtype):
    """Name what a tuned configuration depends on: bucketed sizes, kernel, stride and dtype."""
    sizes = f"px{tuning.bucket(pixels)}-c{tuning.bucket(c)}-oc{tuning.bucket(oc)}"
    return f"{mode}-k{kernel}s{stride}-{sizes}-{str(dtype).removeprefix('torch.')}"
