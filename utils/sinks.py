"""Optional metric sinks: Weights & Biases and TensorBoard."""

import hashlib
import importlib.util
import netrc
import os
import socket
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from configs.errors import UserError

WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
REACH_S = 10  # for a connection to wandb's server
NO_WANDB = "training.loggers names wandb, which is not installed; run pip install wandb, or pass --disable-wandb"
NO_TENSORBOARD = (
    "training.loggers names tensorboard, which is not installed; run pip install tensorboard, or set "
    "training.loggers=[]"
)


def check_loggers(loggers: Sequence[str], *, wandb: bool = True) -> None:
    """Raise a UserError if WandbSink or TensorboardSink would fail. wandb: False = without Weights & Biases."""
    if "tensorboard" in loggers and not _installed("tensorboard"):
        raise UserError(NO_TENSORBOARD)
    if "wandb" not in loggers or not wandb:
        return
    if not _installed("wandb"):
        raise UserError(NO_WANDB)
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in WANDB_MODES:
        raise UserError(f"WANDB_MODE={mode} is no mode of wandb; use one of {', '.join(WANDB_MODES)}")
    if mode not in ("online", "run"):
        return
    if not _wandb_key():
        raise UserError(
            "training.loggers names wandb, which has no key here; run wandb login, set WANDB_API_KEY or "
            "WANDB_MODE=offline, or pass --disable-wandb"
        )
    if not urllib.request.getproxies().keys() - {"no"}:
        server = _wandb_server()
        try:
            port = server.port or (80 if server.scheme == "http" else 443)
            socket.create_connection((server.hostname or "", port), timeout=REACH_S).close()
        except (OSError, ValueError) as error:
            raise _no_wandb(f"{server.geturl()}: {error}") from error


def _no_wandb(reason: str) -> UserError:
    return UserError(
        f"training.loggers names wandb, which cannot be used ({reason}); mend that, set WANDB_MODE=offline, or pass "
        "--disable-wandb"
    )


def _wandb_server() -> SplitResult:
    return urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")


def _installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def _wandb_key() -> bool:
    """Whether wandb finds an API key: in the environment, or for its host in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = _wandb_server().hostname
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
    return False


class WandbSink:
    """A Weights & Biases run. Its id is derived from the folder, so that a resumed training continues it."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], save_dir: Path | None = None):
        try:
            import wandb
        except ImportError as error:
            raise UserError(NO_WANDB) from error
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        where = save_dir or folder
        where.mkdir(parents=True, exist_ok=True)
        about = {"project": "diagonal-distillation", "name": name, "config": dict(config)}
        try:
            self._run = wandb.init(**about, id=identity, resume="allow", dir=str(where))
        except (wandb.Error, ValueError) as error:
            raise _no_wandb(str(error).splitlines()[0][:200]) from error
        self._run.define_metric("*", step_metric="step")  # wandb's own step drops rows of a run that has gone back

    def write(self, step: int, **values: Any) -> None:
        self._run.log({"step": step, **values})

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        self._run.finish(exit_code=int(kind is not None))


class TensorboardSink:
    """Scalars as event files under `folder`."""

    def __init__(self, folder: Path, purge_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(NO_TENSORBOARD) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, **values: Any) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._writer.close()
