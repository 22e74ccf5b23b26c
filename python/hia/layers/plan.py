"""The cheapest exact form of the adapter's maths for given sizes (docs/plans.md has the derivations).

Every form computes the same numbers up to rounding. A form is a list of steps; a step has its matrix products, which
give FLOPs, and the bytes it moves. Its time is estimated as max(FLOPs / rate, bytes / bandwidth), and the cheapest
form is taken. Only ratios matter, so the ceilings are orders of magnitude, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..config import HiAConfig
from .forms import AUTO, EXTRACT_FORMS, split_plan
from .forms import INJECT_FORMS as INJECT_FORMS  # beside the costs, for whoever lists the forms

NEEDS = {
    "folded": "it folds the released maths' shared projection, which this config lacks",
    "folded_absorbed": "it folds the released maths' shared projection, which this config lacks",
    "absorbed": "16-bit scores would be rounded",
    "ln_folded_kv": "it needs fold_weights(), and no gradients",
    "ln_folded_absorbed": "it needs fold_weights(), and no gradients",
    "cached_folded": "it needs encode_images(keep='folded'), weights that have not changed since, and no gradients",
    "cached_kv": "it needs encode_images(keep='kv'), weights that have not changed since, and no gradients",
}
EXTRA_COLUMNS = 16  # columns behind the features: one of ones, the rest zero, so that rows stay aligned
# FLOP/s, bytes/s, seconds to start a step; by device type and bytes of an element
CEILINGS = {
    ("cpu", 2): (1e11, 2e10, 2e-5),
    ("cpu", 4): (1e11, 2e10, 2e-5),
    ("cpu", 8): (5e10, 2e10, 2e-5),
    ("cuda", 2): (5e14, 3e12, 1e-5),
    ("cuda", 4): (4e13, 3e12, 1e-5),
    ("cuda", 8): (3e13, 3e12, 1e-5),
}
LEAST_SCORES = 4  # bytes: the absorbed injection's scores are a product's result, and halves would round them
TRAINING_GAIN = 1.2  # absorbed forms keep queries and results of H * M rows for the backward: they must be worth it
BACKWARD = 2  # a product's backward is two products of its size


@dataclass(frozen=True)
class Sizes:
    """Sizes that a form's cost depends on; all of one layer.

    Attributes:
        hidden_size: D1 of the host.
        dim: D.
        heads: H.
        queries: M.
        channels: C of the encoder's features.
        samples: B prompts with images.
        features: N of each image.
        visual: rows each image has in the hidden states.
        sharing: layers that share the released maths' Linear(C -> D1); 0 without it.
        itemsize: bytes of an element.
        training: gradients are recorded.
        weights_folded: folded weights are there.
        cached: what was kept with the features: "folded", "kv".
    """

    hidden_size: int
    dim: int
    heads: int
    queries: int
    channels: int
    samples: int
    features: tuple[int, ...]
    visual: tuple[int, ...] = ()
    sharing: int = 0
    itemsize: int = 4
    training: bool = False
    weights_folded: bool = False
    cached: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Return n."""
        return len(self.features) or len(self.visual)


@dataclass(frozen=True)
class Product:
    """``batch`` matrix products [m, k] @ [k, n]."""

    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        """Count FLOPs, 2 a multiply-add."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def elements(self) -> int:
        """Count elements, each read or written once."""
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True)
class Step:
    """Part of a form.

    Attributes:
        name: what it computes.
        products: its matrix products.
        moved: bytes read and written besides what the products read and write.
        repeats: how often a training step runs it: forward, recomputation, backward.
    """

    name: str
    products: tuple[Product, ...]
    moved: int = 0
    repeats: float = 1


@dataclass(frozen=True)
class Form:
    """One exact way to compute a part.

    Attributes:
        name: of :data:`EXTRACT_FORMS` or :data:`INJECT_FORMS`.
        steps: what it does.
        itemsize: bytes of an element.
    """

    name: str
    steps: tuple[Step, ...]
    itemsize: int

    @property
    def flops(self) -> float:
        """Count the FLOPs of the matrix products, a training step's backward included."""
        return sum(step.repeats * product.flops for step in self.steps for product in step.products)

    @property
    def bytes(self) -> float:
        """Count bytes: every operand of every product read or written once, and what is between them."""
        return sum(step.repeats * self._bytes(step) for step in self.steps)

    def products(self) -> tuple[Product, ...]:
        """List the products of one forward."""
        return tuple(product for step in self.steps for product in step.products)

    def seconds(self, ceilings: tuple[float, float, float]) -> float:
        """Estimate the time; see the module's docstring."""
        rate, bandwidth, start = ceilings
        total = 0.0
        for step in self.steps:
            flops = sum(product.flops for product in step.products)
            total = total + step.repeats * (_larger(flops / rate, self._bytes(step) / bandwidth) + start)
        return total

    def _bytes(self, step: Step) -> float:
        return step.moved + self.itemsize * sum(product.elements for product in step.products)


def _larger(a: float, b: float) -> float:
    """Take the maximum without a guard in a compiled graph: what bounds a step may change with the sizes."""
    return torch.sym_max(a, b) if torch.compiler.is_compiling() else max(a, b)


def _smaller(a: float, b: float) -> float:
    return torch.sym_min(a, b) if torch.compiler.is_compiling() else min(a, b)


def extract_forms(sizes: Sizes) -> tuple[Form, ...]:
    """List the extractor's forms that can run at these sizes."""
    found = {
        "direct": _projected(sizes, folded=False) + _key_values(sizes),
        "absorbed": _projected(sizes, folded=False) + _absorbed(sizes, sizes.dim),
    }
    if sizes.sharing:
        found["folded"] = _projected(sizes, folded=True) + _key_values(sizes)
        found["folded_absorbed"] = _projected(sizes, folded=True) + _absorbed(sizes, sizes.dim)
    if sizes.weights_folded and not sizes.training:
        wide = sizes.channels + EXTRA_COLUMNS
        found["ln_folded_kv"] = _ln_folded_norms(sizes) + _ln_folded_key_values(sizes, wide)
        found["ln_folded_absorbed"] = _ln_folded_norms(sizes) + _absorbed(sizes, wide)
    if "folded" in sizes.cached and not sizes.training:
        found["cached_folded"] = _absorbed(sizes, sizes.dim)
    if "kv" in sizes.cached and not sizes.training:
        found["cached_kv"] = _attention(sizes)
    every, after = _queries(sizes), _output(sizes)
    return tuple(Form(name, every + found[name] + after, sizes.itemsize) for name in EXTRACT_FORMS if name in found)


def inject_forms(sizes: Sizes) -> tuple[Form, ...]:
    """List the injection's forms that can run at these sizes."""
    forms = (Form("direct", _inject_direct(sizes), sizes.itemsize),)
    if sizes.itemsize < LEAST_SCORES:
        return forms
    return (*forms, Form("absorbed", _inject_absorbed(sizes), sizes.itemsize))


def sizes_of(
    config: HiAConfig, images: Sequence[tuple[int, int]], visual_tokens: int, samples: int, itemsize: int
) -> Sizes:
    """Collect the sizes of an adapter's layer on images of (height, width) pixels."""
    stride = config.encoder_stride
    return Sizes(
        hidden_size=config.hidden_size,
        dim=config.dim,
        heads=config.num_heads,
        queries=config.num_queries,
        channels=config.encoder_channels,
        samples=samples,
        features=tuple(-(-height // stride) * -(-width // stride) for height, width in images),
        visual=(visual_tokens,) * len(images),
        sharing=len(config.layer_indices) if config.shared_projection else 0,
        itemsize=itemsize,
    )


def ceilings_of(device: str, itemsize: int) -> tuple[float, float, float]:
    """Return FLOP/s, bytes/s and a step's start in seconds, in orders of magnitude."""
    return CEILINGS.get((device, itemsize), CEILINGS["cuda", 2])


def cheapest(forms: Sequence[Form], ceilings: tuple[float, float, float], training: bool = False) -> Form:
    """Take the first form of the least estimated time; in training the direct one unless another gains enough."""
    seconds = [form.seconds(ceilings) for form in forms]
    least = seconds[0] = seconds[0] / (TRAINING_GAIN if training else 1)
    for estimate in seconds[1:]:
        least = _smaller(least, estimate)
    # against the least, not one with another: a compiled graph's guards then hold as long as the same form wins
    return next(form for form, estimate in zip(forms, seconds, strict=True) if estimate <= least)


def choose(part: str, forced: str, sizes: Sizes, device: str) -> str:
    """Choose the form to run.

    Args:
        part: "extract" or "inject".
        forced: a form's name, or "auto".
        sizes: of the call.
        device: type of the device.

    Raises:
        ValueError: the forced form can't run at these sizes.
    """
    if torch.compiler.is_compiling():  # sizes may be symbols there
        return _choose(part, forced, sizes, device)
    return _remembered(part, forced, sizes, device)


def _choose(part: str, forced: str, sizes: Sizes, device: str) -> str:
    forms = extract_forms(sizes) if part == "extract" else inject_forms(sizes)
    if forced == AUTO:
        return cheapest(forms, ceilings_of(device, sizes.itemsize), sizes.training).name
    if forced not in [form.name for form in forms]:
        raise ValueError(
            f"hia: plan must be a form that can run here ({', '.join(form.name for form in forms)}), "
            f"got {forced!r}; {NEEDS[forced]}"
        )
    return forced


_remembered = lru_cache(maxsize=1024)(_choose)


@lru_cache(maxsize=1024)
def seconds(part: str, name: str, sizes: Sizes, device: str) -> float:
    """Estimate the time of a form, as :func:`choose` takes its arguments."""
    forms = extract_forms(sizes) if part == "extract" else inject_forms(sizes)
    return next(form for form in forms if form.name == name).seconds(ceilings_of(device, sizes.itemsize))


def table(sizes: Sizes, device: str, plan: str = AUTO) -> str:
    """Describe both parts' forms with FLOPs, bytes and estimated time, and why one is taken."""
    ceilings = ceilings_of(device, sizes.itemsize)
    lines = []
    for part, forms, forced in zip(
        ("extract", "inject"), (extract_forms(sizes), inject_forms(sizes)), split_plan(plan), strict=True
    ):
        chosen = choose(part, forced, sizes, device)
        lines.append(f"{part:<22}{'GFLOP':>12}{'MB moved':>12}{'estimate':>12}")
        for form in forms:
            seconds = form.seconds(ceilings)
            mark = "" if form.name != chosen else "  <- forced" if forced != AUTO else "  <- least time"
            lines.append(
                f"  {form.name:<20}{form.flops / 1e9:>12.1f}{form.bytes / 1e6:>12.1f}{seconds * 1e3:>9.2f} ms{mark}"
            )
    rate, bandwidth, _ = ceilings
    lines.append(f"estimates: max(FLOPs / {rate:.0e}, bytes / {bandwidth:.0e}) a step on {device}; ratios matter only")
    return "\n".join(lines) + "\n"


def _trained(sizes: Sizes, forwards: float = 1) -> float:
    """Count the repeats of a step whose products have weights or inputs that need gradients."""
    return forwards + BACKWARD if sizes.training else 1


def _queries(sizes: Sizes) -> tuple[Step, ...]:
    dim, rows = sizes.dim, sizes.samples * sizes.queries
    condition = Product(1, sizes.samples, dim, sizes.hidden_size)
    return (
        Step("condition queries", (condition,), rows * dim * sizes.itemsize, _trained(sizes)),
        Step("project queries", (Product(1, rows, dim, dim),), rows * dim * sizes.itemsize, _trained(sizes)),
    )


def _output(sizes: Sizes) -> tuple[Step, ...]:
    product = Product(1, sizes.images * sizes.queries, sizes.dim, sizes.dim)
    return (Step("project output", (product,), 0, _trained(sizes)),)


def _projected(sizes: Sizes, *, folded: bool) -> tuple[Step, ...]:
    """Cost F = LN(Linear(Z)), with the two linears of the released maths one after the other or folded into one."""
    tokens, dim, channels = sum(sizes.features), sizes.dim, sizes.channels
    normed = 2 * tokens * dim * sizes.itemsize
    if not sizes.sharing:
        return (Step("project features", (Product(1, tokens, dim, channels),), normed, _trained(sizes)),)
    if not folded:
        shared = Product(1, tokens, sizes.hidden_size, channels)
        own = Product(1, tokens, dim, sizes.hidden_size)
        return (
            Step("project features, shared", (shared,), 0, _trained(sizes) / sizes.sharing),
            Step("project features", (own,), normed, _trained(sizes)),
        )
    folding: tuple[Step, ...] = ()
    if not sizes.weights_folded or sizes.training:
        folding = (Step("fold projections", (Product(1, dim, channels, sizes.hidden_size),), 0, _trained(sizes)),)
    return (*folding, Step("project features", (Product(1, tokens, dim, channels),), normed, _trained(sizes)))


def _key_values(sizes: Sizes) -> tuple[Step, ...]:
    product = Product(1, sum(sizes.features), 2 * sizes.dim, sizes.dim)
    return (Step("project keys, values", (product,), 0, _trained(sizes)), *_attention(sizes))


def _attention(sizes: Sizes) -> tuple[Step, ...]:
    """Cost fused attention: the scores never leave the chip."""
    heads, width = sizes.heads, sizes.dim // sizes.heads
    products = [Product(heads, sizes.queries, tokens, width) for tokens in sizes.features for _ in range(2)]
    scores = sum(product.batch * product.m * product.n for product in products)
    return (Step("attend", tuple(products), -scores * sizes.itemsize, 3.5 if sizes.training else 1),)


def _ln_folded_norms(sizes: Sizes) -> tuple[Step, ...]:
    """Cost the LayerNorm's 1 / std of every token from the features themselves, by a triangular factor."""
    tokens, wide = sum(sizes.features), sizes.channels + EXTRA_COLUMNS
    product = Product(1, tokens, min(sizes.dim, wide), wide)
    return (Step("norms of features", (product,), 4 * tokens * wide * sizes.itemsize),)


def _ln_folded_key_values(sizes: Sizes, wide: int) -> tuple[Step, ...]:
    product = Product(1, sum(sizes.features), 2 * sizes.dim, wide)
    return (Step("keys, values from features", (product,)), *_attention(sizes))


def _absorbed(sizes: Sizes, width: int) -> tuple[Step, ...]:
    """Cost queries through W_k, attention over the latent of ``width`` columns, and results through W_v."""
    heads, head_dim = sizes.heads, sizes.dim // sizes.heads
    group = heads * sizes.queries
    into = Product(sizes.samples * heads, sizes.queries, width, head_dim)
    out = Product(heads, sizes.images * sizes.queries, head_dim, width)
    products = [Product(1, group, tokens, width) for tokens in sizes.features for _ in range(2)]
    softmax = sum(group * tokens for tokens in sizes.features) * (4 + sizes.itemsize)
    return (
        Step("absorb queries", (into,), 0, _trained(sizes)),
        Step("attend to latent", tuple(products), softmax, 3.5 if sizes.training else 1),
        Step("project values", (out,), 0, _trained(sizes)),
    )


def _inject_direct(sizes: Sizes) -> tuple[Step, ...]:
    rows, dim, host = sum(sizes.visual), sizes.dim, sizes.hidden_size
    extracted, head_dim = sizes.images * sizes.queries, dim // sizes.heads
    normed = 2 * rows * host * sizes.itemsize
    attend = [Product(sizes.heads, count, sizes.queries, head_dim) for count in sizes.visual for _ in range(2)]
    scores = sum(product.batch * product.m * product.n for product in attend)
    return (
        Step("project visual tokens", (Product(1, rows, dim, host),), normed, _trained(sizes)),
        Step("project keys, values", (Product(1, extracted, 2 * dim, dim),), 0, _trained(sizes)),
        Step("attend", tuple(attend), -scores * sizes.itemsize, 3.5 if sizes.training else 1),
        Step("project update", (Product(1, rows, host, dim),), rows * host * sizes.itemsize, _trained(sizes)),
    )


def _inject_absorbed(sizes: Sizes) -> tuple[Step, ...]:
    """Cost keys and values that take in the projections on both sides: these act on M rows instead of the image's."""
    rows, dim, host = sum(sizes.visual), sizes.dim, sizes.hidden_size
    extracted, heads = sizes.images * sizes.queries, sizes.heads
    group, head_dim = heads * sizes.queries, dim // heads
    attend = [Product(1, count, *shape) for count in sizes.visual for shape in ((group, host), (host, group))]
    softmax = 3 * rows * group * 4
    absorb = tuple(Product(heads, extracted, host, head_dim) for _ in range(2))
    return (
        Step("norm of visual tokens", (), 2 * rows * host * sizes.itemsize, _trained(sizes)),
        Step("project keys, values", (Product(1, extracted, 2 * dim, dim),), 0, _trained(sizes)),
        Step("absorb both", absorb, 0, _trained(sizes)),
        Step("attend to visual tokens", tuple(attend), softmax, 3.5 if sizes.training else 1),
    )
