"""Networks that are made without weights, sharded and filled in parts are those that are loaded whole."""

import torch
from conftest import SEVERAL_RANKS
from distill_case import distill_config
from ranks_case import group, on_ranks, run_ranks

from configs.schema import Config
from trainer.distill.networks import critic_state, frozen_teacher, student_state
from trainer.parallel.apply import ParallelPlan, full_tensor, local, mesh_of
from trainer.prompt_bank import text_source
from utils.logs import read_jsonl

pytestmark = SEVERAL_RANKS
LORA = ("training.distill.lora.student_rank=3", "training.distill.lora.critic_rank=3")
CPU = torch.device("cpu")


def networks(config: Config) -> dict[str, torch.nn.Module]:
    where = ParallelPlan(config.training, CPU, mesh_of(config.training, CPU))
    student = student_state(config, where)
    return {
        "text": text_source(config, where).encoder, "teacher": frozen_teacher(config, where)[0],
        "student": student.module, "average": student.average.module, "critic": critic_state(config, where).module,
    }  # fmt: skip


def compare(assets: str, sharding: str, lora: tuple[str, ...]) -> bool:
    """On each rank: all values are equal, what is trained is the same, and a rank holds its own parts and no more."""
    plain = networks(distill_config(assets, *lora))
    with group() as ranks:
        parts = networks(distill_config(assets, *lora, f"training.sharding={sharding}", "training.shard_ranks=2"))
        for role, network in plain.items():
            theirs, ours = dict(network.named_parameters()), dict(parts[role].named_parameters())
            assert theirs.keys() == ours.keys(), role
            for name, p in theirs.items():
                full, held = full_tensor(ours[name].detach()), local(ours[name])
                assert torch.equal(full, p), f"{role} {name}"
                assert ours[name].requires_grad == p.requires_grad, f"{role} {name}"
                rows = -(-p.shape[0] // ranks.world)
                assert held.untyped_storage().nbytes() <= rows * p[0].numel() * p.itemsize, f"{role} {name}"
        ids = torch.ones(1, 4, dtype=torch.long)
        with torch.no_grad():
            ours, theirs = (x["text"](input_ids=ids).last_hidden_state for x in (parts, plain))
        torch.testing.assert_close(ours, theirs)
    return True


def test_parts_are_the_whole(tiny_assets):
    distill_config(tiny_assets)  # makes the teacher
    for sharding, lora in (("full", ()), ("hybrid", LORA)):
        outcomes = on_ranks(2, compare, tiny_assets, sharding, lora)
        assert [o.ended for o in outcomes] == ["done"] * 2, outcomes


def test_blocks_in_bfloat16_are_autocast_of_float32(tiny_assets, tmp_path):
    """One process casts each weight when it is used, two gather blocks in bfloat16; gradients are summed in float32.

    What differs are modulation tables and norms, which are gathered rounded, by up to 2^-9 of themselves.
    """
    distill_config(tiny_assets)
    settings = ["training.global_batch=4", "training.micro_batch=2", "training.steps=4", "video.num_latent_frames=6"]
    settings += ["training.precision=bfloat16", "training.checkpointing=true"]
    logged = []
    for world, sharding in ((1, "none"), (2, "full")):
        out = tmp_path / sharding
        outcomes = run_ranks(tiny_assets, out, world, *settings, f"training.sharding={sharding}")
        assert [o.ended for o in outcomes] == ["done"] * world, outcomes
        rows = [row for row in read_jsonl(out / "metrics.jsonl") if "critic_loss" in row]
        names = ("generator_loss", "generator_grad_norm", "critic_loss", "critic_grad_norm")
        logged.append(torch.tensor([[row[name] for name in names] for row in rows]))
    torch.testing.assert_close(logged[1], logged[0], rtol=2**-7, atol=0)
    assert not torch.equal(logged[0], logged[1])
