"""A network that overflows gives a sentence, wherever its chunks go, and never a black video."""

import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import inference
from pipeline import DiagonalPipeline
from pipeline import stream as stream_module
from pipeline.stream import NonFiniteChunk
from utils import exits

PROMPT = "a red circle moves right"


@pytest.fixture
def pipe(tiny_assets):
    return DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "video.num_latent_frames=9")


def break_student(pipe, monkeypatch, value: float, row: int = 0) -> None:
    """From chunk 1 on, one value of the latents of stream `timesteps` is `value`."""
    whole = stream_module.denoise_chunk

    def denoise(*args, chunk: int, **options):
        latents = whole(*args, chunk=chunk, **options)
        if chunk >= 1:
            latents[row, 0, 0, 0, 0] = value
        return latents

    monkeypatch.setattr(stream_module, "denoise_chunk", denoise)


def break_decoder(pipe, monkeypatch, value: float, row: int = 0) -> None:
    """From chunk 1 on, one value of the pixels of stream `timesteps` is `value`."""
    whole = pipe.session.codec.stream

    def stream():
        decoder, count = whole(), []
        decode = decoder.decode

        def broken(latents):
            pixels = decode(latents).clone()
            if count:
                pixels[row, 0, 0, 0, 0] = value
            count.append(1)
            return pixels

        decoder.decode = broken
        return decoder

    monkeypatch.setattr(pipe.session.codec, "stream", stream)


@pytest.mark.parametrize("maker, value", [("student", float("nan")), ("decoder", float("inf"))])
def test_a_chunk_that_is_not_finite_is_never_given_out(pipe, monkeypatch, maker, value):
    before = pipe(PROMPT, seed=1).videos[0].frames
    with monkeypatch.context() as broken:
        {"student": break_student, "decoder": break_decoder}[maker](pipe, broken, value)
        given = []
        with pytest.raises(NonFiniteChunk, match=f"chunk 1 holds NaN or infinity, made by the {maker}.*float32"):
            for frames in pipe.stream(PROMPT, seed=1):
                given.append(frames)
        assert len(given) == 1 and np.array_equal(given[0], before[:9])
        with pytest.raises(NonFiniteChunk):
            pipe([PROMPT, PROMPT], seed=1)
        with pytest.raises(NonFiniteChunk):
            for result in islice(pipe.session.play(PROMPT), 5):
                result.wait()
    assert np.array_equal(pipe(PROMPT, seed=1).videos[0].frames, before), "nothing of it stays in the session"


def test_what_is_made_for_nobody_may_be_anything(pipe, monkeypatch):
    break_student(pipe, monkeypatch, float("nan"), row=1)
    first, second = pipe([PROMPT, PROMPT], seed=[1, 2], num_frames=[33, 9]).videos
    assert len(first.frames) == 33 and len(second.frames) == 9
    with pytest.raises(NonFiniteChunk):
        pipe([PROMPT, PROMPT], seed=[1, 2])


def test_the_remedy_fits_the_precision(pipe, monkeypatch):
    break_student(pipe, monkeypatch, float("nan"))
    pipe.session.dtype = torch.float16
    monkeypatch.setattr(pipe.session, "_text_of_next", lambda student, timer: pipe.session._prompt_track.state.kv)
    results = [result for result in pipe.session.play(PROMPT, 0, 1)]
    results[0].decoded()[1].fill_(False)
    with pytest.raises(NonFiniteChunk, match="float16 overflows.*bfloat16 or float32"):
        results[0].wait()


@pytest.fixture
def overflowing(tiny_assets, tmp_path) -> Path:
    """A student whose numbers are finite and whose outputs are not."""
    folder = Path(shutil.copytree(tiny_assets / "student", tmp_path / "student"))
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.bias"][0] = 3e38
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "how",
    [["--output_folder", "out"], ["--num_output_frames", "0", "--output", "out/long.mp4"], ["--output", "out/one.mp4"]],
)
def test_the_command_line_says_so_and_leaves_nothing(tiny_assets, overflowing, tmp_path, monkeypatch, capsys, how):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    config = ["--config_path", str(tiny_assets / "tiny.yaml")]
    monkeypatch.setattr(
        sys, "argv", ["inference.py", *config, "--checkpoint_path", str(overflowing), "--prompt", PROMPT, *how]
    )
    for _ in range(2):  # the second time, too: nothing was marked as finished
        with pytest.raises(SystemExit) as stop:
            exits.run(inference.main)
        assert stop.value.code == 2
        assert "error: chunk 0 holds NaN or infinity, made by the student" in capsys.readouterr().err
        assert not list((tmp_path / "out").iterdir())
