"""Pictures and clips that videos begin with: what is made of good ones, and what is said of bad ones."""

import io
import json
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import alike
from PIL import Image, ImageCms
from test_bad_input import refused  # noqa: F401  (fixture)
from test_inference_cli import PROMPT, cli, files  # noqa: F401  (fixture)

from configs.errors import UserError
from pipeline import DiagonalPipeline
from utils import pictures
from utils.pictures import read_clip, read_picture
from utils.video import VideoWriter, read_video

SIZE = (32, 48)


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y // height, 255 * x // width, np.full_like(x, 90)], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def clip(path, frames: int, fps: int, size=SIZE) -> str:
    """Frames that say their number in grey: 10, 14, 18, ..."""
    with VideoWriter(path, fps, size) as video:
        video.write(np.stack([np.full((*size, 3), 10 + 4 * i, np.uint8) for i in range(frames)]))
    return str(path)


def numbers(frames: np.ndarray) -> list[int]:
    return [round((value - 10) / 4) for value in frames.mean((1, 2, 3))]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_of_the_size_is_itself(tmp_path, kind):
    pixels = gradient(*SIZE)
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(pixels), kind, quality=95))
    for source in (tmp_path / "x", (tmp_path / "x").read_bytes()):
        assert np.abs(read_picture(source, SIZE).astype(int) - pixels).mean() < 3
    assert np.array_equal(read_picture(pixels, SIZE), pixels)


def test_a_picture_is_scaled_to_cover_and_cropped_about_its_centre():
    pixels = np.zeros((96, 48, 3), np.uint8)
    pixels[32:64] = 200  # the middle third of a tall picture is what a wide one sees of it
    assert (read_picture(pixels, SIZE)[4:-4] == 200).all()
    large = read_picture(gradient(256, 384), SIZE).astype(int)
    assert large.shape == (*SIZE, 3) and np.abs(large - gradient(*SIZE)).max() < 8


def test_a_picture_is_turned_as_its_exif_says_and_laid_on_white():
    pixels, exif = gradient(*SIZE), Image.Exif()
    exif[0x0112] = 6  # was held sideways: turn it clockwise
    sideways = Image.fromarray(np.rot90(pixels).copy())
    assert np.array_equal(read_picture(encoded(sideways, exif=exif), SIZE), pixels)
    clear = Image.new("RGBA", SIZE[::-1], (255, 0, 0, 0))
    assert (read_picture(encoded(clear), SIZE) == 255).all()
    assert read_picture(encoded(Image.new("L", (9, 9), 7)), SIZE).max() == 7


def test_sixteen_bit_greys_keep_their_range():
    ramp = np.tile(np.linspace(0, 65535, 48).round().astype(np.uint16), (32, 1))
    for options in ({}, {"transparency": 65535}):
        found = read_picture(encoded(Image.fromarray(ramp), **options), SIZE).astype(int)
        assert np.abs(found - ramp[..., None] / 257).max() <= 1
    assert (read_picture(encoded(Image.fromarray(ramp), transparency=0), SIZE)[:, 0] == 255).all(), "laid on white"
    wide = Image.fromarray(ramp.astype(np.int32))
    assert np.abs(read_picture(wide, SIZE).astype(int)[..., 0] - ramp / 257).max() <= 1


def display_p3() -> bytes:
    """An ICC profile: that of sRGB with the primaries of Display P3, as its colorants in D50."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    colorants = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189)}
    colorants |= {b"bXYZ": (0.15710, 0.06657, 0.78407)}
    for i in range(struct.unpack(">I", data[128:132])[0]):
        name, offset, _ = struct.unpack(">4sII", data[132 + 12 * i : 144 + 12 * i])
        if name in colorants:
            data[offset + 8 : offset + 20] = struct.pack(">3i", *(round(value * 65536) for value in colorants[name]))
    return bytes(data)


P3, IN_SRGB = (220, 60, 40), (239, 35, 17)  # one colour as Display P3 and as sRGB have it


@pytest.mark.parametrize(
    "kind, mode, options",
    [
        ("png", "RGB", {}),
        ("png", "RGBA", {}),
        ("png", "P", {}),
        ("jpeg", "RGB", {"quality": 100, "subsampling": 0}),
        ("webp", "RGBA", {"lossless": True}),
    ],
)
def test_icc_profiles_are_converted_to_srgb(kind, mode, options):
    image = Image.new("RGB", SIZE[::-1], P3).convert(mode, palette=Image.Palette.ADAPTIVE)
    content = encoded(image, kind, icc_profile=display_p3(), **options)
    assert np.abs(read_picture(content, SIZE).astype(int) - IN_SRGB).max() <= 4
    damaged = encoded(image, kind, icc_profile=display_p3()[:300], **options)
    assert np.abs(read_picture(damaged, SIZE).astype(int) - P3).max() <= 4, "as viewers do"


def test_profiles_for_another_kind_of_pixels_are_left_out():
    for mode, colour in (("L", 70), ("LA", (70, 255)), ("1", 255), ("CMYK", (0, 0, 0, 185))):
        image = Image.new(mode, SIZE[::-1], colour)
        image.info["icc_profile"] = display_p3()
        plain = Image.new(mode, SIZE[::-1], colour)
        assert np.array_equal(read_picture(image, SIZE), read_picture(plain, SIZE))


def giant() -> bytes:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", head) + block(b"IDAT", zlib.compress(b"")) + block(b"IEND", b"")


BAD_PICTURES = {
    "text": (b"a red circle", "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "half a file": (encoded(Image.fromarray(gradient(64, 64)))[:120], "cannot be read"),
    "half a JPEG": (encoded(Image.fromarray(gradient(64, 64)), "jpeg")[:300], "cannot be read"),
    "another kind": (encoded(Image.fromarray(gradient(8, 8)), "gif"), "cannot be read"),
    "giant": (giant(), "100000x100000 pixels|cannot be read"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_is_a_sentence(case, tmp_path):
    content, words = BAD_PICTURES[case]
    (tmp_path / "x.png").write_bytes(content)
    for source in (content, tmp_path / "x.png"):
        with pytest.raises(UserError, match=words) as error:
            read_picture(source, SIZE)
        assert str(error.value).startswith("image") and "\n" not in str(error.value)


def test_limits_are_held_before_anything_is_decoded(monkeypatch, tmp_path):
    content = encoded(Image.fromarray(gradient(64, 64)))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(UserError, match="64x64 pixels"):
        read_picture(content, SIZE)
    monkeypatch.setattr(pictures, "MAX_IMAGE_BYTES", len(content) - 1)
    (tmp_path / "x.png").write_bytes(content)
    for source in (content, tmp_path / "x.png"):
        with pytest.raises(UserError, match="bytes; at most"):
            read_picture(source, SIZE)
    path = clip(tmp_path / "x.mp4", 5, 16)
    monkeypatch.setattr(pictures, "MAX_CLIP_FRAMES", 4)
    with pytest.raises(UserError, match="more than 4 frames"):
        read_clip(path, SIZE, 16, 5)
    monkeypatch.setattr(pictures, "MAX_CLIP_BYTES", 10)
    with pytest.raises(UserError, match="at most 10"):
        read_clip(path, SIZE, 16, 5)


def test_frames_that_last_a_day_take_no_more_than_the_clip_does(tmp_path):
    """Ten frames that would be fourteen million at 16 a second."""
    with av.open(str(tmp_path / "x.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=1)
        stream.height, stream.width = SIZE
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((*SIZE, 3), 10 + 4 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i * 86400, Fraction(1)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert numbers(read_clip(tmp_path / "x.mkv", SIZE, 16, 5)) == [8, 8, 8, 8, 9]


@pytest.mark.parametrize("pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_pixels(pixels):
    with pytest.raises(UserError, match="not pixels"):
        read_picture(pixels, SIZE)


@pytest.mark.parametrize("fps, expected", [(16, range(11, 20)), (32, range(2, 20, 2)), (8, None)])
def test_a_clip_is_its_end_at_the_rate_that_is_generated(tmp_path, fps, expected):
    found = numbers(read_clip(clip(tmp_path / "x.mp4", 20, fps), SIZE, 16, 9))
    if fps == 32:  # the newest frame at each sixteenth: the even ones; the last is shown in any case
        assert found in ([*range(4, 20, 2), 19], [*range(2, 20, 2)])
    else:
        assert found == (list(expected) if expected else [15, 15, 16, 16, 17, 17, 18, 18, 19])
    frames = np.stack([np.full((64, 96, 3), i, np.uint8) for i in range(12)])
    assert read_clip(frames, SIZE, 16, 9)[:, 0, 0, 0].tolist() == list(range(3, 12))


BAD_STARTS = {
    "missing image": (["--image", "none.png"], "--image=none.png does not exist"),
    "folder as image": (["--image", "."], "--image=. is no ordinary file"),
    "video as image": (["--image", "long.mp4"], "cannot be read"),
    "image as long as nothing": (["--image", "file"], "cannot be read"),
    "missing video": (["--video", "none.mp4"], "--video=none.mp4 does not exist"),
    "text as video": (["--video", "text.mp4"], "cannot be read as a video"),
    "short video": (["--video", "short.mp4"], "has 8 frames at 16 a second, and a chunk needs 9"),
    "nothing left": (["--video", "long.mp4", "--num_output_frames", "6"], "gives 6 latent frames and the video has 6"),
    "too few for what is asked": (
        ["--video", "long.mp4", "inference.video_frames=9", "--num_output_frames", "12"],
        "try inference.video_frames=6",
    ),
    "no whole chunks": (["--video", "long.mp4", "inference.video_frames=4"], "inference.video_frames=4 is not a whole"),
    "both": (["--video", "long.mp4", "--image", "good.png"], "both given"),
    "decoder alone": (["--image", "good.png", "model.codec=taehv"], "taehv"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_bad_start_is_a_sentence_and_code_2(refused, tmp_path, case):  # noqa: F811
    clip(tmp_path / "long.mp4", 21, 16)
    clip(tmp_path / "short.mp4", 8, 16)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "good.png").write_bytes(encoded(Image.fromarray(gradient(*SIZE))))
    arguments, words = BAD_STARTS[case]
    assert words in refused("--prompt", PROMPT, *arguments)


def test_inference_from_a_picture_and_from_a_clip(cli, tmp_path, capsys, tiny_assets):  # noqa: F811
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(gradient(*SIZE))))
    assert cli("--prompt", PROMPT, "--image", "a.png") == 0
    assert "trained_image_start" in capsys.readouterr().err
    (video,) = files(tmp_path / "videos", ".mp4")
    assert read_video(video).shape == (21, *SIZE, 3)
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")
    made = pipe(PROMPT, image=gradient(*SIZE)).videos[0]
    made.save("api.mp4")
    assert alike(read_video(video), read_video(tmp_path / "api.mp4"))
    codec, pixels = pipe.session.codec, torch.from_numpy(gradient(*SIZE)).permute(2, 0, 1)[None, None]
    first = codec.decode(codec.encode(pixels / 127.5 - 1)).add(1).mul(127.5).round()[0, 0].permute(1, 2, 0)
    assert np.abs(made.frames[0] - first.numpy()).max() <= 1, "the first frame is the picture, as the codec has it"

    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(gradient(*SIZE)[::-1])))
    assert cli("--prompt", PROMPT, "--image", "a.png") == 0
    assert len(files(tmp_path / "videos", ".mp4")) == 2, "another picture under the same name is another video"

    path = clip(tmp_path / "c.mp4", 30, 16)
    assert cli("--prompt", PROMPT, "--video", path, "--num_output_frames", "12", "--output", "long.mp4") == 0
    assert len(read_video(tmp_path / "long.mp4")) == 45
    assert json.loads((tmp_path / "long.json").read_text())["config"]["inference"]["video"] == path


def test_a_trained_student_gets_no_warning_and_lengths_may_differ(tiny_assets, caplog):
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")
    assert not pipe.card.get("trained_image_start")
    pipe.card = {"trained_image_start": True}
    frames = np.stack([gradient(*SIZE)] * 9)
    short, long = pipe([PROMPT, PROMPT], [0, 1], [21, 33], video=frames).videos
    assert (len(short.frames), len(long.frames)) == (21, 33) and "trained_image_start" not in caplog.text
    parts = list(pipe.stream([PROMPT, PROMPT], 0, [9, 21]))
    assert [[len(own) for own in part] for part in parts] == [[9, 9], [0, 12]]
    with pytest.raises(UserError, match="3 lengths were given for 2 prompts"):
        pipe([PROMPT, PROMPT], 0, [9, 9, 9])
    with pytest.raises(UserError, match="nothing is left"):
        pipe([PROMPT, PROMPT], 0, [9, 21], video=frames)
