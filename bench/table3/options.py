"""The command line of ``python -m bench table3``."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

from . import methods
from .hosts import LLAVA_13B, host_from_file
from .rows import DTYPES, Protocol

RESOLUTIONS = (448, 560, 672, 784, 896, 1344, 2016, 4096)
ATTENTIONS = ("eager", "sdpa")
SMALLEST, LARGEST = 224, 16384


def build_parser() -> argparse.ArgumentParser:
    """All flags; every default is the protocol the README states."""
    parser = argparse.ArgumentParser(
        prog="python -m bench table3",
        description="The paper's Table 3, recomputed: FLOPs and peak memory of a prefill, baseline against HiA, and "
        "real runs of what this machine can hold. Exit code 1 if a check fails.",
    )
    counted = parser.add_argument_group("what is counted")
    counted.add_argument(
        "--methods",
        nargs="+",
        default=list(methods.METHODS),
        metavar="NAME",
        help="; ".join(methods.LABELS.values()) + " (default: all)",
    )
    counted.add_argument(
        "--resolutions",
        nargs="+",
        default=[str(r) for r in RESOLUTIONS],
        metavar="PX",
        help=f"sides of the square images, pixels (default: {' '.join(map(str, RESOLUTIONS))})",
    )
    counted.add_argument(
        "--images-per-sample",
        type=_count("--images-per-sample", 1, 64),
        default=2,
        metavar="N",
        help="images in the one sample of the batch (default: 2, a comparison)",
    )
    counted.add_argument(
        "--text-tokens",
        type=_count("--text-tokens", 1, 4096),
        default=60,
        metavar="N",
        help="tokens beside the images' (default: 60)",
    )
    counted.add_argument(
        "--unit",
        default="flops",
        metavar="UNIT",
        help="show flops (2 a multiply-add, default) or macs; the JSON has both",
    )
    counted.add_argument(
        "--dtype",
        default="bf16",
        metavar="DTYPE",
        help="of the 13B host's weights and activations: bf16 (default), fp16, fp32",
    )
    counted.add_argument(
        "--attention",
        nargs="+",
        default=list(ATTENTIONS),
        metavar="NAME",
        help="attention implementations whose memory is shown: eager, as in the paper's time, and sdpa (default: both)",
    )
    counted.add_argument(
        "--card-gb",
        type=_gigabytes,
        default=32.0,
        metavar="GB",
        help="card that 'fits' is judged by, GB of 1e9 bytes (default: 32)",
    )
    counted.add_argument("--host-config", metavar="PATH", help="config.json of another LLaMA instead of LLaMA-2-13B")
    run = parser.add_argument_group("what is really run")
    run.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu runs a small host, cuda the 13B one; auto (default) prefers cuda",
    )
    run.add_argument(
        "--skip-measured", "--no-measure", action="store_true", dest="skip_measured", help="predict only, run nothing"
    )
    run.add_argument(
        "--images",
        metavar="DIR",
        help="folder of radiographs (default: ../shared/data/images, or $HIA_TEST_DATA/images, where "
        "present; else generated phantoms)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="DIR", help="folder for table3.json, .md, .png (default: bench/results/<device>)"
    )
    output.add_argument("--json", metavar="PATH", help="write the JSON here too")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parsed and checked flags; ``protocol`` among them.

    Raises:
        SystemExit: a value that isn't allowed; the message names the flag, what it takes, and the nearest names.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        options.methods = _names("--methods", options.methods, methods.METHODS)
        options.resolutions = _resolutions(options.resolutions)
        attention = _names("--attention", options.attention, ATTENTIONS)
        (unit,) = _names("--unit", [options.unit], ("flops", "macs"))
        (dtype,) = _names("--dtype", [options.dtype], tuple(DTYPES))
        (options.device,) = _names("--device", [options.device], ("auto", "cpu", "cuda"))
        host = LLAVA_13B if options.host_config is None else host_from_file(options.host_config)
        if options.images is not None and not Path(options.images).is_dir():
            raise ValueError(f"--images: must be a folder, got {options.images}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options.protocol = Protocol(
        options.images_per_sample, options.text_tokens, unit, dtype, attention, options.card_gb, host
    )
    return options


def _names(flag: str, given: Iterable[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Split at commas, in the order allowed, without repeats."""
    values = [part for value in given for part in value.split(",") if part]
    for value in values:
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{flag}: must be among {', '.join(allowed)}, got {value!r}{hint}")
    if not values:
        raise ValueError(f"{flag}: must name at least one of {', '.join(allowed)}, got none")
    return tuple(name for name in allowed if name in values)


def _resolutions(given: Iterable[str]) -> tuple[int, ...]:
    values = [part for value in given for part in value.split(",") if part]
    for value in values:
        if not value.isdigit() or not SMALLEST <= int(value) <= LARGEST:
            raise ValueError(f"--resolutions: must be whole pixels from {SMALLEST} to {LARGEST}, got {value!r}")
    if not values:
        raise ValueError("--resolutions: must name at least one, got none")
    return tuple(sorted({int(value) for value in values}))


def _count(flag: str, low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    convert.__name__ = flag
    return convert


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a positive number of GB, got {text!r}")
    return value
