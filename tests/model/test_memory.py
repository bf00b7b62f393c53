"""The memory plan's formulas against a count of every storage that a computation makes, at full size, on no device."""


import pytest
import torch
from count_bytes import counting
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig
from transformers import UMT5Config, UMT5EncoderModel

from configs.errors import UserError
from configs.geometry import Geometry
from configs.load import load_config
from model import memory
from model.cache import StreamCache
from model.causal_wan import CausalWanModel
from model.checkpointing import full_checkpoint, selective_checkpoint
from model.codec import WORK_PER_CALL, WanCodec
from model.fast import offload
from model.fast.codec import optimize_codec
from model.fast.int8 import quantize_linears
from model.memory import distill_plan, inference_plan
from model.sizes import WAN_1_3B, WAN_14B, TransformerSize
from model.tiny_decoder import TinyDecoder, TinyDecoderCodec
from pipeline.cli import LOW_MEMORY
from pipeline.preflight import memory_plan
from trainer.distill.networks import LORA_TARGETS

BF16 = torch.bfloat16
CONFIG = "configs/wan2.1_t2v_1.3b.yaml"
TINY = TransformerSize(dim=128, ffn=512, layers=7, text_dim=64, freq_dim=64)


def build(cls, network: TransformerSize, layers: int | None = None):
    heads = network.dim // (32 if network is TINY else 128)
    sizes = {"num_attention_heads": heads, "attention_head_dim": network.dim // heads, "ffn_dim": network.ffn}
    sizes |= {"num_layers": layers or network.layers, "text_dim": network.text_dim, "freq_dim": network.freq_dim}
    with torch.device("meta"):
        return cls(**sizes)


@pytest.mark.parametrize("network", [WAN_1_3B, WAN_14B, TINY], ids=["1.3B", "14B", "tiny"])
def test_parameters_are_those_of_the_networks(network):
    model = build(WanTransformer3DModel, network)
    assert network.parameters == sum(p.numel() for p in model.parameters())
    assert network.block_parameters == sum(p.numel() for p in model.blocks[0].parameters())
    keep = set(model._keep_in_fp32_modules)
    wide = sum(p.numel() for name, p in model.named_parameters() if keep & set(name.split(".")))
    assert network.fp32_parameters == wide
    assert TransformerSize.from_config(model.config) == network


def test_parameters_are_those_of_the_published_files():
    assert (WAN_1_3B.parameters, WAN_14B.parameters) == (1_418_996_800, 14_288_491_584)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("network", [WAN_1_3B, WAN_14B], ids=["1.3B", "14B"])
@torch.no_grad()
def test_activations_of_a_denoising_step_are_those_counted(monkeypatch, network, batch):
    config = load_config(CONFIG)
    geometry = Geometry.from_config(config)
    model = build(CausalWanModel, network, layers=2).to(BF16).eval()
    small = TransformerSize(dim=network.dim, ffn=network.ffn, layers=2)
    heads = network.dim // 128
    with torch.device("meta"):
        cache = StreamCache(2, batch, heads, 128, geometry, device="meta", dtype=BF16)
        text = model.text_kv(torch.empty(batch, 512, 4096, dtype=BF16))
        latents, t = torch.empty(geometry.latent_shape(batch, 3)), torch.empty(batch)
        assert memory.cache_bytes(small, geometry, 7, batch) == cache.bytes
        assert memory.text_bytes(small, 512, batch) == sum(x.nbytes for pair in text for x in pair)
        with counting(monkeypatch) as counter:
            model(latents, t, text, view=cache.begin(0), start_frame=0)
    assert memory.step_bytes(network, batch * geometry.tokens_per_chunk) == pytest.approx(counter.peak, rel=0.1)


@torch.no_grad()
def test_blocks_on_the_host():
    """Slots of two blocks and what is not a block, counted where they are."""
    model = build(CausalWanModel, WAN_1_3B, layers=2).to(BF16)
    for name, value in model.named_parameters():
        if set(model._keep_in_fp32_modules) & set(name.split(".")):
            value.data = value.data.float()
    slots = 2 * sum(offload._aligned_size(value) for value in model.blocks[0].parameters())
    rest = sum(value.nbytes for name, value in model.named_parameters() if not name.startswith("blocks."))
    assert WAN_1_3B.offloaded_bytes == pytest.approx(slots + rest, rel=0.01)


@pytest.mark.parametrize("int8", [False, True])
@torch.no_grad()
def test_text_encoder(monkeypatch, int8):
    """One of its blocks, counted, is the plan's; so are the activations of a prompt."""
    sizes = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 2, "num_heads": 64}
    with torch.device("meta"):
        network = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).to(BF16).eval()
        if int8:
            quantize_linears(network.encoder, "meta", "meta")
        blocks, shared = ([*part.parameters(), *part.buffers()] for part in (network.encoder.block, network.shared))
        ids = torch.zeros(1, 512, dtype=torch.long)
        mask = torch.zeros(1, 1, 512, 512, dtype=torch.bool)  # as transformers makes it, which looks at values
        monkeypatch.setattr("transformers.models.umt5.modeling_umt5.create_bidirectional_mask", lambda **_: mask)
        with counting(monkeypatch) as counter:
            network(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert memory.T5_SCORES * 512**2 == pytest.approx(counter.peak, rel=0.1)
    both, embedding = (sum(x.nbytes for x in tensors) for tensors in (blocks, shared))
    config = load_config(CONFIG, [f"inference.text_int8={int8}", "inference.text_encoder=stream"])
    held, working = memory.text_encoder_bytes(config)
    assert working == pytest.approx(embedding + both / 2, rel=0.01)
    assert held == pytest.approx(embedding + 12 * both, rel=0.01)


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("size", [(480, 832), (720, 1280)])
@torch.no_grad()
def test_decoding_with_the_vae(monkeypatch, frames, size):
    height, width = size
    changes = [f"video.height={height}", f"video.width={width}", f"inference.decode_frames={frames}"]
    config = load_config(CONFIG, changes)
    monkeypatch.setitem(WORK_PER_CALL, "cuda", frames * height * width // 64 * 96)
    with torch.device("meta"):
        stream = WanCodec(AutoencoderKLWan().to(BF16).eval()).stream()
        latents = torch.empty(Geometry.from_config(config).latent_shape(1, 3))
        stream.decode(latents)
        carried = [x for x in stream._cache if isinstance(x, torch.Tensor)]
        carried_bytes = [x.nbytes for x in carried]
        with counting(monkeypatch, *carried) as counter:
            del carried
            stream.decode(latents)
    assert memory.decode_bytes(config)[0] == pytest.approx(sum(carried_bytes), rel=0.01)
    assert sum(memory.decode_bytes(config)) == pytest.approx(counter.peak, rel=0.1)


@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_decoding_with_the_tiny_decoder(monkeypatch, fast):
    config = load_config(CONFIG, ["model.codec=taehv"])
    with torch.device("meta"):
        decoder = TinyDecoder().to(BF16)
        codec = TinyDecoderCodec(decoder)
        stream = (optimize_codec(codec, compiled=False) if fast else codec).stream()
        latents = torch.empty(Geometry.from_config(config).latent_shape(1, 3))
        stream.decode(latents)
        carried = sum(x.nbytes for x in stream._memory)
        with counting(monkeypatch, *stream._memory) as counter:
            stream.decode(latents)
    assert memory.decode_bytes(config)[0] == pytest.approx(carried, rel=0.01)
    assert sum(memory.decode_bytes(config)) == pytest.approx(counter.peak, rel=0.1)
    assert memory.TINY_WEIGHTS == pytest.approx(2 * sum(p.numel() for p in decoder.parameters()), rel=0.1)


@pytest.mark.parametrize("how", [None, full_checkpoint, selective_checkpoint])
@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("size", [WAN_1_3B, WAN_14B], ids=["1.3B", "14B"])
def test_training_a_network(monkeypatch, how, layers, size):
    model = build(WanTransformer3DModel, size, layers).to(BF16)
    if how:
        model.enable_gradient_checkpointing(how)
    for p in model.parameters():  # gradients are there before
        p.grad = torch.empty_like(p)
    network = TransformerSize(dim=size.dim, ffn=size.ffn, layers=layers)
    with torch.device("meta"):
        latents, text = torch.empty(1, 16, 21, 60, 104, dtype=BF16), torch.empty(1, 512, 4096, dtype=BF16)
        with counting(monkeypatch) as counter:
            out = model(latents, torch.empty(1), text, return_dict=False)[0]
            held = counter.now
            out.sum().backward()
    tokens = 21 * 1560
    kept = {"attention": how is selective_checkpoint}
    assert memory.graph_bytes(network, tokens, how is not None, **kept) == pytest.approx(counter.peak, rel=0.02)
    if how:
        assert memory.held_graph_bytes(network, tokens, **kept) == pytest.approx(held, rel=0.02)


# Peaks of allocated bytes by `scripts/measure_memory.py`, H100, torch 2.11: encoding a prompt, denoising, decoding.
LEAST = ("inference.student=stream", "inference.text_encoder=stream", "inference.decode_frames=1")
INT8 = ("inference.text_int8=true", "inference.decode_frames=1")
MEASURED = {
    ("_12gb", ()): (5_687_305_216, 6_889_086_976, 9_244_829_696),
    ("_16gb", ()): (5_924_383_744, 8_977_661_952, 11_108_613_632),
    ("_24gb", ()): (14_800_002_048, 8_979_787_776, 15_709_557_760),
    ("", ()): (14_800_002_048, 20_339_089_408, 27_069_656_064),
    ("", LEAST): (3_301_291_008, 6_230_624_768, 8_637_965_312),
    ("", INT8): (10_167_262_208, 15_711_657_984, 17_842_019_840),
}
HELD = [  # bytes that torch's allocator held, with what was asked for where it then ran out of memory, in the VAE
    (("inference.student=stream", "inference.text_encoder=stream", "inference.decode_frames=1"), 10_180_000_000),
    (("inference.text_int8=true",), 25_990_000_000),
]


@pytest.mark.parametrize("preset", MEASURED, ids=lambda preset: preset[0] or "full")
def test_inference_is_planned_as_measured(preset):
    name, change = preset
    config = load_config(f"configs/wan2.1_t2v_1.3b{name}.yaml", change)
    for phase, measured in zip(inference_plan(config).phases, MEASURED[preset], strict=True):
        assert sum(phase.parts.values()) == pytest.approx(measured, rel=0.1), phase.name


@pytest.mark.parametrize(("changes", "held"), HELD, ids=["least", "int8"])
def test_what_the_allocator_held_is_within_the_plan(changes, held):
    assert held <= inference_plan(load_config(CONFIG, changes)).peak.total - memory.CONTEXT <= 1.1 * held


def test_float8_is_planned_as_measured():
    """Weights and cache by `scripts/benchmark.py`, the same GPU."""
    plan = inference_plan(load_config(CONFIG, ["inference.precision=fp8"]))
    for part, measured in (("student", 1_679_390_848), ("KV cache", 1_725_235_200)):
        assert plan.phases[1].parts[part] == pytest.approx(measured, rel=0.01)
    both, without = plan.phases[1].parts, inference_plan(load_config(CONFIG)).phases[1].parts
    for name, part, other in (("linears", "student", "KV cache"), ("attention", "KV cache", "student")):
        one = inference_plan(load_config(CONFIG, [f"inference.precision=fp8_{name}"])).phases[1].parts
        assert one[part] == both[part] and one[other] == without[other] > both[other]


def test_training_is_planned_as_measured():
    """One clip of 480x832 through the 1.3B network and back, checkpointed, but for the results of self-attention, which
    were not kept then; H100, torch 2.11."""
    tokens = 21 * 1560
    rest = memory.graph_bytes(WAN_1_3B, tokens, True) - WAN_1_3B.layers * memory.attention_bytes(WAN_1_3B, tokens)
    assert rest == pytest.approx(7.54e9, rel=0.1)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", [12, 16, 24])
def test_presets_fit_their_card(card):
    config = load_config(f"configs/wan2.1_t2v_1.3b_{card}gb.yaml")
    assert inference_plan(config).fits(card)
    smaller = {24: 16, 16: 12, 12: 8}[card]
    assert not inference_plan(config).fits(smaller), "then it should be the preset of the smaller card"


@pytest.mark.parametrize(("name", "card", "smaller"), [("", 80, 48), ("_48gb", 48, 40), ("_40gb", 40, 24)])
def test_presets_of_14b_fit_their_card(name, card, smaller):
    """Without files the sizes are those that the student's name tells."""
    plan = memory_plan(load_config(f"configs/wan2.1_t2v_14b{name}.yaml"), {})
    assert plan.fits(card) and not plan.fits(smaller)


def test_14b_is_planned_as_two_h200_measured_it():
    """Tensors at most, GB, on the first of so many GPUs; docs/benchmarks/inference.md. There was no text encoder."""
    measured = {("bfloat16", 1): 46.57, ("bfloat16", 2): 38.96, ("fp8", 1): 27.56, ("fp8", 2): 23.70}
    for (precision, gpus), peak in measured.items():
        settings = ["model.codec=taehv", "inference.text_encoder=stream", f"inference.precision={precision}"]
        plan = inference_plan(load_config(CONFIG, [*settings, f"inference.sequence_parallel={gpus}"]), WAN_14B)
        parts = max(sum(phase.parts.values()) for phase in plan.phases if phase.name != "encode prompt")
        assert 1e9 * peak <= 1.02 * parts and parts <= 1.1e9 * peak, (precision, gpus, parts / 1e9)


def test_other_ways_to_fit_a_card():
    """What docs/speed-and-memory.md and scripts/measure_memory.py name beside the presets."""
    assert inference_plan(load_config(CONFIG, LOW_MEMORY)).fits(12)
    eight = load_config(CONFIG, ["inference.text_int8=true"])
    assert not inference_plan(eight).fits(24)
    assert inference_plan(load_config(CONFIG, ["inference.text_int8=true", "inference.decode_frames=1"])).fits(24)


def test_length_costs_nothing_where_the_window_is_bounded():
    short, long = (inference_plan(load_config(CONFIG, [f"video.num_latent_frames={n}"])) for n in (21, 2100))
    assert short.peak.total == long.peak.total
    unbounded = ["stream.window_frames=0", "stream.sink_frames=0"]
    short, long = (inference_plan(load_config(CONFIG, [*unbounded, f"video.num_latent_frames={n}"])) for n in (21, 42))
    assert long.phases[1].parts["KV cache"] == 2 * short.phases[1].parts["KV cache"]


def test_training_shares_are_those_of_the_gpus():
    config = load_config("configs/train_wan2.1_t2v_1.3b.yaml")
    one, eight = distill_plan(config, gpus=1), distill_plan(config, gpus=8)
    for part in ("teacher", "critic, gradients, AdamW", "student, gradients, AdamW, average"):
        assert one.phases[0].parts[part] == 8 * eight.phases[0].parts[part]
    assert eight.fits(80) and not one.fits(80)
    adapters = ["training.distill.lora={student_rank: 64, critic_rank: 64}", "training.distill.fast_rollout=false"]
    lora, shared = (
        distill_plan(load_config("configs/train_wan2.1_t2v_1.3b.yaml", adapters), gpus=gpus) for gpus in (1, 8)
    )
    assert lora.peak.total < one.peak.total
    for phase, with_adapters, alone in zip(eight.phases, shared.phases, one.phases, strict=True):
        assert phase.parts["student, gathered"] == 2 * WAN_1_3B.parameters < with_adapters.parts["student, gathered"]
        assert "student, gathered" not in alone.parts


@pytest.mark.parametrize("size", [WAN_1_3B, WAN_14B], ids=["1.3B", "14B"])
def test_adapters_take_no_more_than_planned(monkeypatch, size):
    """Frozen linears keep no inputs for a backward pass, and adapters share one."""
    model = build(WanTransformer3DModel, size, 3).to(BF16).requires_grad_(False)
    model.add_adapter(LoraConfig(r=64, target_modules=LORA_TARGETS))
    network = TransformerSize(dim=size.dim, ffn=size.ffn, layers=3)
    model.enable_gradient_checkpointing(selective_checkpoint)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == memory.adapter_parameters(network, 64)
    for p in trained:
        p.grad = torch.empty_like(p)
    with torch.device("meta"):
        latents, text = torch.empty(1, 16, 21, 60, 104, dtype=BF16), torch.empty(1, 512, 4096, dtype=BF16)
        with counting(monkeypatch) as counter:
            model(latents, torch.empty(1), text, return_dict=False)[0].sum().backward()
    planned = memory.graph_bytes(network, 21 * 1560, True)
    assert 0.85 * planned < counter.peak <= planned


def test_a_shared_base_is_planned_once():
    def parts(*settings: str, gpus: int = 1) -> dict[str, float]:
        config = load_config("configs/train_wan2.1_t2v_14b_lora.yaml", ["training.sharding=none", *settings])
        return distill_plan(config, WAN_14B, WAN_14B, WAN_14B, gpus=gpus).phases[0].parts

    bases = {"student's base", "critic's base", "frozen start"}
    wan = "wan_models/Wan2.1-T2V-14B"
    assert parts().keys() & bases == {"student's base"}
    assert parts()["student's base"] == parts()["teacher"] == WAN_14B.inference_bytes
    assert not parts(f"training.init.student={wan}").keys() & bases, "all from the teacher's files"
    motion = "training.distill.motion_regression.weight=1"
    assert parts(motion).keys() & bases == {"student's base"}, "the initial student is the student's base"
    assert parts("training.distill.teacher_fp8=true").keys() & bases == {"student's base", "critic's base"}
    critic = parts("training.init.critic=checkpoints/other")
    assert critic.keys() & bases == {"student's base", "critic's base"}
    both = sum(parts()[f"{role}"] for role in parts() if "AdamW" in role)
    assert both == memory.adapter_parameters(WAN_14B, 64) * 4 * (4 + 3)


def test_measuring_needs_a_gpu_and_runs_all_phases(tiny_assets):
    """What scripts/measure_memory.py does on a GPU, here with small networks and a probe that only counts."""
    from scripts import measure_memory

    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is none"):
            measure_memory.main([])
    changes = ["video.height=32", "video.width=48", "inference.text_encoder=stream", "inference.decode_frames=1"]
    config = load_config(CONFIG, [*changes, "model.text_tokens=8", "model.codec=taehv"])
    pipe = measure_memory.build(config, "tiny", torch.device("cpu"), torch.float32)
    asked = iter(range(1, 100))
    most = measure_memory.run_phases(pipe, 3, lambda: next(asked))
    assert list(most) == [phase.name for phase in inference_plan(config).phases]
    assert most["encode prompt"] == 2 and most["decode"] > most["denoise"] > 2
