"""LoRA adapters for the student: loaded and checked here, applied with peft.

    loras = LoraAdapters(student)
    loras.add(plan_lora("longlive_models/models/lora.pt"), scale=1.0)     # any number of adapters
    loras.merge(); loras.unmerge(); loras.set_scale("lora", 0.5)          # W + sum of scale alpha / rank B A
    loras.merge_and_unload()                                              # permanent: peft's layers are removed

Supported files: peft's folders; LongLive's `lora.pt` (a peft dictionary, flat or under `generator_lora`); diffusers';
down/up pairs with `alpha`, with kohya's names too; extracted adapters with differences of biases and norms. Without a
stated alpha it equals the rank, as in LongLive's code. Settings that peft writes are interpreted as by peft.
"""

import math
import re
import warnings
from collections.abc import Collection, Mapping
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
from model.weights.files import StoredTensors, check_finite, is_slow_regex, read_json
from model.weights.parts import PEFT_FILE, find_lora
from utils.files import atomic_path, parse_json, write_json_atomic

PEFT_CONFIG = "adapter_config.json"
# Settings of peft with which an adapter is more than B A.
OTHER_KINDS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "layer_replication")
MAX_PATTERNS, MAX_REPEATING = 4096, 16  # patterns in settings; patterns with repeats


@dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """An adapter whose tensors have not been read: `<layer>.A` [rank, in] and `<layer>.B` [out, rank].

    `differences` are added to the parameters of the same name, multiplied by the adapter's scale, but not by alpha.
    """

    path: Path
    tensors: StoredTensors
    alphas: Mapping[str, float]  # by layer
    differences: StoredTensors

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(".A") for name in self.tensors.shapes if name.endswith(".A")]

    def rank(self, layer: str) -> int:
        return self.tensors.shapes[f"{layer}.A"][0]

    def scaling(self, layer: str) -> float:
        """Factor of B A if the adapter's scale is 1: alpha / rank."""
        return self.alphas[layer] / self.rank(layer)

    @property
    def kind(self) -> str:
        ranks = sorted({self.rank(layer) for layer in self.layers})
        pairs = f"LoRA of rank {'/'.join(map(str, ranks))} on {len(self.layers)} layers" if ranks else "LoRA"
        count = len(self.differences.shapes)
        return f"{pairs}, differences of {count} parameters" if count else pairs


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
    path, stored, known = find_lora(path, name, part)

    def of(*wanted: str, layers: bool = True) -> StoredTensors:
        def rename(tensor: str) -> str | None:
            parsed = known[tensor]
            return (f"{parsed.name}.{parsed.part}" if layers else parsed.name) if parsed.part in wanted else None

        return stored.renamed(rename)

    tensors, own = of("A", "B"), of("alpha")
    trained = {parsed.name: parsed.trained for parsed in known.values() if parsed.part == "A"}
    alphas = _alphas(name, path, trained, {layer: tensors.shapes[f"{layer}.A"] for layer in trained})
    alphas |= {key.removesuffix(".alpha"): own.read(key).float().mean().tolist() for key in own.shapes}
    wrong = next((f"{alpha} for {layer}" for layer, alpha in alphas.items() if not math.isfinite(alpha)), None)
    if wrong:
        raise UserError(f"{name}={path} states alpha={wrong}, which is no number; fetch it again")
    values = StoredTensors(
        tensors.files, tensors.shapes, lambda key: check_finite(path, key, tensors.read(key)), tensors.other_dtypes
    )
    biases = {parsed.name for parsed in known.values() if parsed.part == "bias"}
    differences = of("diff", "bias", layers=False)

    def difference(key: str) -> Tensor:
        value = check_finite(path, key, differences.read(key)).float()
        return value * plan.scaling(key.removesuffix(".bias")) if key in biases else value

    added = StoredTensors(differences.files, differences.shapes, difference, differences.other_dtypes)
    plan = LoraPlan(path=path, tensors=values, alphas=alphas, differences=added)
    _check(name, plan, base, biases)
    return plan


def _alphas(
    name: str, path: Path, trained: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """alpha of each layer, from the settings beside the file or in its header; else the rank.

    trained: the layers' names in the network that was trained, which peft's patterns refer to.
    """
    stated, prefix = _settings(name, path)
    if any(stated.get(key) for key in OTHER_KINDS) or stated.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{name}={path} is not a plain LoRA (DoRA or another kind); merge it where it was made")
    alphas, ranks = (_patterns(name, path, stated, key) for key in ("alpha_pattern", "rank_pattern"))
    if stated.get("use_rslora") not in (None, False, True):
        raise UserError(f"{name}={path} states use_rslora={stated['use_rslora']!r:.40}; it must be true or false")
    out = {}
    for layer, shape in shapes.items():
        rank, called = shape[0] if shape else 0, trained[layer].removeprefix(prefix)
        default = stated.get("lora_alpha", LoraConfig().lora_alpha if stated else rank)
        alpha = next((value for pattern, value in alphas if pattern.match(called)), default)
        stated_rank = next((value for pattern, value in ranks if pattern.match(called)), stated.get("r", rank))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise UserError(f"{name}={path} states lora_alpha={alpha!r:.40}, which is no number; correct it there")
        if stated_rank != rank:
            raise UserError(
                f"{name}={path} states rank {stated_rank!r:.40} for {called}, which has {rank}; its settings are not "
                f"those that it was trained with, so fetch it again"
            )
        out[layer] = float(alpha) * (rank**0.5 if stated.get("use_rslora") else 1)
    return out


def _patterns(name: str, path: Path, stated: Mapping[str, Any], key: str) -> list[tuple[re.Pattern, Any]]:
    """alpha_pattern or rank_pattern, compiled so that they match as in peft: the whole name or its last segments."""
    patterns = stated.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{name}={path} states {key}={patterns!r:.40}, which is no table; correct it there")
    repeating = [pattern for pattern in patterns if any(map(pattern.count, "*+?{"))]
    many = len(patterns) > MAX_PATTERNS or len(repeating) > MAX_REPEATING
    if many or any(map(is_slow_regex, repeating)):
        raise UserError(f"{name}={path} has {key} whose patterns could take for ever to match; name the layers there")
    try:
        return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{name}={path} has {key} with a pattern that is none ({error}); correct it there") from error


def settings_file(path: Path) -> Path | None:
    """The file beside an adapter that holds peft's settings; None if there is none."""
    file = path.parent / PEFT_CONFIG
    return file if path.name.startswith("adapter_model") and file.is_file() else None


def _settings(name: str, path: Path) -> tuple[dict[str, Any], str]:
    """peft's settings of the adapter, from the file beside it or (diffusers) JSON in its header; and the prefix of
    layer names in the file."""
    if file := settings_file(path):
        return read_json(name, file), ""
    if path.suffix != ".safetensors":
        return {}, ""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        settings = parse_json(text)
    except ValueError as error:
        raise UserError(f"{name}: {path} has a header that is not valid JSON ({error}); fetch it again") from error
    prefix = "transformer."
    return {k.removeprefix(prefix): v for k, v in settings.items()} if isinstance(settings, dict) else {}, prefix


def _check(name: str, plan: LoraPlan, base: Mapping[str, tuple[int, ...]] | None, biases: Collection[str]) -> None:
    """Raise a UserError unless each layer has A and B of one rank that fit the student; likewise for differences."""
    shapes, faults = plan.tensors.shapes, []
    for layer in sorted({tensor.rpartition(".")[0] for tensor in shapes}):
        a, b = shapes.get(f"{layer}.A", ()), shapes.get(f"{layer}.B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            faults.append(f"{layer} has A {a} and B {b}")
        elif base is not None and base.get(f"{layer}.weight") != (b[0], a[1]):
            faults.append(f"{layer} is {(b[0], a[1])} for {base.get(f'{layer}.weight', 'no such layer')}")
    for key, shape in plan.differences.shapes.items():
        if base is not None and base.get(key) != shape:
            faults.append(f"the difference of {key} is {shape} for {base.get(key, 'no such parameter')}")
        if key in biases and f"{key.removesuffix('.bias')}.A" not in shapes:
            faults.append(f"{key} has no A and B")
    odd = {**plan.tensors.other_dtypes, **plan.differences.other_dtypes}
    faults += [f"{tensor} holds {kind}" for tensor, kind in odd.items()]
    if faults:
        raise UserError(
            f"{name}={plan.path} does not fit the student in {len(faults)} of its layers ({'; '.join(faults[:2])}); "
            f"use the student that it was trained for"
        )


class LoraAdapters:
    """LoRA adapters on a Wan transformer, each with a name and a scale."""

    def __init__(self, model: WanTransformer3DModel):
        self.model = model
        self.plans: dict[str, LoraPlan] = {}
        self.scales: dict[str, float] = {}
        self._differences: dict[str, dict[str, Tensor]] = {}  # by adapter and parameter
        self._before: dict[str, Tensor] = {}  # original values of parameters with differences

    def add(self, plan: LoraPlan, scale: float = 1.0, adapter: str = "lora", dtype: torch.dtype | None = None) -> None:
        """Add and activate an adapter. dtype: of its weights; None = that of the layers."""
        assert adapter not in self.plans, f"there is an adapter {adapter} already"
        assert not self.merged, "unmerge before another adapter is added"
        ranks = {layer: plan.rank(layer) for layer in plan.layers}
        differences = {key: plan.differences.read(key) for key in plan.differences.shapes}
        if ranks:
            self._inject(plan, ranks, adapter, dtype)
        self._differences[adapter] = differences
        for key in differences:
            self._before.setdefault(key, self._parameter(key).detach().clone())
        self.plans[adapter], self.scales[adapter] = plan, scale
        self._activate()

    def _inject(self, plan: LoraPlan, ranks: Mapping[str, int], adapter: str, dtype: torch.dtype | None) -> None:
        """Wrap the linear layers for which the adapter has A and B in peft's layers."""
        first, alphas = next(iter(ranks)), plan.alphas
        config = LoraConfig(
            r=ranks[first],
            lora_alpha=alphas[first],
            rank_pattern={f"^{layer}": rank for layer, rank in ranks.items() if rank != ranks[first]},
            alpha_pattern={f"^{layer}": alphas[layer] for layer in ranks if alphas[layer] != alphas[first]},
            target_modules=list(ranks),
            init_lora_weights=False,
        )
        weight = self._parameter(f"{first}.weight")
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
        for tensor, value in state.items():  # undoes peft's cast to the dtype of the layer
            layer, _, part = tensor.removesuffix(".weight").rpartition(".")
            self.model.get_submodule(f"{layer}.{part}.{adapter}").weight.data = value
        for layer in self._layers:
            layer.requires_grad_(False)

    def _parameter(self, name: str) -> Tensor:
        """A parameter of the model, by its name without adapters."""
        layer, _, key = name.rpartition(".")
        module = self.model.get_submodule(layer)
        return (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module).get_parameter(key)

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
        for key, before in self._before.items():  # nothing is merged now, so only differences change
            added = [(self.scales[a], mine[key]) for a, mine in self._differences.items() if key in mine]
            total = before.float() + sum(scale * value.to(before.device) for scale, value in added)
            self._parameter(key).data.copy_(total)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter; 0 switches it off. Merged adapters are merged anew."""
        merged = self.merged
        if merged:
            self.unmerge()
        self.scales[adapter] = scale
        self._activate()
        if merged:
            self.merge()

    def merge(self) -> None:
        """Add all adapters to the weights: the same output at the speed of the plain network."""
        for layer in self._layers:
            layer.merge(safe_merge=True)

    def unmerge(self) -> None:
        """Subtract merged adapters from the weights, up to the rounding of merging."""
        for layer in self._layers:
            layer.unmerge()

    @torch.no_grad()
    def merge_and_unload(self) -> None:
        """Merge all adapters permanently and replace peft's layers by plain ones.

        Unlike `merge` it sums all adapters in float32 and rounds once. Raises UserError if a weight overflows.
        """
        if self.merged:
            self.unmerge()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                base = module.get_base_layer()
                delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
                base.weight.copy_(base.weight.float() + delta)
                if not torch.isfinite(torch.stack(torch.aminmax(base.weight))).all():
                    raise UserError(f"adapters take {name} beyond {base.weight.dtype}; lower model.lora_scales")
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, base)
        self.model.__dict__.pop("peft_config", None)
        self.plans, self.scales, self._differences, self._before = {}, {}, {}, {}

    def export(self, adapter: str, path: str | Path) -> None:
        """Save an adapter as it was loaded, without its scale: a `.pt` in LongLive's format, else peft's folder."""
        values: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and adapter in module.lora_A:
                values[f"{name}.A"] = module.lora_A[adapter].weight.detach().cpu().contiguous()
                values[f"{name}.B"] = module.lora_B[adapter].weight.detach().cpu().contiguous()
        save_lora(values, self.plans[adapter].alphas, path, self._differences[adapter])


def save_lora(
    values: Mapping[str, Tensor], alphas: Mapping[str, float], path: str | Path, differences: Mapping[str, Tensor]
) -> None:
    """Write `<layer>.A` and `<layer>.B` with their alphas. A `.pt` has no alpha, so B is multiplied by alpha / rank.

    differences: by name of the parameter; other readers may ignore them.
    """
    path = Path(path)
    layers = [tensor.removesuffix(".A") for tensor in values if tensor.endswith(".A")]
    ranks = {layer: values[f"{layer}.A"].shape[0] for layer in layers}
    if path.suffix == ".pt":
        state = {}
        for layer in layers:
            scaling = alphas[layer] / ranks[layer]
            state[names.original_lora_name(layer, "A")] = values[f"{layer}.A"]
            state[names.original_lora_name(layer, "B")] = values[f"{layer}.B"] * scaling
        state |= {names.lora_difference_name(names.original_name(key)): value for key, value in differences.items()}
        with atomic_path(path) as temporary:
            torch.save({"generator_lora": state}, temporary)
        return
    rank, alpha = (ranks[layers[0]], alphas[layers[0]]) if layers else (1, 1)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {layer: r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {layer: alphas[layer] for layer in layers if alphas[layer] != alpha},
        "target_modules": sorted(layers),
    }
    with atomic_path(path / PEFT_FILE) as temporary:
        tensors = {f"{names.LORA_PREFIX}{t[:-2]}.lora_{t[-1]}.weight": v for t, v in values.items()}
        tensors |= {names.lora_difference_name(key): value for key, value in differences.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json_atomic(path / PEFT_CONFIG, config)
