"""The command line that all benchmarks share: help at once, hints, lists, exit codes, what is recorded of it."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Annotated, get_args, get_type_hints

import pytest
import torch
import typer

from bench import cli
from bench.__main__ import COMMANDS
from bench.__main__ import main as bench
from bench.records import environment
from bench.records.environment import REPOSITORY
from bench.records.files import BadFile

NAMES = [command.__name__.replace("_", "-") for commands in COMMANDS.values() for command in commands]


def test_help_needs_no_torch():
    """Importing it takes seconds."""
    script = f"""
import sys
from bench.__main__ import main
for name in {NAMES!r}:
    assert main([name, "--help"]) == 0
assert main([]) == 0 and main(["-h"]) == 0
sys.exit("torch" in sys.modules or "numpy" in sys.modules)
"""
    paths = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'python'}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=paths, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert f"python -m bench {name} [OPTIONS]" in done.stdout and f" {name} " in done.stdout


@pytest.mark.parametrize("command", [command for commands in COMMANDS.values() for command in commands])
def test_every_option_is_named(command):
    """State the name in every option: Typer 0.27 makes one of the metavar where none is stated, such as --TARGET."""
    for argument, hint in get_type_hints(command, include_extras=True).items():
        for option in get_args(hint)[1:]:
            if isinstance(option, typer.models.OptionInfo):
                first = (option.default, *(option.param_decls or ()))[0]  # what stands first is its "default" here
                assert isinstance(first, str) and first.startswith("--"), argument


@pytest.mark.parametrize("name", NAMES)
def test_record_is_refused_with_out(name, capsys):
    """Try both orders: of two places, one would be dropped without a word. ``ablation --record`` is an addition."""
    if name in ("ablation", "launches", "estimate", "encoder-forms", "deep-forms"):
        assert bench([name, "--help"]) == 0
        said = capsys.readouterr().out
        assert "--record" not in said or "as well" in said
        return
    arguments = [name, "linear", "tiny"] if name == "profile" else [name]
    for options in (["--record", "--out", "nowhere"], ["--out", "nowhere", "--record"]):
        assert bench([*arguments, *options]) == 2
        assert "--record: must not be given with --out, got both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["opps"], "command: must be among ops, targets, .*, got 'opps'; did you mean ops"),
        (["end_to_ent"], "got 'end_to_ent'; did you mean end-to-end"),
        (["targets", "--onyl", "a"], "bench targets: --onyl: must be an option of this command; did you mean --only"),
        (["profile", "linear"], "bench profile: case: must name at least one of 13b-448"),
        (["profile", "linear", "tiny", "--rows", "many"], "bench profile: --rows: must be a whole number, got 'many'"),
        (["targets", "--minutes", "ten"], "bench targets: --minutes: must be a number, got 'ten'"),
        (["targets", "--minutes"], "bench targets: Option '--minutes' requires an argument"),
        (["targets", "foo"], "bench targets: Got unexpected extra argument.*foo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_misspelt_is_named_with_what_is_near(arguments, message, capsys):
    assert bench(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert re.search(message, printed.err), printed.err


@pytest.fixture
def toy():
    """A command line with one command, which notes what it is given, or raises."""
    app, seen = cli.application("A toy."), []

    @app.command("toy", cls=cli.Command)
    def toy(
        first: Annotated[str, typer.Argument()] = "",
        only: Annotated[list[str] | None, typer.Option("--only")] = None,
        px: Annotated[list[int] | None, typer.Option("--px", callback=cli.within(2, 9))] = None,
        share: Annotated[float, typer.Option("--share", callback=cli.within(above=0, high=1))] = 0.5,
        flag: Annotated[bool, typer.Option("--flag")] = False,
    ) -> int:
        seen.append((first, only, px or None, share, flag))
        if first == "bad-file":
            raise BadFile("out/a.json must be a JSON file, got: nothing")
        if first == "interrupt":
            raise KeyboardInterrupt
        return 3

    return lambda *arguments: (cli.run(app, ["toy", *arguments]), seen[-1] if seen else None)


@pytest.mark.parametrize(
    ("arguments", "only", "px"),
    [
        (["--only", "a", "b"], ["a", "b"], None),
        (["--only", "a", "--only", "b"], ["a", "b"], None),
        (["--only=a", "--flag"], ["a"], None),
        (["--only", "a", "b", "--px", "2", "3", "--flag"], ["a", "b"], [2, 3]),
        (["first", "--px", "9"], None, [9]),
    ],
    ids=str,
)
def test_lists_may_be_separated_by_spaces(arguments, only, px, toy):
    code, seen = toy(*arguments)
    assert code == 3 and seen == ("first" if "first" in arguments else "", only, px, 0.5, "--flag" in arguments)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--px", "3", "1"], 2, "bench toy: --px: must be from 2 to 9, got 1\n"),
        (["--share", "0"], 2, "bench toy: --share: must be more than 0 and at most 1, got 0\n"),
        (["--share", "1.5"], 2, "bench toy: --share: must be more than 0 and at most 1, got 1.5\n"),
        (["bad-file"], 2, "bench toy: out/a.json must be a JSON file, got: nothing\n"),
        (["interrupt"], 130, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exit_codes(arguments, code, message, toy, capsys):
    assert toy(*arguments)[0] == code
    assert capsys.readouterr().err.replace("Aborted!", "").strip() == message.strip()


def test_a_command_is_recorded_as_it_is_typed(toy):
    toy("--only", "a*", "b c")
    assert environment.describe("cpu")["command"] == "python -m bench toy --only 'a*' 'b c'"


def test_names():
    known = ("13b-896", "13b-448", "px896")
    assert cli.some_of("--case", ["13b-*"], known) == ("13b-896", "13b-448")
    assert cli.some_of("--case", ["px896, 13b-448", "px896"], known) == ("13b-448", "px896"), "in the known order"
    assert cli.one_of("--case", "px896", iter(known)) == "px896"
    for given, message in (
        (["px869"], r"--case: must be among .*, got 'px869'; did you mean px896\?"),
        (["*"], "must be among"),
        ([","], "--case: must name at least one of 13b-896, 13b-448, px896, got none"),
    ):
        with pytest.raises(cli.BadOption, match=message):
            cli.some_of("--case", given, known, patterns=False)
    with pytest.raises(cli.BadOption, match="must be one of 30 names, got 'x'$"):
        cli.one_of("--case", "x", [f"name-{number}" for number in range(30)])


def test_numbers():
    assert cli.numbers("--px", ["448,896", "448"], 1, 1000) == (448, 896)
    for given, message in (
        (["0"], "--px: must be a whole number from 1 to 9, got '0'"),
        (["1.5"], "got '1.5'"),
        ([], "--px: must name at least one number from 1 to 9, got none"),
    ):
        with pytest.raises(cli.BadOption, match=message):
            cli.numbers("--px", given, 1, 9)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.device_of("auto") == "cpu" and cli.device_of("cuda", listing=True) == "cuda"
    with pytest.raises(cli.BadOption, match="--device: cuda needs a CUDA device .*; use --device cpu"):
        cli.device_of("cuda")
    with pytest.raises(cli.BadOption, match=r"--device: must be among auto, cpu, cuda, got 'cud'; did you mean cuda"):
        cli.device_of("cud")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.device_of("auto") == "cuda"
