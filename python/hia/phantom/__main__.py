"""``python -m hia.phantom``: draw a contact sheet, write studies as files, train the tiny host."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .dataset import PhantomDataset
from .questions import EXTRA_TASKS, LANGUAGES, TASKS
from .records import check_folder, check_parent, write_records
from .sheet import draw_sheet, find_cjk_font
from .studies import PhantomConfig


def _size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be N or HEIGHTxWIDTH in pixels, got {text!r}")
    sides = [int(side) for side in text.split("x")]
    return sides[0], sides[-1]


def make_parser() -> argparse.ArgumentParser:
    """Make the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m hia.phantom",
        description="Draws synthetic studies (bones, soft tissue, a lesion) that follow from a seed. They resemble "
        "radiographs and are none: no anatomy, no medical test.",
    )
    what = parser.add_argument_group("what to make (one or more)")
    what.add_argument(
        "--sheet",
        nargs="?",
        const="phantom-sheet.png",
        metavar="FILE",
        help="draw a contact sheet "
        "(default: phantom-sheet.png); questions in English, and in Chinese where a font is at hand, "
        "since PIL's own has no Chinese characters",
    )
    what.add_argument(
        "--write",
        metavar="DIR",
        help="write --count items into a new or empty folder: PNG images (16 "
        "bits for more than 8) and records.jsonl, whole or not at all",
    )
    what.add_argument(
        "--host",
        metavar="DIR",
        help="train the tiny LLaVA that answers about large lesions, from "
        "--seed, and save it with its processor into a new folder; minutes",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--count", type=int, default=100, metavar="N", help="items to write (default: %(default)s)")
    how.add_argument("--size", type=_size, default=(192, 192), metavar="N|HxW", help="pixels (default: 192)")
    how.add_argument("--bits", type=int, default=12, metavar="B", help="8 to 16 (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0, metavar="S", help="of everything drawn (default: %(default)s)")
    how.add_argument(
        "--radius",
        type=float,
        nargs=2,
        default=PhantomConfig.radius,
        metavar=("LO", "HI"),
        help="of the lesions, in pixels at a shorter side of 192 (default: 1.5 3.25)",
    )
    how.add_argument(
        "--tasks",
        nargs="+",
        default=TASKS,
        choices=TASKS + EXTRA_TASKS,
        metavar="TASK",
        help=f"to write, in turn: {', '.join(TASKS + EXTRA_TASKS)} (default: the first four)",
    )
    how.add_argument("--language", default="en", choices=LANGUAGES, help="to write (default: en)")
    how.add_argument("--font", metavar="FILE", help="a font with Chinese characters, for --sheet")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors of the arguments exit with 2 and one line that says what is wrong."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.sheet is None and options.write is None and options.host is None:
        parser.error("nothing to do: give --sheet, --write DIR or --host DIR")
    try:
        config = PhantomConfig(options.size, options.bits, tuple(options.radius))
        dataset = PhantomDataset(options.count, options.seed, config, options.tasks, options.language, None)
        _check_targets(options)  # all of them before any is made
        if options.write is not None:
            place = write_records(options.write, dataset, _Progress(len(dataset)))
            _say(f"{place}: {len(dataset)} records")
        if options.sheet is not None:
            _write_sheet(Path(options.sheet), options.seed, config, options.font)
        if options.host is not None:
            _write_host(Path(options.host), options.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def _check_targets(options: argparse.Namespace) -> None:
    if options.write is not None:
        check_folder(Path(options.write))
    if options.sheet is not None:
        path = Path(options.sheet)
        if path.suffix.lower() != ".png" or path.is_dir():
            raise ValueError(f"--sheet must name a .png file, got {path}")
        check_parent("--sheet", path)
        find_cjk_font(options.font)
    if options.host is not None:
        folder = Path(options.host)
        if folder.exists() or folder.is_symlink():
            raise FileExistsError(f"--host must name a new folder, got {folder}, which exists")
        if options.write is not None and folder.resolve() == Path(options.write).resolve():
            raise ValueError(f"--host must name another folder than --write, got {folder} for both")
        check_parent("--host", folder)


class _Progress:
    """Say every ten seconds how far the writing is."""

    def __init__(self, count: int) -> None:
        self.count, self.said = count, time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            _say(f"{done} of {self.count} records")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _write_host(folder: Path, seed: int) -> None:
    from .host import TinyHostRecipe, save_tiny_host, train_tiny_host  # transformers, which the rest does without

    recipe = TinyHostRecipe(seed=seed)
    save_tiny_host(train_tiny_host(recipe, _say), recipe, folder)
    sys.stdout.write(f"{folder}: LlavaForConditionalGeneration and LlavaProcessor, from_pretrained reads both\n")


def _write_sheet(path: Path, seed: int, config: PhantomConfig, font: str | None) -> None:
    face = find_cjk_font(font)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        draw_sheet(seed, config, face).save(partial, format="PNG")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sys.stdout.write(f"{path}{'' if face else ': English only, no font with Chinese characters was found (--font)'}\n")


if __name__ == "__main__":
    sys.exit(main())
