"""The picture of a run's metrics."""

import numpy as np
from PIL import Image

from utils.curves import draw_curves, group_of, write_curves

ROWS = [
    {"step": step, "critic_loss": 1 / step, "critic_grad_norm": "inf" if step == 3 else 2.0, "motion": float("nan"),
     "validation_shape": 0.5, "seconds_per_step": 1.0, "note": "text"}
    for step in range(1, 300)
]  # fmt: skip


def test_metrics_stand_in_groups():
    names = ("generator_flow", "critic_grad_norm", "dmd_gradient", "seam", "validation_x")
    groups = ["loss terms", "gradient norms", "gradient norms", "diagnostics", "validation"]
    assert [group_of(name) for name in names] == groups


def test_there_is_a_panel_for_each_metric_with_a_number_and_ink_in_it(tmp_path):
    whole = draw_curves(ROWS, "a run")
    one = draw_curves([{"step": 1, "loss": 1.0}], "a run")
    assert whole.height > one.height > draw_curves([], "a run").height
    assert draw_curves([row | {"more_loss": 1} for row in ROWS], "a run").height == whole.height, "beside the other"
    corner = np.asarray(whole)[:30, 400:]
    assert {(181, 205, 240), (23, 86, 169)} <= {tuple(pixel) for pixel in corner.reshape(-1, 3).tolist()}, "a legend"
    pixels = np.asarray(whole).reshape(-1, 3).astype(int)
    assert ((pixels[:, 2] - pixels[:, 0]) > 60).sum() > 1000, "blue lines"
    write_curves(tmp_path / "curves.png", ROWS, "a run")
    assert Image.open(tmp_path / "curves.png").size == whole.size


def test_one_peak_does_not_flatten_the_rest():
    rows = [{"step": i, "loss": 1 + 0.1 * (i % 2)} for i in range(400)]
    peaked = [row | ({"loss": 1e9} if row["step"] == 200 else {}) for row in rows]
    a, b = (np.asarray(draw_curves(r, "")) for r in (rows, peaked))
    assert (a != b).any(axis=2).mean() < 0.1
