"""What the tiny world's stages are fed: clips, crops around the subject, and latents that outlive a process."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from configs.errors import UserError
from configs.train_schema import CodecLossConfig
from model.codec import WanCodec
from trainer.build import initialise_vae
from trainer.tiny import data
from trainer.tiny.captions import ATTRIBUTES, parse_caption
from trainer.tiny.data import LatentBank, PixelBank, SwitchedBank
from trainer.tiny.switch import render_switched, switched_scene
from trainer.tiny.world import TinyWorld, background_image, training_caption
from utils.seeds import generator

WORLD = TinyWorld(64, 96)
CPU = torch.device("cpu")


def small_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()


@pytest.mark.parametrize("frame", [0, 33, 500])
def test_position_is_where_the_colour_is(frame):
    """Independent: the centre of mass of the pixels that differ from the background, for subjects wholly in view."""
    seen = 0
    for scene in WORLD.scenes(3, 24):
        x, y = WORLD.position(scene, frame)
        if not (18 < x < 78 and 18 < y < 46):
            continue
        picture = WORLD.render([scene], 1, start_frame=frame)[0, 0]
        grey = picture.amax(0) - picture.amin(0) > 0.6 * (picture.amax(0) - picture.amin(0)).max()  # not the trail
        rows, columns = grey.nonzero(as_tuple=True)
        assert abs(columns.float().mean() + 0.5 - x) < 6 and abs(rows.float().mean() + 0.5 - y) < 6
        seen += 1
    assert seen >= 3


def test_crops_show_the_subject_and_lie_on_the_grid_of_latents():
    bank = PixelBank(WORLD, 16, 9, seed=0, device=CPU)
    crops = bank.batch(torch.arange(16), 5, 48, generator(0, "crop"))
    assert crops.shape == (16, 5, 3, 48, 48)
    coloured = (crops.amax(2) - crops.amin(2)).flatten(1).amax(1) > 0.5
    assert coloured.sum() >= 14  # a subject that crosses an edge may hide behind it
    striped = next(i for i, scene in enumerate(bank.scenes) if scene.background == "striped")
    left = background_image("striped", 64, 96)[0, :48] * 2 - 1
    columns = crops[striped, 0, 0].mode(0).values  # most pixels of a column show the background
    shifted = [torch.allclose(columns, left.roll(s), atol=0.02) for s in (0, 8)]
    assert any(shifted)
    assert bank.batch(torch.arange(2), 9, 0, generator(0, "crop")).shape == (2, 9, 3, 64, 96)


def test_a_fresh_vae_sees_no_past():
    """So that stills can be learnt first: each frame of a clip is coded as if it were the only one."""
    codec = WanCodec(initialise_vae(small_vae()))
    clip = WORLD.render(WORLD.scenes(1, 1), 9)
    whole = codec.decode(codec.encode(clip))
    for latent, newest in enumerate((0, 4, 8)):
        alone = codec.decode(codec.encode(clip[:, newest : newest + 1]))
        torch.testing.assert_close(whole[:, newest : newest + 1], alone, atol=1e-4, rtol=0)
        repeated = alone.expand(-1, 4 if latent else 1, -1, -1, -1)
        torch.testing.assert_close(whole[:, max(0, newest - 3) : newest + 1], repeated, atol=1e-4, rtol=0)


def test_latents_are_encoded_once(tmp_path, tiny_text_encoder, monkeypatch):
    codec = WanCodec(small_vae())

    def bank(clips=3, **options):
        return LatentBank(WORLD, codec, tiny_text_encoder, clips=clips, frames=9, seed=0, cache=tmp_path, **options)

    first = bank()
    with monkeypatch.context() as patch:
        patch.setattr(WanCodec, "encode", lambda *_: pytest.fail("encoded again"))
        assert torch.equal(bank().latents, first.latents)
        with torch.no_grad():
            codec.vae.post_quant_conv.bias += 1  # the decoder's
        assert torch.equal(bank().latents, first.latents)
    bank(4)
    assert not torch.equal(bank(dtype=torch.bfloat16).latents, first.latents)
    with torch.no_grad():
        codec.vae.quant_conv.bias += 1
    assert not torch.equal(bank().latents, first.latents)
    codec.vae.register_to_config(latents_mean=[0.5] * 16)
    assert not torch.equal(bank().latents, first.latents)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def test_a_share_of_captions_is_open(tiny_text_encoder):
    """Neither direction nor speed is said of these; clips stay as they are."""
    codec = WanCodec(small_vae())
    plain, some = (
        LatentBank(WORLD, codec, tiny_text_encoder, clips=40, frames=1, seed=0, open_captions=share)
        for share in (0.0, 0.5)
    )
    assert some.scenes == plain.scenes and torch.equal(some.latents, plain.latents)
    is_open = (some.text != plain.text).flatten(1).any(1)
    assert 10 <= int(is_open.sum()) <= 30
    captions = [training_caption(scene, open_share=float(o)) for scene, o in zip(some.scenes, is_open, strict=True)]
    assert all(parse_caption(c)["direction"] is None for c, o in zip(captions, is_open, strict=True) if o)
    assert torch.equal(tiny_text_encoder(captions), some.text)


def test_crops_are_squares_about_the_subject(tiny_text_encoder):
    """Independent: each cell's value says where it lies and in which clip."""
    bank = LatentBank(WORLD, WanCodec(small_vae()), tiny_text_encoder, clips=5, frames=1, seed=0)
    clip, row, column = torch.meshgrid(torch.arange(5), torch.arange(8), torch.arange(12), indexing="ij")
    bank.latents = (10000.0 * clip + 100 * row + column)[:, None, None].repeat(1, 2, 3, 1, 1)
    bank.text = torch.arange(5.0)[:, None, None]
    index, corners = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0)), set()
    cut, text = bank.crops(index, 1, 6, torch.Generator().manual_seed(1))
    assert cut.shape == (200, 1, 3, 6, 6) and torch.equal(text[:, 0, 0].long(), index)
    for square, clip in zip(cut[:, 0], index.tolist(), strict=True):
        top, left = divmod(int(square[0, 0, 0]) - 10000 * clip, 100)
        assert top % 2 == left % 2 == 0
        assert torch.equal(square, bank.latents[clip, 0, :, top : top + 6, left : left + 6])
        x, y = WORLD.position(bank.scenes[clip], 0)
        assert left * 8 <= x <= (left + 6) * 8 and top * 8 <= y <= (top + 6) * 8
        corners.add((clip, top, left))
    assert len(corners) > 10  # the subject is not always in the middle


def test_a_prompt_changes_at_a_border_and_the_subject_stays_where_it_is():
    rng, changed = np.random.default_rng(0), set()
    for number, scene in enumerate(WORLD.scenes(3, 60)):
        frame = 9 + 12 * (number % 3)
        both = switched_scene(WORLD, scene, frame, rng)
        assert both.before is scene and both.after.size == scene.size and both.after.seed == scene.seed
        changed |= {name for name in ATTRIBUTES if getattr(both.after, name) != getattr(scene, name)}
        assert any(getattr(both.after, name) != getattr(scene, name) for name in ATTRIBUTES)
        assert WORLD.position(both.after, frame) == pytest.approx(WORLD.position(scene, frame))
        (clip,) = render_switched(WORLD, [both], 36)
        for at in (0, frame - 1, frame, 35):
            (shown,) = WORLD.render([scene if at < frame else both.after], 1, start_frame=at)
            assert torch.equal(clip[at], shown[0])
    assert changed == set(ATTRIBUTES)


def test_switched_clips_know_where_they_change(tiny_text_encoder, tmp_path, monkeypatch):
    """Independent: the codec's own code of what is rendered, and the text of the later caption."""
    codec = WanCodec(small_vae())

    def bank(seed=0):
        return SwitchedBank(
            WORLD, codec, tiny_text_encoder, clips=8, frames=33, chunk_frames=3, seed=seed, cache=tmp_path
        )

    seen, captions = [], []

    def render(world, scenes, *args, **options):
        seen.append(scenes)
        return render_switched(world, scenes, *args, **options)

    monkeypatch.setattr(data, "render_switched", render)
    caption = lambda scene, **_: (captions.append(scene), training_caption(scene))[1]  # noqa: E731
    monkeypatch.setattr(data, "training_caption", caption)
    made = bank()
    (scenes,) = (some for some in seen if len(some) == 8)
    assert captions == [scene.after for scene in scenes]
    assert set(made.switch.tolist()) == {3, 6} and [scene.frame for scene in scenes] == (4 * made.switch - 3).tolist()
    pixels = torch.cat([WORLD.render([scenes[0].before], 33), WORLD.render([scenes[0].after], 33)])
    frame = scenes[0].frame
    clip = torch.cat([pixels[0, :frame], pixels[1, frame:]])[None]
    torch.testing.assert_close(made.latents[:1], codec.encode(clip).half(), atol=2e-3, rtol=0)
    assert torch.equal(made.text[:1], tiny_text_encoder([training_caption(scenes[0].after)]))
    with monkeypatch.context() as patch:
        patch.setattr(WanCodec, "encode", lambda *_: pytest.fail("encoded again"))
        assert torch.equal(bank().latents, made.latents)
    assert not torch.equal(bank(1).latents, made.latents)


@pytest.mark.parametrize("wrong", [{"clip_frames": []}, {"clip_frames": [17, 16]}, {"crop": 20}])
def test_what_cannot_be_cut_is_refused(wrong):
    with pytest.raises(UserError, match="training.codec"):
        CodecLossConfig(**wrong)
