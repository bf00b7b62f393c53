"""The teacher in float8: near the one in bfloat16, the same in parts as whole, half its bytes; others stay exact."""

import pytest
import torch
from conftest import SEVERAL_RANKS, network_config
from diffusers import WanTransformer3DModel
from distill_case import distill_config
from fake_ranks import count_shards
from ranks_case import group, on_ranks
from small_wan import build

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from model.fast.fp8_teacher import PROBE_TIMESTEPS, FrozenFp8Linear, quantize_and_compare, quantize_network
from model.fp8 import E4M3
from model.memory import distill_plan
from model.sizes import TransformerSize
from trainer.cli import parse
from trainer.command import train
from trainer.distill.networks import critic_state, frozen_teacher
from trainer.parallel.apply import ParallelPlan, full_tensor, local, mesh_of

CPU = torch.device("cpu")
FP8 = "training.distill.teacher_fp8=true"


def case(assets, *overrides: str) -> Config:
    """With a teacher of four layers, of which two are rounded."""
    folder = assets / "teacher4"
    if not folder.exists():
        torch.manual_seed(12)
        sizes = network_config("tiny_transformer") | {"num_layers": 4, "ffn_dim": 128}
        WanTransformer3DModel(**{k: v for k, v in sizes.items() if not k.startswith("_")}).save_pretrained(folder)
    init = f"training.init={{student: {assets / 'student'}, teacher: {folder}}}"
    return distill_config(assets, init, "training.precision=bfloat16", *overrides)


def linears(network: torch.nn.Module) -> list[str]:
    return [name for name, part in network.named_modules() if isinstance(part, FrozenFp8Linear)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rounded_network_is_near_what_it_was(dtype):
    """A number is rounded by 2^-4 of itself at most, and by about 2.6% on average, in weights and inputs alike."""
    network = build(attention_head_dim=32, text_dim=32, num_layers=4)[1].to(dtype).requires_grad_(False)
    said, errors = quantize_and_compare(network)
    assert said == "float8: 16 linears in 2 of 4 blocks"
    assert list(errors) == list(PROBE_TIMESTEPS) and all(1e-3 < error < 0.06 for error in errors.values()), errors
    kinds = {type(block.ffn.net[2]) is FrozenFp8Linear for block in (network.blocks[0], network.blocks[-1])}
    assert kinds == {False} and len(linears(network)) == 16


def compare(assets: str) -> bool:
    """On each rank: the parts of what is rounded in parts are those of what is rounded whole, and as small."""
    alone, errors = frozen_teacher(case(assets, FP8), ParallelPlan(case(assets, FP8).training, CPU))
    assert list(errors) == list(PROBE_TIMESTEPS)
    with group() as ranks:
        config = case(assets, FP8, "training.sharding=full")
        parts, errors = frozen_teacher(config, ParallelPlan(config.training, CPU, mesh_of(config.training, CPU)))
        assert errors == {}
        ours = dict(parts.named_parameters())
        for name, p in alone.named_parameters():
            held = local(ours[name])
            rows = -(-p.shape[0] // ranks.world)
            assert held.dtype == p.dtype and held.untyped_storage().nbytes() <= rows * p[0].nbytes, name
            if p.dtype == E4M3:  # what gloo and the comparison know
                held, p = held.view(torch.uint8), p.view(torch.uint8)
                assert torch.equal(held, p.chunk(ranks.world)[ranks.rank]), name
            else:
                assert torch.equal(full_tensor(ours[name]), p), name
        x, t, text = torch.randn(1, 16, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 12, alone.config.text_dim)
        x, text = x.bfloat16(), text.bfloat16()
        with torch.no_grad():
            theirs, mine = (m(x, t, text, return_dict=False)[0] for m in (alone, parts))
        torch.testing.assert_close(mine, theirs)
    return True


@SEVERAL_RANKS
def test_parts_are_the_whole(tiny_assets):
    assert len(linears(frozen_teacher(case(tiny_assets, FP8), ParallelPlan(case(tiny_assets).training, CPU))[0])) == 16
    outcomes = on_ranks(2, compare, tiny_assets)
    assert [o.ended for o in outcomes] == ["done"] * 2, outcomes


def test_the_critic_that_starts_from_it_is_exact(tiny_assets):
    configs = [case(tiny_assets, *more) for more in ((FP8,), ())]
    ours, theirs = (critic_state(config, ParallelPlan(config.training, CPU)).module.state_dict() for config in configs)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_what_follows_stays_in_bfloat16(monkeypatch):
    """Where a norm comes in float32, as autocast has it on a GPU from torch 2.12 on."""
    forward = torch.nn.RMSNorm.forward
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: forward(self, x).float())
    network = build(attention_head_dim=32, text_dim=32, num_layers=4)[1].bfloat16().requires_grad_(False)
    quantize_network(network)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(out.dtype))
    x, text = torch.randn(1, 16, 2, 4, 6).bfloat16(), torch.randn(1, 5, 32).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(x, torch.tensor([500.0]), text)
    assert seen == [torch.bfloat16] * 4


def test_bytes_are_those_of_the_plan():
    """A sum over five layers on the meta device, whole and of one of two ranks; the plan has norms in float32."""
    sizes = TransformerSize(dim=1536, ffn=8960, layers=5)

    def planned(*overrides: str) -> tuple[Config, float]:
        config = load_config("configs/train_wan2.1_t2v_1.3b.yaml", overrides)
        return config, distill_plan(config, sizes, sizes, sizes).peak.parts["teacher"]

    config, teacher = planned(FP8)
    with torch.device("meta"):
        network = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=5).bfloat16()
    quantize_network(network)
    assert sum(p.nbytes for p in network.parameters()) == pytest.approx(teacher, rel=0.02)
    assert count_shards(config.training, {"teacher": "1.3B/5"}, 2)["teacher"] == pytest.approx(teacher / 2, rel=0.02)
    assert planned()[1] > 1.3 * teacher


def test_a_cpu_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="teacher_fp8=true needs a GPU .* use teacher_fp8=false"):
        train(parse(["--config_path", "configs/train_tiny.yaml", "--logdir", str(tmp_path / "run"), "device=cpu", FP8]))
    assert not list(tmp_path.iterdir())
