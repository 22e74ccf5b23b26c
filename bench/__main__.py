"""``python -m bench <command>``: runs ``python -m bench.<command>``."""

from __future__ import annotations

import difflib
import runpy
import sys

COMMANDS = {
    "ablation": "the paper's Tables 2 and 4 in small: what each part of the adapter is worth",
    "compare": "two revisions measured together",
    "end_to_end": "time to first token, second question, decode, training step, memory",
    "figures": "the ratios this project is held to, each with its target and verdict",
    "gpu": "GPU tests, then every benchmark",
    "kernels": "every op beside its peers",
    "launches": "what the Triton kernels launch, compiled without a GPU",
    "profiles": "where the time of one call goes",
    "report": "Markdown, pictures and a page from the records",
    "table3": "the paper's Table 3 beside ours",
    "tune": "the kernels' tile sizes",
}


def main() -> None:
    """Run the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
        print("usage: python -m bench <command> [options]\n\n" + "\n".join(lines))
        sys.exit(0)
    name = sys.argv[1].replace("-", "_")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"bench: the command must be among {', '.join(COMMANDS)}, got {sys.argv[1]!r}{hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"python -m bench {sys.argv[1]}", *sys.argv[2:]]
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
