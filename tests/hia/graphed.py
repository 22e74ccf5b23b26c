"""Small adapters whose layers use their graphs on the CPU, and questions to ask them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

import hia
from hia.layers.adapter import HiAAdapter
from hia.layers.features import ImageFeatures
from hia.layers.layout import build_layout
from tests.hia.captures import Recorder
from tests.hia.hosts import text_config
from tests.hia.test_modules import randomised
from tests.hia.test_plan import PRESETS

CPU = torch.device("cpu")
MAPS = [(3, 5), (7, 4), (1, 9)]
ROWS = (2, 3, 4)  # visual tokens of each image
OWNERS = ((0, 0, 1), (0, 1, 1))  # the samples that the images are in, as one question or another has it


def adapter_of(preset="paper", dtype=torch.float32, layers=(2,), **changes) -> HiAAdapter:
    config = getattr(hia.HiAConfig, preset.removesuffix("-unaware"))(
        text_config(), num_queries=6, encoder_width=4, layers=list(layers), **{**PRESETS[preset], **changes}
    )
    return randomised(HiAAdapter(config)).to(dtype).eval()


def recorded(adapter: HiAAdapter, recorder: Recorder | None = None, kept: int = 4) -> Recorder:
    """Fold an adapter's weights, and let it use its graphs on the CPU."""
    recorder = recorder or Recorder()
    adapter.fold_weights()
    adapter.graphs.capture, adapter.graphs.device_type, adapter.graphs.kept = lambda: recorder, "cpu", kept
    return recorder


def maps_of(seed=0, dtype=torch.float32, images=3):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.rand(*MAPS[i % 3], 128, generator=generator, dtype=torch.double).to(dtype) for i in range(images)
    )


def question(seed=0, dtype=torch.float32, images=3, copies=1, rows=ROWS):
    """Draw a question about images of the same sizes: its length, owners, order and values follow the seed."""
    generator = torch.Generator().manual_seed(seed)
    length = 30 + 7 * seed
    owners = OWNERS[seed % 2] if images == 3 else (1,) * images
    image_map, position = torch.full((2, length), -1), seed
    for image in reversed(range(images)) if seed % 3 else range(images):
        image_map[owners[image], position : position + rows[image % 3]] = image
        position += rows[image % 3] + seed % 2
    layout = build_layout(image_map, torch.tensor([length - 1 - seed, length - 2]), images)
    hidden = torch.randn(2 * copies, length, 64, generator=generator, dtype=torch.double)
    return hidden.to(dtype), layout.for_call(2 * copies, length, CPU)


@contextmanager
def eagerly(adapter) -> Iterator[None]:
    adapter.graphs.enabled = False
    try:
        yield
    finally:
        adapter.graphs.enabled = True


def both(adapter, hidden, maps, layout, layer=2, keep=None):
    """Run a layer with and without graphs, each time on features of its own."""
    outs = []
    for context in (eagerly(adapter), nullcontext()):
        packed = ImageFeatures(maps).packed()
        if keep is not None:
            packed.caches.update(adapter.layer_caches(packed, keep))
        with context:
            outs.append(adapter.layer(layer)(hidden.clone(), packed, layout))
    return outs


def sizes_of(adapter):
    return [key for cache in adapter.graphs.caches.values() for key in cache.keys]
