"""Every setting with its type, unit and default, defined once.

`configs.load.load_config` reads YAML and `key.sub=value` overrides into this tree. A value is checked here, when the
tree is built, and never again. Sizes of a network (layers, heads, widths) are not settings: they come with its weights,
in the `config.json` beside them.
"""

from dataclasses import dataclass, field
from typing import Any

from configs.errors import UserError
from configs.train_schema import TrainingConfig
from configs.validate import check_bounds, number, one_of

CONTEXTS = ("last_step", "clean", "renoise")
RECACHES = ("recache", "recache_window")
SWITCHES = (*RECACHES, "blend", "cut")
ATTENTION = ("auto", "sdpa", "cudnn", "fa2", "fa3")
TEXT_PLACES = ("keep", "after_use", "stream")
# context mode of the presets that have their own, before stream.context
CONTEXT_OF = {"release_2026_03": "last_step", "release_2026_11": "last_step", "self_forcing": "clean"}
DATED = {"release": "release_2026_11"}  # preset -> what it means today: the name that is stored
STUDENT_PLACES = ("keep", "stream")
MAX_SEED = 2**63 - 1
FP8 = ("fp8", "fp8_linears", "fp8_attention")
PRECISION = ("auto", "float32", "bfloat16", "float16", *FP8)


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """What is generated. 1 + 4 (F - 1) pixel frames come from F latent frames."""

    height: int = number(480, 1, 8192)  # pixels
    width: int = number(832, 1, 8192)  # pixels
    num_latent_frames: int = number(21, 1, 100_000)  # latent frames of one clip; 21 are 81 pixel frames
    fps: int = number(16, 1, 1000)  # pixel frames a second of playback

    def __post_init__(self):
        check_bounds("video", self)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Denoising steps of each chunk (model/schedule.py). The last row repeats for all later chunks."""

    preset: str | None = None  # a name in model.schedule.PRESETS or DATED; the other fields must then be left alone
    steps: Any = "4322222"  # steps of chunk 0, 1, ...: digits, or a list of integers
    first: float = number(1000.0, 0, 1000)  # un-warped timestep of a chunk's first step
    last: float = number(100.0, 0, 1000)  # un-warped timestep of a chunk's last step
    shift: float = number(5.0, 0.01, 100)  # sigma' = s sigma / (1 + (s - 1) sigma); 1 = none
    # instead of steps: the timesteps of each chunk, taken as they are
    timesteps: list[list[float]] | None = number(None, 0, 1000)

    def __post_init__(self):
        check_bounds("schedule", self)
        object.__setattr__(self, "preset", DATED.get(self.preset, self.preset))


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How a clip is divided into chunks, and the context of a chunk."""

    chunk_frames: int = number(3, 1, 1024)  # latent frames denoised together
    # latent frames that attention sees, sink and current chunk included; 0 = all
    window_frames: int = number(12, 0, 100_000)
    sink_frames: int = number(3, 0, 100_000)  # first latent frames that are never evicted, inside the window's budget
    # latent frames that rotary positions span from the sink on; then it moves up; 0 = any
    position_frames: int = number(1024, 0, 1_000_000)
    context: str = "last_step"  # keys that later chunks see: last_step (diagonal forcing), clean, renoise
    context_timestep: float = number(0.0, 0, 1000)  # timestep of the extra pass of `renoise`; `clean` always uses 0
    switch: str = "recache"  # handling of a new prompt (pipeline/switch.py): recache, recache_window, blend, cut
    switch_chunks: int = number(3, 1, 10_000)  # chunks that a blend takes

    def __post_init__(self):
        check_bounds("stream", self)
        one_of(SWITCHES, "stream", self, "switch")
        one_of(CONTEXTS, "stream", self, "context")
        c, w, s = self.chunk_frames, self.window_frames, self.sink_frames
        for name, value in (("window_frames", w), ("sink_frames", s)):
            if value % c:
                raise UserError(
                    f"stream.{name}={value} is not a whole number of chunks (stream.chunk_frames={c}); "
                    f"try {value // c * c}"
                )
        if w and w < s + c:
            raise UserError(
                f"stream.window_frames={w} leaves no room beside stream.sink_frames={s} for a chunk of {c}; "
                f"try stream.window_frames={s + 2 * c}"
            )
        if w and 0 < self.position_frames < w:
            raise UserError(
                f"stream.position_frames={self.position_frames} is less than stream.window_frames={w}, whose frames "
                f"all need a position; give {w} or more, or 0 for no bound"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where weights are: paths relative to the checkout, or absolute."""

    student: str = "wan_models/Wan2.1-T2V-1.3B"  # causal student; also `--checkpoint_path`
    use_ema: bool = False  # of a training checkpoint, load the averaged weights
    lora: list[str] = field(default_factory=list)  # LoRA files or folders that go on top of the student
    lora_scales: list[float] = number([], -100, 100)  # weight of each, 1 = as trained; empty = 1 for all
    lora_merge: bool = True  # add them into the student's weights, which costs no time later
    codec: str = "wan"  # wan: the VAE; taehv: the tiny decoder
    vae: str = "wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"
    tiny_decoder: str = "checkpoints/taew2_1.pth"
    text_encoder: str = "wan_models/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth"
    tokenizer: str = "wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl"
    text_tokens: int = number(512, 1, 8192)  # rows of the text embedding, zeros after the prompt's end

    def __post_init__(self):
        check_bounds("model", self)
        one_of(("wan", "taehv"), "model", self, "codec")
        if self.lora_scales and len(self.lora_scales) != len(self.lora):
            raise UserError(
                f"model.lora_scales={self.lora_scales} differs in length from model.lora ({len(self.lora_scales)} and "
                f"{len(self.lora)}); give one for each adapter, or none"
            )


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """How `inference.py` runs and where its files go."""

    prompts: str = "assets/prompts_tiny.txt"  # one prompt a line; also `--data_path`
    image: str = ""  # picture that videos begin with; also `--image`
    video: str = ""  # clip that they go on from; also `--video`
    # latent frames of the clip's end that are used; 0 = what fits the window beside a chunk
    video_frames: int = number(0, 0, 100_000)
    switch_frame_indices: str = ""  # of a story's prompts but the first: latent frames, "12, 24"; empty = even shares
    output_folder: str = "videos"
    num_samples: int = number(1, 1, 100_000)  # videos of one prompt, each with its own seed
    save_with_index: bool = False  # name files by the prompt's index rather than its words
    overwrite: bool = False  # generate again what is already there
    # auto = bfloat16 on a GPU that has it, else float32; fp8 = bfloat16 with large linears in float8 and, where a
    # kernel takes it (fa3), self-attention; fp8_linears, fp8_attention = one of the two
    precision: str = "auto"
    attention: str = "auto"  # attention kernel; auto = the fastest for the GPU and the number of keys
    compile: str = "auto"  # blocks = parts of a block compiled once for all; auto = on a GPU; off
    cuda_graphs: str = "auto"  # replay a step of each cache state instead of launching its kernels: auto, on, off
    # GPUs that share each chunk's tokens (pipeline/sequence_parallel.py): one stream is faster, as many prompts are not
    sequence_parallel: int = number(1, 1, 64)
    overlap: bool = True  # decode a chunk while the next one is denoised; one CPU core cannot
    student: str = "keep"  # on the GPU: keep; stream = a block at a time from the host, slower, for small cards
    text_encoder: str = "keep"  # on the GPU: keep; after_use = back to the host; stream = a block at a time
    text_int8: bool = False  # hold the text encoder's linears in 8 bits: half the bytes, videos differ a little
    # latent frames that the VAE decodes at once; 0 = as many as is fastest, 1 = least memory
    decode_frames: int = number(0, 0, 1024)
    profile: bool = False  # print where the time went

    def __post_init__(self):
        check_bounds("inference", self)
        one_of(STUDENT_PLACES, "inference", self, "student")
        one_of(TEXT_PLACES, "inference", self, "text_encoder")
        one_of(PRECISION, "inference", self, "precision")
        one_of(("auto", "off", "blocks"), "inference", self, "compile")
        one_of(("auto", "on", "off"), "inference", self, "cuda_graphs")
        one_of(ATTENTION, "inference", self, "attention")
        fast = (*(("precision", name) for name in FP8), ("compile", "blocks"), ("cuda_graphs", "on"))
        shared = (("sequence_parallel", self.sequence_parallel),) if self.sequence_parallel > 1 else ()
        for key, value in (*fast, *shared):
            if self.student == "stream" and vars(self)[key] == value:
                raise UserError(
                    f"inference.{key}={value} needs the student on the GPU for good, so it does not go with "
                    f"inference.student={self.student}; leave one of them out"
                )

    @property
    def fp8_linears(self) -> bool:
        """Whether large linear layers are float8."""
        return self.precision in ("fp8", "fp8_linears")

    @property
    def fp8_attention(self) -> bool:
        """Whether self-attention is float8; with precision=fp8 only where a kernel takes it."""
        return self.precision in ("fp8", "fp8_attention")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole tree."""

    name: str = "wan2.1_t2v_1.3b"
    seed: int = number(0, -1, MAX_SEED)  # -1: inference draws one and says which
    device: str = "auto"  # auto = cuda if there is one, else cpu
    # threads that torch computes with on the CPU; 0 = for videos one, for rounding depends on the number; for training
    # those of the CPUs that are available, shared out over a machine's ranks, unless OMP_NUM_THREADS says how many
    cpu_threads: int = number(0, 0, 1024)
    video: VideoConfig = field(default_factory=VideoConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        check_bounds("", self)
        if self.inference.sequence_parallel > 1 and self.model.lora and not self.model.lora_merge:
            raise UserError(
                f"inference.sequence_parallel={self.inference.sequence_parallel} needs adapters that are merged, so it "
                "does not go with model.lora_merge=false; leave one of them out"
            )
        f, c = self.video.num_latent_frames, self.stream.chunk_frames
        if f % c:
            raise UserError(
                f"video.num_latent_frames={f} is not a whole number of chunks (stream.chunk_frames={c}); "
                f"try {max(c, round(f / c) * c)}"
            )
