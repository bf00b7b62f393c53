"""VBench (arXiv 2311.17982): its prompt files, file names, and how 16 dimensions become Total, Quality and Semantic.

The weights and ranges are those of its published final score: each dimension is scaled from its range to [0, 1];
Quality and Semantic are weighted means, and Total is (4 Quality + Semantic) / 5.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from utils.exits import Faults
from utils.prompts import check_prompt, read_prompts

SAMPLES = 5  # videos of one prompt
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
LONGEST_NAME = 255  # bytes, on the file systems that videos are kept on


@dataclass(frozen=True)
class Dimension:
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462, 1.0),
    "background_consistency": Dimension(0.2615, 1.0),
    "temporal_flickering": Dimension(0.6293, 1.0),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
    "dynamic_degree": Dimension(weight=0.5),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(0.0, 0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(0.0, 0.364),
    "overall_consistency": Dimension(0.0, 0.364),
}
DIMENSIONS = QUALITY | SEMANTIC


@dataclass(frozen=True)
class VBenchPrompt:
    """text names the file; `extended` is what the model is given, the same unless a rewritten prompt was."""

    text: str
    dimensions: tuple[str, ...]
    extended: str

    def file_name(self, sample: int) -> str:
        return f"{self.text}-{sample}.mp4"


def read_suite(path: Path, extended: Path | None = None) -> list[VBenchPrompt]:
    """Prompts of VBench_full_info.json, or of a text file such as all_dimension.txt (all dimensions then unknown).

    extended: text file with one rewritten prompt a line, in the order of the suite. UserError for what does not fit.
    """
    if path.suffix == ".json":
        entries = _read_info(path)
    else:
        entries = [(prompt, ()) for prompt in read_prompts(path, "prompts")]
    given = [text for text, _ in entries] if extended is None else read_prompts(extended, "extended")
    if len(given) != len(entries):
        raise UserError(f"extended={extended} has {len(given)} prompts for {len(entries)} of {path}; give one for each")
    suite: dict[str, VBenchPrompt] = {}
    for (text, dimensions), words in zip(entries, given, strict=True):
        if text in suite:  # the same words in two dimensions are one set of videos
            dimensions = tuple(dict.fromkeys(suite[text].dimensions + dimensions))
        suite[text] = VBenchPrompt(text, dimensions, words)
        name = suite[text].file_name(0)
        if "/" in name or len(name.encode()) > LONGEST_NAME:
            raise UserError(f"prompts={path} holds a prompt that cannot be a file name as VBench wants: {text[:60]}")
    return list(suite.values())


def _read_info(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        prompts = [(entry["prompt_en"].strip(), tuple(entry["dimension"])) for entry in entries]
    except FileNotFoundError as error:
        raise UserError(f"prompts={path} does not exist; get VBench_full_info.json from Vchitect/VBench") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"prompts={path} is not like VBench_full_info.json ({error!r}); give that file") from error
    for text, dimensions in prompts:
        check_prompt(text, f"prompts={path}")
        if unknown := [name for name in dimensions if name not in DIMENSIONS]:
            raise UserError(f"prompts={path} names dimension {unknown[0]}, which VBench does not have; check the file")
    if not prompts:
        raise UserError(f"prompts={path} holds no prompt; give VBench_full_info.json")
    return prompts


def read_results(folder: Path, faults: Faults) -> dict[str, float]:
    """Raw score of each dimension in the *_eval_results.json files of a folder; later files go over earlier ones.

    Files that cannot be read go to `faults`. UserError where no score is left.
    """
    scores: dict[str, float] = {}
    for path in sorted(folder.glob("*_eval_results.json")):
        with faults.noted():
            scores |= read_result(path)
    if not scores:
        raise UserError(f"results={folder} holds no *_eval_results.json; run scripts/vbench.py score first")
    return scores


def read_result(path: Path) -> dict[str, float]:
    """Raw scores in one file of the package. UserError where it holds anything else."""
    scores: dict[str, float] = {}
    try:
        for name, (value, *_) in json.loads(path.read_text(encoding="utf-8")).items():
            scores[name] = float(value)
            if not math.isfinite(scores[name]):  # the package's mean of no video at all
                raise ValueError(f"{name} is {value}")
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} does not hold VBench's results ({error!r}); remove it and score again") from error
    if unknown := [name for name in scores if name not in DIMENSIONS]:
        raise UserError(f"{path} has the dimension {unknown[0]}, which VBench's T2V suite lacks; remove it")
    return scores


def aggregate(scores: Mapping[str, float], dimensions: Mapping[str, Dimension]) -> float | None:
    """Weighted mean of scaled scores in [0, 1]; None unless every dimension is there."""
    if any(name not in scores for name in dimensions):
        return None
    scaled = sum(d.weight * (scores[name] - d.low) / (d.high - d.low) for name, d in dimensions.items())
    return scaled / sum(d.weight for d in dimensions.values())


def totals(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Total, Quality and Semantic in [0, 1]; None where dimensions are missing."""
    quality, semantic = aggregate(scores, QUALITY), aggregate(scores, SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {"total": total, "quality": quality, "semantic": semantic}
