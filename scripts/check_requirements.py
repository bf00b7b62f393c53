"""Exit code 0 if this Python has the packages in the given requirements files, else 1 and a line for each problem.

torch may be any supported version (setup.py), not only the pinned one. --whole also checks dependencies of packages and
whether their files exist, for environments filled by pip alone. --damaged prints packages with missing files as lines
name==version, for pip to reinstall.
"""

from __future__ import annotations  # an older Python, too, must get as far as the line about its age

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # a bare virtual environment has it inside pip only
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        print("it has neither packaging nor pip")
        sys.exit(1)


def supported(name: str) -> str:
    """TORCH or PYTHON of setup.py."""
    setup = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.+?)"', setup, re.MULTILINE).group(1)


def asked_for(path: str) -> list[Requirement]:
    """The requirements that a file lists."""
    lines = (line.partition("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    wanted = [Requirement(line) for line in lines if line]
    return [Requirement(supported("TORCH")) if each.name == "torch" else each for each in wanted]


def python_lacks() -> list[str]:
    """A line if this version of Python is not supported."""
    version, needed = ".".join(map(str, sys.version_info[:3])), supported("PYTHON")
    fits = Requirement(f"python{needed}").specifier.contains(version)
    return [] if fits else [f"Python {version} is installed ({needed} is needed)"]


def lacks(path: str) -> list[str]:
    """A line for each requirement in a file that is missing or has another version."""
    missing = []
    for wanted in asked_for(path):
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{wanted.name} is not installed ({wanted} is needed)")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            missing.append(f"{wanted.name} {version} is installed ({wanted} is needed)")
    return missing


def installed(wanted: list[Requirement]) -> tuple[list[metadata.Distribution], list[str]]:
    """The wanted packages and their dependencies, and a line for each missing dependency."""
    packages, missing = {}, []
    wanted = [(each, "") for each in wanted]
    for each, needed_by in wanted:  # grows in the loop
        key = re.sub("[-_.]+", "-", each.name).lower(), *sorted(each.extras)
        if key in packages:
            continue
        try:
            packages[key] = package = metadata.distribution(each.name)
        except metadata.PackageNotFoundError:
            if needed_by:
                missing.append(f"{each.name} is not installed ({needed_by} needs it)")
            continue
        for need in map(Requirement, package.requires or ()):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *each.extras)):
                wanted.append((need, each.name))
    return list(packages.values()), missing


def is_damaged(package: metadata.Distribution) -> bool:
    """Whether files of a package are missing; checks one file in each folder, since all would take too long."""
    root = Path(package.locate_file(""))
    if not root.is_relative_to(sys.prefix):
        return False  # from another installer
    paths = [line.partition(",")[0] for line in (package.read_text("RECORD") or "").splitlines()]
    listed = [path for path in paths if not path.startswith(("..", '"')) and not path.endswith(".pyc")]
    sample = {path.partition("/")[0]: path for path in listed}
    return not sample or not all((root / path).exists() for path in sample.values())


def main(arguments: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="such as requirements.txt")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--damaged", action="store_true")
    args = parser.parse_args(arguments)
    files = args.files
    problems = python_lacks() + [line for path in files for line in lacks(path)]
    if args.whole or args.damaged:
        packages, missing = installed([each for path in files for each in asked_for(path)])
        damaged = [f"{each.metadata['Name']}=={each.version}" for each in packages if is_damaged(each)]
        if args.damaged:
            return damaged
        problems += missing + [f"files of {name} are gone" for name in damaged]
    return problems


if __name__ == "__main__":
    try:
        problems = main(sys.argv[1:])
    except OSError as error:
        print(f"error: {error.filename} cannot be read ({error.strerror}); give a requirements file", file=sys.stderr)
        sys.exit(2)
    print("\n".join(problems))
    sys.exit(bool(problems))
