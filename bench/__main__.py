"""``python -m bench <command>``: runs the module behind a command."""

from __future__ import annotations

import difflib
import runpy
import sys

COMMANDS = {
    "ablation": ("bench.ablation", "the paper's Tables 2 and 4 in small: what each part of the adapter is worth"),
    "ablation.detail": ("bench.ablation.detail", "what of a lesion is left in a host's small view"),
    "compare": ("bench.compare.run", "two revisions measured together"),
    "deep-forms": ("bench.ops.deep_forms", "how exact the absorbed forms are in half precision"),
    "encoder-forms": ("bench.ops.encoder_forms", "ways to run the prepared encoder on the CPU"),
    "end-to-end": ("bench.end_to_end.run", "time to first token, second question, decode, training step, memory"),
    "targets": ("bench.targets", "the ratios this project is held to, each with its target and verdict"),
    "gpu": ("bench.gpu.run", "GPU tests, then every benchmark"),
    "launches": ("bench.launches", "what the Triton kernels launch, compiled without a GPU"),
    "ops": ("bench.ops.run", "every op beside its peers"),
    "profile": ("bench.ops.profile", "where the time of one call goes"),
    "readme": ("bench.table3.readme", "Table 3 in README.md, from its record"),
    "report": ("bench.report.run", "Markdown, pictures and a page from the records"),
    "table3": ("bench.table3.run", "the paper's Table 3 beside ours"),
    "tune": ("bench.ops.tune", "the kernels' tile sizes"),
}


def main() -> None:
    """Run the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
        print("usage: python -m bench <command> [options]\n\n" + "\n".join(lines))
        sys.exit(0)
    name = sys.argv[1].replace("_", "-")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"bench: the command must be among {', '.join(COMMANDS)}, got {sys.argv[1]!r}{hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"python -m bench {name}", *sys.argv[2:]]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
