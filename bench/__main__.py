"""``python -m bench <command>``: the only entry of the benchmarks, their reports and what compiles the kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

import typer

from bench import cli
from bench.ablation.cli import ablation, ablation_detail
from bench.end_to_end.cli import end_to_end
from bench.forms.cli import deep_forms, encoder_forms
from bench.ops.cli import ops
from bench.profile.cli import profile
from bench.report.cli import report
from bench.table3.cli import table3
from bench.targets.cli import targets
from bench.tune.cli import tune

MEASURE, JUDGE, INSIDE = "Measure", "Compare and report", "Look inside"
APP = cli.application(
    "Benchmarks of the ops and the adapter, beside their peers and the device's limits. Results go to `out/<device>`, "
    "which git ignores; with `--record` to `bench/results/<device>`."
)


def _register(command: Callable[..., int], panel: str) -> None:
    name = command.__name__.replace("_", "-")
    APP.command(name, cls=cli.Command, rich_help_panel=panel)(command)


def _passed_on(name: str, module: str, panel: str, text: str) -> None:
    """Register a command whose module still parses its own arguments."""

    def command(ctx: typer.Context) -> int:
        return importlib.import_module(module).main(list(ctx.args)) or 0

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    APP.command(name, help=text, rich_help_panel=panel, add_help_option=False, context_settings=settings)(command)


_register(ops, MEASURE)
_register(targets, MEASURE)
_register(tune, MEASURE)
_register(profile, INSIDE)
_register(encoder_forms, INSIDE)
_register(deep_forms, INSIDE)
_register(end_to_end, MEASURE)
_register(table3, MEASURE)
_register(ablation, MEASURE)
_register(ablation_detail, MEASURE)
_passed_on("gpu", "bench.gpu.run", MEASURE, "GPU tests, then every benchmark.")
_passed_on("compare", "bench.compare.run", JUDGE, "Two revisions measured together.")
_register(report, JUDGE)
_passed_on("launches", "bench.launches.run", INSIDE, "What the Triton kernels launch, compiled without a GPU.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name.

    Returns:
        Its exit code; 2 where an option isn't allowed.
    """
    return cli.run(APP, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
