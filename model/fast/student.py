"""A fast causal student for streaming: `optimize_student(student, plan)`.

A step is split at self- and cross-attention. The three functions around them have the same shapes for every chunk and
do not depend on the cache, so each is compiled once and used for all blocks and chunks:

    pre_attention          norm, modulation, fused QKV, rotary; writes keys and values into the chunk's slot -> q
                           .. self-attention to the visible slots (a kernel for any number of keys)
    cross_attention_query  output projection, gate, norm, query of cross-attention -> x, q
                           .. cross-attention
    feed_forward           output projection, norm, modulation, feed-forward, gate -> x

CUDA graphs contain a whole step, one graph for each state of the cache, that is each pair (slot written, slots
visible). A bounded window has window + ring - 1 states, however long the stream is; `cache_states` lists them. A state
runs without a graph the first time, is captured the second time, and replayed from then on. Nothing waits for the GPU.

The algebra and the places where values are rounded are those of model/causal_wan.py; only the order of sums in fused
kernels differs. With `fused_norms` the three functions are those of model/fast/blocks.py.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from configs.errors import UserError
from configs.geometry import Geometry
from configs.schema import InferenceConfig
from model import fp8
from model.attention import Kernels, attend, attention_support, pick_kernels
from model.cache import E4M3, StreamLayer, StreamView, View, cast_for_cache, slot, visible_slots
from model.causal_wan import CausalWanBlock, CausalWanModel, RotaryEmb, TextKV, _modulate, _rotate
from model.denoiser import Student, as_timestep
from model.fast import blocks as fused_wan
from model.fast.ops import linear_gelu
from model.flow import x0_from_v
from utils.logs import get_logger

log = get_logger(__name__)

MAX_GRAPHS = 32  # an unbounded window has a state for each chunk; further ones run without a graph
# work on static buffers, which has run once -> its replay
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True, kw_only=True)
class FastPlan:
    """The optimizations of a student, in the order in which they are applied."""

    kernels: Kernels
    fuse_qkv: bool = True
    fp8: bool = False  # linear layers in float8
    fp8_cache: bool = False  # queries, keys and values of self-attention in float8
    fused_gelu: bool = False  # GELU in the epilogue of the matrix product
    fused_norms: bool = False  # norms, rotary embedding and quantization by the kernels of model/fast/ops.py
    compile: bool = False
    cuda_graphs: bool = False

    @classmethod
    def from_config(cls, config: InferenceConfig, device: torch.device) -> "FastPlan":
        """The plan for `config` on `device`. `auto` enables everything on a GPU and nothing on a CPU or for a student
        whose blocks are offloaded.

        Raises UserError for a setting that does not work on the device.
        """
        gpu = device.type == "cuda"
        stays = config.student == "keep"
        triton = importlib.util.find_spec("triton") is not None
        if config.fp8_linears:
            fp8.check_fp8(device, f"inference.precision={config.precision}")
        if config.cuda_graphs == "on" and not gpu:
            raise UserError(f"inference.cuda_graphs=on needs a GPU and device={device} is none; use auto")
        if config.compile == "blocks" and gpu and not triton:
            raise UserError("inference.compile=blocks needs triton, which is not installed; use inference.compile=off")
        kernels = pick_kernels(config.attention, *attention_support(device))
        if config.precision == "fp8_attention" and kernels.self_attention != "fa3":
            raise UserError(
                "inference.precision=fp8_attention needs FlashAttention-3 (a Hopper GPU, `pip install fa3-fwd`), and "
                f"self-attention is computed by {kernels.self_attention} on device={device}; "
                "use inference.precision=auto"
            )
        compiled = config.compile == "blocks" or (config.compile == "auto" and gpu and triton and stays)
        return cls(
            kernels=kernels,
            fp8_cache=config.fp8_attention and kernels.self_attention == "fa3",
            fp8=config.fp8_linears,
            fused_gelu=gpu,
            fused_norms=gpu and compiled,
            compile=compiled,
            cuda_graphs=config.cuda_graphs == "on" or (config.cuda_graphs == "auto" and gpu and stays),
        )

    @property
    def is_noop(self) -> bool:
        """Whether the plan changes nothing."""
        return not (self.compile or self.cuda_graphs or self.fp8 or self.fp8_cache)


@torch.no_grad()
def optimize_student(student: Student, plan: FastPlan) -> "FastStudent":
    """Apply `plan` to `student` in place and return the fast student. It cannot be trained afterwards.

    Projections with unmerged LoRA adapters are not fused or quantized.
    """
    model = student.model
    log.info(str(plan.kernels))
    if plan.fuse_qkv:
        for block in model.blocks:
            fuse_qkv_projections(block.attn1)
    if plan.fp8:
        log.info(fp8.quantize_blocks(model.blocks))
    return FastStudent(model, plan)


def fuse_qkv_projections(attn: nn.Module) -> None:
    """Replace the projections of q, k and v of self-attention by a single one and free their weights."""
    parts = (attn.to_q, attn.to_k, attn.to_v)
    if attn.fused_projections or any(type(part) is not nn.Linear for part in parts):
        return
    attn.fuse_projections()
    del attn.to_q, attn.to_k, attn.to_v


def cache_states(geometry: Geometry, num_chunks: int) -> list[tuple[int, int]]:
    """The distinct pairs (slot written, slots visible) of the chunks of a stream, in order of first occurrence."""
    return list(dict.fromkeys((slot(geometry, k), visible_slots(geometry, k)) for k in range(num_chunks)))


# --- the step ---------------------------------------------------------------------------------------------------------


def pre_attention(
    block: CausalWanBlock, x: Tensor, modulation: Tensor, rotary_emb: RotaryEmb, k_slot: Tensor, v_slot: Tensor
) -> Tensor:
    """x [B, L, D] -> queries [B, L, heads, head_dim]; writes k_slot and v_slot [B, L, heads, head_dim]."""
    attn = block.attn1
    y = block.attention_input(x, modulation)
    if attn.fused_projections:
        q, k, v = attn.to_qkv(y).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(y), attn.to_k(y), attn.to_v(y)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
    k_slot.copy_(cast_for_cache(_rotate(k, rotary_emb), k_slot.dtype))
    v_slot.copy_(cast_for_cache(v, v_slot.dtype))
    return cast_for_cache(_rotate(q, rotary_emb).type_as(v), k_slot.dtype)


def cross_attention_query(
    block: CausalWanBlock, x: Tensor, modulation: Tensor, attn_output: Tensor
) -> tuple[Tensor, Tensor]:
    """x [B, L, D] and the result of self-attention [B, L, heads, head_dim] -> x, queries of cross-attention."""
    x, q = block.cross_attention_query(x, attn_output, modulation)
    return x, q.type_as(x)


def feed_forward(block: CausalWanBlock, x: Tensor, modulation: Tensor, attn_output: Tensor, fused_gelu: bool) -> Tensor:
    """x [B, L, D] and the result of cross-attention [B, L, heads, head_dim] -> x."""
    x = block.add_cross_attention(x, attn_output)
    wide, _, narrow = block.ffn.net
    if not fused_gelu or type(wide.proj) is not nn.Linear:
        return block.feed_forward(x, modulation)
    return block.feed_forward(x, modulation, lambda y: narrow(linear_gelu(y, wide.proj.weight, wide.proj.bias)))


def patchify(model: CausalWanModel, latents: Tensor) -> Tensor:
    """Latents [B, F, C, H, W] -> tokens [B, L, D]: the patch embedding as one matrix product."""
    conv = model.patch_embedding
    _, p, q = model.config.patch_size
    cells = rearrange(latents.to(conv.weight.dtype), "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
    return functional.linear(cells, conv.weight.flatten(1), conv.bias)


def output_head(model: CausalWanModel, x: Tensor, temb: Tensor) -> Tensor:
    """Tokens [B, L, D] -> their v [B, L, p q C]."""
    shift, scale = (model.scale_shift_table[:, None] + temb[:, :, None]).chunk(2, dim=2)
    return model.proj_out(_modulate(model.norm_out(x.float()), shift, scale).type_as(x))


def unpatchify_to_x0(model: CausalWanModel, y: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v of all tokens [B, L, p q C] -> x0 [B, F, C, H, W]."""
    _, p, q = model.config.patch_size
    frames, height, width = x_t.shape[1], x_t.shape[3] // p, x_t.shape[4] // q
    v = rearrange(y, "b (f h w) (p q c) -> b f c (h p) (w q)", f=frames, h=height, w=width, p=p, q=q)
    return x0_from_v(x_t, v, t)


class FastStep:
    """One step, from x_t to x0 of a chunk, by the functions above, compiled or not."""

    def __init__(self, model: CausalWanModel, plan: FastPlan, backend: str = "inductor"):
        self.model, self.plan = model, plan
        self.fused = plan.fused_norms and fused_wan.fits(model)
        own = (fused_wan.pre_attention, fused_wan.cross_attention_query, fused_wan.feed_forward)
        plain = (pre_attention, cross_attention_query, feed_forward)
        ends = (patchify, output_head, unpatchify_to_x0, fused_wan.adaln_modulations)
        parts = (*ends, *(own if self.fused else plain))
        if plan.compile:
            parts = tuple(torch.compile(part, fullgraph=True, dynamic=False, backend=backend) for part in parts)
        self._patches, self._head, self._to_x0, self._adaln_tables, *blocks = parts
        self._pre_attention, self._query, self._feed_forward = blocks

    def __call__(self, x_t: Tensor, t: Tensor, rotary_emb: RotaryEmb, text: TextKV, layers: Sequence[StreamLayer]):
        model, kernels, group = self.model, self.plan.kernels, self.model.sequence
        x = self._patches(model, x_t)
        if group is not None:
            x = group.split(x)
        temb, modulation = model._embed_time(t, x.dtype)
        modulations = self._adaln_tables(model, modulation) if self.fused else [modulation] * len(layers)
        for block, modulation, layer, (k, v) in zip(model.blocks, modulations, layers, text, strict=True):
            own, seen = slice(layer.start, layer.start + layer.tokens), slice(layer.end)
            q = self._project(block, x, modulation, rotary_emb, layer.keys[:, own], layer.values[:, own])
            attended = attend(kernels.self_attention, q, layer.keys[:, seen], layer.values[:, seen])
            if group is not None:
                attended = group.tokens_from(attended)
            x, q = self._query(block, x, modulation, attended)
            x = self._feed_forward(block, x, modulation, attend(kernels.cross_attention, q, k, v), self.plan.fused_gelu)
        y = self._head(model, x, temb)
        return self._to_x0(model, y if group is None else group.gather(y), x_t, t)

    def _project(
        self, block: CausalWanBlock, x: Tensor, modulation: Tensor, rotary_emb: RotaryEmb, k_slot: Tensor,
        v_slot: Tensor,
    ) -> Tensor:
        """`pre_attention`; where ranks share the tokens, of all tokens and this rank's heads."""
        group = self.model.sequence
        if group is None:
            return self._pre_attention(block, x, modulation, rotary_emb, k_slot, v_slot)
        k, v = (k_slot.new_empty(*x.shape[:2], block.attn1.heads, k_slot.shape[3]) for _ in range(2))
        q = self._pre_attention(block, x, modulation, rotary_emb, k, v)
        return group.heads_into(q, k, v, k_slot, v_slot)


# --- the student ------------------------------------------------------------------------------------------------------


class FastStudent(Student):
    """A student that uses FastStep for the steps of a stream, and the plain model for anything else."""

    def __init__(self, model: CausalWanModel, plan: FastPlan, backend: str = "inductor"):
        super().__init__(model)
        self.plan, self.step = plan, FastStep(model, plan, backend)
        self.cache_dtype = E4M3 if plan.fp8_cache else None
        self.recorder: Callable[[], Recorder] | None = CUDAGraphRecorder if plan.cuda_graphs else None
        self._graph_caches = WeakTensorKeyDictionary()  # keyed by the first layer's keys: freed with the cache
        self._rotation: tuple[tuple, RotaryEmb] | None = None

    @property
    def graphs(self) -> int:
        """Number of captured CUDA graphs, over all caches that are alive."""
        return sum(len(graph_cache.replays) for graph_cache in self._graph_caches.values())

    def release_graphs(self) -> None:
        """Free all CUDA graphs; they are captured again when needed."""
        self._graph_caches.clear()

    def x0(
        self, x_t: Tensor, t: float | Tensor, text: TextKV | Tensor, view: View | None = None, start_frame: int = 0
    ) -> Tensor:
        """x0 = x_t - sigma v."""
        t = as_timestep(t, x_t)
        streams = not torch.is_grad_enabled() and isinstance(view, StreamView) and not isinstance(text, Tensor)
        if not streams or t.ndim == 2:  # a chunk with conditioning frames: only a few passes per stream
            return super().x0(x_t, t, text, view, start_frame)
        x_t = x_t.contiguous()  # other strides would be compiled again
        layers = [view.layer(i) for i in range(len(self.model.blocks))]
        rotary_emb = self._rotary(x_t, start_frame)
        if self.recorder is None:
            return self.step(x_t, t, rotary_emb, text, layers)
        graph_cache = self._graph_caches.get(layers[0].keys)
        if graph_cache is None or not graph_cache.fits(x_t, t, text):
            graph_cache = CUDAGraphCache(self.step, self.recorder(), x_t, t, rotary_emb, text)
            self._graph_caches[layers[0].keys] = graph_cache
        return graph_cache.run(x_t, t, rotary_emb, text, layers)

    def _rotary(self, x_t: Tensor, start_frame: int) -> RotaryEmb:
        """cos and sin of this rank's tokens of the chunk; the same tensors in all steps of a chunk."""
        _, p, q = self.model.config.patch_size
        height, width = x_t.shape[3] // p, x_t.shape[4] // q
        key = (start_frame, x_t.shape[1], height, width, x_t.device)
        if self._rotation is None or self._rotation[0] != key:
            ids = torch.arange(start_frame, start_frame + x_t.shape[1], device=x_t.device)
            rotary_emb, group = self.model.rope(ids, height, width), self.model.sequence
            own = rotary_emb if group is None else tuple(group.split(part) for part in rotary_emb)
            self._rotation = (key, own)
        return self._rotation[1]


class CUDAGraphCache:
    """CUDA graphs for the buffers of one cache, by (first token written, tokens visible), and their static inputs."""

    def __init__(self, step: FastStep, record: Recorder, x_t, t, rotary_emb: RotaryEmb, text: TextKV):
        self._step, self._record = step, record
        self._x, self._t, self._out = x_t.clone(), t.clone(), torch.empty_like(x_t)
        self._rotation = tuple(part.clone() for part in rotary_emb)
        self._text = [(k.clone(), v.clone()) for k, v in text]
        self._source: tuple = (rotary_emb, text)  # last copied to the static inputs; kept alive for `is`
        self._tried: set[tuple[int, int]] = set()
        self.replays: dict[tuple[int, int], Callable[[], None]] = {}

    def fits(self, x_t: Tensor, t: Tensor, text: TextKV) -> bool:
        """Whether these inputs have the shapes of the static ones."""
        return (
            x_t.shape == self._x.shape
            and x_t.dtype == self._x.dtype
            and t.shape == self._t.shape
            and text[0][0].shape == self._text[0][0].shape
        )

    def run(self, x_t: Tensor, t: Tensor, rotary_emb: RotaryEmb, text: TextKV, layers: Sequence[StreamLayer]) -> Tensor:
        """x0, in a new tensor."""
        key = (layers[0].start, layers[0].end)
        if key not in self._tried or (key not in self.replays and len(self.replays) >= MAX_GRAPHS):
            self._tried.add(key)
            return self._step(x_t, t, rotary_emb, text, layers)
        self._x.copy_(x_t)
        self._t.copy_(t)
        self._refresh(rotary_emb, text)
        if key not in self.replays:
            self.replays[key] = self._record(lambda: self._fixed(layers))
        self.replays[key]()
        return self._out.clone()

    def _fixed(self, layers: Sequence[StreamLayer]) -> None:
        self._out.copy_(self._step(self._x, self._t, self._rotation, self._text, layers))

    def _refresh(self, rotary_emb: RotaryEmb, text: TextKV) -> None:
        old_rotation, old_text = self._source
        if rotary_emb is not old_rotation:
            torch._foreach_copy_(list(self._rotation), list(rotary_emb))
        if text is not old_text:
            torch._foreach_copy_([x for kv in self._text for x in kv], [x for kv in text for x in kv])
        self._source = (rotary_emb, text)


class CUDAGraphRecorder:
    """Captures functions into CUDA graphs that share one memory pool, since they never run concurrently."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture `work`, without running it, and return the function that replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay
