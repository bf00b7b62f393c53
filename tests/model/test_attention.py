"""FlashAttention-3 in full waves: how queries are shared, and that the parts make the whole."""

import math

import pytest
import torch
from torch import Tensor

from model import attention
from model.attention import attend, full_waves


def waves(queries: int, heads: int, processors: int, n: int = 1) -> float:
    """Time of one call, in that of a processor's tile: tile after tile to whoever is free."""
    free = [0.0] * processors
    for _ in range(math.ceil(queries / 128) * heads * n):
        soonest = free.index(min(free))
        free[soonest] += 1 / n
    return max(free)


@pytest.mark.parametrize("queries", [1, 128, 1560, 4680, 10800, 32760])
@pytest.mark.parametrize("heads", [1, 12, 24, 48])
def test_two_calls_only_where_they_take_less(queries: int, heads: int):
    first, n = full_waves(queries, heads, 132)
    once = waves(queries, heads, 132)
    if n == 1:
        assert first == queries
        return
    assert 0 < first < queries and first % 128 == 0
    twice = waves(first, heads, 132) + waves(queries - first, heads, 132, n)
    assert twice <= 0.9 * once + 1e-9
    assert waves(first, heads, 132) == pytest.approx(first / 128 * heads / 132, rel=0.2)  # nearly all busy


def test_a_chunk_of_480x832_takes_three_and_a_half():
    assert full_waves(4680, 12, 132) == (33 * 128, 2)
    assert full_waves(4680, 12, 114) == (4680, 1)  # 444 tiles are 3.9 waves


@pytest.mark.parametrize(("queries", "heads", "streams"), [(700, 2, 1), (1100, 1, 2)])
def test_parts_make_the_whole(monkeypatch, queries: int, heads: int, streams: int):
    calls = []

    def forward(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, softmax_scale: float, num_splits: int):
        calls.append((q.shape[1], num_splits))
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale, dim=-1)
        out.copy_(torch.einsum("bhqk,bkhd->bqhd", weights, v))

    monkeypatch.setattr(attention, "_fa3_forward", lambda: forward)
    monkeypatch.setattr(attention, "_fa3", lambda: lambda q, k, v: pytest.fail("one call"))
    monkeypatch.setattr(attention, "_processors", lambda device: 8)
    q, k, v = torch.randn(3, streams, queries, heads, 128, dtype=torch.float64).unbind(0)
    with torch.no_grad():
        got = attend("fa3", q, k, v)
    first, n = full_waves(queries, heads * streams, 8)
    assert calls == [(first, 1), (queries - first, n)] and n > 1
    torch.testing.assert_close(got, attend("sdpa", q, k, v))


def test_one_call_where_a_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(attention, "_fa3_forward", lambda: lambda *_, **__: pytest.fail("has no gradient"))
    monkeypatch.setattr(attention, "_fa3", lambda: lambda q, k, v: (attend("sdpa", q, k, v), None))
    monkeypatch.setattr(attention, "_processors", lambda device: 8)
    q, k, v = torch.randn(3, 1, 700, 2, 128, requires_grad=True).unbind(0)
    attend("fa3", q, k, v).sum().backward()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_on_a_gpu(dtype: torch.dtype):
    capability, installed = attention.attention_support(torch.device("cuda"))
    if "fa3" not in installed or capability != (9, 0):
        pytest.skip("needs a Hopper GPU and FlashAttention-3")
    q, k, v = (torch.randn(1, n, 12, 128, device="cuda").to(dtype) for n in (4680, 9360, 9360))
    with torch.no_grad():
        got = attend("fa3", q, k, v)
        whole = attention._first(attention._fa3()(q, k, v))
    assert full_waves(4680, 12, attention._processors(q.device))[1] > 1
    expected = attend("sdpa", *(x.float() for x in (q, k, v)))

    def error(x: Tensor) -> float:
        return float((x.float() - expected).norm() / expected.norm())

    assert error(got) < 1.2 * error(whole)
