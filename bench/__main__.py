"""``python -m bench <command>``: the only entry of the benchmarks, their reports and what compiles the kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from bench import cli
from bench.ablation.cli import ablation, ablation_detail
from bench.compare.cli import compare
from bench.end_to_end.cli import end_to_end
from bench.estimate.cli import estimate
from bench.forms.cli import deep_forms, encoder_forms
from bench.gpu.cli import gpu
from bench.launches.cli import launches
from bench.ops.cli import ops
from bench.profile.cli import profile
from bench.report.cli import report
from bench.smoke.cli import smoke
from bench.table3.cli import table3
from bench.targets.cli import targets
from bench.tune.cli import tune

COMMANDS: dict[str, tuple[Callable[..., int], ...]] = {
    "Measure": (ops, targets, table3, end_to_end, ablation, ablation_detail, gpu),
    "Compare and report": (compare, report),
    "Look inside and tune": (smoke, profile, tune, launches, estimate, encoder_forms, deep_forms),
}
APP = cli.application(
    "Benchmarks of the ops and the adapter, beside their peers and the device's limits. Results go to `out/<device>`, "
    "which git ignores; with `--record` to `bench/results/<device>`."
)
for _panel, _commands in COMMANDS.items():
    for _command in _commands:
        _name = _command.__name__.replace("_", "-")
        APP.command(_name, cls=cli.Command, rich_help_panel=_panel)(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name.

    Returns:
        Its exit code; 2 where an option isn't allowed.
    """
    return cli.run(APP, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
