"""The code blocks of README.md: Python blocks are tests, commands of ``bash run`` blocks are run by .ci/run.

Standard library only: .ci/run calls ``python tests/readme.py`` to list the commands, one a line.
"""

import re
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>```+)(?P<info>.*)$")


@dataclass(frozen=True)
class CodeBlock:
    language: str
    flags: tuple[str, ...]
    line: int  # of the first line of code, counted from 1
    code: str


def code_blocks(text: str) -> list[CodeBlock]:
    blocks: list[CodeBlock] = []
    opening: re.Match[str] | None = None
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opening is None:
            if fence:
                opening, code = fence, []
        elif fence and fence["ticks"] == opening["ticks"] and not fence["info"].strip():
            language, *flags = opening["info"].split() or [""]
            blocks.append(CodeBlock(language, tuple(flags), number - len(code), "\n".join(code) + "\n"))
            opening = None
        else:
            code.append(line.removeprefix(opening["indent"]))
    if opening is not None:
        raise ValueError(f"README.md ends inside a code block opened with {opening.group().strip()!r}")
    return blocks


def python_blocks(text: str) -> list[CodeBlock]:
    return [block for block in code_blocks(text) if block.language == "python"]


def runnable_commands(text: str) -> list[str]:
    """List the commands of the blocks that open with ``bash run``: comments dropped, continued lines joined."""
    commands = []
    for block in code_blocks(text):
        if block.language == "bash" and "run" in block.flags:
            lines = block.code.replace("\\\n", " ").splitlines()
            commands += [re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ") for line in lines]
    return [" ".join(command.split()) for command in commands if command]


if __name__ == "__main__":
    print("\n".join(runnable_commands(README.read_text(encoding="utf-8"))))
