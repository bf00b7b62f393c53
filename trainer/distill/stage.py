"""Stage `distill`: diagonal distillation (arXiv 2603.09488), distribution matching along the diagonal schedule.

    a step      one critic update; every `dfake_gen_update_ratio`-th step begins with an update of the generator, from
                step `critic_warmup` on
    generator   x = rollout of the student, with a graph at the drawn step of each chunk
                lambda_spatial L + L_reg + gamma (lambda_flow L_F + L_reg^F)         trainer/distill/losses.py
    critic      flow matching on x, rolled out without a graph
    scores      at x_t = (1 - sigma) x + sigma eps: f = critic's x0, r = teacher's with cond + s (cond - uncond)

The only data are prompts. Random draws are functions of (seed, name, step, part), where `part` numbers the
micro-batches of a step over all ranks, so N ranks see the same samples as one rank with N times the accumulation. Ranks
of a sequence group (training.sequence_parallel) draw the same and compute the same losses. Where possible, they make
the critic's rollouts in turns (trainer/distill/rollout_sharing.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from configs.schema import RECACHES, Config
from model.cache import GraphCache, StreamCache
from model.causal_wan import CausalWanModel
from model.denoiser import ScoreModel, Student
from model.flow import add_noise, shift_time, v_target
from model.schedule import Schedule
from model.timesteps import TIME, warp
from model.weights.load import on_disk, save_network
from model.weights.lora import save_lora
from pipeline.rollout import PrecomputedNoise, last_steps, rollout
from pipeline.switch import embeddings_after_switch
from trainer.backward import Backward
from trainer.build import frozen_codec
from trainer.distill.diagnostics import STATISTICS, sample_statistics, warnings
from trainer.distill.fast_rollout import FastRollout
from trainer.distill.gradient_check import GradientCheck, gradient_check
from trainer.distill.long_tuning import Plan, RolloutPlanner, loss_window
from trainer.distill.losses import GeneratorInputs, critic_loss, generator_terms, term_settings
from trainer.distill.networks import (
    Bases,
    adapter_weights,
    critic_state,
    frozen_initial_student,
    frozen_teacher,
    merged_weights,
    motion_head_state,
    student_state,
)
from trainer.distill.rollout_sharing import RolloutSharing, shares_rollouts
from trainer.pairs import Pairs, open_pairs
from trainer.parallel.apply import ParallelPlan, is_sharded, mean_over_ranks, mesh_of, unshard
from trainer.parallel.sequence import check_tokens, data_ranks, sequence_group
from trainer.prompt_bank import PromptBank, check_text_dim, text_source, training_prompts
from trainer.stage import Stage
from trainer.validation import Validator
from utils.device import pick_dtype
from utils.distributed import Ranks
from utils.files import LORA, write_json_atomic
from utils.logs import get_logger
from utils.seeds import generator

log = get_logger(__name__)

SMOOTHING_UPDATES = 10  # generator updates over which logged sample statistics are averaged


class Distill(Stage):
    """Updates of generator and critic, against a frozen teacher."""

    name = "distill"
    export_often = True

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        super().__init__(config, device, ranks)
        t = config.training
        self.settings, self.mesh = t.distill, mesh_of(t, device)
        self.sharded = self.mesh is not None
        self.data = data_ranks(t.sequence_parallel, ranks)
        self.geometry = Geometry.from_config(config)
        check_tokens(t, self.geometry, config.video.num_latent_frames)
        self.sequence = sequence_group(t.sequence_parallel, ranks, device)
        self.schedule = Schedule.from_config(config.schedule, config.stream)
        self.planner = RolloutPlanner(config, self.schedule, self.geometry)
        parallel, self.dtype = ParallelPlan(t, device, self.mesh, self.sequence), pick_dtype(t.precision, device)
        log.info("attention of networks in training: %s", parallel.kernel(self.dtype))
        decodes = t.validation_clips or self.planner.longest > self.planner.window
        self.codec = frozen_codec(config, device) if decodes else None  # the loss itself needs latents only
        self.encoder = text_source(config, parallel)
        self.prompts = PromptBank(training_prompts(config), self.encoder, ahead=self.settings.encode_ahead)
        self.null = self.encoder([self.settings.negative_prompt])
        self.pairs, self.pair_prompts = self._open_pairs()

        bases: Bases = {}
        teacher, self.teacher_errors = frozen_teacher(config, parallel, bases)
        self.teacher = ScoreModel(teacher)
        student, critic = (make(config, parallel, bases) for make in (student_state, critic_state))
        self.train_states = {"generator": student, "critic": critic}
        self.student = Student(self.train_states["generator"].module)
        check_text_dim(self.encoder, self.student.model.config.text_dim)
        self.critic = ScoreModel(self.train_states["critic"].module)
        self.geometry = self.geometry.for_network(self.student.model.config)
        self.initial_student: Student | None = None  # frozen, for the motion regression
        if self.settings.regresses_motion:
            self.initial_student = Student(frozen_initial_student(config, parallel, bases))
            unwarped = self.settings.motion_regression.timesteps
            timesteps = tuple(warp(t / TIME, config.schedule.shift) for t in unwarped)
            self.initial_schedule = replace(self.schedule, timesteps_by_chunk=(timesteps,))
            self.train_states["motion_head"] = motion_head_state(config, self.geometry.latent_channels, device)

        self.fast_rollout = self._make_fast_rollout()
        shape = self.geometry.latent_shape(t.micro_batch, config.video.num_latent_frames)
        shared = shares_rollouts(t)
        self.rollout_sharing = RolloutSharing(self.sequence, self.micro_batches, shape, device) if shared else None
        self.generator_logs: dict[str, Tensor] = {}
        self.generator_done = -1  # the newest step whose generator update is done
        generator_parameters = [p for name, x in self.train_states.items() if name != "critic" for p in x.parameters]
        self.generator_backward = self._backward(self._generator_loss, generator_parameters)
        self.critic_backward = self._backward(self._critic_loss, self.train_states["critic"].parameters)
        self.validator = Validator(config, self.encoder, self.codec, self.geometry, self.schedule, self.prompts.prompts)

    def _open_pairs(self) -> tuple[Pairs | None, PromptBank | None]:
        """The teacher's trajectories for the regression terms, if any, and the embeddings of their prompts."""
        d = self.settings
        if d.pairs is None:
            return None, None
        if d.long.max_frames:
            raise UserError(
                f"training.distill.pairs={d.pairs} are clips of one length; set training.distill.long.max_frames=0"
            )
        pairs = open_pairs("training.distill.pairs", d.pairs)
        return pairs, PromptBank(pairs.prompts, self.encoder, ahead=d.encode_ahead)

    def _make_fast_rollout(self) -> FastRollout | None:
        sizes = (self.geometry, self.device, self.dtype, self.planner.longest)
        return FastRollout(self.student.model, self.config, *sizes) if self.settings.fast_rollout else None

    def _backward(self, loss, parameters) -> Backward:
        graphed = self.config.training.cuda_graphs and self.sequence.size == 1  # no collectives inside a graph
        return Backward(loss, parameters, autocast=self.dtype, device=self.device, graphed=graphed)

    @property
    def averaged(self) -> CausalWanModel:
        return self.train_states["generator"].average.module

    # --- inputs -------------------------------------------------------------------------------------------------------

    def _draw(self, role: str, step: int, micro: int, plan: Plan, *, image: bool = True) -> dict[str, Tensor]:
        """Inputs of one micro-batch of `role` at a step. image: with a first frame where the plan asks for one."""
        t, d = self.config.training, self.settings
        part = micro * self.data.world + self.data.rank
        rng = generator(self.config.seed, "distill", role, step, part, device=self.device)
        host = generator(self.config.seed, "distill prompts", role, step, part)
        size = t.micro_batch
        index = torch.randint(len(self.prompts), (2, size), generator=host)
        batch = {"text": self.prompts.batch(index[0])}
        if plan.switch is not None:
            batch["text_after"] = self.prompts.batch(index[1])
        shape = PrecomputedNoise.shape(size, len(plan.exits), self.schedule, self.geometry)
        batch["noise"] = torch.randn(shape, generator=rng, device=self.device)
        window = self.geometry.latent_shape(size, self.config.video.num_latent_frames)
        batch["eps"] = torch.randn(window, generator=rng, device=self.device)
        unwarped = 1000 * torch.rand(size, generator=rng, device=self.device)
        batch["t"] = shift_time(unwarped, d.shift).clamp(d.min_timestep, d.max_timestep)
        if self.pairs is not None and role == "generator":
            index = torch.randint(len(self.pairs), (size,), generator=host)
            states = self.pairs.read(index.tolist()).to(self.device).float()
            PrecomputedNoise(batch["noise"], self.schedule).start_from(states[:, 0])
            batch |= {"text": self.pair_prompts.batch(index), "target": states[:, -1]}
        if self.initial_student is not None and role == "generator":
            batch["initial_noise"] = self._initial_student_noise(batch["noise"], step, part)
        if plan.image and image:
            target = batch.get("target")
            batch["image"] = self._generated_image(batch["text"], rng) if target is None else target[:, :1]
        return batch

    def _initial_student_noise(self, drawn: Tensor, step: int, part: int) -> Tensor:
        """Noise of the initial student's rollout: the student's own, and more for the steps that its schedule lacks."""
        own = PrecomputedNoise(drawn, self.schedule)
        chunks = len(own.starts) - 1
        shape = PrecomputedNoise.shape(len(drawn), chunks, self.initial_schedule, self.geometry)
        rng = generator(self.config.seed, "distill start noise", step, part, device=self.device)
        initial = PrecomputedNoise(torch.randn(shape, generator=rng, device=self.device), self.initial_schedule)
        for chunk in range(chunks):
            steps = min(len(self.schedule.timesteps(chunk)), len(self.initial_schedule.timesteps(chunk)))
            a, b = own.starts[chunk], initial.starts[chunk]
            initial.drawn[:, b : b + steps] = drawn[:, a : a + steps]
        return initial.drawn

    @torch.no_grad()
    def _generated_image(self, text: Tensor, rng: torch.Generator) -> Tensor:
        """A first frame [B, 1, C, H, W] for each text, generated by the student as in inference.

        Latent frame 0 encodes a single image, so neither data nor a VAE encoder is needed.
        """
        shape = PrecomputedNoise.shape(len(text), 1, self.schedule, self.geometry)
        noise = PrecomputedNoise(torch.randn(shape, generator=rng, device=self.device), self.schedule)
        cache = GraphCache(self.geometry, self.student.model.config.num_layers)
        exits = last_steps(self.schedule, 1)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            x = rollout(self.student, self.schedule, noise, lambda _: text, cache=cache, exits=exits, grad=False)
        return x[:, :1]

    def _batches(self, role: str, step: int) -> tuple[Plan, list[dict[str, Tensor]]]:
        plan = self.planner.draw(role, step)
        image = role == "generator" or self.rollout_sharing is None  # else made by the rank that makes the rollout
        return plan, [self._draw(role, step, micro, plan, image=image) for micro in range(self.micro_batches)]

    def inputs(self, step: int) -> dict[str, Any]:
        """Those of the generator's update, if the step has one, and of the critic's; without first frames, which the
        student generates."""
        drawn = {}
        for role in ("generator", "critic") if self.settings.updates_generator(step) else ("critic",):
            plan = self.planner.draw(role, step)
            batches = [self._draw(role, step, micro, plan, image=False) for micro in range(self.micro_batches)]
            drawn[role] = {"plan": str(plan), "batches": batches}
        return drawn

    # --- the losses ---------------------------------------------------------------------------------------------------

    def _texts(self, plan: Plan, text: Tensor, text_after: Tensor | None) -> list[Tensor]:
        """Text embedding of each chunk. A change of prompt is handled as in inference."""
        before, stream = len(plan.exits) if plan.switch is None else plan.switch, self.config.stream
        after = islice(
            embeddings_after_switch(text, text_after, stream.switch, stream.switch_chunks), len(plan.exits) - before
        )
        return [text] * before + list(after)

    @contextmanager
    def _rollout_student(self, student: Student, grad: bool) -> Iterator[tuple[Student, GraphCache | StreamCache]]:
        """The form of `student` that makes a rollout, and an empty cache."""
        if grad or self.fast_rollout is None or student is not self.student:
            yield student, GraphCache(self.geometry, student.model.config.num_layers)
        else:
            with self.fast_rollout.ready(self.student.model) as ready:
                yield ready

    def _sample(
        self, plan: Plan, text: Tensor, noise: Tensor, text_after: Tensor | None, *, grad: bool,
        image: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss window [B, F, C, H, W] of a rollout. image: its first frame, if given."""
        return self._window(self.student, self.schedule, plan.exits, plan, text, noise, text_after, grad, image)

    @torch.no_grad()
    def _initial_student_sample(
        self, plan: Plan, text: Tensor, noise: Tensor, text_after: Tensor | None, image: Tensor | None
    ) -> Tensor:
        """The same of the initial student, with every chunk denoised to its last step."""
        student, schedule = self.initial_student, self.initial_schedule
        exits = last_steps(schedule, len(plan.exits))
        return self._window(student, schedule, exits, plan, text, noise, text_after, False, image)

    def _window(
        self, student: Student, schedule: Schedule, exits: tuple[int, ...], plan: Plan, text: Tensor, noise: Tensor,
        text_after: Tensor | None, grad: bool, image: Tensor | None,
    ) -> Tensor:  # fmt: skip
        d, trained = self.settings, student is self.student
        switch, texts = self.config.stream.switch, self._texts(plan, text, text_after)
        with self._rollout_student(student, grad) as (student, cache):
            # Text keys are computed once per text. Under FSDP blocks compute them: it must see the graph, and it
            # gathers a frozen network pass by pass, as a trained one that does not stay gathered
            gathered = trained and self.config.training.sequence_student == "whole"
            if not is_sharded(student.model) or (gathered and not grad):
                unshard(student.model)
                with torch.set_grad_enabled(grad):
                    text_kv = {key: student.model.text_kv(x) for key, x in {id(x): x for x in texts}.items()}
                texts = [text_kv[id(x)] for x in texts]
            x = rollout(
                student,
                schedule,
                PrecomputedNoise(noise, schedule),
                texts.__getitem__,
                cache=cache,
                exits=exits,
                grad=grad,
                first_grad=plan.first_grad,
                context_grad=d.context_grad,
                context=d.rollout_context,
                context_noise=d.context_noise,
                recache_at=plan.switch if switch in RECACHES else None,
                keep_sink=switch == "recache_window",
                conditioning=image,
            )
        return loss_window(x, self.config.video.num_latent_frames, self.codec)

    @torch.no_grad()
    def _scores(self, x: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """x0 of teacher and critic, predicted from a noised copy of x."""
        d, null = self.settings, self.null.expand_as(text)
        x_t = add_noise(self.sequence.broadcast(x.detach()), eps, t)
        if d.guidance:
            real = self.teacher.guided_x0(x_t, t, text, null, d.guidance)
        else:
            real = self.teacher.x0(x_t, t, text)
        if d.fake_guidance:
            return real, self.critic.guided_x0(x_t, t, text, null, d.fake_guidance)
        return real, self.critic.x0(x_t, t, text)

    def _generator_terms(
        self, plan: Plan, text: Tensor, noise: Tensor, eps: Tensor, t: Tensor, text_after: Tensor | None = None,
        target: Tensor | None = None, image: Tensor | None = None, initial_noise: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        """Every term with its weight, and what is logged."""
        x = self._sample(plan, text, noise, text_after, grad=True, image=image)
        real, fake = self._scores(x, text if text_after is None else text_after, t, eps)
        optional = {"target": target}
        if initial_noise is not None:
            head = self.train_states["motion_head"]
            initial = self._initial_student_sample(plan, text, initial_noise, text_after, image)
            optional |= {"initial": initial, "head": head.module, "head_average": head.average.module}
        with torch.autocast(self.device.type, enabled=False):
            inputs = GeneratorInputs(x=x, real=real, fake=fake, frames=plan.frames, **optional)
            terms, logs = generator_terms(inputs, self.settings)
        return terms, sample_statistics(x, real, fake, self.geometry.chunk_frames) | logs

    def _generator_loss(self, plan: Plan, **batch: Tensor) -> dict[str, Tensor]:
        terms, logs = self._generator_terms(plan, **batch)
        total = torch.stack(list(terms.values())).sum()
        named = {f"generator_{name}": value.detach() for name, value in terms.items()}
        return {"loss": total, "generator_loss": total.detach()} | named | logs

    def _critic_loss(
        self, plan: Plan, text: Tensor, noise: Tensor, eps: Tensor, t: Tensor, text_after: Tensor | None = None,
        image: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        with torch.no_grad():
            if self.rollout_sharing is None:
                x = self.sequence.broadcast(self._sample(plan, text, noise, text_after, grad=False, image=image))
            else:
                self._gather_student()
                x = self.rollout_sharing.take(self._critic_sample)
            x_t = add_noise(x, eps, t)
        v = self.critic.v(x_t, t, text if text_after is None else text_after)
        return {"loss": critic_loss(v, v_target(x, eps), frames=plan.frames)}

    def _gather_student(self) -> None:
        """On all ranks, since some of those that share rollouts make none."""
        if self.fast_rollout is not None:
            self.fast_rollout.refresh(self.student.model)
        if self.fast_rollout is None or self.config.training.image_start:  # which makes the images
            unshard(self.student.model)

    def _critic_sample(self, step: int, micro: int) -> Tensor:
        """The critic's sample in a micro-batch of a step, made by this rank alone."""
        plan = self.planner.draw("critic", step)
        batch = self._draw("critic", step, micro, plan)
        text, after, image = batch["text"], batch.get("text_after"), batch.get("image")
        return self._sample(plan, text, batch["noise"], after, grad=False, image=image)

    # --- a step -------------------------------------------------------------------------------------------------------

    def update(self, step: int) -> dict[str, Tensor]:
        d = self.settings
        if d.updates_generator(step) and self.generator_done < step:  # unless a signal interrupted the step after it
            self.generator_logs = self._generator_step(step, d.generator_updates(step))
            self.generator_done = step
        plan, batches = self._batches("critic", step)
        if self.rollout_sharing is not None:
            self.rollout_sharing.begin(step, *d.same_student(step, self.config.training.steps))
        logs = self.critic_backward.run(plan, batches, self.between)
        norm = self.train_states["critic"].step(step)
        return self.generator_logs | {"critic_loss": logs["loss"], "critic_grad_norm": norm}

    def _generator_step(self, step: int, count: int) -> dict[str, Tensor]:
        plan, batches = self._batches("generator", step)
        logs = self.generator_backward.run(plan, batches, self.between)
        del logs["loss"]
        for name in STATISTICS & self.generator_logs.keys():  # smoothed: they depend on the exit step, which changes
            logs[name] = torch.lerp(self.generator_logs[name], logs[name], 1 / SMOOTHING_UPDATES)
        logs["generator_grad_norm"] = self.train_states["generator"].step(count)
        if self.fast_rollout is not None:
            self.fast_rollout.stale = True
        if "motion_head" in self.train_states:
            logs["motion_head_grad_norm"] = self.train_states["motion_head"].step(count)
        return logs

    def begin(self, step: int, logdir: Path) -> None:
        """Check the gradients of the loss terms before the first step."""
        if step > 0:
            return
        check = self.check_gradients()
        log.info("gradients of the loss terms on the student:\n%s", check.table())
        if self.ranks.first:
            write_json_atomic(logdir / "audit.json", check.figures())

    def check_gradients(self) -> GradientCheck:
        """Gradient of each term on the student, for the batch of step 0."""
        plan = self.planner.draw("generator", 0)
        batch = self._draw("generator", 0, 0, plan)

        def terms() -> dict[str, Tensor]:
            enabled = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False):
                return self._generator_terms(plan, **batch)[0]

        if self.settings.flow.gradient_cut and self.settings.flow.weight:
            log.warning("training.distill.flow.gradient_cut=true: the flow loss is logged and trains nothing")
        check = gradient_check(terms, self.train_states["generator"].parameters, settings=term_settings(self.settings))
        self.generator_backward.clear()  # a term may have reached the motion head
        return check

    def diagnose(self, rows: list[dict[str, Any]]) -> list[str]:
        return warnings(rows)

    def state_dict(self) -> dict[str, Any]:
        logs = mean_over_ranks(self.generator_logs)  # equal for any number of ranks on resume
        return {
            "generator_logs": {name: value.cpu() for name, value in logs.items()},
            "generator_done": torch.tensor(self.generator_done),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        logs = state["generator_logs"] if "generator_logs" in state else {}
        self.generator_logs = {name: value.to(self.device) for name, value in logs.items()}
        if "generator_done" in state:
            self.generator_done = int(state["generator_done"])

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        name = f"{self.name}_{step:06d}"
        with self.sequence.disabled():  # unless weights are sharded, one rank validates alone
            return self.validator(self.averaged, self.teacher, folder, name, write=self.ranks.first)

    def export(self, folder: Path, step: int) -> None:
        d = self.config.training.distill
        card = {
            "stage": self.name,
            "step": step,
            "steps": self.config.training.steps,
            "generator_updates": d.generator_updates(step),
            "schedule": self.schedule.to_dict(),
            "size": [self.config.video.height, self.config.video.width],
            "trained_image_start": self.config.training.image_start > 0,
        }
        weights: dict[str, Tensor] = {}
        for name, value in merged_weights(self.averaged):
            if self.ranks.first:
                weights |= on_disk({name: value}, torch.float16)
        values, alphas = adapter_weights(self.averaged)
        if self.ranks.first:
            save_network(self.averaged, folder, card=card, state=weights)
            if values:
                save_lora(values, alphas, folder / LORA, {})
