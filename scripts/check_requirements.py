"""Exit code 0 if this Python has what the requirements files named as arguments ask for, else 1 and one line a lack.

torch may be any version that the code supports (setup.py), not only the one that a fresh environment gets.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # a bare virtual environment has it inside pip only
    from pip._vendor.packaging.requirements import Requirement


def supported_torch() -> str:
    """The range that setup.py writes down."""
    setup = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    return re.search(r'^TORCH = "(.+?)"', setup, re.MULTILINE).group(1)


def lacks(path: str) -> list[str]:
    """What is missing or has another version, a line each."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        wanted = Requirement(supported_torch() if Requirement(line).name == "torch" else line)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found.append(f"{wanted.name} is not installed ({wanted} is needed)")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name} {version} is installed ({wanted} is needed)")
    return found


if __name__ == "__main__":
    problems = [problem for path in sys.argv[1:] for problem in lacks(path)]
    print("\n".join(problems))
    sys.exit(bool(problems))
