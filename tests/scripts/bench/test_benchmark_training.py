"""The training benchmark: layouts, phases, sums, projection, plan without GPUs, and the check against one rank."""

import functools
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SEVERAL_RANKS
from distill_case import distill_stage
from fake_ranks import count_shards
from safetensors.torch import save_file
from torch.autograd import DeviceType

from configs.errors import UserError
from configs.load import load_config
from model.memory import distill_plan
from model.sizes import WAN_1_3B, WAN_14B, TransformerSize
from model.weights.random import transformer_sizes
from scripts import benchmark_training as script
from scripts.bench import layouts as layouts_of_gpus
from scripts.bench.cycle import PhaseWatch, exposed
from scripts.bench.cycle_tables import phase_table, saving_text
from scripts.bench.layouts import Layout, advice, plan_table, planned, project, sizes_of
from scripts.bench.phase_timer import PhaseTimer
from utils import timers

CPU = torch.device("cpu")
FULL = "configs/train_wan2.1_t2v_1.3b.yaml"
SMALL = ["device=cpu", "video.height=32", "video.width=48", "video.num_latent_frames=6", "training.micro_batch=1"]
SMALL += ["training.distill.dfake_gen_update_ratio=2"]
SMALL += [word for role in ("student", "teacher", "critic") for word in (f"--{role}", "tiny/1")]


def test_what_is_inside_counts_for_the_inner_phase_alone(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(clock))
    phases = PhaseTimer(CPU)  # 0
    with phases.of("outer"):  # 1
        with phases.of("inner"):  # 3
            pass  # 6
        with phases.of("inner"):  # 10
            pass  # 15
    # the end of outer: 21
    seconds = phases._timer.spans()
    assert seconds == {"outside": 1.0, "outer": 2.0 + 4.0 + 6.0, "inner": 3.0 + 5.0}


def test_watching_changes_no_number_and_misses_no_time(tiny_assets, monkeypatch):
    """By a clock that moves on whenever it is read."""
    monkeypatch.setattr(timers.time, "perf_counter", itertools.count().__next__)
    plain, watched = distill_stage(tiny_assets), distill_stage(tiny_assets)
    watch, seconds = PhaseWatch(watched, CPU), 0.0
    for step in range(3):
        plain.update(step)
        began = time.perf_counter()
        found = watch.run(lambda step=step: watched.update(step))
        spent = time.perf_counter() - began
        seconds = sum(s for phases in found.values() for s in phases.values())
        assert 0 < seconds <= spent <= seconds + 4, "a few readings are made outside"
        assert bool(found["generator"]) == (step == 0) and found["critic"]["critic forward with grad"] > 0
    for name in ("generator", "critic"):
        a, b = (one.train_states[name].module.state_dict() for one in (plain, watched))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_layouts_are_read_and_refused():
    layout = Layout.parse("sequence2:4,teacher=1.3B,accumulate=3,card=140,training.distill.lora.student_rank=8")
    assert (layout.gpus, layout.sequence, layout.accumulate, layout.card_gb) == (4, 2, 3, 140.0)
    assert layout.sizes == {"teacher": "1.3B"}
    assert layout.overrides(micro_batch=2) == [
        "training.sharding=full", "training.global_batch=12", "training.sequence_parallel=2",
        "training.distill.lora.student_rank=8",
    ]  # fmt: skip
    alone = ["training.sharding=none", "training.global_batch=1", "training.sequence_parallel=1"]
    assert Layout.parse("full:1").overrides(1) == alone
    assert Layout.parse("sequence:4").sequence == 4
    for wrong in ("full", "full2:2", "sequence3:4", "none:1,colour=red", "none:1,accumulate=x", "full:0"):
        with pytest.raises(UserError, match="--layouts"):
            Layout.parse(wrong)
    args = script.parse(["--layouts", "none:1", "full:2,teacher=1.3B", "device=cpu", "seed=3"])
    assert [one.text for one in args.layouts] == ["none:1", "full:2,teacher=1.3B"]
    assert args.settings == ["device=cpu", "seed=3"]


def test_a_call_ends_with_tables_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "START", time.time())
    monkeypatch.setattr(script.Benchmark, "_start", in_this_process)
    file = tmp_path / "found.json"
    layouts = ["none:1,accumulate=2", "none:1,training.sharding=most"]
    assert script.main(["--layouts", *layouts, "--json", str(file), "--budget", "3600", *SMALL]) == 0
    found = json.loads(file.read_text())
    ran, refused = found["layouts"]
    assert refused["why"].startswith("refused: training.sharding=most") and ran["whole"]
    assert ran["global_batch"] == ran["micro_batches"] == 2 and ran["timed"] == {"generator": 2, "critic": 3}
    backward, cycle = ran["updates"]["critic"]["backward"], ran["cycle_s"]
    assert backward["flops"] == 2 * ran["updates"]["critic"]["critic forward with grad"]["flops"]
    parts = [sum(phase["s"] for phase in ran["updates"][who].values()) for who in ("generator", "critic")]
    assert cycle == pytest.approx(parts[0] + 2 * parts[1])
    assert ran["samples_per_s"] == pytest.approx(2 * 2 / cycle) and 0 < ran["mfu"] < 2
    assert {row["gpus"] for row in found["projection"]} == {1, 8, 16, 64}
    text = capsys.readouterr().out
    for words in ("generator: teacher", "critic: backward", "samples/s", "PROJECTED", "refused:", "under 2 hours"):
        assert words in text


def in_this_process(self, gpus: int, spec: dict, limit: float) -> None:
    assert gpus == 1
    file = self.folder / f"{self.began}.spec"
    file.write_text(json.dumps(spec))
    assert script.worker(file) == 0


def test_a_checkpoint_is_timed_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "START", time.time())
    made = []

    def started(self, gpus: int, spec: dict, limit: float) -> None:
        in_this_process(self, gpus, spec, limit)
        folder = Path(spec["save"])
        made.append((folder, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())))
        assert list(folder.glob("export/*.safetensors")) and list(folder.rglob("manifest.json"))

    monkeypatch.setattr(script.Benchmark, "_start", started)
    args = script.parse(["--layouts", "none:1", "--save", str(tmp_path / "disk"), *SMALL])
    found = script.Benchmark(args, tmp_path).run(script.Job(args.layouts[0]))
    ((folder, size),) = made
    assert folder.parent == tmp_path / "disk" and not folder.exists()
    assert found["saving"]["bytes"] == size > 0 and found["saving"]["s"] > 0 and found["saving"]["gpu_bytes"] == 0
    *table, line = phase_table(found).splitlines()
    assert line.startswith("checkpoint, with checksums and export: ") and [line] == saving_text(found)
    assert saving_text(found | {"saving": {"why": "no time was left"}}) == ["checkpoint: no time was left"]
    del found["saving"]
    assert saving_text(found) == [] and phase_table(found).splitlines() == table


@SEVERAL_RANKS
def test_two_ranks_are_checked_against_one(tmp_path, monkeypatch):
    """Through torchrun, in float32; and a difference is seen."""
    monkeypatch.setattr(script, "START", time.time())
    args = script.parse(["--layouts", "full:2", "--budget", "3600", *SMALL])
    bench, starts = script.Benchmark(args, tmp_path), script.Benchmark._start
    monkeypatch.setattr(
        script.Benchmark, "_start",
        lambda self, gpus, *rest: (starts if gpus > 1 else in_this_process)(self, gpus, *rest),
    )
    (row,) = script.check_all(bench, args.layouts)
    assert row["passed"], row
    assert row["losses"][0] < 1e-4 and row["weights"][1] == 2e-2
    one = {"layout": "a", "whole": True, "logs": [{n: 1.0 for n in (*script.LOSSES, *script.NORMS)}], "bfloat16": False}
    for name, value in (("a", 3.0), ("b", 3.1)):
        save_file({"before.x.w": torch.ones(4), "after.x.w": torch.full((4,), value)}, tmp_path / f"{name}.safetensors")
    row = script.compare(one | {"file": str(tmp_path / "b.json")}, one | {"file": str(tmp_path / "a.json")})
    assert row["weights"][0] == pytest.approx(0.05) and not row["passed"]
    died = one | {"whole": False, "ended": "a rank was killed by SIGABRT"}  # after it had written what it found
    assert script.compare(died, one) == {"layout": "a", "why": "a rank was killed by SIGABRT", "passed": False}


def test_full_sizes_are_not_begun_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "START", time.time())
    monkeypatch.setattr(script.Benchmark, "_start", lambda *_: pytest.fail("began"))
    args = script.parse(["--layouts", "none:1", *SMALL, "--teacher", "14B"])
    why = script.Benchmark(args, tmp_path).run(script.Job(args.layouts[0]))["why"]
    assert why == "refused: 14B would take hours on a CPU; give --teacher 14B/2, or use GPUs"


def test_without_time_layouts_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "START", time.time() - 1e6)
    args = script.parse(["--layouts", "none:1", *SMALL])
    assert script.Benchmark(args, tmp_path).run(script.Job(args.layouts[0]))["why"].startswith("left out: 0 s")


def test_why_a_process_ended():
    log = "W1 something\n[rank1]: Traceback\n[rank1]: torch.OutOfMemoryError: CUDA out of memory\nChildFailedError:"
    assert script.reason(log) == "torch.OutOfMemoryError: CUDA out of memory"
    died = "RuntimeError: Connection reset by peer\n  traceback : Signal 6 (SIGABRT) received by PID 7\n"
    assert script.reason(f"Signal 15 (SIGTERM) received by PID 6\n{died}") == "a rank was killed by SIGABRT"
    assert script.reason("x\nerror: training.sharding=odd is not\n") == "refused: training.sharding=odd is not"


def measured(**changes) -> dict:
    """A cycle of round numbers on 2 GPUs."""
    updates = {"generator": {"teacher": {"s": 8.0}, "optimiser": {"s": 0.5}}, "critic": {"backward": {"s": 4.0}}}
    found = {"layout": "full:2", "ranks": 2, "micro_batch": 1, "micro_batches": 1, "ratio": 5, "global_batch": 2}
    found |= {"updates": updates, "sustained_peak": 1e15, "memory": [{"peak": 5}, {"peak": 7}]}
    return found | changes


def test_projection_by_hand():
    one = {"sequence": 1, "global_batch": 64, "steps": 600, "network_gb_s": 50, "trained": 10**9}
    row = project(measured(), 8, **one)
    assert row["accumulated"] == 8 and not row["measured_gpus"]
    assert row["hours"] == pytest.approx((600 * 8 * 4.0 + 120 * (8 * 8.0 + 0.5)) / 3600)
    # half of the waiting is of one GPU in two; of seven in eight it is 7/4 as much, shared out by time
    talk = project(measured(communication={"exposed_s": 1.2, "kernels_s": 2}), 8, **one)
    assert talk["critic_s"] == pytest.approx(8 * (4.0 + 1.2 * 0.75 * 4 / 12))
    # 16 GPUs are two machines: each GPU sends its eighth of 4 GB of gradients at 50 GB/s
    assert project(measured(), 16, **one)["critic_s"] == pytest.approx(4 * (4.0 + 4 / 8 * 2 * 0.5 / 50))
    assert project(measured(), 2, **one)["measured_gpus"] and project(measured(), 128, **one) is None
    assert project(measured(), 128, **one | {"sequence": 2})["accumulated"] == 1
    # in turns each of two made 3 of 5 rollouts, of 1 s; of the 5 x 16 for 8 GPUs it makes half
    critic = {"backward": {"s": 4.0}, "rollout without grad": {"s": 0.6}}
    rollout_sharing = measured(turns=True, updates=measured()["updates"] | {"critic": critic})
    assert project(rollout_sharing, 8, **one | {"sequence": 2})["critic_s"] == pytest.approx(16 * (4.0 + 0.5))
    between = 4 / 8 * 2 * 15 / 16 / 50
    assert project(rollout_sharing, 128, **one | {"sequence": 2})["critic_s"] == pytest.approx(4.0 + 0.6 + between)


def test_communication_that_nothing_hides():
    def event(name, start, end, kind=DeviceType.CUDA, note=False):
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=times, device_type=kind, is_user_annotation=note)

    events = [event("ncclDevKernel_AllGather", 0, 4e6), event("gemm", 1e6, 3e6), event("gemm", 5e6, 6e6)]
    events += [event("FSDP::all_gather", 0, 9e6, note=True), event("cudaLaunchKernel", 0, 9e6, DeviceType.CPU)]
    assert exposed(events) == {"kernels_s": 4.0, "exposed_s": 2.0, "idle_s": 1.0}


def test_a_process_that_does_not_end_is_ended(tmp_path):
    deaf = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    rank, parent = (subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) for _ in range(2))
    assert rank.stdout.readline() and parent.stdout.readline()
    file = tmp_path / "1.pid0"
    file.write_text(str(rank.pid))
    script.end(parent, [file])
    assert parent.wait(60) == rank.wait(60) == -signal.SIGKILL


def test_a_plan_without_gpus():
    """The formulas' shares are those that the real sharding leaves on rank 0."""
    names = {"student": "1.3B/2", "teacher": "14B/2", "critic": "1.3B/2"}
    networks = sizes_of(names, TransformerSize.from_config(transformer_sizes("tiny")))
    rows = plan_table(FULL, [], networks, 64, 64, 80)
    assert [row["layout"] for row in rows] == ["full:64", "hybrid:64", "sequence2:64", "sequence4:64"]
    full, hybrid, two = rows[:3]
    assert full["accumulated"] == 1 and two["accumulated"] == 2 and hybrid["shards"] == 8
    assert hybrid["peak"] > full["peak"] > two["peak"]
    for part, size in count_shards(load_config(FULL).training, names, 64).items():
        assert full["parts"][part] == pytest.approx(size, rel=0.02)  # uneven rows are padded


def test_advice_for_few_gpus():
    networks = sizes_of({"student": "1.3B", "teacher": "14B", "critic": "1.3B"}, WAN_1_3B)
    config = load_config(FULL)
    assert planned(config, networks, shards=1).peak.total > 80e9
    layouts = [advice(FULL, [], networks, gpus, 80)[0] for gpus in (1, 2, 4)]
    assert layouts[0].startswith("none:1,") and layouts[1:] == ["full:2", "full:4"]
    assert advice(FULL, [], networks, 1, 10) is None


def test_advice_for_14b(monkeypatch):
    """The table of docs/distributed.md, and what the two configurations say of themselves."""
    read = functools.cache(load_config)  # the same for each card
    monkeypatch.setattr(layouts_of_gpus, "load_config", lambda path, settings: read(path, tuple(settings)))
    networks = sizes_of({"student": "14B", "teacher": "14B", "critic": "14B"}, WAN_14B)
    file = "configs/train_wan2.1_t2v_14b"
    found = {
        (trained, card, gpus): advice(name, [], networks, gpus, card, trained)
        for trained, name in (("all weights", f"{file}.yaml"), ("adapters", f"{file}_lora.yaml"))
        for card in (80, 140)
        for gpus in (1, 2, 4, 8)
    }
    layouts = {key: best[0] for key, best in found.items() if best}
    assert layouts == {
        ("all weights", 80, 8): "sequence4:8", ("all weights", 140, 4): "sequence4:4",
        ("all weights", 140, 8): "full:8", ("adapters", 80, 2): "sequence2:2", ("adapters", 80, 4): "full:4",
        ("adapters", 80, 8): "full:8", ("adapters", 140, 1): "none:1", ("adapters", 140, 2): "full:2",
        ("adapters", 140, 4): "full:4", ("adapters", 140, 8): "full:8",
    }  # fmt: skip
    assert found["adapters", 140, 2][1].peak.total < 130e9
    for gpus, name in ((8, ""), (4, "_lora")):
        assert distill_plan(load_config(f"{file}{name}.yaml"), *networks.values(), gpus=gpus).peak.total < 80e9
    for lora in ("", "_lora"):
        args = script.parse(["--config_path", f"{file}{lora}.yaml", "--fake_ranks", "2"])
        assert set(script.Benchmark(args, Path()).sizes.values()) == {"14B"}


def test_bad_calls_are_refused():
    with pytest.raises(UserError, match="--network_gb_s=0 is not above 0"):
        script.parse(["--layouts", "full:2", "--network_gb_s", "0"])
    with pytest.raises(UserError, match="--layouts is empty"):
        script.main([])
    with pytest.raises(UserError, match="network size 2B is unknown"):
        transformer_sizes("2B")
    assert Path(script.__file__).name in script.__doc__
