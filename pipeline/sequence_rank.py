"""A rank that shares a stream with rank 0 (pipeline/sequence_parallel.py). Its argument is the number of a pipe.

It makes the calls that rank 0 sends until the pipe is closed.
"""

import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from utils import exits

exits.guard(__name__)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402

from configs.geometry import Geometry  # noqa: E402
from model.attention import set_attention  # noqa: E402
from model.cache import CacheState, StreamCache, StreamView  # noqa: E402
from model.causal_wan import CausalWanModel, TextKV  # noqa: E402
from model.denoiser import Student  # noqa: E402
from model.fast.student import optimize_student  # noqa: E402
from model.sequence import SequenceGroup  # noqa: E402
from pipeline.sequence_parallel import RankSetup, join  # noqa: E402


class Follower:
    """Student and caches of this rank. Rank 0 calls its methods by name."""

    def __init__(self, setup: RankSetup, group: SequenceGroup):
        self.group, self.device = group, setup.device
        with init_empty_weights(include_buffers=False):
            model = CausalWanModel.from_config(setup.network).eval()
        own = dict(model.requires_grad_(False).named_parameters())
        for name, dtype in setup.weights:
            own[name].data = own[name].data.to(dtype)
        model.to_empty(device=setup.device)
        for weight in model.parameters():
            dist.broadcast(weight.data, 0)
        model.share_tokens(group)
        if setup.attention is not None:
            set_attention(model, setup.attention)
        self.student = Student(model) if setup.plan is None else optimize_student(Student(model), setup.plan)
        self.texts: dict[int, TextKV] = {}
        self.caches: dict[int, StreamCache] = {}
        self.states: dict[int, CacheState] = {}
        self.view: StreamView | None = None  # the newest

    def drop(self, names: list[int]) -> None:
        for name in names:
            for things in (self.texts, self.caches, self.states):
                things.pop(name, None)

    def text(self, name: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.texts[name] = self.student.text_kv(self._received(shape, dtype))

    def cache(
        self, name: int, geometry: Geometry, batch: int, max_chunks: int | None, dtype: torch.dtype | None
    ) -> None:
        self.caches[name] = self.student.new_cache(geometry, batch, max_chunks, dtype)

    def on_cache(self, name: int, method: str, *arguments: Any) -> None:
        result = getattr(self.caches[name], method)(*arguments)
        if isinstance(result, StreamView):
            self.view = result

    def shift_keys(self, name: int, position: int, frames: int) -> None:
        self.caches[name].shift_keys(position, frames, self.student.model.shift_keys)

    def snapshot(self, name: int, state: int, to_host: bool) -> None:
        self.states[state] = self.caches[name].snapshot("cpu" if to_host else None)

    def restore(self, name: int, state: int) -> None:
        self.caches[name].restore(self.states[state])

    def x0(
        self, text: int, start_frame: int, shape: tuple[int, ...], dtype: torch.dtype, t_shape: tuple[int, ...]
    ) -> None:
        x_t, t = self._received(shape, dtype), self._received(t_shape, torch.float32)
        self.student.x0(x_t, t, self.texts[text], self.view, start_frame)

    def _received(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.group.broadcast(torch.empty(shape, dtype=dtype, device=self.device))


FOLLOWS: dict[str, Any] = {
    method.__name__: method
    for method in (
        Follower.drop, Follower.text, Follower.cache, Follower.on_cache, Follower.shift_keys, Follower.snapshot,
        Follower.restore, Follower.x0,
    )
}  # fmt: skip


def end_with(parent: int) -> None:
    """End this process when `parent` has ended, even if the main thread waits."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def run(pipe: Connection) -> None:
    setup: RankSetup = pipe.recv()
    torch.set_num_threads(setup.threads)
    pipe.send("")  # started
    follower = Follower(setup, join(setup))
    with torch.no_grad():
        while True:
            what, *arguments = pipe.recv()
            FOLLOWS[what](follower, *arguments)


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    pipe = Connection(int(sys.argv[1]))
    try:
        run(pipe)
    except (EOFError, ConnectionResetError):  # rank 0 has ended; do not wait for the GPU
        os._exit(0)
    except Exception as error:
        said = exits.explain(error)
        pipe.send(said[0].removeprefix("error: ") if said else f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    exits.run(main)
