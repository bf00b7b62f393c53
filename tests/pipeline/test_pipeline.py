"""Sessions and DiagonalPipeline: chunks of frames, batches, seeds, warnings."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.load import load_config
from model.codec import WanCodec
from model.schedule import Schedule
from pipeline import DiagonalPipeline
from pipeline.async_decoder import to_frames
from pipeline.model_warnings import warn_of_schedule
from pipeline.stream import StreamSession
from utils.video import read_video

PROMPT, OTHER = "a red circle moves right", "a blue square moves up"


@pytest.fixture(scope="module")
def pipe(tiny_assets):
    return DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "video.num_latent_frames=9")


def test_streams_9_frames_and_then_12_at_a_time(pipe):
    chunks = list(pipe.stream(PROMPT, seed=0))
    assert [chunk.shape for chunk in chunks] == [(9, 32, 48, 3), (12, 32, 48, 3), (12, 32, 48, 3)]
    assert all(chunk.dtype == np.uint8 for chunk in chunks)
    assert np.concatenate(chunks).std() > 1


def test_call_is_stream_joined_and_can_be_repeated(pipe, tmp_path):
    video = pipe(PROMPT, seed=3).videos[0]
    assert np.array_equal(video.frames, np.concatenate(list(pipe.stream(PROMPT, seed=3))))
    assert (video.prompt, video.seed, video.fps, len(video.timings)) == (PROMPT, 3, 16, 3)
    assert not np.array_equal(video.frames, pipe(PROMPT, seed=4).videos[0].frames)
    assert len(repr(video)) < 200, "a line, not an array of pixels"
    video.save(tmp_path / "v.mp4")
    assert read_video(tmp_path / "v.mp4").shape == video.frames.shape


def test_a_batch_gives_what_each_prompt_gives_alone(pipe):
    videos = pipe([PROMPT, OTHER, PROMPT], seed=[1, 2, 2]).videos
    assert [(video.prompt, video.seed) for video in videos] == [(PROMPT, 1), (OTHER, 2), (PROMPT, 2)]
    for video in videos:
        alone = pipe(video.prompt, video.seed).videos[0].frames.astype(int)
        assert np.abs(video.frames - alone).max() <= 1  # float sums of another batch size may round differently
    chunks = list(pipe.stream([PROMPT, OTHER], seed=5))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2] and chunks[1][1].shape == (12, 32, 48, 3)


def test_frames_are_those_of_decoding_the_whole_clip(pipe):
    results = [result.wait() for result in pipe.session.play([PROMPT], [0], 3)]
    whole = to_frames(pipe.session.codec.decode(torch.cat([result.latents for result in results], dim=1)))
    streamed = torch.cat([result.frames for result in results], dim=1)
    # a value on the border between two levels may round either way, as calls of other sizes sum in another order
    assert (streamed.int() - whole.int()).abs().max() <= 1
    assert (streamed != whole).float().mean() < 1e-3


def test_to_frames_rounds_and_clamps():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.2, 1.0, 2.0]).view(1, 6, 1, 1, 1).expand(1, 6, 3, 2, 2)
    frames = to_frames(pixels)
    assert frames.shape == (1, 6, 2, 2, 3) and frames[0, :, 0, 0, 0].tolist() == [0, 0, 128, 153, 255, 255]


def test_num_frames_are_pixel_frames(pipe):
    assert len(pipe(PROMPT, num_frames=21).videos[0].frames) == 21


def test_schedule_prints_as_a_table(pipe):
    assert "0      4      1000   921.1  769.2  357.1" in str(pipe.schedule)
    assert isinstance(pipe.schedule, Schedule)


def named(timings: dict[str, float]) -> list[str]:
    """Spans of a chunk, without that of a machine with a core to spare."""
    return [name for name in timings if name != "queue"]


def test_timings_name_every_step(pipe):
    timings = pipe(PROMPT).videos[0].timings
    assert named(timings[0]) == ["text", "step 0", "step 1", "step 2", "step 3", "decode"]
    assert [sum(name.startswith("step") for name in chunk) for chunk in timings] == [4, 3, 2]
    assert all(seconds >= 0 for chunk in timings for seconds in chunk.values())


def test_context_policy_reaches_the_loop(tiny_assets):
    clean = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "stream.context=clean")
    assert [named(chunk)[-2] for chunk in clean(PROMPT).videos[0].timings] == ["context", "context"]


def test_the_memory_of_the_last_clip_is_used_again(pipe):
    next(pipe.session.play(PROMPT, 0, 1))
    before = pipe.session._cache
    next(pipe.session.play(OTHER, 1, 1))
    assert pipe.session._cache is before


def test_an_old_stream_does_not_mix_with_a_new_one(pipe):
    old = pipe.stream(PROMPT)
    next(old)
    next(pipe.stream(OTHER))
    with pytest.raises(RuntimeError, match="newer stream"):
        next(old)


class NoSync(TorchDispatchMode):
    """Refuses operators that make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", ["last_step", "clean", "renoise"])
def test_nothing_on_the_path_waits_for_the_device(tiny_student, tiny_vae, tiny_text_encoder, tiny_geometry, context):
    schedule = Schedule(timesteps_by_chunk=((1000.0, 357.1),), context=context, renoise_timestep=100.0)
    session = StreamSession(tiny_student, WanCodec(tiny_vae), tiny_text_encoder, schedule, tiny_geometry)
    generated = session.play(PROMPT, 0, 6)
    next(generated)
    with NoSync():
        assert len(list(generated)) == 5


def test_a_long_prompt_is_cut_with_a_warning(pipe, caplog):
    words = (PROMPT + " ") * 400
    assert len(pipe(words, num_frames=9).videos[0].frames) == 9
    assert "first 12 count" in caplog.text
    caplog.clear()
    pipe(PROMPT, num_frames=9)
    assert not caplog.text


def test_another_schedule_than_the_trained_one_is_a_warning(tiny_assets, caplog):
    card = tiny_assets / "student" / "card.json"
    before = card.read_text()
    config = load_config(tiny_assets / "tiny.yaml")
    trained = Schedule.from_config(dataclasses.replace(config.schedule, steps="5"), config.stream)
    try:
        card.write_text(json.dumps({"stage": "distill", "schedule": trained.to_dict()}))
        DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "schedule.steps=[5, 5]")
        assert not caplog.text
        DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "schedule.steps=432")
        assert "another schedule" in caplog.text
        assert "945.1" in caplog.text and "921.1" in caplog.text, "both are named"
    finally:
        card.write_text(before)


def test_a_student_that_tells_no_schedule_is_a_warning_that_names_self_forcing_s(caplog):
    config = load_config("configs/tiny.yaml")
    warn_of_schedule(Schedule.from_config(config.schedule, config.stream), {})
    assert caplog.text.count("schedule.preset=self_forcing") == 1 and "\n" not in caplog.records[0].getMessage()
    caplog.clear()
    warn_of_schedule(Schedule.from_config(load_config("configs/self_forcing.yaml").schedule, config.stream), {})
    assert not caplog.text


def test_a_seed_of_minus_one_draws_one_for_each_video(pipe, caplog):
    caplog.set_level("INFO", logger="diagonal")
    videos = pipe([PROMPT, PROMPT], seed=-1, num_frames=9).videos
    seeds = [video.seed for video in videos]
    assert seeds[0] != seeds[1] and min(seeds) >= 0 and all(str(seed) in caplog.text for seed in seeds)
    assert pipe(PROMPT, seed=seeds[1], num_frames=9).videos[0].seed == seeds[1]


def test_attention_kernel_is_chosen(tiny_assets, pipe):
    chosen = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "inference.attention=sdpa")
    blocks = chosen.session.student.model.blocks
    assert {str(block.attn1.processor._attention_backend) for block in blocks} == {"AttentionBackendName.NATIVE"}
    assert np.array_equal(chosen(PROMPT, num_frames=9).videos[0].frames, pipe(PROMPT, num_frames=9).videos[0].frames)


def test_a_config_takes_no_overrides(tiny_assets):
    config = load_config(tiny_assets / "tiny.yaml")
    assert DiagonalPipeline.from_config(config).config is config
    with pytest.raises(ValueError):
        DiagonalPipeline.from_config(config, "seed=1")


def test_a_pipeline_computes_with_the_threads_of_its_configuration(tiny_assets):
    before = torch.get_num_threads()
    try:
        for override, threads in ((), 1), (("cpu_threads=3",), 3), (("inference.cpu_threads=2",), 2):
            torch.set_num_threads(4)
            DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *override)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
