"""Networks that are made without weights, sharded and filled in parts are those that are loaded whole."""

import torch
from distill_case import distill_config
from ranks_case import group, on_ranks

from configs.schema import Config
from trainer.parallel import Placing, local, mesh_of, whole
from trainer.players import critic_player, frozen_teacher, student_player
from trainer.prompt_bank import text_source

LORA = ("training.distill.lora.student_rank=3", "training.distill.lora.critic_rank=3")
CPU = torch.device("cpu")


def networks(config: Config) -> dict[str, torch.nn.Module]:
    where = Placing(config.training, CPU, mesh_of(config.training, CPU))
    student = student_player(config, where)
    return {
        "text": text_source(config, where).encoder, "teacher": frozen_teacher(config, where),
        "student": student.module, "average": student.average.module, "critic": critic_player(config, where).module,
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
                full, held = whole(ours[name].detach()), local(ours[name])
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
