"""The speed report: what is in it, what it refuses, how it reads."""

import json
import time

import pytest
import torch
from conftest import random_student, random_vae

from configs.errors import UserError
from configs.schema import ScheduleConfig, StreamConfig
from model.attention import Kernels
from model.codec import WanCodec
from model.fast.student import FastPlan
from model.schedule import Schedule
from model.sizes import WAN_1_3B
from model.weights.random import RandomTextEncoder
from pipeline.stream import StreamSession
from scripts import benchmark
from scripts.bench import speed
from scripts.bench.cost import network_pass
from scripts.bench.roofline import copy_rate, matrix_rate, nbytes, roofline
from scripts.bench.speed_suites import SUITES

CPU = torch.device("cpu")
SMALL = ["video.height=32", "video.width=48", "video.num_latent_frames=6", "--random_weights", "--repeats", "1"]


@pytest.fixture
def session(tiny_geometry) -> StreamSession:
    student = random_student()
    text = RandomTextEncoder(12, student.model.config.text_dim, CPU)
    schedule = Schedule.from_config(ScheduleConfig(steps="32"), StreamConfig())
    return StreamSession(student, WanCodec(random_vae()), text, schedule, tiny_geometry)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(benchmark, "roofline", lambda *_: {"sustained matrix peak": 1e11, "copy": 1e10})


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """Of the tiny model, through the command line."""
    file = tmp_path_factory.mktemp("report") / "report.json"
    assert benchmark.main([*SMALL, "--json", str(file), "--text", "device=cpu"]) == 0
    return json.loads(file.read_text())


def test_the_report_holds_what_the_figures_need(report):
    assert report["weights"] == "random, tiny"
    assert report["settings"]["frames"] == report["frames"] == 21
    assert report["settings"]["schedule"][0][0] == 1000
    assert len(report["chunks"]) == len(report["steps"]) == 2
    assert {"step 0", "step 3", "decode", "arrives_s"} <= set(report["chunks"][0])
    assert set(report["rates_fps"]) == {"clip", "steady", "denoising"}
    assert report["rates_fps"]["clip"] == pytest.approx(21 / report["clip_s"])
    assert 0 < report["first_frames_s"] < report["clip_s"] <= report["since_start_s"]
    assert report["text_encoding_s"] > 0 and report["decode_s"] > 0
    assert {"student", "KV cache", "text keys"} <= set(report["memory_bytes"])
    assert report["machine"]["torch"] == torch.__version__
    assert "latents" not in report
    for step in report["steps"]:
        rates = report["ceilings"]
        products, copies = step["flops"] / rates["sustained matrix peak"], step["bytes"] / rates["copy"]
        assert step["matrix_share"] == pytest.approx(products / step["step_s"])
        assert step["floor_s"] == pytest.approx(max(products, copies))


def test_a_suite_goes_on_after_what_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "START", time.perf_counter())  # not when the tests began
    file = tmp_path / "suite.json"
    args = ["--suite", "cpu", "--only", "plain,5432222,fp8", "--json", str(file), "--budget", "3600"]
    args += ["device=cpu", *SMALL[:2]]
    assert benchmark.main(args) == 0
    reports = json.loads(file.read_text())
    assert list(reports) == ["plain", "5432222", "fp8"]
    assert reports["fp8"]["failed"].startswith("UserError: inference.precision=fp8 needs a GPU")
    assert reports["5432222"]["chunks"][0].keys() > reports["plain"]["chunks"][0].keys()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("fp8: UserError")


def test_every_variant_is_a_configuration():
    for suite in SUITES.values():
        names = [variant.name for variant in suite]
        assert len(set(names)) == len(names)
        for i, variant in enumerate(suite):
            benchmark.load_config(variant.config, variant.settings)
            assert set(variant.arguments) <= vars(benchmark.parse([])).keys()
            assert not variant.against or variant.against in names[:i]
    assert [v.name for v in SUITES["h100"] if v.reference] == ["eager"]


def test_wrong_numbers_are_refused():
    with pytest.raises(UserError, match="--repeats: 0 is less than 1"):
        benchmark.main(["--repeats", "0"])
    with pytest.raises(UserError, match="--only fp9 is no variant of --suite cpu; use some of plain"):
        benchmark.parse(["--suite", "cpu", "--only", "plain,fp9"])
    with pytest.raises(UserError, match="--budget -1 is no time"):
        benchmark.parse(["--budget", "-1"])
    with pytest.raises(UserError, match="needs a GPU"):
        benchmark.main([*SMALL, "device=cpu", "inference.cuda_graphs=on"])


def test_ceilings_of_a_cpu():
    assert matrix_rate(CPU, torch.float32, 64, 64, 64) > 0
    assert copy_rate(CPU, 1 << 16) > 0
    x = torch.zeros(10)
    assert nbytes([x, x[:5]]) == 40
    shapes = {f"matrix {name}" for name in ("qkv", "out", "ffn 1", "ffn 2")}
    assert set(roofline(CPU, 8, 8, 16)) == {"sustained matrix peak", *shapes, "copy"}
    began = time.perf_counter()
    assert matrix_rate(CPU, torch.float32, 64, 64, 64, heat_s=0.2) > 0
    assert time.perf_counter() - began > 0.2


def test_the_share_of_the_peak_goes_by_what_is_float8(session):
    """28 of 30 blocks have float8 linears; float8 is twice as fast."""
    network, rates = WAN_1_3B, {"sustained matrix peak": 1e14, "sustained fp8 peak": 2e14, "copy": 1e12}
    list(session.play(["x"], [0], 1))
    report = {"chunks": [{"step 0": 1.0, "step 1": 1.0}]}
    shares = {}
    for name, parts in {"none": {}, "linears": {"fp8": True}, "attention": {"fp8_cache": True}}.items():
        plan = FastPlan(kernels=Kernels("sdpa", "sdpa", "test"), **parts)
        (row,) = speed.efficiency(session, network, report, rates, batch=1, plan=plan)
        shares[name] = row["matrix_share"]
    tokens = session.geometry.tokens_per_chunk
    done = network_pass(network, tokens=tokens, keys=tokens, text_tokens=12)
    assert shares["none"] == pytest.approx(done.total / 1e14)
    assert shares["none"] - shares["linears"] == pytest.approx(28 / 30 * done.linear / 2e14)
    assert shares["none"] - shares["attention"] == pytest.approx(done.past / 2e14)
