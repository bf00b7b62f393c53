"""What a model may not do well is said: words, sizes and pictures that it was not trained on."""

import json

import numpy as np
import pytest
from conftest import ROOT
from test_inference_cli import cli, files  # noqa: F401  (fixture)

from configs.errors import UserError
from model.weights.load import load_student
from pipeline import DiagonalPipeline


@pytest.fixture(scope="module")
def shipped() -> DiagonalPipeline:
    return DiagonalPipeline.from_config(ROOT / "configs" / "tiny.yaml")


@pytest.mark.parametrize(
    "prompt, unknown",
    [
        ("a red circle moves up-right, quickly!", []),
        ("a panda eating bamboo", ["panda", "eating", "bamboo"]),
        ("A Panda and a panda;\ta red-hot circle", ["Panda", "panda", "hot"]),
        ("na\u00efve \u65e5\u672c 3 caf\u00e9s &amp; red", ["na\u00efve", "\u65e5\u672c", "3", "caf\u00e9s"]),
    ],
)
def test_words_that_the_model_does_not_know_are_named(shipped, caplog, prompt, unknown):
    assert shipped.session.text_encoder.unknown_words(prompt) == unknown
    for chunk in shipped.stream(prompt, 0, 9):
        assert len(chunk) == 9
    said = [text for text in caplog.messages if "does not know" in text]
    assert shipped.warnings([prompt]) == said and len(said) == bool(unknown)
    for text in said:
        assert f": {', '.join(unknown)}; it shows what docs/evaluation.md" in text and len(text) < 200


def test_a_misspelt_word_is_shown_with_the_known_one_that_is_near(shipped):
    (text,) = shipped.warnings(["a Purpel sqare and a panda"])
    assert "out of the prompt: Purpel (purple?), sqare (square?), panda;" in text


def test_warnings_are_on_the_terminal_in_the_json_and_in_the_video(cli, tmp_path, tiny_assets, capsys):  # noqa: F811
    assert cli("--prompt", "a red panda", "--num_output_frames", "3") == 0
    assert "leaves out of the prompt: panda; it shows what docs/evaluation.md" in capsys.readouterr().err
    (record,) = (path for path in files(tmp_path / "videos", ".json"))
    (text,) = json.loads(record.read_text())["warnings"]
    parts = [{"at": 0, "prompt": "a red circle"}, {"at": 0.5, "prompt": "a blue panda"}]
    (tmp_path / "story.jsonl").write_text("\n".join(map(json.dumps, parts)))
    assert cli("--data_path", "story.jsonl", "--output", "story.mp4", "--num_output_frames", "6") == 0
    assert "leaves out of the prompt: panda" in capsys.readouterr().err
    assert json.loads((tmp_path / "story.json").read_text())["warnings"] == [text]
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")
    panda, circle = pipe(["a red panda", "a red circle"], 0, 9).videos
    assert panda.warnings == [text] and circle.warnings == []


@pytest.mark.parametrize("size, far", [((64, 96), False), ((80, 112), False), ((64, 160), True), ((32, 48), True)])
def test_a_size_far_from_that_of_the_training_is_named(caplog, size, far):
    pipe = DiagonalPipeline.from_config(
        ROOT / "configs" / "tiny.yaml", f"video.height={size[0]}", f"video.width={size[1]}"
    )
    said = [text for text in caplog.messages if "was trained for 64x96 pixels" in text]
    assert len(said) == far and pipe.warnings(["a red circle"]) == said


@pytest.mark.parametrize("size", ["64x96", [64], [64, "96"], [0, 96], [64.0, 96], {"height": 64}])
def test_a_size_that_is_none_is_refused(tiny_student, tmp_path, size):
    tiny_student.model.save_pretrained(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"size": size}))
    with pytest.raises(UserError, match=r"not \[height, width\]"):
        load_student(tmp_path)


def test_a_picture_from_outside_the_world_is_named(shipped, caplog):
    rng = np.random.default_rng(0)
    own = shipped("a red circle moves right", 1, 9).videos[0].frames[0]
    outside = rng.integers(0, 255, (64, 96, 3), np.uint8)
    for picture, named in ((outside, True), (own, False)):
        caplog.clear()
        video = shipped("a red circle moves right", 0, 9, image=picture).videos[0]
        assert any("unlike what this model was trained on" in text for text in caplog.messages) == named
        assert len(video.warnings) == named
    assert shipped("a red circle moves right", 0, 9).videos[0].warnings == []
