"""Which tensors collectives get: NCCL takes none of the CPU. The meta device stands for a GPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainer.clips import encoded_clips
from trainer.parallel.apply import average_gradients, mean_over_ranks
from trainer.parallel.control_group import ControlGroup


@pytest.fixture
def messages(monkeypatch):
    """Device and group of each tensor that this rank, the first of two, gives to a collective."""
    given = []

    def reduced(x, *_, group=None):
        given.append((x.device.type, group))

    def gathered(parts, x, group=None):
        given.extend((y.device.type, group) for y in (*parts, x))

    monkeypatch.setattr(dist, "all_reduce", reduced)
    monkeypatch.setattr(dist, "all_gather", gathered)
    monkeypatch.setattr(dist, "new_group", lambda backend, **_: backend)
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)
    return given


def test_gradients_and_logged_values_stay_on_their_device(messages):
    weight = nn.Parameter(torch.empty(3, device="meta"))
    weight.grad = torch.empty_like(weight)
    average_gradients([weight])
    mean_over_ranks({"loss": torch.empty((), device="meta"), "norm": torch.empty((), device="meta")})
    assert messages == [("meta", None)] * 2


def test_ranks_exchange_latents_on_the_codecs_device(messages, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())  # which the meta device has not
    codec = SimpleNamespace(vae=nn.Linear(1, 1, device="meta"), encode=lambda pixels: pixels)

    def render(scenes, frames, device="cpu"):
        return torch.empty(len(scenes), frames, device=device)

    latents = encoded_clips(render, codec, [0, 1, 2], 5, torch.float32, None)
    assert latents.shape == (3, 5) and messages == [("meta", None)] * 3


def test_agreement_is_of_the_host(messages):
    ControlGroup().each(True, False)
    assert messages == [("cpu", "gloo")]
