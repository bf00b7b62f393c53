"""scripts/vbench.py on a small mock of VBench: prompt file, file names, resuming, scores, totals."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, alike

from configs.errors import UserError
from scripts import vbench
from scripts.quality.vbench import DIMENSIONS, QUALITY, SEMANTIC, read_result, read_results, read_suite, totals
from utils.exits import Faults
from utils.video import read_video

SUITE = [  # as VBench_full_info.json has them
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red bird", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
    {"prompt_en": "A 1800s house.", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
]
# the real torch takes seconds to load
TORCH = "class cuda:\n    is_available = staticmethod(lambda: False)\ndevice = str\n"
# the interface of vbench 0.1.5: arguments, the two files it writes, the first five videos of a prompt, NaN for none
MOCK = """
import json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "cpu"
        self.info, self.out = json.load(open(full_info_dir)), output_path
        os.makedirs(output_path, exist_ok=True)
    def write(self, name, data):
        json.dump(data, open(os.path.join(self.out, name + ".json"), "w"), indent=4)
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "vbench_standard" and not prompt_list and not kwargs
        names, wanted = os.listdir(videos_path), [e for e in self.info if set(dimension_list) & set(e["dimension"])]
        suffix = os.path.splitext(names[0])[1]
        for entry in wanted:
            videos = [f"{entry['prompt_en']}-{i}{suffix}" for i in range(5)]
            entry["video_list"] = [os.path.join(videos_path, v) for v in videos if v in names]
            print(*(f"WARNING: {v} is not found" for v in videos if v not in names))
        self.write(name + "_full_info", wanted)
        found = {}
        for dimension in dimension_list:
            if dimension == "color" and os.environ.get("BROKEN"):
                raise RuntimeError("no detectron2")
            videos = [v for e in wanted if dimension in e["dimension"] for v in e["video_list"]]
            score = 0.5 if videos else float("nan")
            found[dimension] = [score, [{"video_path": v, "video_results": 0.5} for v in videos]]
        self.write(name + "_eval_results", found)
"""


@pytest.fixture
def suite(tmp_path) -> Path:
    path = tmp_path / "info.json"
    path.write_text(json.dumps(SUITE))
    return path


@pytest.fixture
def mock(tmp_path, monkeypatch) -> None:
    (tmp_path / "site" / "vbench").mkdir(parents=True)
    (tmp_path / "site" / "vbench" / "__init__.py").write_text(MOCK)
    (tmp_path / "site" / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def test_generate_score_table(suite, mock, tiny_assets, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    make = ["generate", "--out", str(out), "--prompts", str(suite), "--config_path", str(tiny_assets / "tiny.yaml")]
    make += ["video.num_latent_frames=3", "schedule.steps=1"]
    assert vbench.main(make) == 0
    names = {path.name for path in (out / "videos").iterdir()}
    assert names == {f"{entry['prompt_en']}-{i}.mp4" for entry in SUITE for i in range(5)}
    seeds = {json.loads(path.read_text())["seed"] for path in (out / "records").iterdir()}
    assert len(seeds) == 15
    capsys.readouterr()
    times = {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    gone = out / "videos" / "a red bird-3.mp4"
    before = read_video(gone)
    gone.unlink()
    assert vbench.main(make) == 0 and capsys.readouterr().out.startswith("1 videos to make")
    assert alike(read_video(gone), before), "the same seed whatever else is made"
    assert not alike(read_video(out / "videos" / "a red bird-2.mp4"), before)
    assert all(p.stat().st_mtime_ns == times[p.name] for p in (out / "videos").iterdir() if p != gone)
    rate = ["score", "--out", str(out), "--prompts", str(suite), "--python", sys.executable]
    monkeypatch.setenv("BROKEN", "1")
    assert vbench.main(rate) == 2
    assert "could not score color (RuntimeError: no detectron2); see" in capsys.readouterr().err
    assert "Traceback" in (out / "results" / "color.log").read_text()
    others = {name for entry in SUITE for name in entry["dimension"]} - {"color"}
    assert read_results(out / "results", Faults()) == dict.fromkeys(others, 0.5), "one failure is not that of others"
    monkeypatch.delenv("BROKEN")
    monkeypatch.chdir(ROOT / "scripts")  # whose vbench.py is not the package
    assert vbench.main(rate) == 0
    said = capsys.readouterr().out
    assert "color: 0.5" in said and "temporal_flickering: already scored" in said
    assert vbench.main(["table", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| color | 50.00 |" in text and "| scene | - | not scored |" in text
    assert "| - | - | - |" in text and "84.31 | 85.07 | 81.28" in text
    (out / "results" / "imaging_quality_eval_results.json").write_text('{"imaging_quality": [0.')
    assert vbench.main(["table", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "imaging_quality_eval_results.json does not hold VBench's results" in said.err
    assert "| color | 50.00 |" in said.out and "| imaging_quality | - | not scored |" in said.out
    assert vbench.main(rate) == 0 and "imaging_quality: 0.5" in capsys.readouterr().out, "it is scored again"


def test_scores_of_flicker_are_of_the_videos_that_the_filter_leaves(suite, mock, tmp_path, capsys):
    """`vbench static_filter --result_path OUT` copies static videos to OUT/filtered_videos, often fewer than five."""
    out = tmp_path / "out"
    (out / "videos").mkdir(parents=True)
    names = [f"In a still frame, a stop sign-{i}.mp4" for i in range(7)]
    for name in names:
        (out / "videos" / name).touch()
        os.utime(out / "videos" / name, (10, 10))
    rate = ["score", "--out", str(out), "--prompts", str(suite), "--python", sys.executable]
    rate += ["--dimensions", "temporal_flickering"]
    (out / "filtered_videos").mkdir()
    with pytest.raises(UserError, match="no static video"):
        vbench.main(rate)
    for name in names[:2]:
        (out / "filtered_videos" / name).touch()
    assert vbench.main(rate) == 0 and "2 static videos" in capsys.readouterr().out
    ((score, videos),) = json.loads((out / "results" / "temporal_flickering_eval_results.json").read_text()).values()
    assert [v["video_path"] for v in videos] == [str(out / "filtered_videos" / name) for name in names[:2]]
    assert vbench.main(rate) == 0 and "already scored" in capsys.readouterr().out
    (out / "filtered_videos").rename(out / "aside")
    assert vbench.main(rate) == 0 and "already scored" not in capsys.readouterr().out, "not of the same videos"
    (out / "aside").rename(out / "filtered_videos")
    os.utime(out / "videos" / names[4])
    for name in names[:2]:
        os.utime(out / "filtered_videos" / name, (20, 20))
    with pytest.raises(UserError, match="filter again"):
        vbench.main(rate)


def test_results_of_no_video(tmp_path):
    (tmp_path / "color_eval_results.json").write_text('{"color": [NaN, []]}')
    with pytest.raises(UserError, match="color is nan"):
        read_result(tmp_path / "color_eval_results.json")


def test_python_that_is_not_there(suite, tmp_path):
    (tmp_path / "videos").mkdir()
    for i in range(5):
        (tmp_path / "videos" / f"a red bird-{i}.mp4").touch()
    rate = ["score", "--out", str(tmp_path), "--prompts", str(suite), "--dimensions", "color", "--python", "no_python"]
    with pytest.raises(UserError, match="python=no_python cannot be started"):
        vbench.main(rate)


def test_totals_are_those_of_the_published_formula():
    """Against the formula written out with VBench's names and numbers, on uneven scores."""
    scores = {name: 0.2 + 0.04 * i for i, name in enumerate(DIMENSIONS)}
    low = {"subject_consistency": 0.1462, "background_consistency": 0.2615, "temporal_flickering": 0.6293}
    low |= {"motion_smoothness": 0.706, "appearance_style": 0.0009}
    high = {"motion_smoothness": 0.9975, "scene": 0.8222, "appearance_style": 0.2855}
    high |= {"temporal_style": 0.364, "overall_consistency": 0.364}
    scaled = {n: (s - low.get(n, 0)) / (high.get(n, 1) - low.get(n, 0)) for n, s in scores.items()}
    scaled["dynamic_degree"] *= 0.5
    quality = sum(scaled[n] for n in QUALITY) / 6.5
    semantic = sum(scaled[n] for n in SEMANTIC) / 9
    assert totals(scores) == pytest.approx(
        {"total": (4 * quality + semantic) / 5, "quality": quality, "semantic": semantic}
    )
    top = {name: d.high for name, d in DIMENSIONS.items()}
    assert totals(top) == pytest.approx({"total": 1, "quality": 1, "semantic": 1})
    del top["scene"]
    assert totals(top) == {"total": None, "quality": 1.0, "semantic": None}


def test_prompt_files_of_each_kind_are_read(suite, tmp_path):
    found = read_suite(suite)
    assert [p.text for p in found] == [e["prompt_en"] for e in SUITE] and found[1].extended == "a red bird"
    text = tmp_path / "all.txt"
    text.write_text("a red bird\na blue bird\n")
    assert [p.dimensions for p in read_suite(text)] == [(), ()]
    long = tmp_path / "long.txt"
    long.write_text("x\ny\nz\n")
    assert [p.extended for p in read_suite(suite, long)] == ["x", "y", "z"]
    assert read_suite(suite, long)[0].file_name(2) == "In a still frame, a stop sign-2.mp4"
    with pytest.raises(UserError, match="2 prompts for 3"):
        read_suite(suite, text)


@pytest.mark.parametrize(
    "content, said",
    [
        ("[", "is not like"),
        ('{"a": 1}', "is not like"),
        ("[]", "holds no prompt"),
        ('[{"prompt_en": "a/b", "dimension": ["color"]}]', "cannot be a file name"),
        ('[{"prompt_en": "a", "dimension": ["beauty"]}]', "names dimension beauty"),
    ],
)
def test_broken_prompt_files(content, said, tmp_path):
    path = tmp_path / "info.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_suite(path)


def test_scoring_needs_all_videos(suite, tmp_path):
    with pytest.raises(UserError, match="lacks videos"):
        vbench.main(["score", "--out", str(tmp_path / "none"), "--prompts", str(suite)])
    with pytest.raises(UserError, match=r"run scripts/vbench\.py score first"):
        vbench.main(["table", "--out", str(tmp_path / "none")])
