"""A tiny LLaVA that reads phantoms: the frozen host of tests, examples and the ablation.

A host that never saw a lesion passes no gradient for one: it must answer about large lesions, which its 40 x 40 view
shows, before an adapter can teach it small ones, which that view loses. It learns in two stages, as LLaVA does: first
the vision tower, patch by patch, where lesions are and which bone it is; then everything, to answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from ..images.processor import HiAProcessor
from .anatomy import BONES
from .batches import PhantomBatches
from .dataset import PhantomDataset
from .questions import EXTRA_TASKS, TASKS, vocabulary
from .studies import PhantomConfig

try:  # transformers >= 5.x splits the processor by backend; this one needs no torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

VIEW, PATCH = 40, 10  # pixels: 4 x 4 visual tokens an image, each within one quadrant
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
VERSION = 1  # of all that is cached: to be raised when phantoms, host or their training change in code
LARGE = (10.0, 20.0)  # radii of lesions that the view shows
START = 0.1  # of all weights: transformers' 0.02 is meant for widths of thousands, and learns for an hour nothing here

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TinyHostRecipe:
    """The recipe of a tiny host.

    Attributes:
        layers: decoder layers; twelve are enough for "thirds" to stand between where it sees and where it answers.
        hidden_size: of the LLM; the vision tower has 64.
        samples: questions it is trained on, five tasks in turn.
        tower_steps: of the vision tower alone, 64 images each.
        steps: of the whole, 32 questions each.
        lr: of the whole, highest; the tower's is three quarters of it.
        seed: of weights, phantoms and order.
    """

    layers: int = 12
    hidden_size: int = 64
    samples: int = 6000
    tower_steps: int = 600
    steps: int = 1000
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "samples", "tower_steps", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (1 if name != "steps" else 0):
                raise ValueError(f"hia.phantom: {name} must be a positive integer, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"hia.phantom: seed must be an integer, got {self.seed!r}")
        if isinstance(self.lr, bool) or not isinstance(self.lr, (int, float)) or not 0 < self.lr < math.inf:
            raise ValueError(f"hia.phantom: lr must be a positive number, got {self.lr!r}")
        if self.hidden_size % 16:
            raise ValueError(f"hia.phantom: hidden_size must be a multiple of 16, got {self.hidden_size}")

    def fingerprint(self) -> str:
        """Name what the trained host depends on: the recipe, and what this module and the phantoms add to it."""
        facts = {**dataclasses.asdict(self), "inputs": inputs_fingerprint(), "large": LARGE, "start": START}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def inputs_fingerprint() -> str:
    """Name what a phantom becomes on its way into the host: view, patches, vocabulary, the version of the drawing."""
    facts = [VERSION, VIEW, PATCH, SPECIAL, TASKS, EXTRA_TASKS, vocabulary()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the phantoms' words and characters, both languages."""
    words = dict.fromkeys([*SPECIAL, "USER", "ASSISTANT", ":", *vocabulary()])
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Za-z]+|\S"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def tiny_processor() -> LlavaProcessor:
    """Make the processor that goes with :func:`build_tiny_host`."""
    size = {"height": VIEW, "width": VIEW}
    images = CLIPImageProcessor(size={"shortest_edge": VIEW}, crop_size=size)
    return LlavaProcessor(
        images,
        tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_tiny_host(recipe: TinyHostRecipe | None = None) -> LlavaForConditionalGeneration:
    """Build the host with random weights, in evaluation; the global random state is left as it is.

    Args:
        recipe: sizes and seed; None means ``TinyHostRecipe()``.
    """
    recipe = recipe or TinyHostRecipe()
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=VIEW,
        patch_size=PATCH,
        initializer_range=START,
    )
    text = LlamaConfig(
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=START,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        pad_token_id=3,
        initializer_range=START,
    )
    with torch.random.fork_rng():  # of GPUs too, which manual_seed would seed
        torch.manual_seed(recipe.seed)
        return LlavaForConditionalGeneration(config).eval()


def hia_processor(host: LlavaForConditionalGeneration) -> HiAProcessor:
    """Wrap the tiny host's processor for high-resolution images.

    Args:
        host: of :func:`build_tiny_host`, whatever its recipe: they all take one processor.
    """
    return HiAProcessor(tiny_processor())


def _set_lr(optimizer: torch.optim.Optimizer, highest: float, step: int, steps: int, warm_up: int) -> None:
    rate = highest * min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = rate


def _train_tower(tower: nn.Module, batches: PhantomBatches, recipe: TinyHostRecipe) -> None:
    """Teach the vision tower to tell lesions patch by patch, and bones."""
    width = tower.config.hidden_size
    lesion, bone = nn.Linear(width, 1), nn.Linear(width, len(BONES))
    bones = torch.tensor([BONES.index(name) for name in batches.bones], dtype=torch.int64)
    grid = VIEW // PATCH
    covered = F.adaptive_avg_pool2d(batches.masks[:, None].float(), grid).flatten(1)  # [n, patches]
    truth = (covered > 0.02).float()
    optimizer = torch.optim.AdamW([*tower.parameters(), *lesion.parameters(), *bone.parameters()], weight_decay=0.01)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.tower_steps):
        _set_lr(optimizer, 0.75 * recipe.lr, step, recipe.tower_steps, 50)
        chosen = torch.randint(len(truth), (64,), generator=generator)
        patches = tower(batches.views[chosen]).last_hidden_state[:, 1:]  # without the class token
        loss = F.binary_cross_entropy_with_logits(lesion(patches)[..., 0], truth[chosen])
        loss = loss + 0.2 * F.cross_entropy(bone(patches.mean(1)), bones[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_tiny_host(
    recipe: TinyHostRecipe | None = None, progress: Callable[[str], None] | None = None
) -> LlavaForConditionalGeneration:
    """Build the host and train it on phantoms with large lesions; about three minutes on two cores.

    Args:
        recipe: sizes, steps, seed; None means ``TinyHostRecipe()``.
        progress: is told in a line what is being done; None tells this module's logger.

    Returns:
        The host, in evaluation. One recipe gives the same bits on one machine with one number of threads.
    """
    recipe, tell = recipe or TinyHostRecipe(), progress or log.info
    host = build_tiny_host(recipe)
    start = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        tell(f"tiny host: drawing {recipe.samples} phantoms with large lesions")
        config = PhantomConfig(bits=8, radius=LARGE)
        tasks = (*TASKS, *EXTRA_TASKS)
        dataset = PhantomDataset(recipe.samples, (recipe.seed, 1), config, tasks, wording=None)
        batches = PhantomBatches(dataset, hia_processor(host), keep_pixels=False)
        tell(f"tiny host: training its vision tower, {time.monotonic() - start:.0f} s")
        host.train()
        _train_tower(host.model.vision_tower, batches, recipe)
        _train_answers(host, batches, recipe, tell, start)
    return host.eval()


def _train_answers(
    host: LlavaForConditionalGeneration,
    batches: PhantomBatches,
    recipe: TinyHostRecipe,
    tell: Callable[[str], None],
    start: float,
) -> None:
    optimizer = torch.optim.AdamW(host.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    order = batches.shuffled(32, recipe.seed)
    for step in range(recipe.steps):
        _set_lr(optimizer, recipe.lr, step, recipe.steps, 100)
        loss = host(**batches.batch(next(order), high_res=False)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step == recipe.steps - 1:
            spent = time.monotonic() - start
            tell(f"tiny host: step {step + 1} of {recipe.steps}, loss {loss.item():.3f}, {spent:.0f} s")


def tiny_host(
    recipe: TinyHostRecipe | None = None, cache: str | Path | None = None, progress: Callable[[str], None] | None = None
) -> LlavaForConditionalGeneration:
    """Load the trained host from the cache, or train it and keep it there.

    Args:
        recipe: sizes, steps, seed; None means ``TinyHostRecipe()``.
        cache: folder of trained hosts; None means ``$HIA_CACHE``, else ``~/.cache/hia``.
        progress: as in :func:`train_tiny_host`.

    Returns:
        The host, in evaluation. Its processor is :func:`tiny_processor`.

    Raises:
        NotADirectoryError: the cache is a file. PermissionError: it can't be written.
            ValueError: a cached host that is not whole.
    """
    recipe = recipe or TinyHostRecipe()
    root = Path(cache or os.environ.get("HIA_CACHE") or "~/.cache/hia").expanduser()
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"hia.phantom: cache must be a directory, got the file {root}")
    place = root / f"tiny-host-{recipe.fingerprint()}"
    if place.exists():
        return _load_tiny_host(place)
    root.mkdir(parents=True, exist_ok=True)  # what can't be written is known before minutes are spent
    if not os.access(root, os.W_OK | os.X_OK):
        raise PermissionError(f"hia.phantom: cache must be a directory that can be written, got {root}")
    host = train_tiny_host(recipe, progress)
    save_tiny_host(host, recipe, place)
    return host


def _load_tiny_host(place: Path) -> LlavaForConditionalGeneration:
    damaged = f"hia.phantom: cache must hold whole hosts, got {place}, {{}}; delete it to train that host anew"
    if not (place / "config.json").is_file():
        raise ValueError(damaged.format("without config.json"))
    try:
        with _without_bars():
            host, report = LlavaForConditionalGeneration.from_pretrained(place, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(damaged.format(f"which can't be read ({error})")) from error
    lost = sorted({str(key) for name in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in report[name]})
    if lost:
        raise ValueError(damaged.format(f"whose weights are not the host's ({', '.join(lost[:3])})"))
    return host.eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' progress bars, which a host of 2 MB fills at once, off the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def save_tiny_host(host: Any, recipe: TinyHostRecipe, place: Path) -> None:
    """Write host, processor and recipe.json into a folder, whole or not at all; one that is there stays."""

    def write(folder: Path) -> None:
        host.save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")

    with _without_bars():
        save_whole(place, write)


def save_whole(place: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name and rename it when it is whole; one that somebody else wrote stays."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".writing-") as scratch:
        folder = Path(scratch) / "whole"
        folder.mkdir()
        write(folder)
        try:
            folder.rename(place)
        except OSError:  # not empty: another process was faster
            if not place.is_dir():
                raise
