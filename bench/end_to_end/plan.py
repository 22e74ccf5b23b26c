"""The cases of a run, from what was typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cli import BadOption, device_of, numbers, one_of, some_of
from ..records.devices import DEFAULT_DTYPE, DTYPES
from ..workloads import images as pictures
from .subjects import OPS, PROVIDERS, Case, not_offered

RESOLUTIONS = {"cpu": ("448", "896"), "cuda": ("896", "448", "1792")}
BATCHES = ("1", "4")
# the figures a reader looks for first come first: a deadline cuts the list from its end
ORDER = ("hia", "baseline", "released", "anyres", "plain")
SMALLEST, LARGEST = 224, 8192
CPU_DEADLINE_S = 900
Step = tuple[Case, tuple[str, ...]]


@dataclass(frozen=True)
class Options:
    """A run, checked.

    Attributes:
        provider: of :data:`PROVIDERS`.
        op: of :data:`OPS`.
        resolutions: in the order asked for, pixels.
        batch: prompts at a time.
        device: "cpu" or "cuda".
        dtype: its name.
        attention: the host's, sdpa or eager.
        source: of the radiographs.
        images_per_prompt: of each prompt.
        text_tokens: beside the images'.
        new_tokens: decode steps a repetition.
        repeats: timed repetitions, at most.
        budget: seconds a case, roughly.
        deadline: seconds for the whole run; None is none.
    """

    provider: tuple[str, ...]
    op: tuple[str, ...]
    resolutions: tuple[int, ...]
    batch: tuple[int, ...]
    device: str
    dtype: str
    attention: str
    source: pictures.ImageSource
    images_per_prompt: int = 2
    text_tokens: int = 60
    new_tokens: int = 8
    repeats: int = 4
    budget: int = 10
    deadline: int | None = None


def make_options(
    *,
    names: dict[str, list[str] | None],
    sizes: dict[str, list[str] | None],
    device: str,
    listing: bool,
    dtype: str | None,
    attention: str,
    images: Path | None,
    counts: dict[str, int | None],
) -> Options:
    """Check what was typed.

    Raises:
        BadOption: a value that isn't allowed; the message names the option, what it takes, and the nearest names.
    """
    device = device_of(device, listing=listing)
    try:
        source = pictures.find_images(images)
    except ValueError as error:
        raise BadOption(str(error)) from error
    if counts["deadline"] is None and device == "cpu":
        counts = {**counts, "deadline": CPU_DEADLINE_S}
    return Options(
        provider=some_of("--provider", names["provider"] or PROVIDERS, PROVIDERS),
        op=some_of("--op", names["op"] or OPS, OPS),
        resolutions=numbers("--resolutions", sizes["resolutions"] or RESOLUTIONS[device], SMALLEST, LARGEST),
        batch=numbers("--batch", sizes["batch"] or BATCHES, 1, 64),
        device=device,
        dtype=one_of("--dtype", dtype or DEFAULT_DTYPE[device], DTYPES),
        attention=one_of("--attention", attention, ("sdpa", "eager")),
        source=source,
        **counts,
    )


def plan(options: Options) -> list[Step]:
    """List the cases and their providers, the most important first.

    On the CPU a case's providers take turns, so that drift hits all of them; on CUDA, where a second 13B model
    would not fit most cards, each provider goes through the cases of one batch size alone.
    """
    cases = [
        Case(op, resolution, batch, options.images_per_prompt)
        for batch in options.batch
        for op in options.op
        for resolution in options.resolutions
    ]
    wanted = tuple(name for name in ORDER if name in options.provider)
    if options.device == "cuda":
        alone = [(provider, batch) for batch in options.batch for provider in wanted]
        return [(case, (provider,)) for provider, batch in alone for case in cases if case.batch == batch]
    cases.sort(key=lambda case: case.batch * case.resolution**2)  # what takes longest comes last
    return [(case, wanted) for case in cases]


def print_plan(steps: Sequence[Step]) -> None:
    """Print every case and provider, and why one has no number."""
    for case, providers in steps:
        for provider in providers:
            print(f"{case.op:<20} {case.name:<18} {provider:<9} {not_offered(provider, case) or ''}".rstrip())
