"""`pip install -e .`: the same packages as requirements.txt, with torch in the range that the code supports."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
TORCH = "torch>=2.11,<2.15"  # requirements.txt pins one of these
PYTHON = ">=3.11,<3.15"


def requirements(name: str) -> list[str]:
    """Lines of a requirements file, without comments."""
    lines = (line.partition("#")[0].strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines())
    return [TORCH if re.match(r"torch\W", line) else line for line in lines if line]


setup(
    name="diagonal-distillation",
    version="0.1.0",
    description="Streaming text-to-video with a step count that falls from chunk to chunk",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=PYTHON,
    packages=find_packages(include=["client", "configs*", "model*", "pipeline*", "server*", "trainer*", "utils*"]),
    package_data={"": ["py.typed"], "server": ["static/*"], "configs": ["*.yaml", "world/*.yaml", "networks/*.json"]},
    install_requires=requirements("requirements.txt"),
    extras_require={
        "cuda": ["flash-attn>=2.7"],  # compiled on installation; without it, attention is torch's own
        "train": ["wandb>=0.22"],  # metrics go to a JSONL file without it
        "demo": requirements("requirements-demo.txt"),  # python demo.py
        "client": requirements("requirements-client.txt"),  # the package client, which needs nothing else
        "dev": requirements("requirements-dev.txt"),
    },
)
