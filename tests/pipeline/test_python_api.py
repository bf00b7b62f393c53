"""DiagonalPipeline as a user of diffusers expects it: arguments, outputs, folders, devices.

What is compared with is not the pipeline's own: diffusers' and transformers' classes, inference.py, sessions, and a
pipeline that was configured for what a call asks.
"""

import base64
import inspect
import json
import re

import numpy as np
import pytest
import torch
from conftest import TEXT_TOKENS, alike
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from test_inference_cli import cli, files  # noqa: F401  (fixture)
from test_lora import adapter  # noqa: F401  (fixture)
from transformers import AutoTokenizer, UMT5EncoderModel

from configs.errors import UserError
from configs.load import load_config
from model.fast.student import fuse_qkv_projections
from model.schedule import Schedule
from model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from pipeline import DiagonalPipeline, Video
from pipeline.arguments import ABSENT
from utils.seeds import sample_seed
from utils.video import read_video

PROMPT, OTHER = "a red circle moves right", "a blue square moves up"
HALVES = ("inference.precision=bfloat16",)


@pytest.fixture(scope="module")
def pipe(tiny_assets):
    return DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")


def frames(pipe, *arguments, **named) -> np.ndarray:
    """Of the only video, uint8 [T, H, W, 3]."""
    (video,) = pipe(*arguments, **named).videos
    return video.frames


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*list(inspect.signature(WanPipeline.__call__).parameters)[1:], "timesteps", "sigmas"])
def test_each_argument_of_diffusers_is_known_or_answered_in_a_sentence(pipe, name):
    if name in inspect.signature(DiagonalPipeline.__call__).parameters:
        return
    with pytest.raises(UserError) as refused:
        pipe(PROMPT, **{name: 7.5})
    said = str(refused.value)
    assert said.startswith(f"{name}=7.5 ") and said.endswith(ABSENT[name]) and "\n" not in said
    with pytest.raises(UserError, match=name):
        pipe.stream(PROMPT, **{name: 7.5})


def test_what_was_left_out_in_diffusers_way_is_left_out(pipe):
    assert np.array_equal(frames(pipe, PROMPT, negative_prompt=None), frames(pipe, PROMPT))


WRONG = {
    "no text": ({"prompt": 12}, "prompt=12 is int; give a text"),
    "bytes": ({"prompt": b"a"}, "prompt=.* is bytes"),
    "none in a list": ({"prompt": [PROMPT, None]}, "holds null, which is NoneType"),
    "an empty list": ({"prompt": []}, "at least"),
    "a blank prompt": ({"prompt": " "}, "prompt is empty"),
    "a word as seed": ({"seed": "blurry"}, "seed=blurry is str, not an integer"),
    "a float as seed": ({"seed": 1.5}, "seed=1.5 is float"),
    "a truth as seed": ({"seed": True}, "seed=True is bool"),
    "a huge seed": ({"seed": 2**70}, "seed=.* out of range"),
    "two seeds": ({"seed": [1, 2]}, "2 seeds were given for 1 prompts"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, "both given"),
    "a number as generator": ({"generator": 3}, "generator=3 is none; give a torch.Generator"),
    "two generators": ({"generator": [torch.Generator()] * 2}, "2 generators were given for 1 videos"),
    "frames beside": ({"num_frames": 20}, "num_frames=20 is not a whole number of chunks.*9 or 21"),
    "a chunk too many by a frame": ({"num_frames": 22}, "num_frames=22 .*; try 21 or 33"),
    "no frames": ({"num_frames": 0}, "num_frames=0 is out of range"),
    "half a frame": ({"num_frames": 9.0}, "num_frames=9.0 is float"),
    "two lengths": ({"num_frames": [9, 9]}, "2 lengths were given for 1 prompts"),
    "a height beside": ({"height": 50}, "video.height=50 is not divisible by 16"),
    "a width in words": ({"width": "64"}, "width=64 is str"),
    "no videos": ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0 is out of range"),
    "no such output": ({"output_type": "mp4"}, "output_type=mp4 is unknown; use one of np, pil, pt, latent"),
    "no function": ({"callback_on_chunk_end": 3}, "callback_on_chunk_end=3 cannot be called"),
    "no such preset": ({"schedule": "fast"}, "preset=fast is unknown; use one of paper_5432222"),
    "a number as schedule": ({"schedule": 432}, "schedule=432 is no schedule; give a preset"),
    "no steps": ({"schedule": [4, 0]}, "not a count of steps"),
    "rising timesteps": ({"schedule": [[100, 1000]]}, "does not fall"),
    "a slip": ({"hight": 32}, "hight is not an argument; did you mean height?"),
    "no argument at all": ({"qqq": 32}, "qqq is not an argument; there are prompt, seed"),
    "a list as a clip": ({"video": [np.zeros((32, 48, 3), np.uint8)] * 9}, "^video is list, .* or frames as one array"),
    "a number as an image": ({"image": 3}, "^image is int, which is not read here; give a file, a PIL image"),
    "an image that is not there": ({"image": "none.png"}, "^image=none.png does not exist"),
    "a short clip": ({"video": np.zeros((1, 32, 48, 3), np.uint8)}, "^video has 1 frame at .*picture of it as image$"),
    "two starts": ({"image": np.zeros((32, 48, 3), np.uint8), "video": "a.mp4"}, "both given"),
}


@pytest.mark.parametrize("arguments, words", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_a_sentence(pipe, arguments, words):
    with pytest.raises(UserError, match=words) as refused:
        pipe(**{"prompt": PROMPT} | arguments)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("wrong", [{"seed": "x"}, {"image": "none.png"}, {"video": np.zeros((3, 8, 8, 3), np.uint8)}])
def test_a_stream_refuses_when_it_is_asked_for_not_when_it_is_read(pipe, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        pipe.stream(PROMPT, **wrong)


def test_a_scheduler_of_diffusers_is_not_taken_in_silence(pipe):
    with pytest.raises(UserError, match="scheduler=object has no effect.*pipe.schedule"):
        pipe.scheduler = object()
    assert not hasattr(pipe, "scheduler")


def test_seeds_are_those_of_the_settings_and_of_each_video(pipe, tiny_assets):
    configured = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "seed=5")
    assert configured(PROMPT, num_frames=9).videos[0].seed == 5
    assert np.array_equal(frames(configured, PROMPT), frames(pipe, PROMPT, seed=np.int64(5)))
    given = pipe([PROMPT, OTHER], seed=np.arange(2), num_frames=9, num_videos_per_prompt=2).videos
    assert [(video.prompt, video.seed) for video in given] == [
        (PROMPT, 0), (PROMPT, sample_seed(0, 1)), (OTHER, 1), (OTHER, sample_seed(1, 1)),
    ]  # fmt: skip
    assert np.abs(given[3].frames.astype(int) - frames(pipe, OTHER, sample_seed(1, 1), 9)).max() <= 1


def test_a_generator_draws_seeds_that_make_the_video_again(pipe):
    generator = torch.Generator().manual_seed(3)
    first, second = (pipe(PROMPT, num_frames=9, generator=generator).videos[0] for _ in range(2))
    assert first.seed != second.seed, "it goes on"
    again = pipe(PROMPT, num_frames=9, generator=torch.Generator().manual_seed(3)).videos[0]
    assert np.array_equal(again.frames, first.frames)
    assert np.array_equal(again.frames, frames(pipe, PROMPT, again.seed, 9)), "and the seed tells how to make it again"
    batch = pipe([PROMPT, PROMPT], num_frames=9, generator=torch.Generator().manual_seed(3)).videos
    assert [video.seed for video in batch] == [first.seed, second.seed]
    each = [torch.Generator().manual_seed(n) for n in (3, 4)]
    one, other = pipe(PROMPT, num_frames=9, num_videos_per_prompt=2, generator=each).videos
    assert one.seed == first.seed != other.seed


def test_a_size_holds_for_its_call(pipe, tiny_assets):
    before = frames(pipe, PROMPT)
    wide = frames(pipe, PROMPT, height=48, width=64)
    assert wide.shape == (21, 48, 64, 3)
    configured = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "video.height=48", "video.width=64")
    assert np.array_equal(wide, frames(configured, PROMPT)) and np.array_equal(frames(pipe, PROMPT), before)
    assert next(pipe.stream(PROMPT, width=64)).shape == (9, 32, 64, 3)
    assert (pipe.geometry.height, pipe.config.video.width) == (32, 48), "of this call alone"
    picture = np.full((48, 64, 3), 200, np.uint8)
    begun = frames(pipe, PROMPT, image=picture, height=48, width=64)
    assert np.array_equal(begun, frames(configured, PROMPT, image=picture)) and not np.array_equal(begun, wide)


@pytest.mark.parametrize(
    "schedule, settings",
    [
        ("32", ["schedule.steps=32"]),
        ([3, 2], ["schedule.steps=32"]),
        ("self_forcing", ["schedule.preset=self_forcing"]),
        ([[1000, 500], [900.0]], ["schedule.timesteps=[[1000, 500], [900]]"]),
        (
            Schedule(timesteps_by_chunk=((1000.0, 357.1),), context="clean"),
            ["schedule.timesteps=[[1000, 357.1]]", "stream.context=clean"],
        ),
    ],
)
def test_a_schedule_holds_for_its_call_or_until_another_is_set(pipe, tiny_assets, schedule, settings):
    configured = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *settings)
    wanted, before = frames(configured, PROMPT), str(pipe.schedule)
    assert np.array_equal(frames(pipe, PROMPT, schedule=schedule), wanted)
    assert np.array_equal(np.concatenate(list(pipe.stream(PROMPT, schedule=schedule))), wanted)
    assert pipe.session.schedule is pipe.schedule
    assert str(pipe.schedule) == before and not np.array_equal(frames(pipe, PROMPT), wanted), "of this call alone"
    try:
        pipe.schedule = schedule
        assert np.array_equal(frames(pipe, PROMPT), wanted) and str(pipe.schedule) == str(configured.schedule)
    finally:
        pipe.schedule = "4322222"


def test_steps_keep_the_rest_of_a_configured_preset(tiny_assets):
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "schedule.preset=self_forcing")
    pipe.schedule = [2, 1]
    assert pipe.schedule.context == "clean" and pipe.schedule.timesteps_by_chunk[0] == (1000.0, 625.0)
    pipe.schedule = [[1000.0]]
    assert pipe.schedule.context == "clean"


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_forms_of_the_output_are_those_of_diffusers(pipe):
    shown = pipe([PROMPT, OTHER], seed=1)
    raw = np.stack([video.frames for video in shown.videos])
    assert shown.frames.dtype == np.float32 and shown.frames.shape == (2, 21, 32, 48, 3)
    assert np.array_equal((shown.frames[0] * 255).astype(np.uint8), raw[0]), "what export_to_video makes of it"
    pictures = pipe([PROMPT, OTHER], seed=1, output_type="pil").frames
    assert [len(video) for video in pictures] == [21, 21]
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures[1]]), raw[1])
    tensors = pipe([PROMPT, OTHER], seed=1, output_type="pt").frames
    assert tensors.shape == (2, 21, 3, 32, 48) and torch.equal(tensors, torch.from_numpy(shown.frames).movedim(-1, 2))
    uneven = pipe([PROMPT, OTHER], num_frames=[9, 21])
    assert [clip.shape[0] for clip in uneven.frames] == [9, 21]
    assert len(repr(shown)) < 400 and len(repr(pipe(PROMPT, num_frames=9, output_type="latent"))) < 100


def test_latents_are_what_diffusers_vae_decodes(pipe, tiny_assets, monkeypatch):
    wanted = frames(pipe, PROMPT)
    with monkeypatch.context() as broken:
        broken.setattr(pipe.session.codec, "_decode", None)  # nothing is decoded
        output = pipe([PROMPT, PROMPT], seed=0, output_type="latent")
    latents = output.frames
    assert latents.shape == (2, 16, 6, 4, 6) and latents.dtype == torch.float32 and not output.videos
    vae = AutoencoderKLWan.from_pretrained(tiny_assets / "vae")
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        pixels = vae.decode(latents[:1] * std + mean).sample[0]
    made = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()
    assert np.abs(made - wanted).max() <= 1


def test_a_callback_sees_each_chunk_and_may_end_the_call(pipe):
    seen = []

    def look(owner, chunk, made):
        assert owner is pipe
        seen.append((chunk, made))

    video = pipe([PROMPT, OTHER], num_frames=[21, 9], callback_on_chunk_end=look).videos[0]
    assert [chunk for chunk, _ in seen] == [0, 1]
    assert np.array_equal(np.concatenate([made["frames"][0] for _, made in seen]), video.frames)
    assert len(seen[1][1]["frames"][1]) == 0 and seen[0][1]["latents"].shape == (2, 3, 16, 4, 6)

    def stop(owner, chunk, made):
        raise InterruptedError(chunk)

    with pytest.raises(InterruptedError, match="0"):
        pipe(PROMPT, callback_on_chunk_end=stop)
    assert np.array_equal(frames(pipe, [PROMPT]), frames(pipe, PROMPT)), "and nothing is left of it"


def test_the_progress_bar_is_tqdm_s(pipe, capsys):
    pipe(PROMPT)
    assert not capsys.readouterr().err, "where there is no terminal"
    try:
        pipe.set_progress_bar_config(disable=False, desc="clips", mininterval=0)
        pipe(PROMPT)
        assert re.search(r"clips: 100%.* 2/2 .*chunk", capsys.readouterr().err)
        with pytest.raises(UserError, match="disabled is not an argument; did you mean disable"):
            pipe.set_progress_bar_config(disabled=True)
    finally:
        pipe.set_progress_bar_config()


def test_a_video_plays_in_a_notebook(pipe, tmp_path):
    output = pipe("a <b>red</b> & \"blue\" circle", num_frames=9)
    (video,) = output.videos
    page = output._repr_html_()
    assert page == video._repr_html_() and page.count("<") == 2, "one element, whatever the prompt is"
    content = re.fullmatch(r'<video controls .* src="data:video/mp4;base64,([\w+/=]+)"></video>', page)[1]
    (tmp_path / "shown.mp4").write_bytes(base64.b64decode(content))
    video.save(tmp_path / "saved.mp4")
    assert alike(read_video(tmp_path / "shown.mp4"), read_video(tmp_path / "saved.mp4"))
    said = repr(Video(video.frames, 16, "many words " * 50, 3))
    assert said.startswith("Video(9 frames of 32x48, 16 fps, prompt='many words") and len(said) < 140


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved") / "my_model"
    pipe.save_pretrained(saved)
    return saved


def test_a_saved_pipeline_gives_the_same_frames_also_on_the_command_line(pipe, folder, cli, tmp_path):  # noqa: F811
    wanted = frames(pipe, PROMPT, seed=2)
    loaded = DiagonalPipeline.from_pretrained(folder)
    assert np.array_equal(frames(loaded, PROMPT, seed=2), wanted)
    assert (loaded.card, str(loaded.schedule)) == (pipe.card, str(pipe.schedule))
    assert cli("--config_path", str(folder), "--prompt", PROMPT, "--seed", "2", "--output", "cli.mp4") == 0
    loaded(PROMPT, seed=2).videos[0].save("api.mp4")
    assert (tmp_path / "cli.mp4").read_bytes() == (tmp_path / "api.mp4").read_bytes()
    loaded.save_pretrained(tmp_path / "again")
    for file in (path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / "again" / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name


def test_diffusers_and_transformers_read_the_folder(folder, tiny_assets):
    for cls, name, source in (
        (WanTransformer3DModel, "transformer", "student"),
        (AutoencoderKLWan, "vae", "vae"),
        (UMT5EncoderModel, "text_encoder", "text_encoder"),
    ):
        ours = cls.from_pretrained(folder, subfolder=name).state_dict()
        theirs = cls.from_pretrained(tiny_assets / source).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    words = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    assert words(PROMPT).input_ids == AutoTokenizer.from_pretrained(tiny_assets / "text_encoder")(PROMPT).input_ids


def test_numbers_are_stored_in_half_precision_where_that_holds_them(tiny_assets, tmp_path):
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *HALVES)
    pipe.save_pretrained(tmp_path / "half")
    sizes = [
        (folder / "diffusion_pytorch_model.safetensors").stat().st_size
        for folder in (tmp_path / "half" / "vae", tiny_assets / "vae")
    ]
    assert sizes[0] < 0.6 * sizes[1]
    assert np.array_equal(frames(DiagonalPipeline.from_pretrained(tmp_path / "half"), PROMPT), frames(pipe, PROMPT))


def test_a_schedule_that_was_set_is_saved(tiny_assets, tmp_path):
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")
    pipe.schedule = Schedule(
        timesteps_by_chunk=((1000.0, 400.0), (1000.0,)), context="renoise",
        renoise_timestep=50.0,
    )
    pipe.save_pretrained(tmp_path / "a")
    loaded = DiagonalPipeline.from_pretrained(tmp_path / "a")
    assert loaded.schedule == pipe.schedule and np.array_equal(frames(loaded, PROMPT), frames(pipe, PROMPT))
    assert load_config(tmp_path / "a", ["schedule.timesteps=null", "schedule.steps=2"]).schedule.timesteps is None


def test_the_tiny_decoder_is_saved(tiny_assets, tmp_path):
    torch.manual_seed(0)
    decoder = TinyDecoder(TinyDecoderConfig(widths=(12, 8, 6, 6))).eval()
    save_file(decoder.state_dict(), tmp_path / "taew2_1.safetensors")
    named = ["model.codec=taehv", f"model.tiny_decoder={tmp_path / 'taew2_1.safetensors'}"]
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *named, "inference.decode_frames=1")
    pipe.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "vae").exists()
    assert np.array_equal(frames(DiagonalPipeline.from_pretrained(tmp_path / "a"), PROMPT), frames(pipe, PROMPT))
    assert list(pipe.components) == ["transformer", "tiny_decoder", "text_encoder", "tokenizer", "schedule"]


def test_what_inference_made_of_the_networks_is_undone(tiny_assets, folder, tmp_path):
    """Fused projections, blocks on the host, a decoder in small steps."""
    places = ("inference.student=stream", "inference.text_encoder=stream", "inference.decode_frames=1")
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *places)
    for block in pipe.components["transformer"].blocks:
        fuse_qkv_projections(block.attn1)
    pipe.save_pretrained(tmp_path / "a")
    for file in folder.rglob("*.safetensors"):
        assert (tmp_path / "a" / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name


def test_adapters_are_merged_or_refused(tiny_assets, tmp_path, adapter):  # noqa: F811
    named = f"model.lora=[{adapter}]"
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", named)
    pipe.save_pretrained(tmp_path / "a")
    loaded = DiagonalPipeline.from_pretrained(tmp_path / "a")
    assert np.array_equal(frames(loaded, PROMPT), frames(pipe, PROMPT))
    assert loaded.card["merged_lora"] == [{"file": adapter.name}]
    for settings in ((named, "model.lora_merge=false"), ("inference.text_int8=true",)):
        other = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *settings)
        with pytest.raises(UserError, match="held in 8 bits or under adapters; load the pipeline with"):
            other.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_nothing_is_replaced(pipe, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    pipe.save_pretrained(tmp_path / "empty")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "empty", "file", "file/below"):
        with pytest.raises(UserError, match="not empty|cannot be a folder"):
            pipe.save_pretrained(tmp_path / name)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "notes"]


def test_a_full_disk_leaves_nothing(pipe, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.pretrained.write_json_atomic", full)
    with pytest.raises(UserError, match="No space left"):
        pipe.save_pretrained(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, named, words",
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {}, "is no folder here, and nothing is fetched; give one that save_pretr"),
        (".", {}, "has no pipeline.json; give one"),
        ("my_model", {"torch_dtype": torch.float16}, "it is called dtype"),
        ("my_model", {"dtype": torch.int8}, "dtype=torch.int8 is not a dtype of networks"),
        ("my_model", {"devise": "cpu"}, "devise is not an argument"),
    ],
)
def test_folders_that_cannot_be_loaded(folder, monkeypatch, name, named, words):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError, match=words):
        DiagonalPipeline.from_pretrained(name, **named)


@pytest.mark.parametrize("lost", ["vae", "transformer/config.json", "tokenizer/tokenizer.json", "text_encoder"])
def test_a_folder_that_is_not_whole_is_refused(pipe, tmp_path, lost):
    pipe.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / lost).rename(tmp_path / "lost")
    with pytest.raises(UserError, match=lost.partition("/")[0]):
        DiagonalPipeline.from_pretrained(tmp_path / "a")


def test_overrides_go_before_the_folder_s_settings(folder, tmp_path):
    settings = json.loads((folder / "pipeline.json").read_text())
    assert settings["model"] == {"codec": "wan", "text_tokens": TEXT_TOKENS}, "no path of this machine"
    loaded = DiagonalPipeline.from_pretrained(folder, "video.height=48", "device=cpu", dtype=torch.bfloat16)
    assert (loaded.config.video.height, loaded.dtype, loaded.device.type) == (48, torch.bfloat16, "cpu")
    (tmp_path / "other.yaml").write_text(f"base: {folder / 'pipeline.json'}\nname: other\n")
    assert load_config(tmp_path / "other.yaml").model.vae == str(folder / "vae")
    (tmp_path / "links").mkdir()  # as the hub's cache has folders
    for entry in folder.iterdir():
        (tmp_path / "links" / entry.name).symlink_to(entry)
    assert load_config(tmp_path / "links").model.vae == str(tmp_path / "links" / "vae")


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"inference": {"output_folder": "/"}}, "inference.output_folder"),
        ({"model": {"student": "/elsewhere"}}, "model.student"),
        ({"training": {"steps": 1}}, "training.steps"),
        ({"device": "cpu"}, "device"),
        ({"base": "../a.yaml"}, "base"),
    ],
)
def test_a_folder_sets_nothing_but_what_its_videos_look_like(tmp_path, settings, name):
    (tmp_path / "pipeline.json").write_text(json.dumps({"video": {"height": 64}} | settings))
    with pytest.raises(UserError, match=f"pipeline.json sets {name}, which is not for a folder of weights to decide"):
        load_config(tmp_path)


# --- places -----------------------------------------------------------------------------------------------------------


def test_to_gives_what_loading_gives(tiny_assets, pipe, monkeypatch):
    moved = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")
    session = moved.session
    assert moved.to("cpu") is moved and moved.session is session, "nothing to do"
    moved.schedule = "32"
    assert moved.to(torch.bfloat16) is moved and moved.dtype == torch.bfloat16
    assert moved.session.schedule is moved.schedule
    loaded = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *HALVES)
    assert np.array_equal(frames(moved, PROMPT), frames(loaded, PROMPT, schedule="32"))
    kept = [key for key, value in moved.components["transformer"].state_dict().items() if value.dtype == torch.float32]
    assert kept and any("norm" in key for key in kept), "what diffusers keeps in float32"
    moved.to("cpu", torch.float32)
    assert moved.dtype == torch.float32
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no CUDA device"):
            pipe.to("cuda")
    with pytest.raises(UserError, match="device=gpu is not a device"):
        pipe.to("gpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_a_gpu_and_back(tiny_assets):
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "device=cpu")
    before = frames(pipe, PROMPT)
    there = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", "device=cuda")
    assert np.array_equal(frames(pipe.to("cuda"), PROMPT), frames(there, PROMPT))
    assert np.abs(frames(pipe.to("cpu"), PROMPT).astype(int) - before).mean() < 3


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_group_offload"])
def test_offloading_after_loading_is_that_of_the_settings(tiny_assets, name):
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")
    vars(DiagonalPipeline)[name](pipe)
    places = {"enable_model_cpu_offload": ("keep", "after_use"), "enable_group_offload": ("stream", "stream")}[name]
    assert (pipe.config.inference.student, pipe.config.inference.text_encoder) == places
    settings = [f"inference.student={places[0]}", f"inference.text_encoder={places[1]}"]
    loaded = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *settings)
    assert type(pipe.session.text_encoder) is type(loaded.session.text_encoder)
    assert np.array_equal(frames(pipe, PROMPT), frames(loaded, PROMPT))
