"""One rank of several by itself: what it sends and how it is answered, against ranks that are all there."""

import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import SEVERAL_RANKS
from distill_case import distill_config, distill_stage
from ranks_case import group, on_ranks

from configs.errors import UserError
from scripts import benchmark_training as script
from scripts.bench.cycle_tables import left_out, overview, phase_table, scaling, sent_text
from scripts.bench.fake_ranks import fake_group
from scripts.bench.layouts import Layout
from scripts.bench.lone_rank import Messages
from utils.distributed import Ranks

SETTINGS = ("training.global_batch=1", "training.micro_batch=1", "training.precision=float32")
LAYOUTS = {
    "full": ("training.sharding=full", "training.global_batch=2"),
    "sequence": ("training.sharding=full", "training.sequence_parallel=2"),
    "shared": ("training.sharding=full", "training.sequence_parallel=2", "training.sequence_student=shared"),
}


def counted(stage) -> Counter:
    with Messages() as sent:
        for step in range(2):
            stage.update(step)
    return Counter({name: round(count) for name, count in sent.bytes.items()})


def really(assets: str, out: str, settings: tuple[str, ...]) -> bool:
    """Counts what each of two ranks sends in a generator's and two critic's updates."""
    with group() as ranks:
        sent = counted(distill_stage(Path(assets), *SETTINGS, *settings, ranks=ranks))
        Path(out, f"{ranks.rank}.json").write_text(json.dumps(sent))
    return True


@SEVERAL_RANKS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_counts_what_either_of_two_counts(tiny_assets, tmp_path, layout):
    distill_config(tiny_assets)  # makes the teacher
    outcomes = on_ranks(2, really, str(tiny_assets), str(tmp_path), LAYOUTS[layout])
    assert [o.ended for o in outcomes] == ["done"] * 2, outcomes
    with fake_group(2):
        stage = distill_stage(tiny_assets, *SETTINGS, *LAYOUTS[layout], ranks=Ranks(0, 2))
        sent = counted(stage)
        assert all(bool(p.isfinite().all()) for player in stage.players.values() for p in player.parameters)
    assert sent["all"] > 0 and all(sent == json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # in 2.13, of names that 2.11 has alone
def test_messages_are_answered_and_counted():
    before, x, who = dict(vars(dist)), torch.arange(8.0), "first"
    with fake_group(4), Messages() as sent:
        sent.restart(lambda: who)
        out = torch.full((32,), -1.0)
        dist.all_gather_into_tensor(out, x)
        assert torch.equal(out, x.repeat(4))
        out = torch.full((2,), -1.0)
        dist.reduce_scatter_tensor(output=out, input=x)
        assert torch.equal(out, x[:2])
        out = torch.full((4, 2), -1.0)
        dist.all_to_all_single(out, x.view(4, 2))
        assert torch.equal(out, x.view(4, 2))
        assert sent.bytes == {"first": 0.75 * 4 * (32 + 8 + 8)}
        who = "second"
        total, mine, theirs = x.clone(), x.clone(), torch.full((1000,), torch.nan)
        dist.all_reduce(total)
        dist.broadcast(mine, group_src=0)
        dist.broadcast(theirs, group_src=2)
        assert torch.equal(total, x) and torch.equal(mine, x) and theirs.std() == pytest.approx(1, abs=0.2)
        assert sent.bytes["second"] == 0.75 * 4 * (2 * 8 + 8 + 1000)
        who, two = "third", dist.new_group([0, 1], backend="fake")
        dist.broadcast(mine, src=0, group_src=None, group=None)
        dist.all_reduce(mine, group=two)
        assert torch.equal(mine, x) and sent.bytes["third"] == 4 * 8 * (0.75 + 2 * 0.5)
    assert all(vars(dist)[name] is value for name, value in before.items())


def test_a_layout_alone_is_measured_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "START", time.time())
    layout = "sequence:2,alone=true"
    small = ["device=cpu", "video.height=32", "video.width=48", "video.num_latent_frames=6", "training.micro_batch=1"]
    small += ["training.distill.dfake_gen_update_ratio=2", "--save", str(tmp_path / "disk")]
    args = script.parse(["--layouts", layout, "full:2", "--link_gb_s", "0.5", "--budget", "3600", *small])
    assert [one.processes for one in args.layouts] == [1, 2]
    found = script.Bench(args, tmp_path).run(script.Job(args.layouts[0]))
    assert found["whole"] and found["ranks"] == 2 and found["timed"] == {"generator": 2, "critic": 3}
    assert "communication" not in found and "saving" not in found and len(found["memory"]) == 1
    assert found["sent_bytes"] == found["sent"]["generator"] + 2 * found["sent"]["critic"] > 0
    (line,) = sent_text(found)
    size = found["sent_bytes"] / 1e9
    assert line.startswith(f"one of 2 ranks by itself: {size:.3g} GB") and f"{size / 0.5:.2g} s at 0.5 GB/s" in line
    assert line in phase_table(found)
    other = {"layout": "full:2", "why": "not run"}
    assert script.projections(args, [found, other], 10) == [] and scaling([found, found]) == ""
    assert "at best this" in overview([found, other], 80) and "at best this" not in overview([other], 80)
    assert "if nothing hid them" not in sent_text(found | {"ranks": 16})[0]
    (row,) = script.check_all(SimpleNamespace(micro=1), args.layouts[:1])
    assert row["passed"] and "not compared" in row["why"] and row["why"] in left_out([], [row])


def test_machines_of_a_rank_alone(tmp_path, monkeypatch):
    """A group of hybrid sharding is a machine, not what the shell of the call says."""
    monkeypatch.setattr(script, "START", time.time())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    small = ["device=cpu", "video.height=32", "video.width=48", "video.num_latent_frames=6", "training.micro_batch=1"]
    small += ["training.distill.dfake_gen_update_ratio=1"]
    args = script.parse(["--layouts", "hybrid:16,alone=true", "full:16,alone=true", "--budget", "3600", *small])
    bench = script.Bench(args, tmp_path)
    hybrid, full = (bench.run(script.Job(layout))["sent_bytes"] for layout in args.layouts)
    assert hybrid != pytest.approx(full, rel=1e-3)


def test_rates_are_above_zero():
    for name in ("--link_gb_s", "--network_gb_s"):
        with pytest.raises(UserError, match=f"{name}=0 is no rate"):
            script.parse(["--layouts", "full:2", name, "0"])


def test_a_layout_of_one_is_not_alone():
    with pytest.raises(UserError, match="alone=true is for one of several GPUs"):
        Layout.parse("none:1,alone=true")
    with pytest.raises(UserError, match="alone is true or false"):
        Layout.parse("full:2,alone=yes")
    assert not Layout.parse("full:2,alone=false").alone
