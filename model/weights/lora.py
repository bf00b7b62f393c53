"""LoRA adapters for the student: found and checked like all weights, applied with peft.

    loras = Loras(student)
    loras.add(plan_lora("longlive_models/models/lora.pt"), scale=1.0)     # any number of them
    loras.merge(); loras.unmerge(); loras.scale("lora", 0.5)              # W + sum of scale alpha / rank B A
    loras.fold()                                                          # merged for good: the layers are gone

Files: peft's folders; LongLive's `lora.pt` (a peft dictionary, bare or under `generator_lora`); diffusers'; down/up
pairs with their `alpha`. What states no alpha has alpha = rank, as LongLive's code has it.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import UserError
from model.weights import names
from model.weights.files import BARE, Tensors, missing, open_file, read_json, resolve
from utils.files import atomic_path, write_json_atomic

PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
FILES = (PEFT_FILE, "pytorch_lora_weights.safetensors", "adapter_model.bin", "lora.pt", "model.pt")


@dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """An adapter of which no value has been read: tensors `<layer>.A` [rank, in] and `<layer>.B` [out, rank]."""

    path: Path
    tensors: Tensors
    alphas: Mapping[str, float]  # by layer

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(".A") for name in self.tensors.shapes if name.endswith(".A")]

    def rank(self, layer: str) -> int:
        return self.tensors.shapes[f"{layer}.A"][0]

    @property
    def kind(self) -> str:
        ranks = sorted({self.rank(layer) for layer in self.layers})
        return f"LoRA of rank {'/'.join(map(str, ranks))} on {len(self.layers)} layers"


def plan_lora(
    path: str | Path, base: Mapping[str, tuple[int, ...]] | None = None, name: str = "model.lora", part: str = ""
) -> LoraPlan:
    """Find and check an adapter, reading headers only.

    Args:
        base: shapes of the student that it goes on, by our names; None checks nothing of them.
        name: the config field that holds `path`.
        part: of a training checkpoint, e.g. critic_lora; by default the generator's.

    Raises:
        UserError: it is missing, damaged, no LoRA, or one for another network.
    """
    path = resolve(path)
    if not path.exists():
        raise missing(name, path, "does not exist")
    if path.is_dir():
        path = next((path / file for file in FILES if (path / file).is_file()), path)
    if path.is_dir():
        raise missing(name, path, f"has no {' or '.join(FILES)}")
    parts = open_file(name, path)
    wanted = (part,) if part else (*names.LORA_PARTS, BARE)
    found = next((parts[key] for key in wanted if key in parts), None)
    if found is None:
        seems = names.guess(next(iter(parts.values())).shapes if parts else {})
        raise UserError(f"{name}={path} holds no {wanted[0]}; it seems to be {seems}, so give {name} another file")
    known = {tensor: names.lora_name(tensor) for tensor in found.shapes}
    odd = [tensor for tensor, parsed in known.items() if parsed is None]
    if odd or not known:
        raise UserError(
            f"{name}={path} is not a LoRA that we know ({len(odd)} tensors unexpected, the first being "
            f"{min(odd, default='none')}); it seems to be {names.guess(found.shapes)}, so give {name} another file"
        )
    alphas = {known[t][0]: found.read(t).float().mean().tolist() for t in known if known[t][1] == "alpha"}
    values = found.renamed(lambda tensor: None if known[tensor][1] == "alpha" else ".".join(known[tensor]))
    plan = LoraPlan(path=path, tensors=values, alphas=_alphas(name, path, values) | alphas)
    _check(name, plan, base)
    return plan


def _alphas(name: str, path: Path, tensors: Tensors) -> dict[str, float]:
    """alpha of each layer, by what lies beside the file or in its header; else the rank."""
    layers = {tensor.removesuffix(".A"): shape for tensor, shape in tensors.shapes.items() if tensor.endswith(".A")}
    stated = _settings(name, path)
    if stated.get("use_dora") or stated.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{name}={path} is not a plain LoRA (DoRA or another kind); merge it where it was made")
    patterns = stated.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    out = {}
    for layer, shape in layers.items():
        rank = shape[0] if shape else 0
        alpha = next((v for key, v in patterns.items() if layer.endswith(key)), stated.get("lora_alpha", rank))
        if not isinstance(alpha, int | float):
            raise UserError(f"{name}={path} states lora_alpha={alpha}, which is no number; correct it there")
        out[layer] = float(alpha) * (rank**0.5 if stated.get("use_rslora") else 1)
    return out


def _settings(name: str, path: Path) -> dict[str, Any]:
    """What peft wrote about the adapter: a file beside it, or (diffusers) a line of JSON in its header."""
    if path.name.startswith("adapter_model") and (path.parent / PEFT_CONFIG).is_file():
        return read_json(name, path.parent / PEFT_CONFIG)
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {path} has a header that is not valid JSON; fetch it again") from error
    return {key.removeprefix("transformer."): v for key, v in settings.items()} if isinstance(settings, dict) else {}


def _check(name: str, plan: LoraPlan, base: Mapping[str, tuple[int, ...]] | None) -> None:
    """Each layer has its pair, the pair one rank, and the student a layer of those sizes."""
    shapes, faults = plan.tensors.shapes, []
    for layer in sorted({tensor.rpartition(".")[0] for tensor in shapes}):
        a, b = shapes.get(f"{layer}.A", ()), shapes.get(f"{layer}.B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            faults.append(f"{layer} has A {a} and B {b}")
        elif base is not None and base.get(f"{layer}.weight") != (b[0], a[1]):
            faults.append(f"{layer} is {(b[0], a[1])} for {base.get(f'{layer}.weight', 'no such layer')}")
    faults += [f"{tensor} holds {kind}" for tensor, kind in plan.tensors.odd.items()]
    if faults:
        raise UserError(
            f"{name}={plan.path} does not fit the student: {len(faults)} layers differ ({'; '.join(faults[:2])}); "
            f"use the student that it was trained for"
        )


class Loras:
    """Adapters on a Wan transformer, each with a name and a scale."""

    def __init__(self, model: WanTransformer3DModel):
        self.model = model
        self.plans: dict[str, LoraPlan] = {}
        self.scales: dict[str, float] = {}

    def add(self, plan: LoraPlan, scale: float = 1.0, adapter: str = "lora", dtype: torch.dtype | None = None) -> None:
        """Put an adapter on the model, active. dtype: of its values; None = those of the layers that it goes on."""
        assert adapter not in self.plans, f"there is an adapter {adapter} already"
        assert not self.merged, "unmerge before another adapter is added"
        ranks, alphas = {layer: plan.rank(layer) for layer in plan.layers}, plan.alphas
        first = next(iter(ranks))
        config = LoraConfig(
            r=ranks[first],
            lora_alpha=alphas[first],
            rank_pattern={f"^{layer}": rank for layer, rank in ranks.items() if rank != ranks[first]},
            alpha_pattern={f"^{layer}": alphas[layer] for layer in ranks if alphas[layer] != alphas[first]},
            target_modules=list(ranks),
            init_lora_weights=False,
        )
        weight = self.model.get_submodule(first).weight if not self.plans else self._layers[0].get_base_layer().weight
        place = {"device": weight.device, "dtype": dtype or weight.dtype}
        state = {
            f"{tensor[:-2]}.lora_{tensor[-1]}.weight": plan.tensors.read(tensor).to(**place).contiguous()
            for tensor in plan.tensors.shapes
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are wanted
            inject_adapter_in_model(config, self.model, adapter_name=adapter, low_cpu_mem_usage=True)
        rest = set_peft_model_state_dict(self.model, state, adapter_name=adapter, low_cpu_mem_usage=True)
        assert not rest.unexpected_keys, rest.unexpected_keys
        self.plans[adapter], self.scales[adapter] = plan, scale
        for tensor, value in state.items():  # peft has cast them to the precision of the layer that they go on
            layer, _, part = tensor.removesuffix(".weight").rpartition(".")
            self.model.get_submodule(f"{layer}.{part}.{adapter}").weight.data = value
        for layer in self._layers:
            layer.requires_grad_(False)
        self._activate()

    @property
    def _layers(self) -> list[BaseTunerLayer]:
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def merged(self) -> bool:
        return any(layer.merged for layer in self._layers)

    def _activate(self) -> None:
        for layer in self._layers:
            here = [adapter for adapter in self.plans if adapter in layer.lora_A]
            layer.set_adapter(here)
            for adapter in here:
                layer.set_scale(adapter, self.scales[adapter])

    def scale(self, adapter: str, scale: float) -> None:
        """Another weight for an adapter; 0 switches it off."""
        merged = self.merged
        if merged:
            self.unmerge()
        self.scales[adapter] = scale
        self._activate()
        if merged:
            self.merge()

    def merge(self) -> None:
        """Add all adapters into the weights: the same output, at no cost in time."""
        for layer in self._layers:
            layer.merge(safe_merge=True)

    def unmerge(self) -> None:
        """Take them out again. What the weights' precision rounded away when they went in stays away."""
        for layer in self._layers:
            layer.unmerge()

    @torch.no_grad()
    def fold(self) -> None:
        """Merge, and put plain layers where peft's were, so that nothing tells the model from one without LoRA.

        Unlike `merge` it adds up all adapters in float32 and rounds once.
        """
        if self.merged:
            self.unmerge()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                base = module.get_base_layer()
                delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
                base.weight.copy_(base.weight.float() + delta)
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, base)
        self.model.__dict__.pop("peft_config", None)
        self.plans, self.scales = {}, {}

    def export(self, adapter: str, path: str | Path) -> None:
        """Write an adapter as it was loaded, its scale aside: a `.pt` in LongLive's layout, else a folder of peft's."""
        values: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and adapter in module.lora_A:
                values[f"{name}.A"] = module.lora_A[adapter].weight.detach().cpu().contiguous()
                values[f"{name}.B"] = module.lora_B[adapter].weight.detach().cpu().contiguous()
        save_lora(values, self.plans[adapter].alphas, path)


def save_lora(values: Mapping[str, Tensor], alphas: Mapping[str, float], path: str | Path) -> None:
    """Write `<layer>.A` and `<layer>.B` in our names, with their alphas. A `.pt` states none, so B takes the factor."""
    path = Path(path)
    layers = [tensor.removesuffix(".A") for tensor in values if tensor.endswith(".A")]
    ranks = {layer: values[f"{layer}.A"].shape[0] for layer in layers}
    if path.suffix == ".pt":
        state = {}
        for layer in layers:
            factor = alphas[layer] / ranks[layer]
            state[names.original_lora_name(layer, "A")] = values[f"{layer}.A"]
            state[names.original_lora_name(layer, "B")] = values[f"{layer}.B"] * factor
        with atomic_path(path) as temporary:
            torch.save({"generator_lora": state}, temporary)
        return
    first = layers[0]
    config = {
        "peft_type": "LORA",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {layer: alphas[layer] for layer in layers if alphas[layer] != alphas[first]},
        "target_modules": sorted(layers),
    }
    with atomic_path(path / PEFT_FILE) as temporary:
        tensors = {f"{names.LORA_PREFIX}{t[:-2]}.lora_{t[-1]}.weight": v for t, v in values.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json_atomic(path / PEFT_CONFIG, config)
