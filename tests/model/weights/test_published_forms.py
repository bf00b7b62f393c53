"""Files as ComfyUI and other trainers publish them, and that looking at files (doctor.py) refuses what loading does."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from weight_layouts import TO_T5, foreign, original, random_t5, random_wan, same_output

from configs.errors import UserError
from model.causal_wan import CausalWanModel
from model.text import word_tokenizer
from model.weights import load as weights
from model.weights import names
from model.weights.inspection import inspect_weights
from model.weights.plans import plan_text_encoder, plan_transformer, transformer_config, unique_state_dict

FLOAT8 = torch.float8_e4m3fn


def scaled(state, form: str, rows: bool = False):
    """`state` with its matrices in float8, as ComfyUI writes them, old or new; and what they stand for."""
    out, means = {}, dict(state)
    for name, value in state.items():
        if value.ndim != 2 or "norm" in name or not name.endswith(".weight") or "shared" in name:
            out[name] = value.half()
            means[name] = value.half().float()
            continue
        scale = value.abs().amax(1, keepdim=True) / 448 if rows else value.abs().amax() / 448
        small = (value / scale).to(FLOAT8)
        stem = name.removesuffix("weight")
        out[name], means[name] = small, small.float() * scale
        if form == "old":
            out |= {f"{stem}scale_weight": scale.reshape(1) if not rows else scale, f"{stem}scale_input": torch.ones(1)}
        else:
            told = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            out |= {f"{stem}weight_scale": scale, f"{stem}input_scale": torch.ones(()), f"{stem}comfy_quant": told}
    if form == "old":
        out["scaled_fp8"] = torch.zeros(2, dtype=FLOAT8)
    return out, means


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("form", "rows"), [("old", False), ("new", False), ("new", True)])
def test_scaled_float8_of_a_transformer(tmp_path, form, rows, prefix):
    state, means = scaled(original(random_wan()), form, rows)
    path = tmp_path / "fp8.safetensors"
    save_file({prefix + name: value for name, value in state.items()}, path)
    student = weights.load_student(path)
    for name, value in original(student).items():
        torch.testing.assert_close(value, means[name], rtol=0, atol=0)
    assert inspect_weights("student", path).network.layers == 2


@pytest.mark.parametrize("layout", ["krea-realtime-video", "LightX2V", "FastVideo"])
def test_students_of_14b(tmp_path, layout):
    """Their layouts with the sizes of tests: a file of Wan's names in bfloat16, or folders."""
    wan = random_wan()
    for parameter in wan.parameters():
        parameter.data = parameter.data.bfloat16().float()
    state = {name: value.bfloat16() for name, value in original(wan).items()}
    if layout in ("krea-realtime-video", "LightX2V"):
        path = tmp_path / {"LightX2V": "distill_model.safetensors"}.get(layout, "krea-realtime-video-14b.safetensors")
        save_file(state, path)
    else:
        path = tmp_path / "folder"
        copy.deepcopy(wan).bfloat16().save_pretrained(path / "transformer", max_shard_size="100KB")
        file = path / "transformer" / "config.json"
        more = {"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 3, "local_attn_size": -1}
        file.write_text(json.dumps(json.loads(file.read_text()) | more | {"sink_size": 0}))
        index = {"_class_name": "WanCausalDMDPipeline", "transformer": ["diffusers", "CausalWanTransformer3DModel"]}
        (path / "model_index.json").write_text(json.dumps(index))
    assert inspect_weights("student", path).network.layers == 2
    same_output(weights.load_student(path), wan)


def test_a_pipeline_of_two_networks_is_refused(tmp_path, wan):
    """Wan 2.2 and FastVideo's causal students of it; each network by itself has a folder that can be named."""
    for name in ("transformer", "transformer_2"):
        wan.save_pretrained(tmp_path / name)
    for look in (weights.load_student, lambda path: inspect_weights("student", path)):
        with pytest.raises(UserError, match=r"model.student=.* has two networks, .* \(Wan 2.2\)"):
            look(tmp_path)
    same_output(weights.load_student(tmp_path / "transformer_2"), wan)


@pytest.mark.parametrize("form", ["as transformers saves it", "half", "untied", "old", "new", "Wan's names"])
def test_text_encoders_of_one_file(tmp_path, form):
    model = random_t5()
    state = {k: v.clone() for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    means, path = dict(state), tmp_path / "umt5_xxl.safetensors"
    if form in ("old", "new"):
        state, means = scaled(state, form)
    elif form == "half":
        state = {k: v.half() for k, v in state.items()}
        means = {k: v.float() for k, v in state.items()}
    elif form == "untied":
        state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    elif form == "Wan's names":
        state = {foreign(k, TO_T5): v for k, v in state.items()}
    state["spiece_model"] = torch.zeros(1000, dtype=torch.uint8)
    if form == "Wan's names":
        del state["spiece_model"]
    save_file(state, path)
    word_tokenizer(["a", "cat"]).save_pretrained(tmp_path)
    encoder = weights.load_text_encoder(path, tmp_path, 8)
    got = unique_state_dict(encoder.encoder)
    assert got.keys() == means.keys()
    for name, value in means.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
    assert inspect_weights("text_encoder", path).kind.startswith("T5 text encoder")


@pytest.mark.parametrize("ema", ["ema", "model_ema"])
def test_parts_of_other_trainers(tmp_path, wan, ema):
    state = original(wan)
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"module": state, ema: other, "step": torch.tensor(3)}, tmp_path / "m.pt")
    same_output(weights.load_student(tmp_path / "m.pt"), wan)
    averaged = weights.load_student(tmp_path / "m.pt", use_ema=True).state_dict()
    assert torch.equal(averaged["proj_out.bias"], wan.state_dict()["proj_out.bias"] + 1)
    torch.save({ema: other}, tmp_path / "e.pt")
    with pytest.raises(UserError, match="holds averaged weights only; set model.use_ema=true"):
        weights.load_student(tmp_path / "e.pt")
    torch.save({"weights": state}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds no generator but weights; it seems to be a Wan transformer"):
        weights.load_student(tmp_path / "w.pt")


def test_two_names_of_one_tensor(tmp_path, wan_state):
    twice = wan_state | {"model.head.head.bias": torch.zeros(64)}
    save_file(twice, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds head.head.bias twice, as head.head.bias and model.head.head.bias"):
        weights.load_student(tmp_path / "a.safetensors")


# --- what doctor.py says ----------------------------------------------------------------------------------------------


def test_layouts_are_those_of_the_networks(tmp_path, wan):
    wan.save_pretrained(tmp_path / "wan")
    plan = plan_transformer("model.student", tmp_path / "wan", CausalWanModel)
    assert names.wan_shapes(transformer_config(plan)) == plan.tensors.shapes
    t5 = random_t5()
    t5.save_pretrained(tmp_path / "t5")
    plan = plan_text_encoder(tmp_path / "t5")
    assert names.t5_shapes(t5.config.to_dict()) == plan.tensors.shapes


# --- tokenizers -------------------------------------------------------------------------------------------------------


def rules(**changed):
    def change(folder):
        told = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(told | changed))

    return change


def replacing(content: str, pattern: dict | None = None) -> dict:
    return {"type": "Replace", "pattern": pattern or {"String": " "}, "content": content}


def pipe(name: str):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def grown(folder):
    tokenizer = word_tokenizer([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(folder)


TOKENIZERS = {
    "spaces become books": (rules(normalizer=replacing(" " * 600_000)), "make texts too long"),
    "spaces become spaces become spaces": (
        rules(normalizer={"type": "Sequence", "normalizers": [replacing(" " * 30)] * 5}),
        "make texts too long",
    ),
    "before each word": (rules(normalizer={"type": "Prepend", "prepend": "a" * 5000}), "make texts too long"),
    "splits for ever": (
        rules(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False}),
        "take for ever",
    ),
    "ends without end": (
        rules(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 100_000,
                "pair": [],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
            }
        ),
        "too many tokens around",
    ),
    "no object": (lambda folder: (folder / "tokenizer.json").write_text("[]"), "is no tokenizer"),
    "cut": (lambda folder: os.truncate(folder / "tokenizer.json", 500), "is no tokenizer"),
    "60 MB": (lambda folder: (folder / "tokenizer.json").write_bytes(b" " * 60_000_000), "60,000,000 bytes; at most"),
    "a pipe": (pipe("tokenizer.json"), "no ordinary file"),
    "settings a pipe": (pipe("tokenizer_config.json"), "no ordinary file"),
    "more words than the encoder": (grown, "gives ids up to 42 and model.text_encoder knows 32 words"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_are_refused(tmp_path, case):
    random_t5().save_pretrained(tmp_path)
    word_tokenizer(["a", "cat"]).save_pretrained(tmp_path)
    weights.load_text_encoder(tmp_path, tmp_path, 8)
    change, message = TOKENIZERS[case]
    change(tmp_path)
    with pytest.raises(UserError, match="model.tokenizer") as caught:
        weights.load_text_encoder(tmp_path, tmp_path, 8)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if case != "more words than the encoder":
        with pytest.raises(UserError, match="model.tokenizer"):
            inspect_weights("tokenizer", tmp_path)


def test_a_tokenizer_that_needs_a_package_says_so(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(b"\n\x0c\n\x05<unk>")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"spiece\.model alone, for which the package sentencepiece is needed"):
        inspect_weights("tokenizer", tmp_path)


@pytest.mark.parametrize(
    "schedule",
    [
        {"rows": [[1000, 500]], "policy": "dirty", "exceptions": [], "renoise_timestep": 0},
        {"rows": [[1000, 500]], "policy": "clean", "exceptions": [[0, "dirty"]], "renoise_timestep": 0},
        {"rows": [[500, 1000]], "policy": "clean", "exceptions": [], "renoise_timestep": 0},
        {"rows": [[]], "policy": "clean", "exceptions": [], "renoise_timestep": 0},
        {"rows": [], "policy": "clean", "exceptions": [], "renoise_timestep": 0},
        {"rows": [[1000]], "policy": ["clean"], "exceptions": [], "renoise_timestep": 0},
        {"rows": [[1000]], "policy": "clean", "exceptions": [], "renoise_timestep": -1},
    ],
)
def test_cards_of_no_schedule_are_refused(tmp_path, student, schedule):
    weights.save_network(student, tmp_path / "s", card={"schedule": schedule})
    for look in (weights.load_student, lambda path: inspect_weights("student", path)):
        with pytest.raises(UserError, match=r"card\.json holds a schedule that is none"):
            look(tmp_path / "s")
