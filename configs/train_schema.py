"""Knobs of `train.py`, a section of the tree in configs/schema.py."""

from dataclasses import dataclass, field

from configs.distill_schema import DistillConfig
from configs.errors import UserError
from configs.optimizer_schema import OptimizerConfig
from configs.validate import at_least, between, one_of

STAGES = ("text", "codec", "pretrain", "teacher_forcing", "few_steps", "causal_ode", "ode_regression", "distill")
ATTENTION = ("auto", "sdpa", "cudnn")  # those of inference.attention that torch differentiates under autocast
SHARDINGS = ("none", "full", "hybrid")
SEQUENCE_STUDENTS = ("whole", "shared")
LOGGERS = ("wandb", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching: which timesteps are drawn, and what the past looks like to a causal student."""

    shift: float = 5.0  # timesteps are drawn evenly in un-warped time, then shifted
    text_dropout: float = 0.1  # share of samples trained without a prompt, for guidance
    context_timesteps: list[float] = field(default_factory=lambda: [0.0])  # causal: noise level of the past, one drawn
    first_chunk_share: float = 0.0  # pretrain, teacher_forcing, few_steps: share of steps on first chunks alone
    first_chunk_batch: int = 64  # clips in a micro-batch of such a step
    first_chunk_clips: int = 0  # first chunks made ahead for such steps; 0 = those of the whole clips
    first_chunk_trajectories: int = 0  # few_steps: first chunks of a many-step student, learnt in place of real ones
    crop_share: float = 0.0  # the same stages: share of those on a square around the subject
    crop: int = 6  # latent cells: side of that square, even
    crop_batch: int = 160  # clips in a micro-batch of such a step
    past_weight: float = 0.5  # teacher_forcing, few_steps: weight of the loss of a noisy past beside that of the chunks
    own_share: float = 0.5  # few_steps: share of clips whose chunks, but for the first, are the student's own
    switched_share: float = 0.0  # few_steps: share of clips whose prompt changes on the way
    switched_clips: int = 2048  # such clips made ahead
    bank_cache: str | None = None  # folder that keeps encoded clips for later runs, from the checkout on; None = none
    ode_interval: float = 50.0  # Euler step of a teacher's trajectory, in un-warped time
    ode_clips: int = 4096  # causal_ode: trajectories made ahead and drawn from
    guidance: float = 1.0  # s of cond + s (cond - uncond), in validation and for a teacher's trajectories

    def __post_init__(self):
        at_least(1, "training.flow", self, "shift", "ode_clips", "first_chunk_batch", "crop_batch", "switched_clips")
        shares = ("text_dropout", "first_chunk_share", "crop_share", "own_share", "switched_share")
        between(0, 1, "training.flow", self, *shares)
        if self.crop < 2 or self.crop % 2:
            raise UserError(f"training.flow.crop={self.crop} is not an even number of latent cells; use 4 or 6")
        between(1, 1000, "training.flow", self, "ode_interval")
        at_least(0, "training.flow", self, "guidance", "past_weight", "first_chunk_clips", "first_chunk_trajectories")


@dataclass(frozen=True, kw_only=True)
class CodecLossConfig:
    """Codec training on the tiny world: what is shown, and the weights of the loss terms."""

    clip_frames: list[int] = field(default_factory=lambda: [17])  # lengths of training clips, each 1 + 4 n; one a step
    crop: int = 0  # pixels: side of a square around the subject, where there is something to learn; 0 = whole frames
    gradient: float = 0.5  # L1 between spatial finite differences, for sharp edges
    temporal: float = 0.0  # L1 between differences of neighbouring frames: motion without a step at each latent frame
    mse: float = 5.0  # squared error beside L1: small coloured subjects count, and PSNR is what is measured
    chroma: float = 20.0  # squared error of the colour alone, which is learnt last: only small subjects have one
    kl: float = 1e-5  # KL to the unit normal, mean over latent values
    decoder_only: bool = False  # the encoder stays as it is, and so do the latents that other networks have learnt

    def __post_init__(self):
        if not self.clip_frames or any(n < 1 or n % 4 != 1 for n in self.clip_frames):
            raise UserError(f"training.codec.clip_frames={self.clip_frames}: each must be 1 + 4 n, e.g. [17, 49]")
        if self.crop % 8:
            raise UserError(f"training.codec.crop={self.crop} is not a multiple of 8; use 48, or 0 for whole frames")
        at_least(0, "training.codec", self, "crop", "gradient", "temporal", "mse", "chroma", "kl")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One stage of training."""

    stage: str = "pretrain"
    steps: int = 1000  # optimiser steps
    global_batch: int = 64  # samples a step, over all ranks and accumulated micro-batches
    micro_batch: int = 64  # samples a forward pass on one rank
    bank_clips: int = 4096  # tiny world: clips made ahead and drawn from
    open_captions: float = 0.0  # share of the tiny world's captions that state neither direction nor speed
    image_start: float = 0.0  # causal stages: share of clips that begin with a given frame, as --image does
    init: dict[str, str] = field(default_factory=dict)  # module -> weights, or a config.json for fresh ones
    ema_decay: float = 0.999
    ema_start_step: int = 200  # before this step the average is the weights themselves
    precision: str = "auto"  # of activations under autocast; weights and optimiser stay float32
    compile: bool = False  # torch.compile the repeated blocks (distill: but for self-attention)
    cuda_graphs: bool = False  # replay forward and backward as one CUDA graph
    attention: str = "auto"  # distill: kernel of all networks; auto = cuDNN in half precision on Hopper and newer
    checkpointing: bool = False  # distill: recompute blocks in the backward pass (critic's: but for self-attention)
    sharding: str = "none"  # over ranks: none (each holds all), full (FSDP2 by block), hybrid (within groups of ranks)
    shard_ranks: int = 0  # hybrid: ranks of a group, which together hold one copy of everything; 0 = those of a machine
    timeout_s: float = 900.0  # seconds that a rank waits for the others before it ends the run
    sequence_parallel: int = 1  # ranks that share each sample's tokens and heads; the rest of them see other samples
    sequence_student: str = "whole"  # on each of those ranks, or "shared": its chunks and their keys, too
    log_every: int = 20  # steps
    loggers: list[str] = field(default_factory=list)  # beside the JSON lines: wandb, tensorboard
    checkpoint_every: int = 1000  # steps; 0 = only at the end
    validate_every: int = 0  # steps; 0 = only at the end
    validation_clips: int = 64
    max_checkpoints: int = 2  # the newest that are kept
    accept_changes: list[str] = field(default_factory=list)  # settings in which a resumed run may differ all the same
    export: str | None = None  # folder that the trained modules are written to at the end, from the checkout on
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    codec: CodecLossConfig = field(default_factory=CodecLossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self):
        one_of(STAGES, "training", self, "stage")
        for logger in self.loggers:
            if logger not in LOGGERS:
                raise UserError(f"training.loggers={self.loggers} names {logger}; use any of {', '.join(LOGGERS)}")
        one_of(SHARDINGS, "training", self, "sharding")
        one_of(ATTENTION, "training", self, "attention")
        if self.attention != "auto" and self.stage != "distill":
            raise UserError(
                f"training.attention={self.attention} is for stage distill; use auto for stage {self.stage}"
            )
        if self.attention == "cudnn" and self.precision == "float32":
            raise UserError(
                "training.attention=cudnn computes in bfloat16 or float16 and training.precision=float32 is neither; "
                "use training.attention=sdpa, or precision=bfloat16"
            )
        at_least(1, "training", self, "steps", "global_batch", "micro_batch", "bank_clips", "log_every")
        at_least(0, "training", self, "ema_start_step", "checkpoint_every", "validate_every", "validation_clips")
        at_least(0, "training", self, "shard_ranks")
        at_least(1, "training", self, "max_checkpoints", "sequence_parallel", "timeout_s")
        one_of(SEQUENCE_STUDENTS, "training", self, "sequence_student")
        if self.stage == "distill" and not self.distill.generator_updates(self.steps):
            raise UserError(
                f"training.distill.critic_warmup={self.distill.critic_warmup} leaves no update of the generator in "
                f"training.steps={self.steps}; make it less"
            )
        if self.sequence_parallel > 1 and self.stage != "distill":
            n = self.sequence_parallel
            raise UserError(f"training.sequence_parallel={n} is for stage distill; use 1 for stage {self.stage}")
        if self.sharding != "none" and (self.optimizer.muon_lr or self.distill.critic_optimizer.muon_lr):
            raise UserError(
                f"training.sharding={self.sharding} cuts the matrices that muon_lr moves whole; set muon_lr to 0"
            )
        between(0, 1, "training", self, "ema_decay", "image_start", "open_captions")
        if self.distill.fast_rollout and self.cuda_graphs:
            raise UserError(
                "training.distill.fast_rollout=true captures graphs of its own, and training.cuda_graphs=true puts the "
                "whole update into one; set fast_rollout=false or cuda_graphs=false"
            )
        if self.distill.prompts is not None and self.open_captions:
            raise UserError(
                f"training.open_captions={self.open_captions} is for captions of the tiny world, and "
                f"training.distill.prompts={self.distill.prompts} gives others; set open_captions=0 or prompts=null"
            )
        if self.image_start and self.stage not in ("teacher_forcing", "few_steps", "distill"):
            raise UserError(
                f"training.image_start={self.image_start} is for stages teacher_forcing, few_steps and distill; "
                f"set it to 0 for stage {self.stage}"
            )
        if self.image_start and self.sequence_parallel > 1 and self.sequence_student == "shared":
            raise UserError(
                f"training.image_start={self.image_start} needs the student whole on each rank that makes an image; "
                "set image_start=0 or training.sequence_student=whole"
            )
