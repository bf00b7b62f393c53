"""Video files: what is written is what is read, whole or not at all."""


import av
import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from pipeline.video import Video
from utils.video import VideoWriter, clip_sheet, contact_sheet, read_video, sheet_frames, shrink


def clip(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A smooth clip with saturated colours, uint8 [T, H, W, 3]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    parts = 255 * x / width, 255 * (t / frames) + 0 * y, 255 * (1 - y / height)
    return np.stack(parts, axis=-1).astype(np.uint8)


def test_round_trip_and_format(tmp_path):
    frames = clip(21)
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 16, (64, 96)) as video:
        for part in (frames[:9], frames[9:]):
            video.write(part)
            assert not path.exists()
    back = read_video(path)
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).mean() < 3
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate, stream.frames) == ("h264", "yuv420p", 16, 21)
    assert path.read_bytes().find(b"moov") < path.read_bytes().find(b"mdat"), "a browser would wait for the whole file"


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (128, 128, 128)])
def test_colours_survive_encoding(tmp_path, colour):
    """Wrong matrix coefficients (BT.601 against BT.709) would move these by 20 and more."""
    frames = np.full((4, 32, 32, 3), colour, np.uint8)
    with VideoWriter(tmp_path / "c.mp4", 16, (32, 32)) as video:
        video.write(frames)
    assert np.abs(read_video(tmp_path / "c.mp4").astype(int) - frames).max() <= 6


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_an_animation_of_one_frame(tmp_path, ending):
    Video(clip(1), 16, "a prompt", 0).save(tmp_path / f"a{ending}")
    with Image.open(tmp_path / f"a{ending}") as image:
        assert image.n_frames == 1


@pytest.mark.parametrize(
    ("name", "start", "size"),
    [("a.gif", b"GIF89a", (63, 96)), ("a.webp", b"RIFF", (63, 95)), ("a.webm", b"\x1aE\xdf\xa3", (64, 96))],
)
def test_a_file_is_what_its_ending_says(tmp_path, name, start, size):
    frames = clip(21)[:, : size[0], : size[1]]
    video = Video(frames, 16, "a prompt", 0)
    video.save(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    if name == "a.webm":
        back, seconds = read_video(tmp_path / name), 21 / 16
    else:
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 21 and image.info["loop"] == 0
            back, seconds = [], 0.0
            for i in range(21):
                image.seek(i)
                back.append(np.asarray(image.convert("RGB")))
                seconds += image.info["duration"] / 1000
    assert np.abs(np.stack(back).astype(int) - frames).mean() < 6
    assert seconds == pytest.approx(21 / 16, abs=0.006), "at the right speed"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / name, 16, size) as writer:
        writer.write(frames[:3])
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("name", ["a.avi", "a", "a.png", "mp4"])
def test_an_ending_that_cannot_be_written_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} has no ending.*.mp4, .webm, .gif or .webp"):
        Video(clip(3), 16, "a prompt", 0).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_bad_frames_and_sizes(tmp_path):
    with pytest.raises(UserError, match="odd"):
        VideoWriter(tmp_path / "clip.mp4", 16, (63, 96))
    with pytest.raises(ValueError, match="uint8"), VideoWriter(tmp_path / "clip.mp4", 16, (64, 96)) as video:
        video.write(clip(3).astype(np.float32))
    assert not list(tmp_path.iterdir())


def test_read_video_refuses_what_is_none(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(UserError, match=name):
            read_video(tmp_path / name)


def test_contact_sheet_places_frames_and_marks_chunks():
    frames = np.zeros((21, 10, 20, 3), np.uint8) + np.arange(21, dtype=np.uint8)[:, None, None, None]
    sheet = np.asarray(contact_sheet(frames, columns=9, chunk_borders=[9]))
    assert sheet.shape == (30, 180, 3)
    assert sheet[15, 30].tolist() == [10] * 3, "frame 10 is the second of the second row"
    marked = [i for i in range(21) if sheet[i // 9 * 10 + 5, i % 9 * 20, 0] == 255]
    assert marked == [9]


@pytest.mark.parametrize("title", ["a red circle", "many words " * 99, "x" * 9999, "", "熊猫 🐼"])
def test_a_clips_sheet_has_its_title_numbers_and_marks(title):
    shown = sheet_frames(200)
    cells = np.full((len(shown), 10, 30, 3), 90, np.uint8)
    sheet = np.asarray(clip_sheet(cells, shown, [9], [title]))
    head = sheet.shape[0] - 9 * 25
    assert 30 <= head <= 100 and sheet.shape[1] == 9 * 30
    assert sheet[:head].max() == 255, "what is shown is said"
    place = int(np.searchsorted(shown, 9))
    marked = [i for i in range(81) if sheet[head + i // 9 * 25 + 5, i % 9 * 30, 2] == 0]
    assert marked == [place]
    strips = [sheet[head + i // 9 * 25 + 10 : head + i // 9 * 25 + 25, i % 9 * 30 : i % 9 * 30 + 30] for i in range(81)]
    assert all(strip.max() > 200 for strip in strips) and not np.array_equal(strips[1], strips[2])


def test_a_clips_sheet_shows_every_paragraph_with_spaces_between_words():
    cells = np.zeros((9, 10, 90, 3), np.uint8)
    heads = [clip_sheet(cells, range(9), [], title).height for title in (["one"], ["one", "two", "three"])]
    assert heads[1] - heads[0] == 2 * 15, "a line each"
    columns = np.asarray(clip_sheet(cells, range(9), [], ["i i"]))[2:15].max(axis=(0, 2))
    first, last = np.flatnonzero(columns)[[0, -1]]
    assert (columns[first:last] == 0).sum() >= 5, "more than between letters"


def test_contact_sheet_of_a_long_clip_stays_small():
    frames = np.zeros((500, 90, 400, 3), np.uint8)
    sheet = contact_sheet(frames, chunk_borders=range(9, 500, 12))
    assert sheet.size == (9 * 160, 9 * 36)


def test_shrink_keeps_small_frames_and_aspect():
    assert shrink(clip(2), 160).shape == (2, 64, 96, 3)
    assert shrink(clip(2, 480, 832), 160).shape == (2, 92, 160, 3)


@pytest.mark.parametrize("size", [(64, 96), (144, 208)])
def test_equal_frames_give_equal_files_whatever_memory_holds(tmp_path, size):
    """On a CPU with AVX-512, x264's own choice of code gave 56 different files of 80 at 144x208."""
    frames, rng, files = clip(24, *size), np.random.default_rng(0), set()
    for _ in range(8):
        junk = [rng.bytes(int(n)) for n in rng.integers(1_000, 300_000, rng.integers(20))]  # what freed memory holds
        del junk
        with VideoWriter(tmp_path / "clip.mp4", 16, size) as video:
            video.write(frames)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1
