"""Settings of `train.py`, a section of the tree in configs/schema.py."""

from dataclasses import dataclass, field

from configs.distill_schema import DistillConfig
from configs.errors import UserError
from configs.optimizer_schema import OptimizerConfig
from configs.validate import check_bounds, groups_of, number, one_of

STAGES = ("text", "codec", "pretrain", "teacher_forcing", "few_steps", "ode_regression", "distill")
WORLD_STAGES = ("world_text", "world_vae", "world_teacher", "world_causal")  # of the moving world
ATTENTION = ("auto", "sdpa", "cudnn")  # those of inference.attention that torch differentiates under autocast
INIT = ("student", "teacher", "critic", "transformer", "vae", "text_encoder")  # networks that a stage starts from
TRAINED_PRECISION = ("auto", "float32", "bfloat16")  # float16 rounds gradients of a clip to 0
SHARDINGS = ("none", "full", "hybrid")
SEQUENCE_STUDENTS = ("whole", "shared")
LOGGERS = ("wandb", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching: timesteps, and the context of a causal student."""

    shift: float = number(5.0, 1, 100)  # timesteps are drawn evenly in un-warped time, then shifted
    text_dropout: float = number(0.1, 0, 1)  # share of samples trained without a prompt, for guidance
    context_timesteps: list[float] = number([0.0], 0, 1000)  # causal: noise level of the context, drawn per clip
    # pretrain, teacher_forcing, few_steps: share of steps on first chunks alone
    first_chunk_share: float = number(0.0, 0, 1)
    first_chunk_batch: int = number(64, 1, 1_000_000)  # clips in a micro-batch of such a step
    # first chunks made ahead for such steps; 0 = those of the whole clips
    first_chunk_clips: int = number(0, 0, 10_000_000)
    # few_steps: trajectories of a many-step student's first chunks, used instead of real first chunks
    first_chunk_trajectories: int = number(0, 0, 10_000_000)
    crop_share: float = number(0.0, 0, 1)  # the same stages: share of those on a square around the subject
    crop: int = number(6, 2, 1024)  # latent cells: side of that square, even
    crop_batch: int = number(160, 1, 1_000_000)  # clips in a micro-batch of such a step
    # few_steps: share of clips whose chunks, except the first, are the student's own predictions
    self_rollout_ratio: float = number(0.5, 0, 1)
    switched_share: float = number(0.0, 0, 1)  # few_steps: share of clips whose prompt changes
    switched_clips: int = number(2048, 1, 10_000_000)  # such clips made ahead
    bank_cache: str | None = None  # folder that keeps encoded clips for later runs, from the checkout on; None = none
    ode_interval: float = number(50.0, 1, 1000)  # Euler step of a teacher's trajectory, in un-warped time
    # s of cond + s (cond - uncond), in validation and for a teacher's trajectories
    guidance: float = number(1.0, 0, 1000)

    def __post_init__(self):
        check_bounds("training.flow", self)
        if self.crop % 2:
            raise UserError(f"training.flow.crop={self.crop} is not an even number of latent cells; use 4 or 6")


@dataclass(frozen=True, kw_only=True)
class CodecLossConfig:
    """Codec training on the tiny world: training clips and weights of the loss terms."""

    clip_frames: list[int] = number([17], 1, 10_001)  # lengths of training clips, each 1 + 4 n; one is drawn per step
    # pixels: side of a square around the subject, where there is something to learn; 0 = whole frames
    crop: int = number(0, 0, 8192)
    gradient: float = number(0.5, 0, 1_000_000)  # L1 between spatial finite differences, for sharp edges
    # L1 between differences of neighbouring frames: motion without a step at each latent frame
    temporal: float = number(0.0, 0, 1_000_000)
    # squared error beside L1: small coloured subjects count, and PSNR is what is measured
    mse: float = number(5.0, 0, 1_000_000)
    # squared error of the colour alone, which is learnt last: only small subjects have one
    chroma: float = number(20.0, 0, 1_000_000)
    kl: float = number(1e-5, 0, 1_000_000)  # KL to the unit normal, mean over latent values
    stills: float = number(0.0, 0, 1)  # world_vae: share of the steps, the first ones, that see single frames alone
    decoder_only: bool = False  # freeze the encoder, so that latents stay the same

    def __post_init__(self):
        check_bounds("training.codec", self)
        if not self.clip_frames or any(n < 1 or n % 4 != 1 for n in self.clip_frames):
            raise UserError(f"training.codec.clip_frames={self.clip_frames}: each must be 1 + 4 n, e.g. [17, 49]")
        if self.crop % 8:
            raise UserError(f"training.codec.crop={self.crop} is not a multiple of 8; use 48, or 0 for whole frames")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One stage of training."""

    stage: str = "pretrain"
    steps: int = number(1000, 1, 1_000_000_000)  # optimizer steps
    global_batch: int = number(64, 1, 1_000_000)  # samples a step, over all ranks and accumulated micro-batches
    micro_batch: int = number(64, 1, 1_000_000)  # samples a forward pass on one rank
    bank_clips: int = number(4096, 1, 10_000_000)  # tiny world: clips made ahead and drawn from
    # share of the tiny world's captions that state neither direction nor speed
    open_captions: float = number(0.0, 0, 1)
    # causal stages: share of clips that begin with a given frame, as --image does
    image_start: float = number(0.0, 0, 1)
    init: dict[str, str] = field(default_factory=dict)  # module -> weights, or a config.json for fresh ones
    ema_decay: float = number(0.999, 0, 1)
    ema_start_step: int = number(200, 0, 1_000_000_000)  # before this step the EMA is a copy of the weights
    precision: str = "auto"  # of activations under autocast; weights and optimizer state stay float32
    compile: bool = False  # torch.compile the repeated blocks (distill: but for self-attention)
    cuda_graphs: bool = False  # replay forward and backward as one CUDA graph
    attention: str = "auto"  # distill, flow matching of teachers; auto = cuDNN in half precision on Hopper and newer
    checkpointing: bool = False  # distill: recompute blocks in the backward pass (critic's: but for self-attention)
    sharding: str = "none"  # over ranks: none (replicated), full (FSDP2), hybrid (FSDP2 within groups of ranks)
    # hybrid: ranks of a group, which share one copy of everything; 0 = those of a machine
    shard_ranks: int = number(0, 0, 100_000)
    timeout_s: float = number(900.0, 1, 604_800)  # seconds that a rank waits for the others before it ends the run
    # ranks that share each sample's tokens and heads; the rest of them see other samples
    sequence_parallel: int = number(1, 1, 1024)
    sequence_student: str = "whole"  # on each of those ranks, or "shared": its chunks and their keys, too
    log_every: int = number(20, 1, 1_000_000_000)  # steps
    loggers: list[str] = field(default_factory=list)  # beside the JSON lines: wandb, tensorboard
    checkpoint_every: int = number(1000, 0, 1_000_000_000)  # steps; 0 = only at the end
    validate_every: int = number(0, 0, 1_000_000_000)  # steps; 0 = only at the end
    validation_clips: int = number(64, 0, 1_000_000)
    max_checkpoints: int = number(2, 1, 1_000_000)  # the newest that are kept
    accept_unfinished: bool = False  # start from a run of ours that has not reached its last step
    accept_changes: list[str] = field(default_factory=list)  # settings in which a resumed run may differ all the same
    export: str | None = None  # folder that the trained modules are written to at the end, from the checkout on
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    codec: CodecLossConfig = field(default_factory=CodecLossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self):
        check_bounds("training", self)
        self.optimizer.check("training.optimizer")
        one_of((*STAGES, *WORLD_STAGES), "training", self, "stage")
        for logger in self.loggers:
            if logger not in LOGGERS:
                raise UserError(f"training.loggers={self.loggers} names {logger}; use any of {', '.join(LOGGERS)}")
        for role in self.init:
            if role not in INIT:
                raise UserError(f"training.init.{role} is none of the networks there are; use {', '.join(INIT)}")
        one_of(TRAINED_PRECISION, "training", self, "precision")
        one_of(SHARDINGS, "training", self, "sharding")
        one_of(ATTENTION, "training", self, "attention")
        if self.attention != "auto" and self.stage != "distill":
            raise UserError(
                f"training.attention={self.attention} is for stage distill; use auto for stage {self.stage}"
            )
        if self.checkpointing and self.stage != "distill":
            raise UserError(f"training.checkpointing=true is for stage distill; use false for stage {self.stage}")
        if self.attention == "cudnn" and self.precision == "float32":
            raise UserError(
                "training.attention=cudnn does not compute in float32, which training.precision=float32 asks for; use "
                "training.attention=sdpa, or precision=bfloat16"
            )
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
                f"training.sharding={self.sharding} shards the matrices that Muon needs in full; set muon_lr to 0"
            )
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
        if self.image_start and self.stage not in ("teacher_forcing", "few_steps", "world_causal", "distill"):
            raise UserError(
                f"training.image_start={self.image_start} is for stages teacher_forcing, few_steps and distill; "
                f"set it to 0 for stage {self.stage}"
            )
        if self.image_start and self.sequence_parallel > 1 and self.sequence_student == "shared":
            raise UserError(
                f"training.image_start={self.image_start} needs the student whole on each rank that makes an image; "
                "set image_start=0 or training.sequence_student=whole"
            )

    def accumulation(self, ranks: int) -> tuple[int, str]:
        """Micro-batches per rank and step, so that all ranks together process `global_batch` samples; and in words.

        Raises UserError if that is no whole number, or if ranks that share samples do not come in whole groups.
        """
        groups = groups_of(ranks, self.sequence_parallel, "training.sequence_parallel")
        who = f"{groups} rank{'s' * (groups != 1)}"
        if self.sequence_parallel > 1:
            who = f"{groups} group{'s' * (groups != 1)} of {self.sequence_parallel} ranks"
        rounds, rest = divmod(self.global_batch, self.micro_batch * groups)
        if rest or not rounds:
            raise UserError(
                f"training.global_batch={self.global_batch} is not a multiple of training.micro_batch="
                f"{self.micro_batch} x {who}; try {max(1, rounds) * self.micro_batch * groups}"
            )
        return rounds, f"{self.global_batch} = {self.micro_batch} a pass x {who} x {rounds} accumulated"
