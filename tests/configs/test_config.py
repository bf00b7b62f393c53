"""configs/load.py: what merges over what, and that every mistake is one sentence with a field, its value and a fix."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from configs.errors import UserError, shown
from configs.load import CHECKOUT, REMOVED, load_config, presets, to_dict, to_yaml
from configs.optimizer_schema import OptimizerConfig
from configs.schema import Config
from configs.train_schema import STAGES
from configs.validate import BOUNDS

TINY = "configs/tiny.yaml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path, *overrides: str) -> str:
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", presets())
def test_every_preset_loads_and_comes_back_from_its_own_yaml(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path, "again.yaml", to_yaml(config))) == config


def test_an_empty_file_is_the_schema_s_defaults(tmp_path):
    assert load_config(write(tmp_path, "empty.yaml", "")) == Config()
    assert load_config(write(tmp_path, "sections.yaml", "video:\nstream:\n")) == Config()


def test_a_preset_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(TINY) == load_config(CHECKOUT / TINY)
    write(tmp_path, "mine.yaml", "name: mine")
    assert load_config("mine.yaml").name == "mine"


def test_overrides_win_over_the_file_and_the_file_over_its_base(tmp_path):
    write(tmp_path, "under.yaml", "seed: 1\nname: under\nvideo: {fps: 8, height: 128}\nschedule: {steps: [5, 4]}\n")
    top = write(tmp_path, "top.yaml", "base: under.yaml\nname: top\nvideo:\n  height: 256\nschedule: {steps: [3]}\n")
    config = load_config(top, ["video.fps=24", "video.fps=30"])
    assert (config.seed, config.name, config.video.height, config.video.fps) == (1, "top", 256, 30)
    assert config.schedule.steps == [3], "lists are replaced, not merged"


def test_bases_chain_and_are_relative_to_the_file_that_names_them(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.yaml", "seed: 1\nname: a\nvideo: {fps: 8}")
    write(tmp_path / "sub", "b.yaml", "base: ../a.yaml\nname: b")
    config = load_config(write(tmp_path, "c.yaml", "base: sub/b.yaml\nseed: 3"))
    assert (config.seed, config.name, config.video.fps) == (3, "b", 8)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("stream.window_frame=9", "stream.window_frame is not a setting; did you mean stream.window_frames?"),
        ("window_frames=9", "window_frames is not a setting; did you mean stream.window_frames?"),
        ("steam.window_frames=9", "steam is not a setting; did you mean stream?"),
        ("training.optimizer.learning=1", "training.optimizer.learning is not a setting"),
        ("qqqqq=1", "qqqqq is not a setting; configs/schema.py lists them all"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(override, expected):
    assert refusal(TINY, override).startswith(expected)


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("video.height", "tall", "an integer"),
        ("video.height", "null", "an integer"),
        ("video.height", "64.5", "an integer"),
        ("video.height", "[64]", "an integer"),
        ("schedule.shift", "five", "a number"),
        ("inference.profile", "perhaps", "true or false"),
        ("training.export", "[]", "text or null"),
        ("training.optimizer.betas", "[0.9, x]", "a list of numbers"),
        ("training.init", "[student]", "a mapping from texts to texts"),
        ("schedule.timesteps", "[1000, 500]", "a list of lists of numbers or null"),
        ("schedule.timesteps", "[[1000, x]]", "a list of lists of numbers or null"),
    ],
)
def test_a_wrong_type_names_field_value_and_expected_type(field, value, expected):
    message = refusal(TINY, f"{field}={value}")
    assert message.replace("'", "") == f"{field}={value} has the wrong type; it must be {expected}"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("schedule.shift=nan", "schedule.shift=nan is out of range"),
        ("schedule.shift=inf", "schedule.shift=inf is out of range"),
        ("schedule.shift=.nan", "schedule.shift=.nan has the wrong type; it must be a number"),
        ("schedule.shift=1e-320", "schedule.shift=1e-320 is out of range; it must lie in [0.01, 100]"),
        ("training.optimizer.betas=[0.9, nan]", "training.optimizer.betas=[0.9, nan] holds nan, which is out of"),
        ("training.optimizer.betas=[0.9]", "training.optimizer.betas=[0.9] is no pair of numbers; give two"),
        ("training.distill.critic_optimizer.lr=-1", "training.distill.critic_optimizer.lr=-1.0 is out of range"),
        ("training.precision=fp8", "training.precision=fp8 is unknown; use one of auto, float32, bfloat16"),
        ("training.init={studnt: a}", "training.init.studnt is none of the networks there are; use student, teacher"),
        ("training.init.teachr=a", "training.init.teachr is none of the networks there are; use student, teacher"),
        ("inference.overlap=2", "inference.overlap=2 has the wrong type; it must be true or false"),
        ("inference.overlap=-1", "inference.overlap=-1 has the wrong type; it must be true or false"),
        ("model.student=${oc.env:HOME}", "model.student=${oc.env:HOME} is not filled in here; write the value out"),
        ("training.init={student: '${x}'}", "training.init=${x} is not filled in here"),
        ("model.lora=['${oc.env:HOME}']", "model.lora=${oc.env:HOME} is not filled in here"),
        ("inference.output_folder='???'", "inference.output_folder=??? is not filled in here"),
        ('name="a\\0b"', "name holds a NUL character; give plain text"),
        ("name=\udcff", "override=name=\udcff is not valid YAML"),
        ('name="\\udcff"', "name='\\udcff' is not valid UTF-8"),
        ("training.loggers=[mlflow]", "training.loggers=['mlflow'] names mlflow; use any of wandb"),
        ("video=480", "video=480 is a section, not a value; set one of its keys: height, width"),
    ],
)
def test_a_value_that_no_setting_may_have_is_refused(override, expected):
    assert refusal(TINY, override).startswith(expected)


@pytest.mark.parametrize(
    "override, field",
    [
        ("video.fps=0", "video.fps=0"),
        ("stream.window_frames=10", "stream.window_frames=10"),
        ("stream.context=cleen", "stream.context=cleen"),
        ("video.num_latent_frames=20", "video.num_latent_frames=20"),
        ("training.stage=sleep", "training.stage=sleep"),
    ],
)
def test_a_value_out_of_range_is_the_schema_s_own_sentence(override, field):
    message = refusal(TINY, override)
    assert message.startswith(f"{field} is ") and "; " in message


@pytest.mark.parametrize("override", ["seed", "=3", "", "video.fps=[1", "base=tiny.yaml", "video..fps=3"])
def test_a_malformed_override_is_refused(override):
    assert refusal(TINY, override)


AS_WRITTEN = [  # digits are digits, and words are words, wherever YAML 1.1 sees something else in them
    ("seed=010", ("seed",), 10),
    ("video.fps=016", ("video", "fps"), 16),
    ("schedule.shift=05.0", ("schedule", "shift"), 5.0),
    ("schedule.steps=043", ("schedule", "steps"), "043"),
    ("schedule.steps=4_3", ("schedule", "steps"), "4_3"),
    ("schedule.steps=4:3", ("schedule", "steps"), "4:3"),
    ("schedule.steps=0x21", ("schedule", "steps"), "0x21"),
    ("schedule.steps=432", ("schedule", "steps"), 432),
    ("name=1:2", ("name",), "1:2"),
    ("name=2024.10", ("name",), "2024.10"),
    ("name=2026-11-29", ("name",), "2026-11-29"),
    ("name=1e3", ("name",), "1e3"),
    ("name=no", ("name",), "no"),
    ("name=true", ("name",), "true"),
    ("inference.compile=off", ("inference", "compile"), "off"),
    ("inference.cuda_graphs=on", ("inference", "cuda_graphs"), "on"),
    ("inference.overwrite=yes", ("inference", "overwrite"), True),
    ("training.compile=off", ("training", "compile"), False),
    ("training.export=null", ("training", "export"), None),
    ("training.export='null'", ("training", "export"), "null"),
    ("schedule.first=1e3", ("schedule", "first"), 1000.0),
    ("schedule.timesteps=[[1000, 500], [1000]]", ("schedule", "timesteps"), [[1000.0, 500.0], [1000.0]]),
    ("inference.output_folder=a=b", ("inference", "output_folder"), "a=b"),
]


@pytest.mark.parametrize("override, keys, expected", AS_WRITTEN)
def test_values_are_what_is_written(override, keys, expected, tmp_path):
    key, _, value = override.partition("=")
    text = "".join(f"{'  ' * i}{part}:\n" for i, part in enumerate(key.split(".")))[:-1] + f" {value}\n"
    for config in (load_config(TINY, [override]), load_config(write(tmp_path, "a.yaml", text))):
        found = to_dict(config)
        for part in keys:
            found = found[part]
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("override", ["seed=0x21", "seed=1:2", "seed=0o17", "video.fps=1e1"])
def test_what_is_no_digits_is_no_number(override):
    assert "has the wrong type; it must be an integer" in refusal(TINY, override)


HOSTILE = {
    "huge integer": "seed: " + "9" * 10_000,
    "300 digits": "seed: " + "9" * 300,
    "deep lists": "name: " + "[" * 100_000,
    "deep mappings": "".join(" " * i + "a:\n" for i in range(1000)),
    "null key": "~: 3",
    "empty key": ": 3",
    "null key in a section": "video: {~: 3}",
    "null key in a mapping": "training: {init: {~: a}}",
    "list as key": "[a]: 3",
    "tag of Python": "name: !!python/object/apply:os.system [ls]",
    "number that is none": "seed: !!int abc",
    "mapping that is no number": "seed: !!int {a: 1}",
    "aliases that multiply": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "merge key": "video: {<<: {fps: 3}}",
    "environment": "name: [a, '${oc.env:HOME}']",
    "interpolation that is not closed": "name: '${'",
    "control characters": "name: \x07",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "null in a list": "model: {lora: [null]}",
    "a megabyte": "name: " + "x" * 1_000_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_one_sentence(case, tmp_path):
    assert len(refusal(write(tmp_path, "bad.yaml", HOSTILE[case]))) < 400


def sections(section: type) -> list[type]:
    """`section` and every section below it."""
    below = [hint for hint in typing.get_type_hints(section).values() if dataclasses.is_dataclass(hint)]
    return [section, *(inner for hint in below for inner in sections(hint))]


@pytest.mark.parametrize("section", sorted(set(sections(Config)), key=lambda section: section.__name__))
def test_every_number_has_bounds_that_hold(section):
    for field in dataclasses.fields(section):
        kind = str(typing.get_type_hints(section)[field.name])
        if "configs." in kind or not re.search(r"\b(int|float)\b", kind):
            continue
        assert BOUNDS in field.metadata, f"define {field.name} with number(default, low, high)"
        low, high = field.metadata[BOUNDS]
        for beyond in (low - 1, high * 2 + 1, *(() if "int" in kind else map(float, ("nan", "inf", "-inf")))):
            value = [[beyond]] if "list[list" in kind else [beyond] if "list" in kind else beyond
            value = {beyond: "clean"} if "dict" in kind else value
            with pytest.raises(UserError, match=f"{field.name}.*is out of range"):
                made = section(**{field.name: value})
                if section is OptimizerConfig:  # which its owner checks, who knows its name
                    made.check("optimizer")


def test_a_missing_file_lists_the_presets():
    message = refusal("configs/none.yaml")
    assert message.startswith("config_path=configs/none.yaml does not exist") and TINY in message


def test_a_syntax_error_names_file_and_line(tmp_path):
    message = refusal(write(tmp_path, "bad.yaml", "name: x\nvideo:\n  height: [1\n  width: 3\n"))
    assert re.search(r"bad\.yaml is not valid YAML: line 4, column 8: ", message)
    assert "line 2" in refusal(write(tmp_path, "twice.yaml", "seed: 1\nseed: 2\n")), "a key given twice"


@pytest.mark.parametrize(
    "text, expected", [("- 1\n- 2\n", "holds no settings"), ("3", "holds no settings"), ("base: [3]\n", "base=[3] in")]
)
def test_a_file_that_is_no_mapping_is_refused(text, expected, tmp_path):
    assert expected in refusal(write(tmp_path, "odd.yaml", text))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "is not UTF-8 text" in refusal(tmp_path / "binary.yaml")


def test_a_circle_of_bases_is_refused(tmp_path):
    a = write(tmp_path, "a.yaml", "base: b.yaml")
    write(tmp_path, "b.yaml", "base: a.yaml")
    assert "closes a circle (a.yaml -> b.yaml -> a.yaml)" in refusal(a)


def test_a_missing_base_is_refused(tmp_path):
    folder = tmp_path / "a folder" / ("x" * 80)  # of a long path the end is said
    folder.mkdir(parents=True)
    path = write(folder, "a.yaml", "base: gone.yaml")
    assert refusal(path).startswith(f"base=gone.yaml of {shown(path)} does not exist; ")


@pytest.mark.parametrize("key", ["teacher", "critic"])
def test_keys_that_nothing_reads_any_more_say_what_does(key, tmp_path, caplog):
    load_config(write(tmp_path, "a.yaml", f"base: {CHECKOUT / TINY}\nmodel:\n  {key}: weights/14b\n"))
    assert f"model.{key}=weights/14b is not read any more: set training.init.{key}" in caplog.text
    caplog.clear()
    load_config(write(tmp_path, "a.yaml", f"base: {CHECKOUT / TINY}\nmodel:\n  {key}: null\n"))  # as runs stored it
    assert not caplog.text


def test_the_flow_losses_heads_are_gone_and_only_those_that_did_something_are_spoken_of(tmp_path, caplog):
    """Every stored configuration has these keys."""
    base = f"base: {CHECKOUT / 'configs/train_tiny.yaml'}\n"
    flow = "training: {distill: {flow: {head: difference, head_lr: 0.0001, weight: 4.0}}}"
    load_config(write(tmp_path, "a.yaml", base + flow))
    assert not caplog.records
    load_config(write(tmp_path, "a.yaml", base + flow.replace("difference", "conv")))
    assert "training.distill.flow.head=conv is not read any more: motion is compared as it is" in caplog.text


GONE = (  # key, what was stored by default, another value
    ("stream.restart_every", "0", "5"),
    ("stream.context_by_chunk", "{}", "{0: clean}"),
    ("schedule.warp", "true", "false"),
    ("inference.fused_gelu", "true", "false"),
    ("inference.fused_norms", "true", "false"),
    ("inference.fp8_scaling", "row", "tensor"),
    ("inference.fp8_attention", "true", "false"),
    ("training.flow.past_weight", "0.5", "1.0"),
    ("training.distill.flow.frame_weights", "true", "false"),
    ("training.distill.motion_regression.layers", "2", "3"),
    ("training.distill.motion_regression.hidden", "64", "8"),
    ("training.distill.motion_regression.kernel", "1", "3"),
    ("training.distill.long.rollout", "inference", "release"),
    ("training.distill.long.reencode_first", "true", "false"),
    ("training.distill.long.decode_frames", "6", "0"),
    ("training.distill.flow.head", "difference", "conv"),
    ("training.distill.flow.head_lr", "0.0001", "0.001"),
    ("training.flow.ode_clips", "4096", "64"),
    ("model.teacher", "null", "weights/14b"),
    ("model.critic", "null", "weights/14b"),
)


def stored(folder: Path, key: str, value: str) -> Path:
    """A file with one setting."""
    *sections, last = key.split(".")
    text = f"{last}: {value}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    return write(folder, "stored.yaml", f"base: {CHECKOUT / TINY}\n{text}\n")


@pytest.mark.parametrize("key, idle, other", GONE)
def test_a_setting_that_is_gone_is_read_in_old_files_and_refused_where_it_is_typed(tmp_path, caplog, key, idle, other):
    """In files in silence, if it is as all runs stored it, else with a warning."""
    load_config(stored(tmp_path, key, idle))
    assert not caplog.records
    load_config(stored(tmp_path, key, other))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{key}=") and "is not read any more" in record.getMessage()
    *sections, last = key.split(".")
    typed = [f"{key}={idle}", f"{key}={other}", f"{'.'.join(sections)}={{{last}: {other}}}"]
    for override in typed:
        with pytest.raises(UserError, match=f"^{re.escape(key)}=.* is no setting any more; leave it out: "):
            load_config(TINY, [override])
    assert len(caplog.records) == 1


def test_every_setting_that_is_gone_is_tested():
    assert REMOVED.keys() == {key for key, _, _ in GONE}


@pytest.mark.parametrize(
    "overrides, refused",
    [
        (["schedule.preset=self_forcing"], False),  # the file's own stream.context is from before
        (["schedule.preset=self_forcing", "stream.context=last_step"], True),
        (["stream.context=renoise", "schedule.preset=self_forcing"], True),
        (["schedule.preset=release", "stream.context=clean"], True),
        (["schedule.preset=self_forcing", "stream.context=clean"], False),
        (["schedule.preset=paper_5432222", "stream.context=clean"], False),
    ],
)
def test_a_preset_does_not_beat_a_context_in_silence(overrides, refused):
    if refused:
        assert "has no effect beside schedule.preset=" in refusal(TINY, *overrides)
    else:
        load_config(TINY, overrides)


def test_a_file_over_that_of_a_preset_has_no_effect_in_silence_either(tmp_path):
    path = write(tmp_path, "a.yaml", f"base: {CHECKOUT}/configs/self_forcing.yaml\nstream:\n  context: last_step\n")
    assert "has no effect beside schedule.preset=self_forcing" in refusal(path)
    load_config(write(tmp_path, "b.yaml", to_yaml(load_config("configs/self_forcing.yaml"))))  # what is stored has both


@pytest.mark.parametrize(
    "schedule",
    [
        "{timesteps: [[1000, 500]], steps: 43}",
        "{timesteps: [[1000, 500]], first: 900}",
        '{preset: release, steps: "4322222"}',  # as by default, which is not what the preset has
    ],
)
def test_what_timesteps_are_computed_from_is_refused_beside_timesteps(tmp_path, schedule):
    assert "has no effect beside schedule." in refusal(write(tmp_path, "a.yaml", f"schedule: {schedule}\n"))
    base, _, later = schedule.strip("{}").rpartition(", ")
    write(tmp_path, "b.yaml", f"schedule: {{{base}}}\n")
    assert "has no effect beside schedule." in refusal(
        write(tmp_path, "c.yaml", f"base: b.yaml\nschedule: {{{later}}}\n")
    )
    decides = base.partition(":")[0]
    over = load_config(tmp_path / "b.yaml", [f"schedule.{decides}=null", f"schedule={{{later}}}"]).schedule
    assert vars(over)[decides] is None
    write(tmp_path, "d.yaml", f"schedule: {{{later}}}\n")
    assert load_config(write(tmp_path, "e.yaml", f"base: d.yaml\nschedule: {{{base}}}\n"))  # the later one replaces


def test_a_stored_schedule_has_both_and_is_read(tmp_path):
    stored = write(tmp_path, "a.yaml", to_yaml(load_config(TINY, ["schedule.timesteps=[[1000, 500]]"])))
    assert load_config(stored).schedule.timesteps == [[1000.0, 500.0]]
    assert "schedule.steps=43 has no effect beside schedule.timesteps=" in refusal(stored, "schedule.steps=43")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "distill"])
def test_checkpointing_is_refused_where_it_is_ignored(stage):
    assert "training.checkpointing=true is for stage distill" in refusal(
        f"configs/train_tiny_{stage}.yaml", "training.checkpointing=true"
    )


def test_a_setting_that_has_moved_is_still_read(tmp_path, caplog):
    written = write(tmp_path, "a.yaml", f"base: {CHECKOUT / TINY}\ninference:\n  cpu_threads: 3\n")
    assert load_config(written).cpu_threads == load_config(TINY, ["inference.cpu_threads=3"]).cpu_threads == 3
    assert "inference.cpu_threads is called cpu_threads by now" in caplog.text
    now = load_config("configs/train_tiny_few_steps.yaml", ["training.flow={own_share: 0.25, guidance: 2}"]).training
    assert (now.flow.self_rollout_ratio, now.flow.guidance) == (0.25, 2.0)
