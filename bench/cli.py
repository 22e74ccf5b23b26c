"""The parser that all commands of ``python -m bench`` share, the check of a name with its hint, and their options.

A command is a function with annotated arguments in its folder's ``cli.py``, which :mod:`bench.__main__` registers.
Those modules import torch and what needs it inside their functions, so that ``--help`` is there at once.
"""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import typer.core
import typer.main

from .records import environment
from .records.devices import AUTO, DEVICES, DTYPES, cuda_is_available
from .records.files import BadFile

MANY = 24  # names that an error lists
# by words of the parser's message, which differ by its version
KINDS = {"integer": "a whole number", "valid int": "a whole number", "number": "a number", "float": "a number"}
UsageError: Any = typer.BadParameter.__base__  # Typer's own, or click's where Typer stands on it
Number = TypeVar("Number", int, float)


class BadOption(ValueError):
    """An option's value that isn't allowed: "<option>: must <expectation>, got <actual>[; <hint>]". Exit code 2."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Return "; did you mean a or b?" of the names that are nearest, or nothing where none is near."""
    near = difflib.get_close_matches(value, list(known), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def one_of(option: str, value: str, known: Iterable[str]) -> str:
    """Return ``value``, which must be one of the known names.

    Raises:
        BadOption: it isn't; the nearest are offered.
    """
    return some_of(option, [value], known, patterns=False)[0]


def some_of(option: str, given: Iterable[str], known: Iterable[str], *, patterns: bool = True) -> tuple[str, ...]:
    """Split at commas, expand patterns such as ``13b-*``; return what is named in the known order, without repeats.

    Raises:
        BadOption: no name at all, or a name or pattern that fits none; the nearest are offered.
    """
    names, found = tuple(known), set()
    values = [part.strip() for value in given for part in value.split(",") if part.strip()]
    if not values:
        raise BadOption(f"{option}: must name at least one of {', '.join(names[:MANY])}, got none")
    for value in values:
        fitting = fnmatch.filter(names, value) if patterns else [name for name in names if name == value]
        if not fitting:
            listed = f"among {', '.join(names)}" if len(names) <= MANY else f"one of {len(names)} names"
            raise BadOption(f"{option}: must be {listed}, got {value!r}{did_you_mean(value, names)}")
        found.update(fitting)
    return tuple(name for name in names if name in found)


def numbers(option: str, given: Iterable[str], low: int, high: int) -> tuple[int, ...]:
    """Split at commas; return whole numbers within the bounds, in the order given, without repeats.

    Raises:
        BadOption: none, or something else.
    """
    values = [part.strip() for value in given for part in value.split(",") if part.strip()]
    if not values:
        raise BadOption(f"{option}: must name at least one number from {low} to {high}, got none")
    for value in values:
        if not value.isdigit() or not low <= int(value) <= high:
            raise BadOption(f"{option}: must be a whole number from {low} to {high}, got {value!r}")
    return tuple(dict.fromkeys(int(value) for value in values))


def within(
    low: float | None = None, high: float | None = None, *, above: float | None = None
) -> Callable[[typer.CallbackParam, Any], Any]:
    """Make the callback of an option whose number must be in a range, bounds included; ``above`` excludes its own."""
    parts = [f"more than {above:g}" if above is not None else ""]
    if low is not None:
        parts.append(f"at least {low:g}" if high is None else f"from {low:g} to {high:g}")
    elif high is not None:
        parts.append(f"at most {high:g}")
    expected = " and ".join(filter(None, parts))

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            wrong = one is not None and not (
                (low is None or one >= low) and (high is None or one <= high) and (above is None or one > above)
            )
            if wrong:
                raise BadOption(f"{param.opts[0]}: must be {expected}, got {one:g}")
        return [] if value is None and getattr(param, "multiple", False) else value  # Typer 0.12 wants a list

    return check


def device_of(value: str, *, listing: bool = False) -> str:
    """Return "cpu" or "cuda" for what ``--device`` says; "auto" takes CUDA where torch sees a device.

    Args:
        value: of the option.
        listing: nothing will run, so no device need be there.

    Raises:
        BadOption: another name, or CUDA without a device.
    """
    value = one_of("--device", value, (AUTO, *DEVICES))
    if value == AUTO:
        return "cuda" if cuda_is_available() else "cpu"
    if value == "cuda" and not listing and not cuda_is_available():
        raise BadOption("--device: cuda needs a CUDA device and a torch built for it, got none; use --device cpu")
    return value


def one_place(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Refuse ``--out`` with ``--record``, whichever of the two is read last."""
    if value and context.params.get("record" if param.name == "out" else "out"):
        raise BadOption("--record: must not be given with --out, got both")
    return value


Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help=f"{', '.join(DEVICES)}, or {AUTO}: CUDA where there is a GPU.")
]
_DTYPE = typer.Option(
    "--dtype", metavar="DTYPE", help=f"{', '.join(DTYPES)}. By default fp32 on the CPU, bf16 on CUDA."
)
Dtype = Annotated[str | None, _DTYPE]
Dtypes = Annotated[list[str] | None, _DTYPE]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the results, instead of `out/<device>`.", callback=one_place),
]
Record = Annotated[
    bool,
    typer.Option(
        "--record",
        help="Write to `bench/results/<device>`, which is committed, instead of `out/<device>`.",
        callback=one_place,
    ),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the records here too.")]
Minutes = Annotated[
    float | None,
    typer.Option("--minutes", metavar="M", help="Begin nothing new after that long.", callback=within(above=0)),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Measure nothing again that the file holds of this commit on this device. The exit code is 75 while "
        "something is left to do.",
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny shapes, few repetitions: a smoke test.")]
Listing = Annotated[bool, typer.Option("--list", help="Print what would be run, and stop.")]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Folder of radiographs. By default ../shared/data/images, or $HIA_TEST_DATA/images, where present; "
        "else phantoms are generated.",
    ),
]


class Command(typer.core.TyperCommand):
    """A command whose lists may be separated by spaces: ``--only a b`` is ``--only a --only b``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the option before each of its values."""
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, _repeated(args, lists))


def _repeated(arguments: Sequence[str], lists: set[str]) -> list[str]:
    """Repeat the options of ``lists`` before every value of theirs."""
    found: list[str] = []
    current, values = None, 0
    for position, argument in enumerate(arguments):
        if argument == "--":
            return found + list(arguments[position:])
        if argument.startswith("-") and not argument[1:2].isdigit():
            current, values = (argument if argument in lists else None), 0
        elif current is not None:
            found += [current] if values else []
            values += 1
        found.append(argument)
    return found


class Commands(typer.core.TyperGroup):
    """The commands, ``end_to_end`` as well as ``end-to-end``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command.

        Raises:
            BadOption: there is none of that name.
        """
        name = args[0].replace("_", "-")
        if name not in self.commands and not name.startswith("-"):
            one_of("command", args[0], self.commands)
        args = [name if name in self.commands else args[0], *args[1:]]
        return super().resolve_command(ctx, args)


def application(help_text: str) -> typer.Typer:
    """Make the application, without its commands."""
    app = typer.Typer(
        cls=Commands,
        help=help_text,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(lambda: None)  # a group, however many commands there are
    return app


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command line.

    Returns:
        What the command returns; 2 where an option isn't allowed or a file holds something else; 130 after Ctrl-C.
    """
    environment.typed[:] = arguments
    command = typer.main.get_command(app)
    try:
        found = command.main(list(arguments) or ["--help"], prog_name="python -m bench", standalone_mode=False)
    except (BadOption, BadFile) as error:
        return _refuse(str(error), arguments)
    except UsageError as error:
        return _refuse(_usage(error, arguments), arguments)
    except typer.Abort:
        return 130
    return found if isinstance(found, int) else 0


def _refuse(message: str, arguments: Sequence[str]) -> int:
    """Say on standard error what is wrong."""
    name = next((one for one in arguments[:1] if not one.startswith("-")), "")
    sys.stderr.write(f"{' '.join(filter(None, ('bench', name)))}: {message}\n")
    return 2


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """Put what the parser refuses in our words: the option first, then what it takes, and the nearest names."""
    context, wrong = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if wrong is not None and context is not None and error.message.startswith("No such option"):
        known = [name for param in context.command.params for name in param.opts]
        return f"{wrong}: must be an option of this command{did_you_mean(wrong, known) or '.'} See --help"
    param, message = getattr(error, "param", None), error.format_message()
    option = next((name for name in getattr(param, "opts", ()) if name in arguments), None)
    kind = next((text for word, text in KINDS.items() if word in message), None)
    if option is None or kind is None:
        return message
    return f"{option}: must be {kind}, got {arguments[arguments.index(option) + 1]!r}"
