"""Knobs of `train.py`, a section of the tree in configs/schema.py."""

from dataclasses import dataclass, field

from configs.validate import at_least, between, one_of

STAGES = ("codec", "pretrain", "teacher_forcing", "causal_ode")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to `final_lr_share` of the peak."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    final_lr_share: float = 0.05  # of lr, reached at the last step; 1 = constant
    max_grad_norm: float = 1.0  # gradients are clipped to this norm

    def __post_init__(self):
        at_least(0, "training.optimizer", self, "lr", "eps", "weight_decay", "warmup_steps", "max_grad_norm")
        between(0, 1, "training.optimizer", self, "final_lr_share")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching: which timesteps are drawn, and what the past looks like to a causal student."""

    shift: float = 5.0  # timesteps are drawn evenly in un-warped time, then shifted
    text_dropout: float = 0.1  # share of samples trained without a prompt, for guidance
    clean_context: float = 0.5  # causal stages: share of samples whose past is clean; the rest at a drawn noise level
    ode_steps: int = 24  # causal_ode: Euler steps of the teacher's trajectory
    guidance: float = 2.0  # causal_ode: cond + s (cond - uncond) of the teacher

    def __post_init__(self):
        between(0, 1, "training.flow", self, "text_dropout", "clean_context")
        at_least(1, "training.flow", self, "ode_steps")


@dataclass(frozen=True, kw_only=True)
class CodecLossConfig:
    """Codec training on the tiny world: clip length and the weights of its loss terms."""

    clip_frames: int = 17  # pixel frames of one training clip, 1 + 4 n
    kl: float = 1e-6
    gradient: float = 0.5  # L1 on spatial finite differences, for sharp edges
    latent_rms: float = 1e-3  # pulls the latents' scale towards 1


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One stage of training."""

    stage: str = "pretrain"
    steps: int = 1000  # optimiser steps
    global_batch: int = 64  # samples a step over all ranks and accumulation
    micro_batch: int = 64  # samples a forward pass on one rank
    bank_clips: int = 4096  # tiny world: clips encoded ahead and drawn from
    bank_refresh: int = 0  # steps after which the bank is drawn anew; 0 = never
    init: dict[str, str] = field(default_factory=dict)  # module name -> weights it starts from
    ema_decay: float = 0.999
    ema_start_step: int = 200  # before this step the average is the weights themselves
    precision: str = "auto"  # of activations under autocast; weights and optimiser stay float32
    compile: bool = False  # torch.compile of the repeated blocks
    cuda_graphs: bool = False  # replay forward and backward as CUDA graphs
    log_every: int = 20  # steps
    checkpoint_every: int = 1000  # steps
    validate_every: int = 0  # steps; 0 = only at the end
    max_checkpoints: int = 2  # the newest that are kept
    export: str | None = None  # folder that the trained modules are written to at the end
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    codec: CodecLossConfig = field(default_factory=CodecLossConfig)

    def __post_init__(self):
        one_of(STAGES, "training", self, "stage")
        at_least(1, "training", self, "steps", "global_batch", "micro_batch", "bank_clips", "log_every")
        at_least(0, "training", self, "bank_refresh", "ema_start_step", "checkpoint_every", "validate_every")
        at_least(1, "training", self, "max_checkpoints")
        between(0, 1, "training", self, "ema_decay")
