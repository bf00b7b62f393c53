"""The measures of live streams: what they say of streams whose faults are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_session import PROMPT, make  # noqa: F401  (fixture)

from scripts import measure_live as script
from scripts.bench.live import FrameNumbering, StreamMeasures, read_numbers, recoloured, watch_stream
from trainer.tiny.captions import COLOURS
from trainer.tiny.world import TinyWorld
from utils.video_live import LiveWriter


def plain(pixels: torch.Tensor) -> torch.Tensor:
    return pixels


def test_numbers_survive_the_file_and_a_lost_or_repeated_frame_is_seen(tmp_path):
    numbered = FrameNumbering(plain)
    frames = torch.cat([numbered(torch.full((1, 9, 64, 96, 3), 90, dtype=torch.uint8)) for _ in range(8)], 1)[0].numpy()
    cases = {"good": frames, "lost": np.delete(frames, 31, 0), "twice": np.insert(frames, 31, frames[30], 0)}
    for name, shown in cases.items():
        with LiveWriter(tmp_path / f"{name}.mp4", 16, (64, 96)) as writer:
            writer.write(shown)
    assert read_numbers(tmp_path / "good.mp4") == list(range(72))
    assert read_numbers(tmp_path / "lost.mp4") == [n for n in range(72) if n != 31]
    assert read_numbers(tmp_path / "twice.mp4") == sorted([*range(72), 30])


def test_a_long_stream_is_watched_and_left_as_it_was(make, tmp_path, tiny_geometry):  # noqa: F811
    session = make()
    before = session.async_decoder.to_frames
    found = watch_stream(session, PROMPT, 8, 16, tmp_path / "x.mp4", 12)
    assert found["every_frame_once"] and found["frames"] == 93 and found["latent_frames"] == 24
    assert session.async_decoder.to_frames is before
    assert found["memory_change"] < 0.5 and found["chunk_seconds"] > 0
    session.async_decoder.to_frames = lambda pixels: before(pixels)[
        :, :-1
    ]  # one frame a chunk is lost before it is counted
    assert not watch_stream(session, PROMPT, 2, 16, tmp_path / "y.mp4", 12)["every_frame_once"]


def test_drift_and_seams_of_a_made_up_stream():
    """Chroma falls by half, and a jump at each border is four times a step inside."""
    watch, level, number = StreamMeasures(), 10.0, 0
    for chunk in range(10):
        frames = []
        for i in range(12):
            level += 4.0 if i == 0 and chunk else 1.0
            red = 200 - 100 * number / 119
            frames.append(np.stack([np.full((16, 16), v) for v in (level / 4 + red / 2, level / 4, level / 4)], -1))
            number += 1
        watch.see(np.stack(frames).round().astype(np.uint8), 0.1, 100)
    assert watch.borders == list(range(12, 120, 12))
    assert -0.5 < watch.drift(120) < -0.3
    assert watch.drift(12) > -0.1
    assert len(watch.steps) == 119
    # three latent frames a chunk; the VAE's step is 2, that between chunks 6, all others 1
    watch.steps = [6.0 if t % 12 == 0 else 2.0 if t % 4 == 0 else 1.0 for t in range(1, 120)]
    inside = [s for s in watch.steps if s < 6]
    seams = watch.seams(3)
    assert seams["seam_ratio"] == pytest.approx(6 * len(inside) / sum(inside), rel=1e-3)
    assert seams["seam_against_latents"] == pytest.approx(3)


def test_one_chunk_has_no_seam_and_no_change(tmp_path, capsys):
    out = tmp_path / "live.json"
    asked = ["--random_weights", "tiny", "--minutes", "0.001", "--switches", "0", "--plays", "0", "device=cpu"]
    assert script.main([*asked, "--json", str(out)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    undefined = ["memory_change", "chunk_time_change", "seam_ratio", "seam_against_latents"]
    assert [row for row in rows if row[1] == "-"] == [[f"long.{name}", "-"] for name in undefined]
    figures = json.loads(out.read_text())["long"]
    assert [figures[name] for name in undefined] == [None] * 4


def test_a_recoloured_scene_has_another_colour_and_nothing_else():
    for i, scene in enumerate(TinyWorld().scenes(7, 30)):
        other = recoloured(scene, i)
        assert other.colour != scene.colour and vars(other) | {"colour": scene.colour} == vars(scene)
    assert len({recoloured(TinyWorld().scenes(7, 1)[0], i).colour for i in range(5)}) == len(COLOURS) - 1


def test_the_script_in_seconds(tmp_path, capsys):
    settings = ["--random_weights", "tiny", "--plays", "1", "--sessions", "1", "--seconds", "1", "device=cpu"]
    settings += ["--json", str(tmp_path / "live.json")]
    assert script.main(["--minutes", "0.02", "--switches", "2", "--batch", "2", "--switch_chunk", "1", *settings]) == 0
    printed = capsys.readouterr().out
    demo = "demo.first_frame_ms", "1_workers.1.paced.late_frames"
    for name in ("long.every_frame_once", "switches.seen_within_chunks.2", *demo):
        assert name in printed
    assert Path(tmp_path / "live.json").exists()


@pytest.mark.parametrize("flag, value", [("--batch", "0"), ("--plays", "-1"), ("--sessions", "-1")])
def test_too_little_is_refused(flag, value):
    with pytest.raises(script.UserError, match=f"{flag}.*{value} is less than"):
        script.parse([flag, value])
