"""Stage `distill` on random tiny networks: who is moved by what, exact resume, variants, and what stops it."""

import gc
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from distill_case import distill_config, distill_stage, without_warnings

from configs.errors import UserError
from configs.geometry import Geometry
from model.weights.load import load_student
from pipeline.stream import StreamSession
from trainer.distill.diagnostics import warnings
from trainer.distill.gradient_check import gradient_check
from trainer.distill.long_tuning import loss_window
from trainer.loop import NonFiniteLoss, _FiniteCheck, run
from trainer.prompt_bank import training_prompts
from trainer.registry import build_stage
from trainer.tiny.captions import parse_caption
from trainer.tiny.world import TinyWorld, training_caption
from trainer.validation import LABEL, causal_clips
from utils.distributed import Ranks
from utils.logs import read_jsonl
from utils.seeds import sample_seed, stable_hash
from utils.video import read_video

pytestmark = pytest.mark.slow


def tensors(state, prefix=""):
    """Every tensor of a nested state, by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {k: v for name, value in items for k, v in tensors(value, f"{prefix}/{name}").items()}


def states(stage) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in tensors({n: p.state_dict() for n, p in stage.train_states.items()}).items()}


def student_gradient(stage, step: int = 0) -> list[torch.Tensor]:
    """Of the whole loss of a step."""
    plan, batches = stage._batches("generator", step)
    stage.generator_backward.run(plan, batches)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in stage.student.model.parameters()]


def largest_difference(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


MOTION = "training.distill.motion_regression={weight: 1.0, lr: 1.0e-2}"


class TestMotionRegression:
    def test_it_moves_student_and_head_and_the_audit_shows_it(self, tiny_assets, tmp_path):
        stage = distill_stage(tiny_assets, MOTION)
        off = student_gradient(distill_stage(tiny_assets))
        assert largest_difference(student_gradient(stage), off) > 1e-6
        stage.begin(0, tmp_path)
        figures = json.loads((tmp_path / "audit.json").read_text())
        assert figures["audit_norm_motion_regression"] > 0
        assert all(p.grad is None for train_state in stage.train_states.values() for p in train_state.parameters)
        before, start = states(stage), [p.clone() for p in stage.initial_student.model.parameters()]
        logs = stage.update(0)
        after = states(stage)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {"/motion_head/module/net.0.weight", "/motion_head/average/net.0.weight"} <= moved
        assert logs["generator_motion_regression"] > 0 and logs["motion_head_grad_norm"] > 0
        assert all(torch.equal(a, b) for a, b in zip(start, stage.initial_student.model.parameters(), strict=True))
        average, module = "/motion_head/average/net.0.weight", "/motion_head/module/net.0.weight"
        torch.testing.assert_close(after[average], torch.lerp(before[average], after[module], 0.05))

    def test_the_heads_learning_rate_falls_over_its_own_updates(self, tiny_assets):
        """It makes as many steps as the student, so both end at the same share of their rates."""
        falling = "{lr: 1.0e-3, warmup_steps: 0, final_lr_share: 0.1}"
        settings = [f"training.optimizer={falling}", f"training.distill.critic_optimizer={falling}"]
        stage = distill_stage(tiny_assets, MOTION, *settings, "training.steps=6")

        def shares(name: str) -> list[float]:
            train_state = stage.train_states[name]
            peak = train_state.optimizer_config.lr
            return [group["lr"] / peak for group in train_state.optimizer.param_groups]

        for step in range(6):  # updates of the generator at 0 and 3
            stage.update(step)
        assert shares("motion_head") == pytest.approx([0.55] * 2) == shares("generator")

    def test_a_run_that_had_no_head_is_not_resumed_with_one(self, tiny_assets, tmp_path):
        """`gamma` may change, and with it whether there is one."""
        run(distill_stage(tiny_assets, MOTION, "training.distill.gamma=0", "training.steps=1"), tmp_path)
        with pytest.raises(UserError, match="state.pt has no motion_head, which this run needs; .* or choose another"):
            run(distill_stage(tiny_assets, MOTION, "training.steps=2"), tmp_path)

    def test_the_target_is_the_frozen_start_on_the_same_noise(self, tiny_assets):
        """With the student still at its start, and its schedule the target's, they make the same clip."""
        steps = ["schedule.first=1000", "schedule.last=250", "schedule.steps=4", "training.distill.exit=last"]
        stage = distill_stage(tiny_assets, MOTION, *steps)
        plan, (batch,) = stage._batches("generator", 0)
        target = {"text_after": None, "image": None}
        x = stage._sample(plan, batch["text"], batch["noise"], None, grad=False)
        y = stage._initial_student_sample(plan, batch["text"], batch["initial_noise"], **target)
        assert stage.initial_schedule.timesteps_by_chunk == stage.schedule.timesteps_by_chunk and torch.equal(x, y)
        for _ in range(2):
            stage._generator_step(0, 0)
        assert not torch.equal(stage._sample(plan, batch["text"], batch["noise"], None, grad=False), x)
        assert torch.equal(stage._initial_student_sample(plan, batch["text"], batch["initial_noise"], **target), y)

    def test_its_rows_are_fixed_whatever_the_schedule(self, tiny_assets):
        stage = distill_stage(tiny_assets, MOTION, "schedule.preset=release")
        (row,) = stage.initial_schedule.timesteps_by_chunk
        assert row == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
        assert all(value.isfinite() for value in stage.update(0).values())

    def test_timesteps_that_rise_are_refused(self, tiny_assets):
        with pytest.raises(UserError, match="do not fall; list them from"):
            distill_config(tiny_assets, "training.distill.motion_regression={timesteps: [250, 500]}")


def test_a_cycle_is_one_generator_update_and_then_critic_updates(tiny_assets):
    stage = distill_stage(tiny_assets)
    teacher = {k: v.clone() for k, v in stage.teacher.model.state_dict().items()}
    moved = []
    for step in range(4):
        before = states(stage)
        stage.update(step)
        after = states(stage)
        moved.append({k.split("/")[1] for k in after if k in before and not torch.equal(before[k], after[k])})
    assert moved == [{"generator", "critic"}, {"critic"}, {"critic"}, {"generator", "critic"}]
    assert all(torch.equal(v, teacher[k]) for k, v in stage.teacher.model.state_dict().items())


def test_the_critic_warms_up_before_the_generators_first_update(tiny_assets, tmp_path):
    stage = distill_stage(tiny_assets, "training.distill.critic_warmup=2")  # of 6 steps, 3 a generator update
    moved = []
    for step in range(6):
        before = states(stage)
        stage.update(step)
        after = states(stage)
        moved.append(any(not torch.equal(before[k], after[k]) for k in before if k.startswith("/generator/")))
    assert moved == [False, False, True, False, False, True]
    stage.export(tmp_path, 6)
    assert json.loads((tmp_path / "card.json").read_text())["generator_updates"] == 2


def test_a_warm_up_of_all_steps_is_refused(tiny_assets):
    with pytest.raises(UserError, match="critic_warmup=6 leaves no update of the generator in training.steps=6"):
        distill_config(tiny_assets, "training.distill.critic_warmup=6")


def test_the_flow_loss_changes_the_students_gradient(tiny_assets):
    off = student_gradient(distill_stage(tiny_assets, "training.distill.flow.weight=0"))
    for variant in ("half=true", "half=false", "frame_error=release"):
        on = student_gradient(distill_stage(tiny_assets, f"training.distill.flow.{variant}"))
        assert largest_difference(on, off) > 1e-3 * max(x.abs().max().item() for x in off), variant


def test_the_flow_loss_of_4ea418d_changes_nothing_and_is_called_so(tiny_assets, tmp_path, caplog):
    cut = distill_stage(tiny_assets, "training.distill.flow.gradient_cut=true")
    off = student_gradient(distill_stage(tiny_assets, "training.distill.flow.weight=0"))
    assert largest_difference(student_gradient(cut), off) == 0.0
    cut.begin(0, tmp_path)
    assert "trains nothing" in caplog.text
    assert json.loads((tmp_path / "audit.json").read_text())["audit_norm_flow"] == 0.0


def test_audit_names_norms_and_cosines(tiny_assets, tmp_path):
    stage = distill_stage(tiny_assets)
    stage.begin(0, tmp_path)
    figures = json.loads((tmp_path / "audit.json").read_text())
    assert figures["audit_norm_spatial"] > 0 and figures["audit_norm_flow"] > 0
    assert -1 < figures["audit_cos_spatial_flow"] < 1
    whole = student_gradient(stage)
    a, b, cos = figures["audit_norm_spatial"], figures["audit_norm_flow"], figures["audit_cos_spatial_flow"]
    norm = sum(g.double().square().sum() for g in whole).sqrt().item()
    assert norm == pytest.approx((a * a + b * b + 2 * a * b * cos) ** 0.5, rel=1e-4)


def test_a_term_without_gradient_stops_the_run():
    p = torch.nn.Parameter(torch.ones(3))
    settings = {"spatial": "spatial_weight=1", "flow": "flow.weight=4"}

    calls = []

    def terms():
        calls.append(None)
        return {"spatial": (p * p).sum(), "flow": (p.detach() * p.detach()).sum()}

    with pytest.raises(UserError, match="flow.weight=4 switches the flow term on, but it sends no gradient"):
        gradient_check(terms, [p], settings=settings)
    assert len(calls) == len(settings), "one rollout for each term"
    assert gradient_check(terms, [p], settings=settings | {"flow": ""}).norms[1] == 0
    with pytest.raises(UserError, match="the flow term sends no gradient to the student"):
        gradient_check(terms, [p], settings={"spatial": "spatial_weight=1"})  # a term that it does not know
    assert p.grad is None


def test_a_step_in_bfloat16_gives_no_warning(tiny_assets):
    """Norms of trained networks stay float32 under autocast, which torch remarks on."""
    with without_warnings():
        distill_stage(tiny_assets, "training.precision=bfloat16").update(0)


@pytest.mark.parametrize(("stop_after", "warmup"), [(2, 0), (3, 0), (1, 2)])
def test_resume_is_exact_in_the_middle_of_a_cycle(tiny_assets, tmp_path, stop_after, warmup):
    extra = [MOTION, f"training.distill.critic_warmup={warmup}"]
    straight = distill_stage(tiny_assets, *extra)
    run(straight, tmp_path / "straight")

    first = distill_stage(tiny_assets, *extra, f"training.checkpoint_every={stop_after}")
    update = first.update

    class Killed(Exception):
        pass

    def die(step):
        if step == stop_after:
            raise Killed
        return update(step)

    first.update = die
    with pytest.raises(Killed):
        run(first, tmp_path / "resumed")
    second = distill_stage(tiny_assets, *extra)
    run(second, tmp_path / "resumed")
    a, b = states(straight), states(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("straight", "resumed")]
    rows = [[{k: v for k, v in row.items() if k != "seconds_per_step"} for row in part] for part in rows]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_checkpointing_does_not_change_the_gradient(tiny_assets):
    plain, other = (
        student_gradient(distill_stage(tiny_assets, f"training.checkpointing={on}"), 1) for on in ("false", "true")
    )
    assert largest_difference(plain, other) <= 1e-7


def test_bfloat16_gradients_agree_roughly(tiny_assets):
    """Also a guard: under autocast a weight that a step without gradients has cast must not lose its own."""
    exact = student_gradient(distill_stage(tiny_assets))
    rough = student_gradient(distill_stage(tiny_assets, "training.precision=bfloat16"))
    a, b = (torch.cat([g.flatten() for g in part]) for part in (exact, rough))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95
    assert all(g.abs().max() > 0 for g, e in zip(rough, exact, strict=True) if e.abs().max() > 1e-4)


def test_settings_change_the_gradient(tiny_assets):
    stage, release = distill_stage(tiny_assets), "training.distill.rollout_context=release"
    early = next(s for s in range(60) if stage.planner.draw("generator", s).exits == (1, 1, 0, 0))
    plain = student_gradient(stage, early)
    for overrides in (
        [release], [release, "training.distill.context_noise=0"], ["training.distill.context_grad=false"],
        ["training.distill.exit=last"], ["training.distill.fake_guidance=0.5"], ["stream.context=clean"],
        ["schedule.steps=2"], ["training.distill.guidance=0"],
    ):  # fmt: skip
        other = student_gradient(distill_stage(tiny_assets, *overrides), early)
        assert largest_difference(plain, other) > 1e-5, overrides


class TestLong:
    LONG = "training.distill.long={max_frames: 18, min_frames: 12, switch_share: 1.0}"

    def test_lengths_switches_and_counted_frames(self, tiny_assets):
        stage = distill_stage(tiny_assets, self.LONG)
        plans = [stage.planner.draw("generator", step) for step in range(60)]
        assert {len(plan.exits) for plan in plans} == {4, 5, 6}
        for plan in plans:
            before = len(plan.exits) - 4
            assert plan.first_grad == (before + 1 if before else 0)
            assert (plan.switch is None) == (before == 0) and (not before or 1 <= plan.switch <= before)
            assert plan.frames == (slice(3, 12) if before else None)
            assert plan.exits[:before] == (3, 2, 1, 1, 1, 1)[:before], "chunks before the window walk whole rows"

    def test_the_windows_image_is_decoded_from_six_latents(self, tiny_assets):
        codec, past = distill_stage(tiny_assets, self.LONG).codec, torch.randn(1, 18, 16, 4, 6)
        window = loss_window(past, 9, codec)
        assert torch.equal(window, loss_window(past[:, 4:], 9, codec)) and torch.equal(window[:, 1:], past[:, 10:])
        assert not torch.equal(window[:, 0], loss_window(past[:, 5:], 9, codec)[:, 0])
        image = codec.decode(past[:, 4:10])[:, -1:]
        assert torch.equal(window[:, :1], codec.encode(image))

    def test_the_window_is_a_clip_and_its_first_chunk_has_no_gradient(self, tiny_assets):
        stage = distill_stage(tiny_assets, self.LONG)
        step = next(s for s in range(60) if len(stage.planner.draw("generator", s).exits) == 6)
        plan = stage.planner.draw("generator", step)
        batch = stage._draw("generator", step, 0, plan)
        x = stage._sample(plan, batch["text"], batch["noise"], batch["text_after"], grad=True)
        assert x.shape[1] == 12
        x.retain_grad()
        (gradient,) = torch.autograd.grad(x[:, :3].sum(), [stage.student.model.proj_out.weight], allow_unused=True)
        assert gradient is None or not gradient.any()
        same_text = stage._sample(plan, batch["text"], batch["noise"], batch["text"], grad=False)
        assert not torch.equal(same_text, x)
        logs = stage.generator_backward.run(plan, [batch])
        assert logs["loss"].isfinite()

@pytest.mark.parametrize(
    "settings, trains",
    [
        (["training.distill.flow.weight=0"], False),
        (["training.distill.gamma=0"], False),
        (["training.distill.flow.gradient_cut=true"], False),
        (["training.distill.flow.weight=0", "training.distill.pairs=x", "training.distill.regression_weight=0"], False),
        (["training.distill.flow.weight=0", "training.distill.pairs=x"], True),
        (["training.distill.flow.weight=0", "training.distill.motion_regression.weight=1"], True),
    ],
)
def test_without_the_spatial_loss_another_has_to_have_a_gradient(tiny_assets, settings, trains):
    refused = pytest.raises(UserError, match="no other loss with a gradient leave nothing to train on")
    with nullcontext() if trains else refused:
        distill_config(tiny_assets, "training.distill.spatial_weight=0", *settings)


def test_float16_has_no_room_for_the_gradients_of_a_clip_and_is_refused(tiny_assets):
    """Of the mean over a clip of full size, 2 million latent values, float16 rounds most gradients to 0."""
    with pytest.raises(UserError, match="training.precision=float16 is unknown; use one of auto, float32, bfloat16"):
        distill_config(tiny_assets, "training.precision=float16")
    values = 12 * 16 * 4 * 6 / (21 * 16 * 60 * 104)  # of the clip here, over those of a full one
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stage = distill_stage(tiny_assets)
        stage.generator_backward.dtype = dtype
        plan, (batch,) = stage._batches("generator", 0)
        stage.generator_backward.once(plan, values, batch)
        parameters = stage.train_states["generator"].parameters
        gradients[dtype] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    exact = gradients[torch.float32].norm()
    assert (gradients[torch.bfloat16] - gradients[torch.float32]).norm() < 0.03 * exact
    assert (gradients[torch.float16] - gradients[torch.float32]).norm() > 0.1 * exact
    assert (gradients[torch.float16] == 0).float().mean() > 0.5


def test_rollout_shorter_than_the_window_is_refused(tiny_assets):
    with pytest.raises(UserError, match="long.max_frames=9 is shorter"):
        distill_stage(tiny_assets, "training.distill.long.max_frames=9")


def test_the_last_step_is_exported_once(tiny_assets, tmp_path):
    """With its checkpoint; again where a run at its end has lost it, and to a folder that is named beside it."""

    def exports(*settings: str) -> list[tuple[str, int]]:
        stage, made = distill_stage(tiny_assets, "training.steps=2", *settings), []
        write = stage.export
        stage.export = lambda folder, step: (made.append((folder.name, step)), write(folder, step))
        run(stage, tmp_path / "run")
        return made

    assert exports("training.checkpoint_every=1") == [("export", 1), ("export", 2)]
    shutil.rmtree(tmp_path / "run" / "export")
    assert exports() == [("export", 2)] and load_student(tmp_path / "run" / "export").card["step"] == 2
    shutil.rmtree(tmp_path / "run")
    assert exports(f"training.export={tmp_path / 'mine'}") == [("export", 2), ("mine", 2)]


def test_nan_stops_the_run_with_its_batch_and_without_a_checkpoint(tiny_assets, tmp_path):
    stage = distill_stage(tiny_assets, "training.checkpoint_every=1", "training.log_every=100")
    update = stage.update

    def poison(step):
        if step == 2:
            with torch.no_grad():
                stage.critic.model.proj_out.bias[0] = float("nan")
        return update(step)

    stage.update = poison
    with pytest.raises(NonFiniteLoss, match="critic_loss.*not finite at step 3.*lower the learning rate"):
        run(stage, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("checkpoint_*")) == ["checkpoint_000001", "checkpoint_000002"]
    kept = torch.load(tmp_path / "not_finite_rank0.pt", weights_only=True)
    assert kept["step"] == 3 and kept["critic"]["batches"][0]["noise"].shape[0] == 2


def test_the_inputs_of_a_step_that_is_checked_late_are_its_own(tiny_assets, tmp_path, monkeypatch):
    """On a GPU the values of a step are read after the next step, whose inputs are others by then."""

    class Late(_FiniteCheck):
        def put(self, *values):
            super().put(*values)
            answer, _, step = self.pending.pop()
            self.pending.append((answer, SimpleNamespace(synchronize=lambda: None), step))

    monkeypatch.setattr("trainer.loop._FiniteCheck", Late)
    stage = distill_stage(tiny_assets, "training.log_every=100")
    update, given, steps = stage.update, {}, []
    run_loss = stage.critic_backward.run

    def keep(plan, batches, *rest):
        given[steps[-1]] = [{name: value.clone() for name, value in batch.items()} for batch in batches]
        return run_loss(plan, batches, *rest)

    def poison(step):
        steps.append(step)
        values = update(step)
        return values | {"critic_loss": values["critic_loss"] * float("nan")} if step == 2 else values

    stage.critic_backward.run, stage.update = keep, poison
    with pytest.raises(NonFiniteLoss, match="critic_loss.*not finite at step 3"):
        run(stage, tmp_path)
    assert steps == [0, 1, 2, 3]
    (kept,) = torch.load(tmp_path / "not_finite_rank0.pt", weights_only=True)["critic"]["batches"]
    for name, value in given[2][0].items():
        assert torch.equal(kept[name], value), name


def test_validation_writes_a_video_with_the_teachers_clips(tiny_assets, tmp_path):
    stage = distill_stage(tiny_assets, "training.validation_clips=3", "training.distill.video_clips=2")
    figures = stage.validate(5, tmp_path)
    assert "shape" in figures
    assert read_video(tmp_path / "distill_000005.mp4").shape == (45, LABEL + 2 * 32, 2 * 48, 3)


def test_each_validation_clip_has_noise_of_its_own(tiny_assets, monkeypatch):
    """Also where there are more than are made together."""
    asked = []

    class Session:
        geometry = Geometry.from_config(distill_config(tiny_assets))

        def play(self, prompts, seeds, chunks):
            asked.append((list(prompts), list(seeds)))
            return [SimpleNamespace(wait=lambda: SimpleNamespace(frames=torch.zeros(len(prompts), 1, 2, 2, 3)))]

    monkeypatch.setattr(StreamSession, "from_config", lambda *_: Session())
    config, prompts = distill_config(tiny_assets), [str(i) for i in range(130)]
    frames = causal_clips(None, None, None, prompts, None, config)
    assert frames.shape[0] == 130 and max(len(said) for said, _ in asked) <= 64
    assert [text for said, _ in asked for text in said] == prompts
    seeds = [seed for _, some in asked for seed in some]
    assert seeds == [sample_seed(config.seed, i + 1) for i in range(130)] and len(set(seeds)) == 130


def test_validation_holds_no_tensors_but_the_teachers_clips(tiny_assets, tmp_path):
    """On the host; whatever else it used is free when it ends, without a garbage collection, which may be far off."""
    stage = distill_stage(tiny_assets, "training.validation_clips=3", "training.distill.video_clips=2")
    stage.update(0)

    def tensors() -> dict[int, torch.Tensor]:
        return {id(x): x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}

    gc.collect()
    gc.disable()
    try:
        before = tensors()
        stage.validate(1, tmp_path)
        first = [x for key, x in tensors().items() if key not in before]
        teachers = [x for x in first if x.shape == (2, 45, 3, 32, 48)]
        assert len(teachers) == 1 and sum(x.nbytes for x in first) < teachers[0].nbytes + 2**20
        before = tensors()
        stage.validate(2, tmp_path)
        assert not [x.shape for key, x in tensors().items() if key not in before]
    finally:
        gc.enable()


def test_prompts_of_a_file(tiny_assets, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle moves right\na blue square\n")
    stage = distill_stage(tiny_assets, f"training.distill.prompts={tmp_path / 'p.txt'}")
    assert len(stage.prompts) == 2 and stage.update(0)["critic_loss"].isfinite()


def test_open_captions_are_a_share_and_leave_the_others_alone(tiny_assets):
    def captions(share: float) -> list[str]:
        prompts = training_prompts(
            distill_config(tiny_assets, "training.bank_clips=2000", f"training.open_captions={share}")
        )
        assert len(prompts) == 2000
        return prompts

    def is_open(prompt: str) -> bool:
        said = parse_caption(prompt)
        return said["direction"] is None and said["speed"] is None

    scenes = TinyWorld(32, 48).scenes(stable_hash(0, "prompts"), 2000)
    plain, some, more = captions(0), captions(0.3), captions(0.6)
    assert plain == [training_caption(scene) for scene in scenes]
    assert sum(map(is_open, plain)) < 60
    assert some == captions(0.3)
    changed = [i for i, (a, b) in enumerate(zip(plain, some, strict=True)) if a != b]
    assert all(is_open(some[i]) and some[i] == more[i] for i in changed)
    for prompts, share in ((some, 0.3), (more, 0.6), (captions(1), 1.0)):
        count = sum(map(is_open, prompts)) / 2000
        assert abs(count - share) < 0.05
    for scene, prompt in zip(scenes, some, strict=True):
        assert all(value in (None, vars(scene)[name]) for name, value in parse_caption(prompt).items())
    grounds = sum(parse_caption(prompt)["background"] is not None for prompt in captions(1))
    assert 0.5 < grounds / 2000 < 0.7  # the other attributes come and go as ever


def test_open_captions_of_given_prompts_are_refused(tiny_assets):
    with pytest.raises(UserError, match=r"open_captions=0.2 is .*distill.prompts=p.txt.*; set open_captions=0 or"):
        distill_config(tiny_assets, "training.distill.prompts=p.txt", "training.open_captions=0.2")
    for share in ("-0.1", "1.5"):
        with pytest.raises(UserError, match=f"open_captions={share} is out of range"):
            distill_config(tiny_assets, f"training.open_captions={share}")


def test_health_warns_once_with_a_remedy():
    good = {"critic_gap": 0.9, "motion": 1.0, "contrast": 0.9, "seam": 1.0}
    rows = [dict(good) for _ in range(8)]
    assert not warnings(rows)
    rows += [good | {"motion": 0.3} for _ in range(3)]
    said = [warning for end in range(1, len(rows) + 1) for warning in warnings(rows[:end])]
    assert len(said) == 1 and "flow.weight" in said[0]
    for bad in ({"critic_gap": 2.0}, {"contrast": 1.5}, {"seam": 2.0}):
        assert len(warnings([good] * 6 + [good | bad] * 3)) + len(warnings([good] * 6 + [good | bad] * 2)) >= 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("regression", [0, 1])
def test_graphs_of_several_plans_give_the_eager_gradients(tiny_assets, regression):
    """Each plan captured when it comes up, replayed in another order, with one and with two micro-batches."""
    stages = {}
    for graphs in (False, True):
        extra = [f"training.cuda_graphs={str(graphs).lower()}", "training.precision=float32", "device=cuda"]
        extra += ["training.global_batch=4", f"training.distill.motion_regression.weight={regression}"]
        stages[graphs] = build_stage(distill_config(tiny_assets, *extra), torch.device("cuda", 0), Ranks())
    for step in (0, 3, 6, 0, 9, 3, 12):
        for who in ("generator", "critic"):
            found = []
            for stage in stages.values():
                family = {"generator": stage.generator_backward, "critic": stage.critic_backward}[who]
                logs = family.run(*stage._batches(who, step))
                found.append((logs, [p.grad.clone() for p in family.parameters if p.grad is not None]))
            (a, eager), (b, graphed) = found
            assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)
            one, two = (torch.cat([g.flatten() for g in part if g.any()]) for part in (eager, graphed))
            assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.9999
    assert len(stages[True].generator_backward.graphs) > 1
