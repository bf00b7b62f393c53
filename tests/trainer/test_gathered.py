"""A trained student that is sharded stays gathered from its first pass after a step to its next step, and no longer;
with training.sequence_student=shared it is gathered block by block in each pass."""

from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from checkpoint_case import read_state
from conftest import SEVERAL_RANKS
from distill_case import distill_stage
from ranks_case import group, on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from model.weights.load import load_student
from trainer.checkpoint.sharded import write
from trainer.distill.stage import Distill
from trainer.parallel.apply import full_tensor, mean_over_ranks, optimized, optimizer_state, reshard, unshard
from trainer.parallel.control_group import ControlGroup

pytestmark = [SEVERAL_RANKS, pytest.mark.slow]
CYCLE = 3  # steps, of which the first begins with an update of the generator
SETTINGS = (
    f"training.distill.dfake_gen_update_ratio={CYCLE}", "training.global_batch=4", "training.micro_batch=1",
    "video.num_latent_frames=9", "training.validation_clips=2", "training.distill.video_clips=1",
    "training.optimizer.eps=1e-3", "training.distill.critic_optimizer.eps=1e-3",
)  # fmt: skip
LORA = ("training.distill.lora.student_rank=3", "training.distill.lora.critic_rank=3")
SHARED = ("training.sequence_parallel=2", "training.sequence_student=shared")


@contextmanager
def gathers(networks: dict[str, nn.Module]):
    """Messages that gather a unit of each network's, while it is open."""
    seen, inner = Counter(), _fsdp_param_group.foreach_all_gather
    owner = {id(part): role for role, network in networks.items() for part in network.modules()}

    def counted(params, *args, **kwargs):
        seen[owner.get(id(params[0]._module_info.module))] += 1
        return inner(params, *args, **kwargs)

    _fsdp_param_group.foreach_all_gather = counted
    try:
        yield seen
    finally:
        _fsdp_param_group.foreach_all_gather = inner


def units(network: nn.Module) -> int:
    return sum(isinstance(part, FSDPModule) for part in network.modules())


def networks(stage: Distill) -> dict[str, nn.Module]:
    return {"student": stage.student.model, "critic": stage.critic.model, "average": stage.averaged}


def values(stage: Distill) -> dict[str, Tensor]:
    """Every parameter of what is trained and of the average; sharded ones are gathered from their parts."""
    for network in networks(stage).values():
        reshard(network)
    named = {role: network.named_parameters() for role, network in networks(stage).items()}
    return {f"{role} {name}": full_tensor(p.detach()).clone() for role, some in named.items() for name, p in some}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(tiny_assets, tmp_path_factory):
    """`alone(network) -> folder` of two cycles of one process, made once: `steps.pt` of what each left, `export`."""

    @cache
    def make(network: tuple[str, ...]) -> Path:
        folder, expected = tmp_path_factory.mktemp("alone"), []
        stage = distill_stage(tiny_assets, *SETTINGS, *network)
        for step in range(2 * CYCLE):
            logs = {name: value.clone() for name, value in stage.update(step).items()}
            expected.append((logs, values(stage)))
        torch.save(expected, folder / "steps.pt")
        stage.export(folder / "export", 2 * CYCLE)
        return folder

    return make


def train(assets: str, out: str, alone: str, settings: tuple[str, ...], parallel: tuple[str, ...]) -> bool:
    """Two cycles of all ranks, compared with those of one process, in `alone`; then what they save."""
    expected = torch.load(Path(alone, "steps.pt"), weights_only=True)
    torch.compile = partial(torch.compile, backend="aot_eager", fullgraph=True)  # of this process
    with group() as ranks:
        stage, counts = distill_stage(Path(assets), *settings, *parallel, ranks=ranks), []
        student, whole = stage.student.model, stage.config.training.sequence_student == "whole"
        text_kv, made = student.text_kv, []
        student.text_kv = lambda text: made.append(step) or text_kv(text)
        for step in range(2 * CYCLE):
            with gathers(networks(stage)) as seen:
                logs = stage.update(step)
            counts.append(seen["student"])
            assert_close(mean_over_ranks(logs), expected[step][0])
            assert whole == (not any(isinstance(p, DTensor) for p in student.blocks[0].parameters()))
            assert seen["critic"] > units(stage.critic.model), "forward, and blocks again"
            if step == 1:  # the average is gathered by this, and changes next
                stage.validate(step, Path(out))
        once = units(student)
        if whole:
            assert counts == [2 * once, 0, 0, once, 0, 0], "once for the first update, and once after each step"
            assert made.count(CYCLE - 1) == stage.micro_batches, "keys of a text once a rollout"
        else:
            assert min(counts) > once and not made, "in each pass, in which blocks make the text's keys"
        held = {f"student {name}": full_tensor(p.detach()).clone() for name, p in student.named_parameters()}
        train_state = stage.train_states["generator"]
        assert [p for _, p in optimized(student, train_state.optimizer)] == train_state.parameters
        unshard(student)
        named = optimizer_state(student, train_state.optimizer)
        assert not ranks.first or len(named["state"]) == len(train_state.parameters)
        unshard(student)
        control = ControlGroup()
        if ranks.first:
            Path(out, "shards").mkdir()
        control.wait()
        write(Path(out, "shards"), stage.train_states, stage.state_dict(), control)
        stage.export(Path(out, "export"), 2 * CYCLE)
        parts = values(stage)
        assert all(torch.equal(value, parts[name]) for name, value in held.items()), "weights of before the step"
        assert_close(parts, expected[-1][1])
        saved = read_state(Path(out, "shards"))
        for role, name_of_state, part in (("student", "generator", "module"), ("average", "generator", "average")):
            for name, value in saved[name_of_state][part].items():
                assert torch.equal(value, parts[f"{role} {name}"]), f"{role} {name}"
        if ranks.first:
            exports = (load_student(Path(folder, "export")) for folder in (out, alone))
            assert_close(*(dict(student.named_parameters()) for student in exports))
    return True


@pytest.mark.parametrize(
    "network, parallel",
    [
        ((), ("training.sharding=full",)),
        (LORA, ("training.sharding=hybrid", "training.shard_ranks=2")),
        (LORA, ("training.sharding=full", *SHARED, "training.checkpointing=true")),
        ((), ("training.sharding=full", "training.checkpointing=true", "training.compile=true")),
    ],
    ids=["full", "adapters", "sequence", "compiled"],
)
def test_gathered_once_a_cycle_and_never_stale(tiny_assets, alone, tmp_path, network, parallel):
    settings = (*SETTINGS, *network)
    outcomes = on_ranks(2, train, str(tiny_assets), str(tmp_path), str(alone(network)), settings, parallel)
    assert [o.ended for o in outcomes] == ["done"] * 2, outcomes
