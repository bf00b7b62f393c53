"""Settings of stage `distill`: distribution matching along the diagonal schedule."""

from dataclasses import dataclass, field

from configs.errors import UserError
from configs.optimizer_schema import OptimizerConfig
from configs.validate import check_bounds, number, one_of

ROLLOUT_CONTEXTS = ("inference", "release")
EXITS = ("random", "last", "release")
FRAME_ERRORS = ("motion", "release")


@dataclass(frozen=True, kw_only=True)
class FlowLossConfig:
    """Flow distribution matching: the loss on differences of neighbouring latent frames.

    `release` is diagdistill, commit 24ef1c9.
    """

    weight: float = number(4.0, 0, 1_000_000)  # lambda_flow; 0 = off
    half: bool = True  # the factor 1/2 that the spatial loss has, too; false: as in commit 24ef1c9
    # frames are weighted by position and accumulated error: of the critic's motion, or (release) of the gradient
    # against the latents
    frame_error: str = "motion"
    gradient_cut: bool = False  # true: no gradient, as up to commit 4ea418d; for comparison only

    def __post_init__(self):
        check_bounds("training.distill.flow", self)
        one_of(FRAME_ERRORS, "training.distill.flow", self, "frame_error")


@dataclass(frozen=True, kw_only=True)
class MotionRegressionConfig:
    """Regression of motion on the frozen initial student, through a trained head.

    As in diagdistill's commit 24ef1c9; so are the defaults, except for the weight (1 there) and the learning rate
    (ours). The target's head is the EMA of the head.
    """

    weight: float = number(0.0, 0, 1_000_000)  # times gamma; 0 = off
    decay: float = number(0.95, 0, 1)  # of the EMA
    lr: float = number(1e-4, 0, 10)  # of the head
    # of the initial student in every chunk, un-warped
    timesteps: list[float] = number([1000.0, 750.0, 500.0, 250.0], 1, 1000)

    def __post_init__(self):
        check_bounds("training.distill.motion_regression", self)
        row = self.timesteps
        if not row or any(a <= b for a, b in zip(row, row[1:], strict=False)):
            raise UserError(
                f"training.distill.motion_regression.timesteps={row} do not fall; list them from noisy to clean, "
                f"[1000, 750, 500, 250]"
            )


@dataclass(frozen=True, kw_only=True)
class LongConfig:
    """Long tuning: rollouts of more chunks than the loss window has. Off at 0."""

    # latent frames of the longest rollout; 0 = video.num_latent_frames, no long tuning
    max_frames: int = number(0, 0, 100_000)
    # of the shortest; 0 = video.num_latent_frames. Each step draws a whole number of chunks
    min_frames: int = number(0, 0, 100_000)
    # share of rollouts whose prompt changes before the loss window
    switch_share: float = number(0.0, 0, 1)

    def __post_init__(self):
        check_bounds("training.distill.long", self)
        if self.max_frames and self.min_frames > self.max_frames:
            raise UserError(
                f"training.distill.long.min_frames={self.min_frames} is above max_frames={self.max_frames}; lower it"
            )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on every linear layer of the blocks, in place of full fine-tuning. Off at rank 0."""

    student_rank: int = number(0, 0, 65_536)
    critic_rank: int = number(0, 0, 65_536)
    alpha: float = number(0.0, 0, 1_000_000)  # scale is alpha / rank; 0 = the rank, scale 1

    def __post_init__(self):
        check_bounds("training.distill.lora", self)


def _critic_optimizer() -> OptimizerConfig:
    return OptimizerConfig(lr=4e-7, betas=[0.0, 0.999], warmup_steps=0, final_lr_share=1.0, max_grad_norm=10.0)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A step is one critic update; every `dfake_gen_update_ratio`-th step begins with a generator update."""

    dfake_gen_update_ratio: int = number(5, 1, 1_000_000)  # critic updates for each of the generator
    # critic updates before the first generator update, since a critic that starts from the teacher lags
    critic_warmup: int = number(0, 0, 1_000_000_000)
    critic_optimizer: OptimizerConfig = field(default_factory=_critic_optimizer)  # the student: training.optimizer

    # the loss: spatial_weight L + L_reg + gamma (flow.weight L_F + L_reg^F + motion_regression.weight L_M)
    spatial_weight: float = number(4.0, 0, 1_000_000)  # lambda_spatial
    gamma: float = number(1.0, 0, 1_000_000)  # weight of motion against space
    flow: FlowLossConfig = field(default_factory=FlowLossConfig)
    motion_regression: MotionRegressionConfig = field(default_factory=MotionRegressionConfig)
    regression_weight: float = number(1.0, 0, 1_000_000)  # of L_reg and L_reg^F, which are on if `pairs` is given
    pairs: str | None = None  # teacher's trajectories: a folder or LMDB made by scripts/generate_ode_pairs.py

    # teacher and critic
    # s of cond + s (cond - uncond), on the teacher's x0; the usual weight is s + 1
    guidance: float = number(3.0, 0, 1000)
    fake_guidance: float = number(0.0, 0, 1000)  # the same for the critic
    negative_prompt: str = ""  # text of the branch without the prompt
    teacher_fp8: bool = False  # the teacher's large linears in float8: 17 GB of 14B, not 29; scores a few percent off
    # timesteps of teacher and critic are drawn evenly in un-warped time, then shifted
    shift: float = number(5.0, 1, 100)
    min_timestep: float = number(20.0, 1, 1000)  # then clamped to
    max_timestep: float = number(980.0, 1, 1000)

    # the rollout
    exit: str = "random"  # step with the gradient: random (one relative position for all chunks), last, release
    rollout_context: str = "inference"  # context mode of inference; release = re-noise the exit's x0
    context_noise: float = number(100.0, 0, 1000)  # of release: to this timestep, not warped; 0 in commit 4ea418d
    context_grad: bool = True  # gradients of later chunks reach earlier ones through their keys and values
    long: LongConfig = field(default_factory=LongConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fast_rollout: bool = False  # critic's rollouts by the fast student of inference, a copy in training.precision

    # prompts and validation
    prompts: str | None = None  # text file, one a line; None = training.bank_clips prompts of the tiny world
    encode_ahead: bool = True  # embed all prompts before the first step and keep them on the device
    encoded_prompts: str | None = None  # folder of scripts/encode_prompts.py; no text encoder is loaded then
    video_clips: int = number(4, 0, 1000)  # validation clips written as a video, the teacher's beside them

    @property
    def regresses_motion(self) -> bool:
        return self.gamma * self.motion_regression.weight > 0

    def generator_updates(self, steps: int) -> int:
        """Updates of the generator in the first `steps` steps."""
        return max(0, -((self.critic_warmup - steps) // self.dfake_gen_update_ratio))

    def updates_generator(self, step: int) -> bool:
        """Step `step` begins with one."""
        return self.generator_updates(step + 1) > self.generator_updates(step)

    def same_student(self, step: int, steps: int) -> tuple[int, int]:
        """The range of steps around `step` without a generator update in between; it ends at `steps` at the latest."""
        start = next((s for s in range(step, 0, -1) if self.updates_generator(s)), 0)
        return start, next((s for s in range(step + 1, steps) if self.updates_generator(s)), max(steps, step + 1))

    def __post_init__(self):
        check_bounds("training.distill", self)
        self.critic_optimizer.check("training.distill.critic_optimizer")
        one_of(ROLLOUT_CONTEXTS, "training.distill", self, "rollout_context")
        one_of(EXITS, "training.distill", self, "exit")
        if self.min_timestep > self.max_timestep:
            raise UserError(
                f"training.distill.min_timestep={self.min_timestep} is above training.distill.max_timestep="
                f"{self.max_timestep}; swap them"
            )
        if self.fast_rollout and self.lora.student_rank:
            raise UserError(
                f"training.distill.fast_rollout=true copies a student that is fully fine-tuned, and training.distill."
                f"lora.student_rank={self.lora.student_rank} trains adapters; set fast_rollout=false or student_rank=0"
            )
        flow = self.gamma * self.flow.weight > 0 and not self.flow.gradient_cut
        regression = self.pairs is not None and self.regression_weight > 0
        if not (self.spatial_weight or flow or regression or self.regresses_motion):
            raise UserError(
                "training.distill.spatial_weight=0 and no other loss with a gradient leave nothing to train on; set a "
                "weight above 0"
            )
