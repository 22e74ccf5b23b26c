"""Install another version of transformers beside the environment, for ``make test-transformers``.

``python tests/install_transformers.py 4.57.6 build/transformers-4.57.6`` puts that version into the folder,
with those of its requirements that the environment does not satisfy (tokenizers, huggingface-hub, ...) and
nothing else; torch is never installed. A folder that is complete is left alone.
"""

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NEVER = {"torch"}
ROUNDS = 8  # each installs what the last one turned out to need
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import huggingface_hub, tokenizers, transformers
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
for module in (transformers, tokenizers, huggingface_hub):
    print(module.__name__, module.__version__, "from", module.__path__[0])
"""


def installed_versions(folders: list[str] | None = None) -> dict[str, str]:
    found = distributions() if folders is None else distributions(path=folders)
    return {canonicalize_name(dist.metadata["Name"]): dist.version for dist in found if dist.metadata["Name"]}


def unmet_requirements(folder: Path) -> list[str]:
    """List the requirements of what lies in `folder` that neither it nor the environment satisfies."""
    versions = installed_versions() | installed_versions([str(folder)])
    unmet = set()
    for dist in distributions(path=[str(folder)]):
        for requirement in map(Requirement, dist.requires or []):
            name = canonicalize_name(requirement.name)
            if name in NEVER or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            if name not in versions or not requirement.specifier.contains(versions[name], prereleases=True):
                unmet.add(f"{name}{requirement.specifier}")
    return sorted(unmet)


def pip_install(folder: Path, requirements: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*pip, *requirements], check=True)


def install(version: str, folder: Path) -> None:
    complete = folder / ".complete"
    if complete.exists():
        return
    pip_install(folder, [f"transformers=={version}"])
    for _ in range(ROUNDS):
        unmet = unmet_requirements(folder)
        if not unmet:
            complete.touch()
            return
        print(f"transformers {version} also needs: {', '.join(unmet)}", flush=True)
        pip_install(folder, unmet)
    raise RuntimeError(f"transformers {version}: still not satisfied in {folder}: {unmet_requirements(folder)}")


if __name__ == "__main__":
    target = Path(sys.argv[2]).resolve()
    install(sys.argv[1], target)
    subprocess.run([sys.executable, "-c", CHECK, str(target)], check=True)
