"""The shell scripts: what they set up, once, and what they start. Stand-in entry points print their arguments."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from configs.load import CHECKOUT

pytestmark = pytest.mark.slow

SCRIPTS = sorted([*CHECKOUT.glob("*.sh"), *(CHECKOUT / "scripts").glob("*.sh"), CHECKOUT / ".ci" / "run"])
COPIED = ("inference.sh", "training.sh", "demo.sh", "serve.sh", "setup.py", "scripts/setup.sh",
          "scripts/check_requirements.py")  # fmt: skip
STAND_IN = """
import json, os, sys
print(json.dumps([sys.prefix, os.getcwd(), os.path.basename(sys.argv[0]), *sys.argv[1:]]))
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The scripts beside stand-ins for the entry points, with requirements that need no download."""
    root = tmp_path / "check out"  # a space, as in many home folders
    (root / "scripts").mkdir(parents=True)
    for name in COPIED:
        shutil.copy(CHECKOUT / name, root / name)
    for name in ("inference.py", "train.py", "demo.py", "serve.py"):
        (root / name).write_text(STAND_IN)
    for name in ("requirements.txt", "requirements-demo.txt"):
        (root / name).write_text("# nothing\n")
    return root


def wheel(checkout: Path, name: str, needs: str = "") -> None:
    """A package of one module, for pip to find in `wheels` of the folder that scripts are started in."""
    info, folder = f"{name}-1.0.dist-info", checkout.parent / "wheels"
    folder.mkdir(exist_ok=True)
    needed = f"Requires-Dist: {needs}\n" if needs else ""
    members = {
        f"{name}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + needed,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        for path, text in members.items():
            file.writestr(path, text)
        file.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*members, f"{info}/RECORD"]))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A virtual environment with pip alone."""
    path = tmp_path_factory.mktemp("bare") / "environment"
    venv.create(path, with_pip=True, symlinks=True)
    return path


@pytest.fixture
def filled(checkout, bare) -> Path:
    """A checkout that asks for `thing`, which needs `part`, with a .venv that somebody made, and that was filled."""
    wheel(checkout, "thing", needs="part")
    wheel(checkout, "part")
    (checkout / "requirements.txt").write_text("thing==1.0\n")
    shutil.copytree(bare, checkout / ".venv", symlinks=True)
    _, err = run(checkout / "inference.sh")
    assert "thing is not installed" in err and "packages installed" in err and "making" not in err
    return checkout


def packages(checkout: Path) -> Path:
    (path,) = checkout.glob(".venv/lib/python*/site-packages")
    return path


def start(script: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """`bash script arguments` in the folder above the checkout, with no environment active and no GPU visible."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "PIP_NO_INDEX": "1", "PYTHON": sys.executable}
    kept |= {"PIP_FIND_LINKS": "wheels", "HOME": str(script.parents[1])} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", str(script), *arguments], env=kept, cwd=script.parents[1], **pipes)


def run(script: Path, *arguments: str, code: int = 0, **variables: str) -> tuple[str, str]:
    """(standard output, standard error) of a script that must end with `code`."""
    process = start(script, *arguments, **variables)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out.strip(), err.strip()


@pytest.fixture
def echo(tmp_path) -> str:
    """A `python3` that prints how it was called."""
    path = tmp_path / "echo-python"
    path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return str(path)


def called(script: Path, echo: str, *arguments: str, **variables: str) -> list[str]:
    """Arguments that the script gives to Python."""
    return run(script, *arguments, DIAGONAL_NO_VENV="1", PYTHON=echo, **variables)[0].splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_each_script(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_fresh_checkout_is_set_up_once_even_by_two_at_once(checkout):
    script, arguments = checkout / "inference.sh", ["--prompt", "a red circle  moves", "--seed", "3", "a.b=c"]
    pair = [start(script, *arguments) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert sum("making a virtual environment" in err for _, err in ends) == 1
    prefix, cwd, *called_with = json.loads(ends[0][0])
    assert Path(prefix) == checkout / ".venv" and Path(cwd) == checkout.parent
    assert called_with == ["inference.py", *arguments]

    _, err = run(script)
    assert not err, "a second run sets nothing up"
    assert "pip install" not in run(checkout / "training.sh")[1]

    wheel(checkout, "thing")
    (checkout / "requirements.txt").write_text("thing==1.0\n")
    _, err = run(script)
    assert "packages installed" in err and "making" not in err, "a changed file is installed over what is there"
    assert not run(script)[1]


def test_an_environment_is_not_steered_from_outside(checkout, bare):
    wheel(checkout, "thing", needs="part")
    wheel(checkout, "part")
    (checkout / "requirements.txt").write_text("thing==1.0\n")
    shutil.copytree(bare, checkout / ".venv", symlinks=True)
    above = checkout.parent
    (above / "pip.conf").write_text("[install]\ntarget = elsewhere\nno-deps = true\n[global]\nfind-links = wheels\n")
    for name in ("thing", "part"):  # what a cluster's modules would offer
        shutil.unpack_archive(above / "wheels" / f"{name}-1.0-py3-none-any.whl", above / "cluster", "zip")
    steered = {
        "PIP_TARGET": "elsewhere", "PIP_PREFIX": "elsewhere", "PIP_USER": "1", "PIP_NO_DEPS": "1", "PIP_DRY_RUN": "1",
        "PIP_CONFIG_FILE": "pip.conf", "PIP_FIND_LINKS": "", "PYTHONPATH": str(above / "cluster"), "PIP_PYTHON": "none",
    }  # fmt: skip
    out, err = run(checkout / "inference.sh", **steered)
    assert json.loads(out)[0] == str(checkout / ".venv") and "packages installed" in err
    assert (packages(checkout) / "thing").exists() and (packages(checkout) / "part").exists()
    assert not (above / "elsewhere").exists()
    assert not run(checkout / "inference.sh", **steered, PYTHONHOME="elsewhere", PYTHON="")[1]


def test_what_is_deleted_from_an_environment_comes_back(filled):
    place, python = packages(filled), filled / ".venv" / "bin" / "python"
    check = [python, filled / "scripts" / "check_requirements.py", "--whole", filled / "requirements.txt"]
    gone = {
        "thing": "files of thing==1.0 are gone",
        "thing/__init__.py": "files of thing==1.0 are gone",
        "part-1.0.dist-info/RECORD": "files of part==1.0 are gone",
        "part-1.0.dist-info": "part is not installed (thing needs it)",
    }
    for path, said in gone.items():
        (place / path).rename(filled / "away")
        assert subprocess.run(check, capture_output=True, text=True).stdout.strip() == said, path
        (filled / "away").rename(place / path)
    assert subprocess.run(check, check=True)

    shutil.rmtree(place / "thing")
    for path in place.glob("part*"):
        shutil.rmtree(path)
    _, err = run(filled / "inference.sh")
    faults = "part is not installed (thing needs it), files of thing==1.0 are gone"
    assert err.splitlines()[0] == f"in {filled / '.venv'} {faults}" and "making" not in err
    assert all((place / f"{name}/__init__.py").exists() for name in ("thing", "part"))
    assert not run(filled / "inference.sh")[1]


def test_an_environment_that_pip_leaves_empty_or_that_has_none_is_not_believed_and_kept(filled):
    place = packages(filled)
    shutil.rmtree(place / "part")
    (place / "pip" / "__main__.py").write_text("")
    for _ in range(2):
        _, err = run(filled / "inference.sh", code=2)
        assert "pip found nothing wrong, and" in err and "files of part==1.0 are gone" in err.splitlines()[-1]
    mine = filled / ".venv" / "mine"
    mine.touch()
    shutil.rmtree(place / "pip")
    _, err = run(filled / "inference.sh", code=2)
    assert "was not made by this script and cannot be used: it has neither packaging nor pip" in err and mine.exists()


def test_a_half_done_environment_is_made_again_from_where_its_own_python_came(checkout, bare):
    script = checkout / "inference.sh"
    shutil.copytree(bare, checkout / ".venv", symlinks=True)
    (checkout / ".venv" / "bin" / "pip").unlink()
    for name in ("incomplete", "left"):
        (checkout / ".venv" / name).touch()
    active = {"PYTHON": "", "VIRTUAL_ENV": str(checkout / ".venv")}
    path = f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    _, err = run(script, PATH=path, **active)
    assert "making a virtual environment" in err and (checkout / ".venv" / "bin" / "pip").exists()
    assert not (checkout / ".venv" / "left").exists()


def test_a_checkout_that_cannot_be_written_to_is_said(checkout):
    (checkout / ".venv.lock").mkdir()
    _, err = run(checkout / "inference.sh", code=2)
    assert err == (
        f"error: {checkout / '.venv'} cannot be made or mended: {checkout} cannot be written to; "
        "activate an environment that has requirements.txt"
    )


def test_one_set_up_for_all_and_its_versions():
    started = {"setup.sh", "run", "train_slurm.sh"}  # what is sourced, and what starts others
    for script in SCRIPTS:
        assert script.name in started or "\nset_up requirements.txt" in script.read_text(encoding="utf-8"), script
    told = (CHECKOUT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    versions = re.search(r"^ +(3\.\d+(?: \| 3\.\d+)*)\) printf", told, re.MULTILINE).group(1).split(" | ")
    supported = Requirement(f"python{ranges()['PYTHON']}").specifier
    assert versions == [f"3.{minor}" for minor in range(30) if supported.contains(f"3.{minor}")]
    assert f"Python {versions[0]} to {versions[-1]}" in told
    for name in ("README.md", ".github/workflows/test.yml"):
        text = (CHECKOUT / name).read_text(encoding="utf-8")
        assert f"Python {versions[0]} to {versions[-1]}" in text or json.dumps(versions) in text, name


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used_where_it_has_what_is_needed(checkout, variable):
    (checkout / "requirements.txt").write_text("pytest>=1\n")
    out, err = run(checkout / "inference.sh", **{variable: sys.prefix})
    assert json.loads(out)[0] == sys.prefix and not err and not (checkout / ".venv").exists()
    (checkout / "requirements.txt").write_text("pytest>=999\n")
    (checkout / ".venv.lock").mkdir()  # far enough
    _, err = run(checkout / "inference.sh", code=2, **{variable: sys.prefix})
    assert err.startswith(f"the active environment {sys.prefix} is not used: pytest ")


def test_a_python_that_is_too_old_is_named(checkout, tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/usr/bin/env bash\necho 3.9\n")
    old.chmod(0o755)
    _, err = run(checkout / "inference.sh", code=2, PYTHON=str(old))
    assert err == (
        f"error: Python 3.11 to 3.14 is needed and was not found (found: {old}=3.9); "
        "install one, or name it: PYTHON=/path/to/python3.12"
    )


def test_several_gpus_share_the_prompts_through_torchrun(checkout, echo):
    program = str(checkout / "inference.py")
    launch = ["-m", "torch.distributed.run", "--standalone"]
    script = checkout / "inference.sh"
    assert called(script, echo, "--seed", "1", CUDA_VISIBLE_DEVICES="0,1,5") == [
        *launch, "--nproc_per_node=3", program, "--seed", "1"
    ]  # fmt: skip
    assert called(script, echo, "--seed", "1", CUDA_VISIBLE_DEVICES="0") == [program, "--seed", "1"]
    assert called(script, echo, CUDA_VISIBLE_DEVICES="-1") == [program]
    for flag in ("--print_schedule", "--dry_run", "--help"):
        assert called(script, echo, flag, CUDA_VISIBLE_DEVICES="0,1") == [program, flag]


def test_the_demo_has_its_own_packages(checkout, bare, echo):
    shutil.copytree(bare, checkout / ".venv", symlinks=True)
    program = str(checkout / "demo.py")
    assert called(checkout / "demo.sh", echo, "--port", "0") == [program, "--port", "0"]
    (checkout / "requirements-demo.txt").write_text("no-such-package==1\n")
    _, err = run(checkout / "demo.sh", code=2)
    assert err.splitlines()[-1].startswith("error: packages could not be fetched; go online")


def test_training_has_defaults_that_arguments_replace(checkout, echo):
    script, program = checkout / "training.sh", str(checkout / "train.py")
    config = "configs/train_tiny.yaml"
    assert called(script, echo, "seed=1") == [
        program, "--config_path", config, "--logdir", "logs/train_tiny", "seed=1"
    ]  # fmt: skip
    given = ["--config_path", "mine/other.yaml"]
    assert called(script, echo, *given) == [program, "--logdir", "logs/other", *given]
    assert called(script, echo, "--config_path=other.yaml", "--logdir=x") == [
        program, "--config_path=other.yaml", "--logdir=x"
    ]  # fmt: skip


def test_training_starts_on_many_machines(checkout, echo):
    script = checkout / "training.sh"
    several = {"CUDA_VISIBLE_DEVICES": "0,1", "NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "first"}
    assert called(script, echo, **several)[:7] == [
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--nnodes=4", "--node_rank=3", "--master_addr=first",
        "--master_port=29500",
    ]  # fmt: skip
    _, err = run(script, code=2, DIAGONAL_NO_VENV="1", PYTHON=echo, NNODES="2", NODE_RANK="0")
    assert err == "error: NNODES=2 needs MASTER_ADDR, the host name of node 0"


def test_requirements_are_checked_with_torch_in_its_supported_range(tmp_path):
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("torch==2.0.0  # any supported one will do\n\npytest>=1\npytest>=999\nno-such-package\n")
    check = [sys.executable, str(CHECKOUT / "scripts" / "check_requirements.py"), str(wanted)]
    done = subprocess.run(check, capture_output=True, text=True)
    found = done.stdout.splitlines()
    assert done.returncode == 1 and len(found) == 2 and found[0].endswith("(pytest>=999 is needed)")
    assert found[1] == "no-such-package is not installed (no-such-package is needed)"
    for path in (tmp_path, tmp_path / "none.txt"):
        done = subprocess.run([*check[:2], str(path)], capture_output=True, text=True)
        assert done.returncode == 2 and re.fullmatch(r"error: .* cannot be read \(.*\); give .*\n", done.stderr)
    lines = (CHECKOUT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [line for line in lines if line.startswith("torch==")]
    (version,) = [spec.version for spec in Requirement(pin).specifier]
    assert Requirement(ranges()["TORCH"]).specifier.contains(version)


def ranges() -> dict[str, str]:
    """What setup.py supports."""
    text = (CHECKOUT / "setup.py").read_text(encoding="utf-8")
    return dict(re.findall('^([A-Z]+) = "(.+?)"', text, re.MULTILINE))
