"""Adapters as other trainers name and scale them: each against W + scale (alpha / rank B A + difference), or peft."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_case import LINEARS, RANK, close, longlive, output, pairs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from weight_layouts import TO_WAN, foreign

from configs.errors import UserError
from model.weights.export import lazy_tensors
from model.weights.load import save_network
from model.weights.lora import LoraAdapters, plan_lora
from model.weights.plans import plan_transformer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]
SCALE = 0.5
HEAD = "head.head"


def shapes(student) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in student.state_dict().items()}


def by_pairs(values, name, up: str = "lora_up", down: str = "lora_down") -> dict[str, torch.Tensor]:
    state = {}
    for layer, (a, b) in values.items():
        state |= {f"{name(layer)}.{down}.weight": a, f"{name(layer)}.{up}.weight": b}
    return state


BLOCK = {"self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def ours(layer: str) -> str:
    """An original name of a linear layer of a block -> ours."""
    layer = layer.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
    return ".".join(BLOCK.get(segment, segment) for segment in layer.split("."))


def flat(layer: str) -> str:
    return layer.replace(".", "_")


NAMES = {
    "kohya": lambda layer: f"lora_unet_{flat(layer)}",
    "kohya, two underscores": lambda layer: f"lora_unet__{flat(layer)}",
    "kohya, dots": lambda layer: f"lora_unet_{layer.replace('blocks.', 'blocks_')}",
    "kohya, names of diffusers": lambda layer: f"lora_transformer_{flat(ours(layer))}",
    "lycoris": lambda layer: f"lycoris_{flat(layer)}",
    "pipe.dit": lambda layer: f"pipe.dit.{layer}",
    "ComfyUI": lambda layer: f"diffusion_model.{layer}",
    "ComfyUI, whole": lambda layer: f"model.diffusion_model.{layer}",
    "peft around a wrapper": lambda layer: f"base_model.model.model.{layer}",
    "diffusers": lambda layer: f"transformer.{ours(layer)}",
}


def applied(student, path, *, scale: float = SCALE):
    """State dicts of the student without and with the adapter, in each way of having it, which must agree."""
    before = {name: value.clone() for name, value in student.state_dict().items()}
    kept = LoraAdapters(student)
    kept.add(plan_lora(path, shapes(student)), scale, dtype=torch.float32)
    unmerged = output(student)
    kept.merge()
    close(output(student), unmerged)
    kept.set_scale("lora", 0)
    kept.unmerge()
    kept.set_scale("lora", scale)
    close(output(student), unmerged)
    kept.merge_and_unload()
    close(output(student), unmerged)
    return before, student.state_dict()


def expect(before, after, added) -> None:
    """`after` is `before` with `added` [parameter -> difference], and nothing else has changed."""
    for name, value in before.items():
        right = value.double() + added.get(name, torch.zeros(())).double()
        torch.testing.assert_close(after[name].double(), right, rtol=0, atol=1e-5)
    assert added.keys() <= before.keys()


@pytest.mark.parametrize("form", NAMES)
def test_names_of_each_trainer_are_read(tmp_path, wan, student, form):
    values = pairs(wan)
    values[HEAD] = (torch.randn(3, 128) * 0.05, torch.randn(64, 3) * 0.05)
    letters = ("lora_B", "lora_A") if form in ("peft around a wrapper", "diffusers", "pipe.dit") else ()
    name = NAMES[form] if form != "diffusers" else lambda layer: NAMES[form](layer).replace(HEAD, "proj_out")
    save_file(by_pairs(values, name, *letters), tmp_path / "a.safetensors")
    before, after = applied(student, tmp_path / "a.safetensors")
    added = {f"{ours(layer)}.weight": SCALE * b @ a for layer, (a, b) in values.items() if layer != HEAD}
    expect(before, after, added | {"proj_out.weight": SCALE * values[HEAD][1] @ values[HEAD][0]})


@pytest.fixture
def extracted(wan, tmp_path):
    """An adapter with pairs, alphas and differences of every kind; returns its path and what it adds at scale 1."""
    values, g = pairs(wan), torch.Generator().manual_seed(7)
    like = {name: tuple(value.shape) for name, value in wan.state_dict().items()}
    found = {
        "blocks.0.attn1.to_q.bias": "diffusion_model.blocks.0.self_attn.q.diff_b",
        "blocks.1.attn2.norm_k.weight": "diffusion_model.blocks.1.cross_attn.norm_k.diff",
        "blocks.1.norm2.weight": "lora_unet_blocks_1_norm3.diff",
        "blocks.1.norm2.bias": "lora_unet_blocks_1_norm3.diff_b",
        "blocks.0.scale_shift_table": "diffusion_model.blocks.0.modulation.diff",
        "blocks.1.scale_shift_table": "blocks.1.diff_m",
        "scale_shift_table": "diffusion_model.head.modulation.diff",
        "patch_embedding.weight": "diffusion_model.patch_embedding.diff",
        "condition_embedder.time_embedder.linear_1.weight": "diffusion_model.time_embedding.0.diff",
    }
    differences = {ours_: torch.randn(like[ours_], generator=g) * 0.1 for ours_ in found}
    bias = torch.randn(128, generator=g) * 0.1
    state = by_pairs(values, lambda layer: f"diffusion_model.{layer}", "lora_B", "lora_A")
    state |= {f"diffusion_model.{layer}.alpha": torch.tensor(6.0) for layer in values}
    state |= {name: differences[ours_] for ours_, name in found.items()}
    state["diffusion_model.blocks.1.self_attn.k.lora_B.bias"] = bias
    save_file(state, tmp_path / "a.safetensors")
    added = {f"{ours(layer)}.weight": 6 / RANK * b @ a for layer, (a, b) in values.items()} | differences
    return tmp_path / "a.safetensors", added | {"blocks.1.attn1.to_k.bias": 6 / RANK * bias}


def test_differences_beside_pairs_are_added(student, extracted):
    path, added = extracted
    assert "differences of 10 parameters" in plan_lora(path, shapes(student)).kind
    before, after = applied(student, path)
    expect(before, after, {name: SCALE * value for name, value in added.items()})


def test_differences_alone_are_an_adapter(tmp_path, student):
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(128, 128)}, tmp_path / "a.safetensors")
    before, after = applied(student, tmp_path / "a.safetensors")
    expect(before, after, {"blocks.0.attn1.to_q.weight": torch.full((128, 128), SCALE)})


@pytest.mark.parametrize("suffix", [".pt", ""])
def test_differences_are_exported(tmp_path, student, extracted, suffix):
    path, added = extracted
    before = {name: value.clone() for name, value in student.state_dict().items()}
    loras = LoraAdapters(student)
    loras.add(plan_lora(path, shapes(student)), 0.0)
    loras.export("lora", tmp_path / f"out{suffix}")
    loras.merge_and_unload()
    expect(before, applied(student, tmp_path / f"out{suffix}", scale=1.0)[1], added)


def test_conversion_merges_differences(tmp_path, student, extracted):
    path, added = extracted
    save_network(student, tmp_path / "s", card={}, dtype=None)
    plan = plan_transformer("IN", tmp_path / "s", type(student))
    lazy = lazy_tensors(plan, [(plan_lora(path, shapes(student)), SCALE)], torch.float32)
    after = {name: tensor.read() for name, tensor in lazy.items()}
    expect(student.state_dict(), after, {name: SCALE * value for name, value in added.items()})


# --- held against peft ------------------------------------------------------------------------------------------------

PATTERNS = {
    "none": {},
    "last segment": {"alpha_pattern": {"q": 3}},
    "end of a word that is no segment": {"alpha_pattern": {"attn.q": 3, "ttn.k": 5}},
    "whole name": {"alpha_pattern": {"blocks.1.self_attn.v": 7}},
    "our name, which was never there": {"alpha_pattern": {"attn1.to_q": 9}},
    "regex": {"alpha_pattern": {r"blocks\.[0-9]+\.cross_attn\.(q|k)": 3, "^ffn": 11}},
    "anchored": {"alpha_pattern": {r"^blocks.0.ffn.0": 2, r"^self_attn.q": 5}},
    "first of two": {"alpha_pattern": {"self_attn.q": 3, "q": 5}},
    "ranks": {"rank_pattern": {"self_attn.v": 2, r"blocks.\d.ffn.2": 6}},
    "both": {"rank_pattern": {"v": 2}, "alpha_pattern": {"blocks.0.self_attn.v": 9, "o": 1}},
    "both, rslora": {"rank_pattern": {"v": 2}, "alpha_pattern": {"o": 1}, "use_rslora": True},
    "bias": {"lora_bias": True, "alpha_pattern": {"q": 3}},
    "default alpha": {"lora_alpha": 8},
}


class Original(torch.nn.Module):
    """Linear layers under original names, with the values of a Wan transformer."""

    def __init__(self, wan):
        super().__init__()
        for name, value in wan.state_dict().items():
            layer = foreign(name, TO_WAN).removesuffix(".weight")
            if not layer.endswith(LINEARS) or not name.endswith(".weight"):
                continue
            *path, last = layer.split(".")
            place = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, torch.nn.Module())
                place = place._modules[part]
            linear = torch.nn.Linear(value.shape[1], value.shape[0])
            linear.weight.data, linear.bias.data = value.clone(), wan.state_dict()[name[:-6] + "bias"].clone()
            place.add_module(last, linear)


@pytest.mark.parametrize("form", ["original", "diffusers"])
@pytest.mark.parametrize("case", PATTERNS)
def test_settings_mean_what_they_mean_to_peft(tmp_path, wan, student, case, form):
    """Trained, saved and merged by peft, and merged by us."""
    names = ["q", "k", "v", "o", "ffn.0", "ffn.2"] if form == "original" else ["to_q", "to_v", "to_out.0", "net.0.proj"]

    def fresh():
        theirs = Original(wan) if form == "original" else WanTransformer3DModel.from_config(dict(wan.config))
        if form == "diffusers":
            theirs.load_state_dict(wan.state_dict())
        return theirs

    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": names} | PATTERNS[case], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(fresh(), config).save_pretrained(tmp_path)
    if case == "default alpha":
        file = tmp_path / "adapter_config.json"
        stated = json.loads(file.read_text())
        del stated["lora_alpha"]
        file.write_text(json.dumps(stated))
    merged = PeftModel.from_pretrained(fresh(), tmp_path).merge_and_unload().state_dict()
    loras = LoraAdapters(student)
    loras.add(plan_lora(tmp_path, shapes(student)), dtype=torch.float32)
    loras.merge_and_unload()
    state, compared = student.state_dict(), 0
    for name in state:
        there = foreign(name, TO_WAN) if form == "original" else name
        if there in merged:
            torch.testing.assert_close(state[name], merged[there], rtol=0, atol=1e-5)
            compared += 1
    assert compared >= 2 * 2 * len(LINEARS)


@pytest.mark.parametrize("case", ["none", "regex", "ranks", "both, rslora", "bias"])
def test_settings_in_a_header_of_diffusers(tmp_path, wan, student, case):
    theirs = WanTransformer3DModel.from_config(dict(wan.config))
    theirs.load_state_dict(wan.state_dict())
    names = ["to_q", "to_v", "to_out.0", "net.0.proj"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": names} | PATTERNS[case], init_lora_weights=False)
    torch.manual_seed(0)
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path)
    theirs.fuse_lora()
    loras = LoraAdapters(student)
    loras.add(plan_lora(tmp_path, shapes(student)), dtype=torch.float32)
    loras.merge_and_unload()
    for name, value in student.state_dict().items():
        key = name if name in theirs.state_dict() else ".base_layer.".join(name.rsplit(".", 1))
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=0, atol=1e-5)


# --- refused ----------------------------------------------------------------------------------------------------------

STATED = {
    "NaN": ('{"lora_alpha": NaN}', "NaN is no number"),
    "infinite": ('{"lora_alpha": 1e999}', "1e999 is no number"),
    "endless": ('{"lora_alpha": 1' + "0" * 400 + "}", "is no number"),
    "text": ('{"lora_alpha": "4"}', "lora_alpha='4', which is no number"),
    "a switch": ('{"lora_alpha": true}', "lora_alpha=True, which is no number"),
    "text for a switch": ('{"use_rslora": "false"}', "use_rslora='false'"),
    "pattern that is none": ('{"alpha_pattern": {"(": 3}}', "with a pattern that is none"),
    "pattern without end": ('{"alpha_pattern": {"(.*)*x": 3}}', "could take for ever"),
    "pattern of many repeats": ('{"rank_pattern": {".*.*.*.*.*.*x": 3}}', "could take for ever"),
    "patterns without end": (json.dumps({"alpha_pattern": {f"a{i}": 1 for i in range(5000)}}), "could take for ever"),
    "patterns that are none": ('{"alpha_pattern": [["q", 3]]}', "is no table"),
    "another rank": ('{"r": 8}', "states rank 8 for blocks.0."),
    "DoRA": ('{"use_dora": true}', "not a plain LoRA"),
    "layers twice": ('{"layer_replication": [[0, 1], [0, 1]]}', "not a plain LoRA"),
}


@pytest.mark.parametrize("case", STATED)
def test_settings_that_are_refused(tmp_path, wan, student, case):
    text, message = STATED[case]
    save_file(longlive(pairs(wan)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="model.lora") as caught:
        plan_lora(tmp_path, shapes(student))
    assert message in str(caught.value) and len(str(caught.value)) < 600


def test_adapters_that_are_refused(tmp_path, wan, student):
    good, key = longlive(pairs(wan)), "base_model.model.blocks.0.self_attn.q"
    again = {"lora_unet_blocks_0_self_attn_q.lora_down.weight": good[f"{key}.lora_A.weight"]}
    cases = {
        "difference of nothing": (good | {"blocks.0.norm7.diff": torch.zeros(3)}, "of blocks.0.norm7.weight is"),
        "difference of another size": (good | {"blocks.0.norm3.diff_b": torch.zeros(3)}, r"is \(3,\) for \(128,\)"),
        "bias of nothing": ({f"{key}.lora_B.bias": torch.zeros(128), "head.head.diff_b": torch.zeros(64)}, "has no A"),
        "two names of one layer": (good | again, "holds blocks.0.attn1.to_q.A twice"),
        "two adapters": (
            {k.replace(".weight", f".{name}.weight"): v for k, v in good.items() for name in ("a", "b")},
            "twice",
        ),
        "alpha that is no number": (good | {f"{key}.alpha": torch.tensor(float("nan"))}, "alpha=nan for blocks.0"),
        "LoHa": ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.zeros(4, 4)}, "another kind .LoHa."),
        "LoKr": ({"lycoris_blocks_0_self_attn_q.lokr_w1": torch.zeros(4, 4)}, "another kind .LoKr."),
        "DoRA": (good | {f"{key}.lora_magnitude_vector": torch.zeros(4)}, "another kind .DoRA."),
        "alphas alone": ({f"{key}.alpha": torch.zeros(())}, "not a LoRA that we know"),
    }
    for state, message in cases.values():
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(UserError, match=message):
            plan_lora(tmp_path / "a.pt", shapes(student))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("key", ["blocks.0.self_attn.q.lora_down.weight", "blocks.0.norm3.diff_b"])
def test_no_numbers_are_refused_when_read(tmp_path, wan, student, value, key):
    state = by_pairs(pairs(wan), str) | {"blocks.0.norm3.diff_b": torch.zeros(128)}
    state[key].view(-1)[-1] = float(value)
    save_file(state, tmp_path / "a.safetensors")
    plan, before = plan_lora(tmp_path / "a.safetensors", shapes(student)), output(student)
    loras = LoraAdapters(student)
    with pytest.raises(UserError, match=r"a\.safetensors holds values in blocks\.0.* that are no numbers"):
        loras.add(plan)
    close(output(student), before)


def test_beyond_the_range_of_the_student(tmp_path, wan, student):
    save_file(by_pairs({k: (a, b * 1e7) for k, (a, b) in pairs(wan).items()}, str), tmp_path / "a.safetensors")
    loras = LoraAdapters(student.half())
    loras.add(plan_lora(tmp_path / "a.safetensors"), dtype=torch.float32)
    with pytest.raises(UserError, match="beyond torch.float16; lower model.lora_scales"):
        loras.merge_and_unload()
