"""scripts/report.py: one folder, two folders in pairs, records that lack things, and a page that a browser runs."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote, unquote

import av
import numpy as np
import pytest

from configs.errors import UserError
from scripts import report
from scripts.quality.clip_folder import chunk_borders, find_videos, measure_video, pair
from scripts.quality.report_page import report_page, schedule_text
from utils.clip_measures import MEASURES
from utils.video import VideoWriter

HOSTILE = 'a "red" circle </script><img src=x onerror=alert(1)>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")



def write_clip(path: Path, seed: int, prompt: str | None, brightness: float = 0.0) -> Path:
    """21 frames of a square that moves; `brightness` is added from frame 9, the first chunk border, on."""
    frames = np.full((21, 32, 48, 3), 60.0 + seed)
    for t in range(21):
        frames[t, 8:20, 5 + t : 17 + t, 0] = 220
    frames[9:] += 255 * brightness
    with VideoWriter(path, 16, (32, 48)) as video:
        video.write(frames.clip(0, 255).astype(np.uint8))
    if prompt is not None:
        record = {
            "prompt": prompt,
            "seed": seed,
            "nfe": 5,
            "schedule": {"rows": [[1000, 357.1]], "policy": "clean", "exceptions": [], "renoise_timestep": 0},
            "timings_s": {"total": 1.5, "first_frames": 0.25, "chunks": []},
            "config": {"stream": {"chunk_frames": 3}, "video": {"fps": 16}},
        }
        path.with_suffix(".json").write_text(json.dumps(record))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of three clips each, two of which pair up; the second's have a seam."""
    root = tmp_path_factory.mktemp("videos")
    for name, brightness in (("plain", 0.0), ("seamy", 0.03)):
        write_clip(root / name / "b.mp4", 1, HOSTILE, brightness)
        write_clip(root / name / f"{name}.mp4", 2, "a blue square", brightness)
        write_clip(root / name / f"only-{name}.mp4", 3, f"only in {name}", brightness)
    return root / "plain", root / "seamy"


def test_the_page_plays_its_videos_from_where_it_lies(tmp_path):
    """By a relative address, whatever is in a name; in report.json there is none."""
    video = write_clip(tmp_path / "a b" / 'c "#?%.mp4', 1, "a red circle")
    assert report.main([str(video.parent), "--workers", "1", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    shown = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    address = shown["folders"][0]["clips"][0]["address"]
    assert (tmp_path / "out" / unquote(address)).resolve() == video and quote(unquote(address)) == address
    assert "address" not in (tmp_path / "out" / "report.json").read_text()
    assert "media-src 'self' file:" in page and 'el("video"' in page


def test_borders_are_those_of_the_codec():
    assert chunk_borders(81, 3) == [9, 21, 33, 45, 57, 69]
    assert chunk_borders(9, 3) == [] and chunk_borders(10, 3) == [9] and chunk_borders(1, 1) == []


def test_a_report_of_one_folder_has_each_clip(folders, capsys):
    assert report.main([str(folders[0]), "--workers", "1"]) == 0
    data = json.loads((folders[0] / "report.json").read_text())
    (folder,) = data["folders"]
    assert [clip["name"] for clip in folder["clips"]] == ["b.mp4", "only-plain.mp4", "plain.mp4"]
    clip = folder["clips"][0]
    assert (clip["prompt"], clip["seed"], clip["frames"], clip["borders"]) == (HOSTILE, 1, 21, [9])
    assert (clip["seconds"], clip["first_frames"], clip["nfe"]) == (1.5, 0.25, 5)
    assert set(clip["measures"]) == set(MEASURES) and not clip["defects"]
    assert len(clip["series"]["motion"]) == 20 and len(clip["series"]["luma"]) == 21
    assert "differences" not in data
    assert "3 clips, 0 with something" in capsys.readouterr().out


def test_two_folders_are_paired_by_prompt_and_seed(folders, tmp_path, capsys):
    assert report.main([*map(str, folders), "--out", str(tmp_path), "--workers", "2"]) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["pairs"] == [[0, 0], [2, 2]]
    seam = data["differences"]["seam"]
    first, second = ([folder["clips"][i]["measures"]["seam"] for i in (0, 2)] for folder in data["folders"])
    assert seam["n"] == 2 and seam["value"] == pytest.approx(np.mean(second) - np.mean(first))
    assert seam["value"] > 0.5
    assert all("seam" in [d["kind"] for d in clip["defects"]] for clip in data["folders"][1]["clips"])
    assert "difference" in capsys.readouterr().out


def test_the_page_loads_nothing_and_is_not_broken_by_a_prompt(folders):
    clips = [measure_video(path) for path in find_videos(folders[0])]
    page = report_page([("plain", clips)])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not re.search(r"<(link|iframe)|\ssrc=[\"']?(?!x\b)|@import|url\(", page)
    assert page.count("</script>") == 2 and "\\u003c/script>\\u003cimg" in page
    embedded = re.search(r'<script id="data" type="application/json">(.*)</script>\n', page).group(1)
    assert json.loads(embedded)["folders"][0]["clips"][0]["prompt"] == HOSTILE


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_every_clip(folders, tmp_path):
    page = tmp_path / "report.html"
    parts = [(folder.name, [measure_video(path) for path in find_videos(folder)]) for folder in folders]
    sort = "<script>document.querySelectorAll('#clips th button')[3].click()</script></body>"
    unread = ["a <b>broken</b> clip.mp4 cannot be read"]
    page.write_text(report_page(parts, unread=unread).replace("</body>", sort), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300, check=True).stdout
    body = re.search(r'<table id="clips">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL).group(1)
    assert body.count("<tr>") == 6 and dom.count("data:image/jpeg;base64,") >= 6 and dom.count("<svg") == 30
    assert "<img src=x" not in body and "&lt;img src=x" in body, "a prompt is text"
    assert 'aria-sort="ascending"' in dom
    assert '<li>a &lt;b&gt;broken&lt;/b&gt; clip.mp4 cannot be read</li>' in dom
    heads = re.findall(r'<th title="[^"]*"[^>]*><button type="button">([^<]*)</button>', dom)
    assert heads == [name.replace("_", " ") for name in MEASURES]
    assert body.count("<td") == 6 * (3 + len(MEASURES) + 3), "a cell for each column"
    assert body.index('class="first"') < body.index('class="second"'), "sorted by seam: the plain folder comes first"


def test_clips_that_cannot_be_read_are_named_and_the_others_reported(tmp_path, capsys):
    """However they are broken: the sentence, the page, the file, and an exit code that tells."""
    folder = tmp_path / "clips"
    whole = write_clip(folder / "whole.mp4", 1, "a red circle")
    write_clip(folder / "zz.mp4", 2, "a blue circle")
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "sound.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        file.mux(sound.encode(silence))
        file.mux(sound.encode(None))
    for side in (32, 64):
        with av.open(str(tmp_path / f"{side}.ts"), "w") as file:
            pictures = file.add_stream("mpeg2video", rate=25)
            pictures.width = pictures.height = side
            file.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), "rgb24")))
            file.mux(pictures.encode(None))
    (folder / "sizes.mp4").write_bytes((tmp_path / "32.ts").read_bytes() + (tmp_path / "64.ts").read_bytes())
    records = {
        "broken": "{",
        "count": '{"config": {"stream": {"chunk_frames": 0}}}',
        "digits": b'{"prompt": "\xff"}',
        "list": '{"prompt": ["a"]}',
        "rows": '{"schedule": {"rows": [["x"]]}}',
        "time": '{"timings_s": {"total": "long"}}',
    }
    for name, record in records.items():
        shutil.copy(whole, folder / f"{name}.mp4")
        (folder / f"{name}.json").write_bytes(record.encode() if isinstance(record, str) else record)
    bad = "broken count cut digits empty folder gone list pipe rows sizes sound time".split()
    for workers in "12":
        assert report.main([str(folder), "--workers", workers, "--out", str(tmp_path)]) == 2
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == len(bad)
        for name, line in zip(bad, lines, strict=True):
            assert f"/{name}.mp4" in line or f"/{name}.json" in line
        assert "2 clips, 0 with something to look at, 13 more cannot be read" in said.out
    data = json.loads((tmp_path / "report.json").read_text())
    assert [clip["name"] for clip in data["folders"][0]["clips"]] == ["whole.mp4", "zz.mp4"]
    assert data["folders"][0]["averages"]["motion"]["n"] == 2, "what cannot be read is no result"
    assert [f"error: {sentence}" for sentence in data["unread"]] == lines
    assert "whole.mp4" in (tmp_path / "report.html").read_text()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.mp4").touch()
    with pytest.raises(UserError, match="no clip that can be read"):
        report.main([str(tmp_path / "only")])
    assert report.main([str(folder), str(tmp_path / "only"), "--out", str(tmp_path)]) == 2
    assert [len(part["clips"]) for part in json.loads((tmp_path / "report.json").read_text())["folders"]] == [2, 0]


def test_a_video_alone_is_measured(tmp_path):
    clip = measure_video(write_clip(tmp_path / "alone.mp4", 4, None), chunk_frames=3)
    assert (clip.prompt, clip.seed, clip.schedule, clip.seconds, clip.key) == (None, None, None, None, ("alone.mp4",))
    assert pair([clip], [clip]) == [(clip, clip)]
    path = tmp_path / "alone.json"
    path.write_text('{"prompt": "x", "config": 3, "timings_s": null, "seed": 1}')
    assert measure_video(tmp_path / "alone.mp4").prompt == "x"
    path.write_text("{")
    with pytest.raises(UserError, match="alone.json cannot be read"):
        measure_video(tmp_path / "alone.mp4")


@pytest.mark.parametrize("arguments, said", [(["missing"], "does not exist"), (["a", "b", "c"], "too many")])
def test_mistakes_are_one_sentence(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        report.main(arguments)
    (tmp_path / "missing").mkdir()
    with pytest.raises(UserError, match=r"holds no \.mp4"):
        report.main(["missing"])


def test_schedules_on_one_line():
    rows = {"rows": [[1000, 357.142857], [1000]], "policy": "clean"}
    assert schedule_text(rows) == "1000 357.1 / 1000, context clean"
    assert schedule_text(None) is None and schedule_text({}) is None
