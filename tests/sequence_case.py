"""What two processes run for test_sequence.py: each network whole by itself, then with its tokens shared out.

It fails with an AssertionError if outputs or gradients differ.
"""

import copy
from collections.abc import Callable

import ranks_case
import torch
from small_wan import KernelRuns, build, inputs, sizes
from torch import Tensor, nn

from configs.train_schema import TrainingConfig
from model.block_parts import compile_blocks
from model.cache import GraphCache
from model.causal_wan import CausalWanModel, chunk_causal_mask
from model.checkpointing import full_checkpoint, selective_checkpoint
from model.denoiser import ScoreModel, Student
from model.schedule import Schedule
from model.sequence import SequenceGroup
from pipeline.rollout import PrecomputedNoise, rollout
from trainer.parallel.apply import average_gradients, full_tensor, mesh_of, shard
from trainer.parallel.sequence import sequence_group, share_tokens

CPU = torch.device("cpu")
CLOSE = dict(atol=1e-5, rtol=1e-5)
GEOMETRY = sizes(window=3, sink=1)


def outcome(network: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Output of `run`, and the gradient that a loss of it sends to each parameter, averaged over ranks."""
    network.zero_grad()  # before the pass: behind it a sharded network's parameters may be what it has gathered
    out = run()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    (out * weights).mean().backward()
    parameters = dict(network.named_parameters())
    average_gradients(parameters.values())
    gradients = {name: full_tensor(p.grad).clone() for name, p in parameters.items() if p.grad is not None}
    return {"output": out.detach()} | gradients


def compare(
    name: str, network: nn.Module, group: SequenceGroup, run: Callable[[nn.Module], Tensor], ways: int = 4
) -> None:
    """`run` of the network, of a copy on the group, of that with recomputation as in training, of that sharded, and of
    that compiled (the first of these `ways`). Self-attention runs as often in each, but for a student that is
    recomputed."""
    with KernelRuns() as once:
        expected = outcome(network, lambda: run(network))
    parts = copy.deepcopy(network)
    share_tokens(parts, group, name)
    again = full_checkpoint if isinstance(network, CausalWanModel) else selective_checkpoint
    checks = {"shared out": lambda: None, "recomputed": lambda: parts.enable_gradient_checkpointing(again)}
    checks["sharded"] = lambda: shard(parts, mesh_of(TrainingConfig(sharding="full"), CPU))
    checks["compiled"] = lambda: compile_blocks(parts, backend="aot_eager", fullgraph=True)
    for how, change in list(checks.items())[:ways]:
        change()
        with KernelRuns() as seen:
            found = outcome(parts, lambda: run(parts))
        more = parts.gradient_checkpointing and again is full_checkpoint  # in passes with a graph
        assert (seen.past > once.past) if more else (seen.past == once.past > 0), f"{name} {how}"
        assert found.keys() == expected.keys(), f"{name} {how}"
        for key, value in expected.items():
            where = f"{name} {how} {key}"
            torch.testing.assert_close(found[key], value, **CLOSE, msg=lambda m, where=where: f"{where}: {m}")
    with group.disabled(), torch.no_grad():
        torch.testing.assert_close(run(parts), expected["output"], **CLOSE)


def rolled(student: nn.Module, text: Tensor) -> Tensor:
    """Five chunks, over the end of the window, with a gradient at each one's last step but one or last."""
    schedule = Schedule(timesteps_by_chunk=((1000.0, 800.0, 400.0), (1000.0, 400.0)))
    shape = PrecomputedNoise.shape(len(text), 5, schedule, GEOMETRY)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    cache = GraphCache(GEOMETRY, student.config.num_layers)
    exits = (1, 1, 0, 1, 1)
    return rollout(
        Student(student), schedule, PrecomputedNoise(noise, schedule), lambda k: text, cache=cache, exits=exits
    )


def compare_networks() -> bool:
    """On each rank."""
    with ranks_case.group() as ranks:
        group = sequence_group(2, ranks, CPU)
        assert group.size == 2 and group.rank == ranks.rank
        assert torch.equal(group.broadcast(torch.full((2, 3), float(ranks.rank)).t()), torch.zeros(3, 2))
        mine = torch.full((2,), float(ranks.rank))
        assert torch.equal(group.broadcast(mine, source=1), torch.ones(2))
        assert torch.equal(mine, torch.full((2,), float(ranks.rank))), "each keeps its own"
        student, score = build(num_attention_heads=4, attention_head_dim=12)
        latents, t, text = inputs(GEOMETRY, 6)
        compare("score", score, group, lambda m: ScoreModel(m).v(latents, t[:, 0], text))
        compare("student", student, group, lambda m: rolled(m, text))
        mask = chunk_causal_mask(GEOMETRY, 6, CPU)
        compare("whole clip", student, group, lambda m: m(latents, t[:, 0], text, mask=mask), ways=1)
    return True
