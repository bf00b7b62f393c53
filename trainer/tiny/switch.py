"""Scenes of the tiny world with a change of prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.tiny.captions import ATTRIBUTES, VALUES
from trainer.tiny.world import TinyScene, TinyWorld, velocity


@dataclass(frozen=True)
class SwitchedScene:
    """`before` until `frame`, `after` from it on; the subject keeps its position."""

    before: TinyScene
    after: TinyScene
    frame: int


def switched_scene(world: TinyWorld, scene: TinyScene, frame: int, rng: np.random.Generator) -> SwitchedScene:
    """The scene with new attributes from `frame` on: one always, each other one with probability 1/3."""
    certain = ATTRIBUTES[int(rng.integers(len(ATTRIBUTES)))]
    changed = {name: vars(scene)[name] for name in ATTRIBUTES}
    for name in ATTRIBUTES:
        if name == certain or rng.random() < 1 / 3:
            others = [value for value in VALUES[name] if value != changed[name]]
            changed[name] = others[int(rng.integers(len(others)))]
    (x, y), (vx, vy) = world.position(scene, frame), velocity(changed["direction"], changed["speed"])
    after = replace(scene, **changed, x=x - vx * frame, y=y - vy * frame)
    return SwitchedScene(scene, after, frame)


def render_switched(
    world: TinyWorld, scenes: Sequence[SwitchedScene], num_frames: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Clips [B, T, 3, H, W] in [-1, 1]."""
    before, after = (
        world.render([getattr(scene, part) for scene in scenes], num_frames, device) for part in ("before", "after")
    )
    at = torch.tensor([scene.frame for scene in scenes], device=device)
    late = torch.arange(num_frames, device=device) >= at[:, None]
    return torch.where(late[:, :, None, None, None], after, before)
