"""LoRA training: frozen weights are in memory once, and nothing else about a run changes for that."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SEVERAL_RANKS
from diffusers import WanTransformer3DModel
from distill_case import distill_config, distill_stage
from peft import PeftModel
from ranks_case import group, on_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.memory import adapter_parameters, weight_origin
from model.sizes import TransformerSize
from model.weights.load import load_student
from trainer.checkpoint.save import restore
from trainer.distill import networks
from trainer.distill.stage import Distill
from trainer.loop import run, save_checkpoint
from trainer.parallel.apply import full_tensor, local, mean_over_ranks, reshard
from trainer.parallel.control_group import ControlGroup

RANKS = (3, 2)  # of the student's adapters and of the critic's
LORA = f"training.distill.lora={{student_rank: {RANKS[0]}, critic_rank: {RANKS[1]}, alpha: 6}}"
SETTINGS = (
    LORA, "training.global_batch=1", "training.micro_batch=1", "video.num_latent_frames=6",
    "training.distill.dfake_gen_update_ratio=2",
    "training.optimizer.eps=1e-3", "training.distill.critic_optimizer.eps=1e-3", "training.ema_decay=0.9",
)  # fmt: skip
MOTION = "training.distill.motion_regression={weight: 1.0, timesteps: [1000, 500]}"  # adds the frozen initial student
STEPS = 3  # in the first and the third the student is updated


def same_files(assets: Path) -> str:
    """Student, critic and teacher from the teacher's files."""
    return f"training.init={json.dumps({role: str(assets / 'teacher') for role in ('student', 'teacher')})}"


def modules(stage: Distill) -> dict[str, nn.Module]:
    """All transformers of a stage."""
    both = {"student": stage.student.model, "average": stage.averaged, "critic": stage.critic.model}
    initial = {} if stage.initial_student is None else {"initial": stage.initial_student.model}
    return both | {"teacher": stage.teacher.model} | initial


def storages(stage: Distill) -> dict[int, int]:
    """Bytes of the memory behind all transformers' parameters, by address."""
    tensors = [local(p.detach()) for module in modules(stage).values() for p in module.parameters()]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}


def separate(stage: Distill) -> None:
    """Give every network frozen weights of its own."""
    for module in modules(stage).values():
        for owner, (name, p) in ((m, one) for m in module.modules() for one in m.named_parameters(recurse=False)):
            if not p.requires_grad:
                setattr(owner, name, nn.Parameter(p.detach().clone(), requires_grad=False))


def train(stage: Distill, steps: int = STEPS) -> list[dict[str, Tensor]]:
    return [{name: value.clone() for name, value in stage.update(step).items()} for step in range(steps)]


def values(stage: Distill) -> dict[str, Tensor]:
    for module in modules(stage).values():
        reshard(module)
    named = {role: module.named_parameters() for role, module in modules(stage).items()}
    return {f"{role} {name}": full_tensor(p.detach()).clone() for role, some in named.items() for name, p in some}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, different[:3]


@pytest.mark.parametrize("same", [False, True], ids=["critic_of_teacher", "all_of_teacher"])
@pytest.mark.parametrize("more", [(), (MOTION, "training.checkpointing=true")], ids=["plain", "recomputed"])
def test_a_shared_base_equals_separate_ones(tiny_assets, monkeypatch, same, more):
    """Losses, gradient norms, adapters and EMA, bit for bit, against networks that each were loaded by themselves."""
    distill_config(tiny_assets)  # makes the teacher
    settings = (*SETTINGS, *more, *((same_files(tiny_assets),) if same else ()))
    shared = distill_stage(tiny_assets, *settings)
    begin = networks._begin  # without bases: each is read from its file
    monkeypatch.setattr(networks, "_begin", lambda *args, **kwargs: begin(*args[:4], {}, **kwargs))
    apart = distill_stage(tiny_assets, *settings)
    separate(apart)
    assert len(storages(shared)) < len(storages(apart))
    assert len(storages(apart)) == sum(len(list(module.parameters())) for module in modules(apart).values())
    before, logs, expected = values(shared), train(shared), train(apart)
    for ours, theirs in zip(logs, expected, strict=True):
        assert_equal(ours, theirs)
    assert_equal(values(shared), values(apart))
    moved = {name for name, value in values(shared).items() if not torch.equal(value, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert moved == adapters and {name.split()[0] for name in moved} == {"student", "average", "critic"}


@pytest.mark.parametrize("same", [False, True], ids=["critic_of_teacher", "all_of_teacher"])
def test_memory_is_counted(tiny_assets, same):
    """One base for each file; adapters three times (student, EMA, critic's once); the optimisers see adapters alone."""
    distill_config(tiny_assets)
    stage = distill_stage(tiny_assets, *SETTINGS, MOTION, *((same_files(tiny_assets),) if same else ()))
    train(stage, 1)
    teacher, student = (TransformerSize.from_config(m.config) for m in (stage.teacher.model, stage.student.model))
    small, large = (adapter_parameters(student, RANKS[0]), adapter_parameters(teacher, RANKS[1]))
    bases = teacher.parameters + (0 if same else student.parameters)
    assert sum(storages(stage).values()) == 4 * (bases + 2 * small + large)
    for name, count in (("generator", small), ("critic", large)):
        train_state = stage.train_states[name]
        entries = [x for state in train_state.optimizer.state.values() for x in state.values() if x.ndim]
        assert sum(p.numel() for p in train_state.parameters) == sum(x.numel() for x in entries) == count
        assert sum(x.numel() for x in train_state.state_dict()["module"].values()) == count
    assert sum(x.numel() for x in stage.train_states["generator"].state_dict()["average"].values()) == small


def test_networks_of_the_same_files_share_a_base(tiny_assets):
    def origins(**init: str) -> list[str]:
        written = f"training.init={json.dumps(init)}"
        training = distill_config(tiny_assets, written).training
        return [weight_origin(training, role) for role in ("student", "teacher", "critic")]

    a, b, c = origins(student="x/one", teacher="x/two")
    assert a != b == c
    a, b, c = origins(student="x/one", teacher="x/./one", critic="x/one")
    assert a == b != c, "a critic that is named may be another part of the file"
    a, b, c = origins(student="random:14B", teacher="random:14B")
    assert a != b == c, "drawn by name"


def test_a_teacher_in_float8_is_nobody_s_base(tiny_assets):
    distill_config(tiny_assets)
    fp8 = distill_stage(tiny_assets, *SETTINGS, same_files(tiny_assets), "training.distill.teacher_fp8=true")
    roles = ("student", "average", "critic", "teacher")
    places = [dict(modules(fp8)[role].named_parameters())["proj_out.weight"].data_ptr() for role in roles]
    assert len(set(places[:3])) == 1 and places[3] not in places[:3]


def test_frozen_weights_are_in_the_precision_of_activations(tiny_assets, tmp_path):
    """One base in bfloat16, adapters in float32; losses are those of a base in float32 under autocast, rounded."""
    distill_config(tiny_assets)
    settings = (*SETTINGS, same_files(tiny_assets), "training.validation_clips=2", "training.distill.video_clips=1")
    half = distill_stage(tiny_assets, *settings, "training.precision=bfloat16")
    for module in modules(half).values():
        for name, p in module.named_parameters():
            kept = "lora_" in name or not {"norm2", "time_embedder", "scale_shift_table"}.isdisjoint(name.split("."))
            assert p.dtype == (torch.float32 if kept else torch.bfloat16), name
    logs, expected = train(half, 2), train(distill_stage(tiny_assets, *settings), 2)
    for ours, theirs in zip(logs, expected, strict=True):
        for name in ("generator_loss", "critic_loss"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=0)
    half.validate(2, tmp_path)


def test_resumed_and_exported(tiny_assets, tmp_path):
    """A resumed run is the one that was not stopped; its export is the base plus what peft reads from export/lora."""
    distill_config(tiny_assets)
    settings = (*SETTINGS, f"training.steps={STEPS}")
    whole = distill_stage(tiny_assets, *settings)
    run(whole, tmp_path / "whole")
    stopped = distill_stage(tiny_assets, *settings)
    train(stopped, 2)
    save_checkpoint(stopped, tmp_path / "resumed", 2, ControlGroup())
    resumed = distill_stage(tiny_assets, *settings)
    run(resumed, tmp_path / "resumed")
    assert_equal(values(resumed), values(whole))
    export = tmp_path / "resumed" / "export"
    for file in ("diffusion_pytorch_model.safetensors", "lora/adapter_model.safetensors"):
        assert (export / file).read_bytes() == (tmp_path / "whole" / "export" / file).read_bytes()
    x, t, text = torch.randn(1, 3, 16, 4, 6), torch.tensor([500.0]), torch.randn(1, 12, 64)
    base = load_student(tiny_assets / "student")
    with torch.no_grad():
        before = base(x, t, text)
        theirs = PeftModel.from_pretrained(base, export / "lora").eval()(x, t, text)
        torch.testing.assert_close(whole.averaged(x, t, text), theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load_student(export)(x, t, text), theirs, rtol=1e-2, atol=1e-2)
        assert (theirs - before).abs().max() > 1e-4
    size = (next((tmp_path / "resumed").glob("checkpoint_*")) / "state.pt").stat().st_size
    assert size < (export / "diffusion_pytorch_model.safetensors").stat().st_size, "a checkpoint holds no base"


def test_a_checkpoint_that_holds_bases_can_be_resumed(tiny_assets, tmp_path):
    """As runs wrote them before."""
    distill_config(tiny_assets)
    first = distill_stage(tiny_assets, *SETTINGS, "training.steps=2")
    for train_state in first.train_states.values():
        train_state.frozen = frozenset()
    run(first, tmp_path)
    again = distill_stage(tiny_assets, *SETTINGS)
    restore(next(tmp_path.glob("checkpoint_*")), again.train_states)
    assert_equal(values(again), values(first))


def on_rank(assets: str, out: str, sequence: tuple[str, ...]) -> bool:
    """Steps of one process and of all; what each rank holds; a checkpoint of the ranks, resumed; the exports."""
    settings = [*SETTINGS, same_files(Path(assets)), "training.global_batch=2", f"training.steps={STEPS}", *sequence]
    plain = [setting for setting in settings if "sequence" not in setting]
    alone = distill_stage(Path(assets), *plain)
    expected = train(alone)
    with group() as ranks:
        parts = (*settings, "training.sharding=full")
        stage = distill_stage(Path(assets), *parts, ranks=ranks)
        trained = sum(p.numel() for name, p in values(stage).items() if "lora_" in name)
        frozen = sum(p.numel() for p in alone.teacher.model.parameters())
        held = sum(storages(stage).values())
        assert held <= 1.1 * 4 * (trained + frozen) / ranks.world, "one base, spread over the ranks"
        for step in range(STEPS):
            logs = mean_over_ranks(stage.update(step))
            for name, value in expected[step].items():
                torch.testing.assert_close(logs[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            gathered = any(not isinstance(p, DTensor) for p in stage.student.model.blocks[0].parameters())
            assert gathered == (stage.config.training.sequence_student == "whole")
            if step == 1:
                save_checkpoint(stage, Path(out), 2, ControlGroup())
        after = values(stage)
        for name, value in values(alone).items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-7)
        assert sum(storages(stage).values()) == held
        resumed = distill_stage(Path(assets), *parts, ranks=ranks)
        run(resumed, Path(out))
        assert_equal(values(resumed), after)
    alone.export(Path(out, f"alone{ranks.rank}"), STEPS)
    ours, theirs = (dict(load_student(Path(out, name)).named_parameters()) for name in ("export", f"alone{ranks.rank}"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    return True


@SEVERAL_RANKS
@pytest.mark.parametrize(
    "sequence",
    [(), ("training.sequence_student=shared",), ("training.sequence_student=shared", "training.sequence_parallel=2")],
    ids=["gathered", "block_by_block", "tokens_shared"],
)
def test_two_ranks_share_a_base(tiny_assets, tmp_path, sequence):
    distill_config(tiny_assets)
    outcomes = on_ranks(2, on_rank, str(tiny_assets), str(tmp_path), sequence)
    assert [o.ended for o in outcomes] == ["done"] * 2, outcomes


def test_gradients_are_those_of_peft(tiny_assets):
    """Of the critic's adapters, against peft's own model around diffusers' network."""
    from peft import LoraConfig, get_peft_model

    distill_config(tiny_assets)
    stage = distill_stage(tiny_assets, *SETTINGS)
    train(stage, 2)  # so that no adapter is zero
    critic = stage.critic.model
    targets = [name for name, _ in networks.adapters(critic).items()]
    base = WanTransformer3DModel.from_pretrained(tiny_assets / "teacher")
    theirs = get_peft_model(base, LoraConfig(r=RANKS[1], lora_alpha=6, target_modules=targets))
    ours = {name: p for name, p in critic.named_parameters() if "lora_" in name}
    own = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if "lora_" in name}
    assert ours.keys() == own.keys()
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(ours[name])
    x, t, text = torch.randn(2, 16, 3, 4, 6), torch.tensor([300.0, 800.0]), torch.randn(2, 12, 64)
    for network in (critic, theirs):
        network.zero_grad()
        network(x, t, text, return_dict=False)[0].square().mean().backward()
    for name, p in own.items():
        torch.testing.assert_close(ours[name].grad, p.grad, rtol=1e-5, atol=1e-7)
        assert p.grad.abs().max() > 0
