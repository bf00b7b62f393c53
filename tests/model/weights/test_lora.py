"""LoRA: every layout loads, and what peft makes of it is W + scale alpha / rank B A, computed here by hand."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_case import RANK, close, longlive, output, pairs
from safetensors.torch import save_file
from weight_layouts import TO_WAN, foreign

from configs.errors import UserError
from configs.load import load_config
from model.weights import load as weights
from model.weights.lora import LoraAdapters, plan_lora
from pipeline.diagonal import DiagonalPipeline
from pipeline.provenance import fingerprint


def expected(wan, *adapters) -> WanTransformer3DModel:
    """A copy of `wan` with factor * B A added to its weights, in float64. adapters: (pairs, factor)."""
    state = {name: value.double() for name, value in wan.state_dict().items()}
    for name in state:
        layer = foreign(name, TO_WAN).removesuffix(".weight")
        for values, factor in adapters:
            if layer in values and name.endswith(".weight"):
                a, b = values[layer]
                state[name] = state[name] + factor * b.double() @ a.double()
    model = WanTransformer3DModel.from_config(dict(wan.config)).eval()
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


def write(folder, layout: str, values) -> tuple[object, float]:
    """A file of `values` in a layout; returns its path and the factor alpha / rank that it states."""
    names = {layer: (a, b) for layer, (a, b) in values.items()}
    if layout == "bare":
        torch.save(longlive(names), folder / "lora.pt")
        return folder / "lora.pt", 1.0
    if layout == "LongLive":
        critic = {key: value * 0 for key, value in longlive(names).items()}
        torch.save({"generator_lora": longlive(names), "critic_lora": critic, "step": 7}, folder / "lora.pt")
        return folder, 1.0
    if layout == "adapter's name inside":
        state = {key.replace(".weight", ".default.weight"): v for key, v in longlive(names).items()}
        torch.save(state, folder / "lora.bin")
        return folder / "lora.bin", 1.0
    if layout == "peft folder":
        save_file(longlive(names), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 10}))
        return folder, 10 / RANK
    assert layout == "rslora"
    save_file(longlive(names), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, 6 / RANK**0.5


# names of other trainers: test_lora_forms.py
LAYOUTS = ("bare", "LongLive", "adapter's name inside", "peft folder", "rslora")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_adds_its_product_in_each_way_of_having_it(tmp_path, wan, student, layout):
    values = pairs(wan)
    path, factor = write(tmp_path, layout, values)
    before = output(student)
    loras = LoraAdapters(student)
    loras.add(plan_lora(path, {n: tuple(v.shape) for n, v in student.state_dict().items()}), scale=0.5)
    right = output(expected(wan, (values, 0.5 * factor)))
    assert (right - before).abs().max() > 1e-2  # the adapter does something
    close(output(student), right)
    loras.merge()
    close(output(student), right)
    loras.unmerge()
    close(output(student), right)
    loras.set_scale("lora", 0.0)
    close(output(student), before)


def test_layout_of_diffusers(tmp_path, wan, student):
    """Written by diffusers itself."""
    from peft import LoraConfig

    theirs = WanTransformer3DModel.from_config(dict(wan.config))
    theirs.load_state_dict(wan.state_dict())
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "net.0.proj"], init_lora_weights=False))
    theirs.save_lora_adapter(tmp_path)
    loras = LoraAdapters(student)
    loras.add(plan_lora(tmp_path))
    close(output(student), output(theirs.eval()))
    plan = loras.plans["lora"]
    assert len(plan.layers) == 6 and set(plan.alphas.values()) == {5.0} and "rank 3" in plan.kind


def test_several_adapters_add_up(wan, student, tmp_path):
    first, second = pairs(wan, 1), {k: v for k, v in pairs(wan, 2, rank=2).items() if "blocks.1.ffn" in k}
    for name, values in (("a", first), ("b", second)):
        torch.save(longlive(values), tmp_path / f"{name}.pt")
    loras, before = LoraAdapters(student), output(student)
    loras.add(plan_lora(tmp_path / "a.pt"), 0.7, "a")
    loras.add(plan_lora(tmp_path / "b.pt"), -0.4, "b")
    close(output(student), output(expected(wan, (first, 0.7), (second, -0.4))))
    loras.merge()
    loras.set_scale("a", 0.1)  # while merged
    right = output(expected(wan, (first, 0.1), (second, -0.4)))
    assert loras.merged
    close(output(student), right)
    loras.unmerge()
    close(output(student), right)
    loras.set_scale("a", 0)
    loras.set_scale("b", 0)
    close(output(student), before)


def test_folded_model_is_a_plain_one(wan, student, tmp_path):
    values, names = pairs(wan), list(student.state_dict())
    torch.save(longlive(values), tmp_path / "a.pt")
    loras = LoraAdapters(student)
    loras.add(plan_lora(tmp_path / "a.pt"))
    loras.merge_and_unload()
    assert list(student.state_dict()) == names and not loras.plans
    close(output(student), output(expected(wan, (values, 1.0))))
    weights.save_network(student, tmp_path / "s", card={}, dtype=None)
    close(output(weights.load_student(tmp_path / "s")), output(student))


def test_half_precision_is_rounded_once(wan, student, tmp_path):
    values = pairs(wan)
    torch.save(longlive(values), tmp_path / "a.pt")
    student = student.to(torch.bfloat16)
    weight = student.blocks[0].attn1.to_q.weight.detach().clone()
    loras = LoraAdapters(student)
    loras.add(plan_lora(tmp_path / "a.pt"), 0.7, dtype=torch.float32)
    loras.merge_and_unload()
    a, b = values["blocks.0.self_attn.q"]
    assert torch.equal(student.blocks[0].attn1.to_q.weight, (weight.float() + 0.7 * (b @ a)).bfloat16())


@pytest.mark.parametrize("layout, suffix", [("bare", ""), ("peft folder", ".pt"), ("rslora", "")])
def test_export_round_trip(tmp_path, wan, student, layout, suffix):
    (tmp_path / "in").mkdir()
    path, factor = write(tmp_path / "in", layout, pairs(wan))
    loras = LoraAdapters(student)
    loras.add(plan_lora(path), scale=0.25)  # which is not part of the adapter
    loras.export("lora", tmp_path / f"out{suffix}")
    again = plan_lora(tmp_path / f"out{suffix}")
    for layer, (a, b) in pairs(wan).items():
        ours = next(name for name in again.layers if foreign(f"{name}.weight", TO_WAN) == f"{layer}.weight")
        down, up = again.tensors.read(f"{ours}.A"), again.tensors.read(f"{ours}.B")
        delta = again.alphas[ours] / again.rank(ours) * up @ down
        torch.testing.assert_close(delta, factor * b @ a, rtol=1e-5, atol=1e-7)
        assert torch.equal(down, a)


def test_what_does_not_fit(tmp_path, wan, wan_state, student):
    shapes = {n: tuple(v.shape) for n, v in student.state_dict().items()}
    good = longlive(pairs(wan))
    key = "base_model.model.blocks.0.self_attn.q.lora_A.weight"
    cases = {
        "unpaired": ({k: v for k, v in good.items() if k != key}, r"blocks\.0\.attn1\.to_q has A \(\) and B"),
        "other width": (good | {key: torch.zeros(RANK, 64)}, r"to_q is \(128, 64\) for \(128, 128\)"),
        "other rank": (good | {key: torch.zeros(3, 128)}, r"has A \(3, 128\) and B \(128, 4\)"),
        "more layers": (
            good | {k.replace("blocks.0.", "blocks.9."): v for k, v in good.items()},
            r"blocks\.9\.attn1\.to_k is .* for no such layer",
        ),
        "whole student": (wan_state, "a Wan transformer of width 128 with 2 layers"),
        "more than a LoRA": (good | {"x.weight": torch.zeros(3)}, r"unexpected tensors: 1, the first being x\.weight"),
        "integers": ({k: v.int() for k, v in good.items()}, r"holds torch\.int32"),
        "empty": ({}, "holds no generator_lora"),
    }
    for state, message in cases.values():
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(UserError, match=message):
            plan_lora(tmp_path / "a.pt", shapes)
    with pytest.raises(UserError, match=r"model\.lora=.*nowhere\.pt does not exist; set model\.lora to another path$"):
        plan_lora(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match=r"download\.py longlive"):
        plan_lora(tmp_path / "longlive_models" / "lora.pt")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        plan_lora(tmp_path)
    with pytest.raises(UserError, match=r"differs in length from model.lora \(2 and 1\)"):
        load_config("configs/tiny.yaml", ["model.lora=[a.pt]", "model.lora_scales=[1, 2]"])


# --- in the pipeline --------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, tiny_student):
    """An adapter for the tiny student's q of both layers, in a peft folder."""
    state, g = {}, torch.Generator().manual_seed(0)
    for i in range(2):
        for part, shape in (("A", (RANK, 128)), ("B", (128, RANK))):
            key = f"base_model.model.blocks.{i}.attn1.to_q.lora_{part}.weight"
            state[key] = torch.randn(shape, generator=g) * 0.5
    (tmp_path / "adapter").mkdir()
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    return tmp_path / "adapter"


def test_a_pipeline_with_merged_and_unmerged_adapters_gives_the_same_frames(tiny_assets, adapter):
    def frames(*overrides):
        pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *overrides)
        return pipe, pipe("a red circle moves right").videos[0].frames

    named = f"model.lora=[{adapter}]"
    _, plain = frames()
    folded, merged = frames(named)
    kept, unmerged = frames(named, "model.lora_merge=false")
    _, off = frames(named, "model.lora_scales=[0]")
    assert not folded.loras.plans and list(kept.loras.plans) == ["lora_0"]
    assert (plain != merged).mean() > 0.1 and (plain == off).all()
    assert abs(merged.astype(int) - unmerged.astype(int)).max() <= 1
    assert kept.loras.model is kept.session.student.model


def test_check_lists_adapters(tiny_assets, adapter):
    config = load_config(tiny_assets / "tiny.yaml", [f"model.lora=[{adapter}, {adapter}]"])
    checks = {check.role: check for check in weights.check_weights(config.model)}
    assert checks["lora 1"].kind == "LoRA of rank 4 on 2 layers"
    assert checks["lora 0"].files == (adapter / "adapter_model.safetensors",)


def test_a_video_is_of_its_adapters_settings_too(tiny_assets, adapter):
    config = load_config(tiny_assets / "tiny.yaml", [f"model.lora=[{adapter}]"])
    digests = set()
    for alpha in (4, 64):
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": alpha}))
        digests.add(fingerprint(config, weights.check_weights(config.model)))
    assert len(digests) == 2
