"""How much memory a configuration takes, from formulas, before anything is loaded. Needs no torch.

Bytes are those of tensors that live at once on one GPU. Added to them: CONTEXT, which the driver and its kernels take,
and SLACK, which the allocator loses between blocks. tests/model/test_memory.py holds the formulas to a count of every
storage that a run on the meta device makes and to peaks measured on an H100; `scripts/measure_memory.py` measures.

T tokens, D width, F width of the feed-forward, itemsize bytes per element (2 for bfloat16). In inference a block holds
its input, the feed-forward's hidden layer before and after GELU, and copies of width D (norms in float32). In training
each block saves its input and, over whole clips, the result of self-attention (model/checkpointing.py). While a block
is recomputed, everything that its backward pass reads is in memory too: 25 T D and 2 T F elements. 12 T D of them are
float32: the inputs of three norms, the outputs of two, and the feed-forward's result before its gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from configs.geometry import Geometry
from configs.schema import Config
from configs.train_schema import TrainingConfig
from model.sizes import RANDOM, WAN_1_3B, WAN_14B, TransformerSize
from model.weights.files import resolve_path
from model.weights.run_folders import find_weights
from utils.tables import aligned

GIB = 1 << 30
CONTEXT = 0.6 * GIB  # CUDA context and kernels
CUBLAS_WORKSPACE = 32 << 20  # that torch allocates for matrix products, and again for those in CUDA graphs (Hopper)
ALLOCATOR_OVERHEAD = 1.05  # bytes that the allocator reserves / bytes in use
GPU_SIZES_GIB = (12, 16, 24, 40, 48, 80)  # GiB on the box
USABLE = 0.95  # of them; a desktop, ECC and other programs take theirs
WAN_PIXEL = (4729, 5394)  # VAE of base 96: bytes a pixel of video held between calls, and for each latent frame of one
WAN_HOLES = 0.65  # of those, what torch's allocator holds and cannot give out, for what is carried lies between what
# is not; measured on an H100, torch 2.11: 0.50 with one latent frame at once and 0.63 with three when memory ran out
TINY_PIXEL = (168, 1209)  # tiny decoder: the same, but for each latent frame of a chunk
TINY_SEARCH = 1024  # as much again as its widest convolution reads and writes, while cuDNN tries kernels (compiled)
WAN_CALL = 2_000_000  # latent cells x base channels that WanCodec decodes at once by itself
T5_WEIGHTS, T5_BLOCK, T5_EMBEDDING = 11_361_820_672, 386_000_000, 2_100_298_752  # UMT5-XXL's encoder in bfloat16
T5_SCORES = 8 * 64 * 2  # bytes of its activations for each pair of tokens: position bias and mask of 64 heads
VAE_WEIGHTS, TINY_WEIGHTS = 253_785_062, 19_700_000  # in bfloat16


@dataclass(frozen=True)
class Phase:
    """A phase of a program, and the bytes that are in use during it, by part."""

    name: str
    parts: Mapping[str, float]
    fragmentation: float = 0.0  # bytes that the allocator loses beyond SLACK

    @property
    def total(self) -> float:
        """Bytes in total, including the overhead of driver and allocator."""
        return ALLOCATOR_OVERHEAD * sum(self.parts.values()) + self.fragmentation + CONTEXT


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that a configuration needs on one GPU, by phase."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def fits(self, gib: float) -> bool:
        """Whether a GPU with `gib` GiB is large enough."""
        return self.peak.total <= gib * GIB * USABLE

    def table(self) -> str:
        """Phases as columns, parts as rows, in GiB."""
        names = list(dict.fromkeys(part for phase in self.phases for part in phase.parts))
        rows = [["GiB", *(phase.name for phase in self.phases)]]
        for name in names:
            rows.append([name, *(f"{p.parts[name] / GIB:.2f}" if name in p.parts else "" for p in self.phases)])
        rows.append(["driver, allocator", *(f"{(p.total - sum(p.parts.values())) / GIB:.2f}" for p in self.phases)])
        rows.append(["sum", *(f"{phase.total / GIB:.2f}" for phase in self.phases)])
        return aligned(rows)


# --- inference --------------------------------------------------------------------------------------------------------


def cache_bytes(network: TransformerSize, geometry: Geometry, chunks: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes of the KV cache: keys and values of all chunks in the window, in all layers."""
    slots = geometry.window_chunks or chunks
    return 2 * network.layers * batch * slots * geometry.tokens_per_chunk * network.dim * itemsize


def text_bytes(network: TransformerSize, tokens: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes of the prompt's keys and values in all layers."""
    return 2 * network.layers * batch * tokens * network.dim * itemsize


def step_bytes(network: TransformerSize, tokens: int, itemsize: int = 2) -> int:
    """Peak bytes of activations in a forward pass without gradients (in the feed-forward); `tokens` of all samples."""
    return tokens * itemsize * (2 * network.ffn + 5 * network.dim)


def exchange_bytes(network: TransformerSize, tokens: int, itemsize: int = 2) -> int:
    """What ranks that share tokens hold of a block's queries, keys and values on their way; `tokens` of one rank."""
    return 2 * 3 * tokens * network.dim * itemsize


def decode_bytes(config: Config, batch: int = 1) -> tuple[int, int]:
    """Bytes of the decoder's state between chunks, and additional bytes while a chunk is decoded."""
    pixels = batch * config.video.height * config.video.width
    if config.model.codec == "taehv":
        held, each = TINY_PIXEL
        return pixels * held, pixels * each * config.stream.chunk_frames
    base, cells = 96, batch * (config.video.height // 8) * (config.video.width // 8)
    frames = config.inference.decode_frames or max(1, WAN_CALL // (cells * base))
    held, each = WAN_PIXEL
    return pixels * held, pixels * each * min(frames, config.stream.chunk_frames)


def decode_phase(config: Config, batch: int = 1) -> tuple[dict[str, int], float]:
    """Parts of the plan while a chunk is decoded, and bytes that are lost to fragmentation."""
    held, work = decode_bytes(config, batch)
    if config.model.codec != "taehv":
        return {"decoder state": held, "activations": work}, WAN_HOLES * (held + work)
    search = batch * config.video.height * config.video.width * TINY_SEARCH * config.stream.chunk_frames
    tried = {"search for kernels": search} if fast(config.inference.compile, config) else {}
    return {"decoder state": held, "activations": work} | tried, 0.0


def fast(setting: str, config: Config) -> bool:
    """Whether `inference.compile` or `cuda_graphs` (the value `setting`) is active on a GPU (model/fast/student.py)."""
    return setting != "off" and config.inference.student == "keep"


def text_encoder_bytes(config: Config, weights: int = T5_WEIGHTS) -> tuple[int, int]:
    """Bytes of the text encoder's weights, and how many of them are on the GPU while it runs."""
    block = T5_BLOCK
    if config.inference.text_int8 and weights > T5_EMBEDDING:  # all but the token embedding is in linears
        weights, block = (weights + T5_EMBEDDING) // 2, block // 2
    if config.inference.text_encoder != "stream":
        return weights, weights
    return weights, min(weights, T5_EMBEDDING + block)  # at the widest point of one the next has no room yet


def inference_plan(
    config: Config, student: TransformerSize = WAN_1_3B, batch: int = 1, *, text_weights: int = T5_WEIGHTS
) -> MemoryPlan:
    """Memory of `inference.py` in bfloat16. Phases: encoding the prompt, a denoising step, decoding a chunk.

    The KV cache of float8 attention is planned as float8, as it is with FlashAttention-3. With sequence_parallel the
    plan is that of the first GPU; the others hold only student, cache and step.
    """
    geometry = geometry_for(config, student)
    chunks = config.video.num_latent_frames // config.stream.chunk_frames
    weights = student.inference_bytes if config.inference.student == "keep" else student.offloaded_bytes
    ranks = config.inference.sequence_parallel
    cache = cache_bytes(student, geometry, chunks, batch, 1 if config.inference.fp8_attention else 2)
    always = {
        "student": student.fp8_bytes if config.inference.fp8_linears else weights,
        "codec": TINY_WEIGHTS if config.model.codec == "taehv" else VAE_WEIGHTS,
        "workspace": CUBLAS_WORKSPACE,
    }
    text_weights, encoder = text_encoder_bytes(config, text_weights)
    keep = {"text encoder": text_weights} if config.inference.text_encoder == "keep" else {}
    encoding = {"text encoder": encoder, "activations": T5_SCORES * batch * config.model.text_tokens**2}
    playing = {
        "KV cache": cache // ranks,
        "text keys": text_bytes(student, config.model.text_tokens, batch),
    }
    if fast(config.inference.cuda_graphs, config):  # which read a copy of the text's keys
        playing["CUDA graphs"] = playing["text keys"] + CUBLAS_WORKSPACE
    tokens = batch * geometry.tokens_per_chunk // ranks
    step = step_bytes(student, tokens) + (0 if ranks == 1 else exchange_bytes(student, tokens))
    decode, fragmentation = decode_phase(config, batch)
    carried = {"decoder state": decode["decoder state"]}
    return MemoryPlan(
        (
            Phase("encode prompt", always | encoding),
            Phase("denoise", always | keep | playing | carried | {"activations": step}),
            Phase("decode", always | keep | playing | decode, fragmentation),
        )
    )


# --- training ---------------------------------------------------------------------------------------------------------


def graph_bytes(
    network: TransformerSize, tokens: int, checkpointing: bool, itemsize: int = 2, *, attention: bool = True
) -> int:
    """Peak bytes of activations in a forward pass with gradients and its backward pass; `tokens` of all samples.

    attention: checkpointing saves the result of self-attention.
    """
    d, f = network.dim, network.ffn
    block = tokens * (25 * d + 2 * f) * itemsize
    if not checkpointing:
        return tokens * 21 * d * itemsize // 4 + network.layers * block + tokens * 5 * d * itemsize
    if attention:
        block -= attention_bytes(network, tokens, itemsize)  # the block at work has that already
    return held_graph_bytes(network, tokens, itemsize, attention=attention) + block + 2 * tokens * d * itemsize


def attention_bytes(network: TransformerSize, tokens: int, itemsize: int = 2) -> int:
    """Bytes that checkpointing saves of a block's self-attention: the result, and a float32 per token and head."""
    return tokens * (network.dim * itemsize + network.dim // 32)


def held_graph_bytes(network: TransformerSize, tokens: int, itemsize: int = 2, *, attention: bool = True) -> int:
    """Bytes that a checkpointed graph holds between its forward and its backward pass."""
    block = tokens * network.dim * itemsize + (attention_bytes(network, tokens, itemsize) if attention else 0)
    return tokens * 21 * network.dim * itemsize // 4 + network.layers * block


def start_of(training: TrainingConfig, role: str) -> str:
    """The entry of `training.init` whose weights `role` starts from: the critic starts from the teacher's unless
    another source, or a training checkpoint with a critic of its own, is named for it."""
    init = training.init
    if role != "critic" or "critic" not in init:
        return "teacher" if role == "critic" else role
    path = resolve_path(init["critic"])
    parts = path.suffix in (".pt", ".pth") or find_weights(path) != path
    return "critic" if parts or init["critic"] != init.get("teacher") else "teacher"


def weight_origin(training: TrainingConfig, role: str) -> str:
    """What the weights of student, teacher or critic are read from. Networks with the same start from equal weights,
    which are in memory once where they stay frozen."""
    name = start_of(training, role)
    source = training.init.get(name, "")
    drawn = not source or source.startswith(RANDOM) or source.endswith(".json")
    return f"{name}: {source}" if drawn or name == "critic" else str(resolve_path(source))


def adapter_parameters(network: TransformerSize, rank: int) -> int:
    """Parameters of LoRA adapters of `rank` on every linear layer of the blocks."""
    return network.layers * rank * (16 * network.dim + 2 * (network.dim + network.ffn))


def trained_bytes(betas: Sequence[float], averaged: bool) -> int:
    """Bytes per trained parameter: float32 weight and gradient, AdamW's moments (one if beta_1 is 0), and the EMA."""
    return 4 * (2 + (2 if betas[0] else 1) + averaged)


def geometry_for(config: Config, network: TransformerSize) -> Geometry:
    """The geometry of streams that `network` generates."""
    return replace(Geometry.from_config(config), latent_channels=network.channels, patch=network.patch)


def rollout_student_bytes(config: Config, student: TransformerSize) -> int:
    """Bytes of the inference copy of the student that makes the critic's rollouts (training.distill.fast_rollout):
    weights, KV cache, activations, and the text's keys and values twice, since its CUDA graphs hold a copy."""
    geometry, batch = geometry_for(config, student), config.training.micro_batch
    chunks = geometry.num_chunks(max(config.video.num_latent_frames, config.training.distill.long.max_frames))
    work = step_bytes(student, batch * geometry.tokens_per_chunk)
    keys = cache_bytes(student, geometry, chunks, batch) + 2 * text_bytes(student, config.model.text_tokens, batch)
    return student.inference_bytes + keys + work


def distill_plan(
    config: Config,
    student: TransformerSize = WAN_1_3B,
    teacher: TransformerSize = WAN_14B,
    critic: TransformerSize | None = None,
    *,
    gpus: int = 1,
) -> MemoryPlan:
    """Memory of stage `distill` on one of `gpus`: float32 for what is trained (weights, gradients, AdamW and EMA), and
    the rest in bfloat16, once for networks that start from the same; compute in bfloat16.

    With training.sharding each GPU holds its shard, two gathered blocks at a time, and the gathered student in bfloat16
    unless training.sequence_student=shared (trainer/parallel/apply.py). hybrid without shard_ranks assumes machines
    with eight GPUs. With adapters a graph takes up to a sixth less than planned: frozen linears keep no inputs.
    """
    t, geometry, critic = config.training, geometry_for(config, student), critic or student
    shards = {"none": 1, "full": gpus, "hybrid": t.shard_ranks or min(gpus, 8)}[t.sharding]
    lora, motion = t.distill.lora, t.distill.regresses_motion
    moved = adapter_parameters(student, lora.student_rank) or student.parameters
    learnt = adapter_parameters(critic, lora.critic_rank) or critic.parameters
    always = {
        "student, gradients, AdamW, average": trained_bytes(t.optimizer.betas, True) * moved / shards,
        "critic, gradients, AdamW": trained_bytes(t.distill.critic_optimizer.betas, False) * learnt / shards,
        "teacher": (teacher.fp8_bytes if t.distill.teacher_fp8 else teacher.inference_bytes) / shards,
        "text encoder": 0 if t.distill.encoded_prompts else 2 * T5_WEIGHTS,  # float32, and on every GPU
        "VAE": VAE_WEIGHTS,
    }
    bases = set() if t.distill.teacher_fp8 else {(weight_origin(t, "teacher"), teacher)}
    for part, role, network, frozen in (
        ("student's base", "student", student, lora.student_rank),
        ("critic's base", "critic", critic, lora.critic_rank),
        ("frozen start", "student", student, motion),
    ):
        origin = weight_origin(t, role), network
        if frozen and origin not in bases:
            always[part] = network.inference_bytes / shards
            bases.add(origin)
    if t.distill.fast_rollout:
        always["fast student"] = rollout_student_bytes(config, student)
    whole_student = t.sequence_student == "whole"
    if shards > 1 and whole_student:
        always["student, gathered"] = 2 * (student.parameters + adapter_parameters(student, lora.student_rank))
    frames = max(config.video.num_latent_frames, t.distill.long.max_frames)
    # of this GPU, where several share a sample: tokens outside attention, and as many of all heads' tokens inside
    window = t.micro_batch * config.video.num_latent_frames * geometry.tokens_per_frame // t.sequence_parallel
    sharing = 1 if whole_student else t.sequence_parallel
    rolled = t.micro_batch * frames * geometry.tokens_per_frame // sharing

    def whole(network: TransformerSize, frozen: bool) -> dict[str, float]:
        return {"blocks at work": 2 * network.block_parameters * (2 if frozen else 4)} if shards > 1 else {}

    keys = {"keys of the rollout": 4 * student.layers * rolled * student.dim}
    # each chunk is a forward pass of its own, so that what is recomputed at once is a chunk
    chunk = t.micro_batch * geometry.tokens_per_chunk // sharing
    held, others = (held_graph_bytes(student, n, attention=False) for n in (rolled, rolled - chunk))
    work = others + graph_bytes(student, chunk, True, attention=False)
    rollout = keys | {"activations": work if t.checkpointing else graph_bytes(student, rolled, False)}
    kept = {"keys of the rollout": keys["keys of the rollout"], "rollout's graph": held}
    scoring, learning = step_bytes(teacher, 2 * window), graph_bytes(critic, window, t.checkpointing)
    return MemoryPlan(
        (
            Phase("rollout", always | rollout | whole(student, bool(lora.student_rank))),
            Phase("teacher", always | kept | {"activations": scoring} | whole(teacher, True)),
            Phase("critic", always | {"activations": learning} | whole(critic, bool(lora.critic_rank))),
        )
    )
