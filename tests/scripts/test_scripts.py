"""The shell scripts: what they set up, once, and what they start. Stand-in entry points print their arguments."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from configs.load import CHECKOUT

SCRIPTS = sorted([*CHECKOUT.glob("*.sh"), *(CHECKOUT / "scripts").glob("*.sh"), CHECKOUT / ".ci" / "run"])
COPIED = ("inference.sh", "training.sh", "demo.sh", "setup.py", "scripts/setup.sh", "scripts/check_requirements.py")
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
    for name in ("inference.py", "train.py", "demo.py"):
        (root / name).write_text(STAND_IN)
    for name in ("requirements.txt", "requirements-demo.txt"):
        (root / name).write_text("# nothing\n")
    return root


def start(script: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """`bash script arguments` in the folder above the checkout, with no environment active and no GPU visible."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "PIP_NO_INDEX": "1", "PYTHON": sys.executable} | variables
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
def test_syntax(script):
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

    (checkout / "requirements.txt").write_text("# something else\n")
    _, err = run(script)
    assert "packages installed" in err and "making" not in err, "a changed file is installed over what is there"
    assert not run(script)[1]


def test_a_half_done_set_up_is_done_again(checkout):
    (checkout / "requirements.txt").write_text("no-such-package-anywhere==1\n")
    _, err = run(checkout / "inference.sh", code=2)
    assert err.splitlines()[-1].startswith("error: packages could not be fetched; go online")
    (checkout / ".venv" / "left").touch()
    (checkout / "requirements.txt").write_text("# nothing\n")
    assert "making a virtual environment" in run(checkout / "inference.sh")[1]
    assert not (checkout / ".venv" / "left").exists()


def test_an_active_environment_is_used_where_it_has_what_is_needed(checkout):
    (checkout / "requirements.txt").write_text("pytest>=1\n")
    out, err = run(checkout / "inference.sh", VIRTUAL_ENV=sys.prefix)
    assert json.loads(out)[0] == sys.prefix and not err and not (checkout / ".venv").exists()


def test_a_python_that_is_too_old_is_named(checkout, tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/usr/bin/env bash\necho 3.9\n")
    old.chmod(0o755)
    _, err = run(checkout / "inference.sh", code=2, PYTHON=str(old))
    assert err == (
        f"error: Python 3.11 or 3.12 is needed and was not found (found: {old}=3.9); "
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


def test_the_demo_has_its_own_packages(checkout, echo):
    program = str(checkout / "demo.py")
    assert called(checkout / "demo.sh", echo, "--port", "0") == [program, "--port", "0"]
    (checkout / "requirements-demo.txt").write_text("no-such-package==1\n")
    _, err = run(checkout / "demo.sh", code=2)
    assert "packages could not be fetched" in err


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
    sys.path.insert(0, str(CHECKOUT / "scripts"))
    try:
        from check_requirements import lacks, supported_torch
    finally:
        sys.path.pop(0)
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("torch==2.0.0  # any supported one will do\n\npytest>=1\npytest>=999\nno-such-package\n")
    found = lacks(str(wanted))
    assert len(found) == 2 and found[0].endswith("(pytest>=999 is needed)")
    assert found[1] == "no-such-package is not installed (no-such-package is needed)"
    lines = (CHECKOUT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [line for line in lines if line.startswith("torch==")]
    (version,) = [spec.version for spec in Requirement(pin).specifier]
    assert Requirement(supported_torch()).specifier.contains(version)
