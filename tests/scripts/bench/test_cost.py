"""Operations by formula against those that torch counts."""

import pytest
import torch
from small_wan import build, inputs, sizes, stream_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.geometry import Geometry
from configs.schema import ScheduleConfig, StreamConfig
from model.denoiser import Student
from model.schedule import Schedule
from model.sizes import WAN_1_3B, TransformerSize
from scripts.bench.cost import clip_flops, step_cost


@pytest.mark.parametrize("chunks, batch", [(1, 1), (3, 2)])
def test_operations_of_a_step_are_those_that_torch_counts(chunks, batch):
    geo = sizes(3, 1)
    model, _ = build()
    latents, _, text = inputs(geo, chunks * geo.chunk_frames, batch)
    cache, student = stream_cache(model, geo, batch), Student(model)
    with torch.no_grad():
        kv = model.text_kv(text)
        for k in range(chunks):
            counter = FlopCounterMode(display=False)
            with counter, sdpa_kernel(SDPBackend.MATH):  # it knows no flops of the CPU's fused kernel
                student.x0(latents[:, geo.chunk(k)], 500.0, kv, cache.begin(k), k * geo.chunk_frames)
    network = TransformerSize.from_config(model.config)
    cost = step_cost(network, geo, visible=chunks, text_tokens=text.shape[1], batch=batch)
    assert cost.flops == counter.get_total_flops()


def test_a_step_at_full_size_costs_what_it_is_known_to():
    """One evaluation at 12 frames of keys is 28.3 TFLOP."""
    geo = Geometry(height=480, width=832)
    cost = step_cost(WAN_1_3B, geo, visible=4, text_tokens=512)
    assert cost.flops / 1e12 == pytest.approx(28.3, abs=0.2)
    # weights alone are 2.6 GB in bfloat16, half that in float8
    assert 2.3e9 < cost.bytes["weights"] < 2.9e9
    half = step_cost(WAN_1_3B, geo, visible=4, text_tokens=512, fp8=True)
    assert half.bytes["weights"] / cost.bytes["weights"] == pytest.approx(0.5, abs=0.01)
    # 18,720 tokens to read, 4,680 to write, 512 of the text; keys and values of 1,536 numbers in 30 layers
    kept = [30 * 2 * 1536 * (size * (18720 + 4680) + 2 * 512) for size in (2, 1)]
    narrow = step_cost(WAN_1_3B, geo, visible=4, text_tokens=512, key_bytes=1)
    assert [cost.bytes["keys and values"], narrow.bytes["keys and values"]] == kept
    assert cost.matrix_seconds(1e15, 2e15) == cost.flops / 1e15
    whole = cost.passes.linear + cost.passes.past
    assert cost.matrix_seconds(1e15, 2e15, linears=1.0, attention=True) == (cost.flops - whole / 2) / 1e15


def test_a_clip_is_its_passes():
    geo = Geometry(height=480, width=832)
    one = [step_cost(WAN_1_3B, geo, visible=v, text_tokens=512).flops for v in (1, 2, 3, 4)]
    schedule = Schedule.from_config(ScheduleConfig(steps="4322222"), StreamConfig())
    total = clip_flops(WAN_1_3B, geo, schedule, 7, text_tokens=512)
    assert total == 4 * one[0] + 3 * one[1] + 2 * one[2] + 8 * one[3]
    clean = Schedule.from_config(ScheduleConfig(steps="2"), StreamConfig(context="clean"))
    assert clip_flops(WAN_1_3B, geo, clean, 2, text_tokens=512) == 3 * (one[0] + one[1])
