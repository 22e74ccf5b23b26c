"""Download the Python halves of flash-attn 4 and xformers, to test calls of them against their real signatures.

``python tests/install_peers.py build/peers`` puts each into a folder of its own, without what they need: no GPU and no
CUDA is there to run them, and neither could be imported beside the other's missing half.
"""

import subprocess
import sys
from pathlib import Path

VERSIONS = {"flash-attn-4": "4.0.0b36", "xformers": "0.0.35"}  # docs/cross_attention.md names them


def install(root: Path) -> None:
    """Download what is not there yet."""
    for name, version in VERSIONS.items():
        folder = root / f"{name}-{version}"
        if not (folder / ".complete").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
            subprocess.run([*pip, f"{name}=={version}"], check=True)
            (folder / ".complete").touch()


if __name__ == "__main__":
    install(Path(sys.argv[1]).resolve())
