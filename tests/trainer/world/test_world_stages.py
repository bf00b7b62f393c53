"""Stages of the moving world: what they are fed, that they learn, and that the recipe's parts fit each other."""

import types

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from configs.load import CHECKOUT, load_config
from model.weights.load import load_student
from pipeline.positions import sink_offset
from scripts import train_world
from scripts.train_world import FILES, STAGES, TRAINED, given_to, main, settings_of, write_prompts
from trainer.loop import run
from trainer.registry import build_stage
from trainer.world import flow
from trainer.world.captions import VALUES, parse_caption
from trainer.world.scene import World
from utils.distributed import Ranks

CPU = torch.device("cpu")
SMALL = [
    *(f"model.{name}=assets/tiny/text_encoder" for name in ("text_encoder", "tokenizer")), "model.vae=assets/tiny/vae",
    "training.precision=float32", "training.compile=false", "training.global_batch=2", "training.micro_batch=2",
    "training.flow.bank_cache=null", "training.flow.first_chunk_batch=2", "training.ema_start_step=0",
]  # fmt: skip


def stage(file: str, *settings: str):
    return build_stage(load_config(f"configs/world/{file}.yaml", [*SMALL, *settings]), CPU, Ranks())


def test_every_stage_starts_from_what_one_before_it_wrote():
    written = set()
    for name in STAGES:
        settings = settings_of(name, "out", "runs")
        config = load_config(f"configs/world/{FILES.get(name, name)}.yaml", settings)
        starts = {path for path in config.training.init.values() if not path.endswith(".json")}
        needs = {config.model.text_encoder} if name not in ("text", "vae") else set()
        needs |= {config.model.vae} if name not in ("text", "vae") else set()
        assert starts | needs <= written, name
        written.add(config.training.export or f"runs/{name}/export")
        assert str(config.schedule.steps) == ("4" if name == "four" else "4322222")
    assert written >= {"out/student", "out/teacher", "out/vae", "out/text_encoder"}


def test_the_recipe_has_at_most_eight_files_and_names_weights_consistently():
    files = sorted(file.stem for file in (CHECKOUT / "configs" / "world").glob("*.yaml"))
    assert set(files) == {"world", *(FILES.get(name, name) for name in STAGES)} and len(files) <= 8
    for name in set(STAGES) - {"four"}:  # the files alone say what the program says
        file = f"configs/world/{FILES.get(name, name)}.yaml"
        assert load_config(file, settings_of(name, "assets/world", "logs/world")) == load_config(file, []), name


def test_a_stream_of_ten_minutes_never_moves_its_sink():
    geometry = Geometry.from_config(load_config("configs/world/long.yaml", []))
    assert not any(sink_offset(geometry, chunk) for chunk in range(800))


def test_a_warm_start_is_from_what_the_stage_itself_has_exported():
    for name in STAGES[1:]:
        config = load_config(f"configs/world/{FILES.get(name, name)}.yaml", settings_of(name, "out", "runs", warm=True))
        network = TRAINED.get(name, "student")
        assert config.training.init[network] == (config.training.export or f"runs/{name}/export")
        cold = load_config(f"configs/world/{FILES.get(name, name)}.yaml", settings_of(name, "out", "runs"))
        assert {k: v for k, v in cold.training.init.items() if k != network}.items() <= config.training.init.items()


def test_a_setting_can_be_for_one_stage():
    settings = ["long:training.steps=7", "seed=1", "training.steps=5"]
    assert given_to("long", settings) == ["seed=1", "training.steps=5", "training.steps=7"]  # the last one counts
    assert given_to("four", settings) == given_to("", settings) == ["seed=1", "training.steps=5"]


def begun(monkeypatch, folder, *flags):
    """The stages that a command begins, with the steps of each; training takes no time."""
    stages = {}

    def train(args, until):
        config = load_config(args.config_path, args.overrides)
        if config.training.steps == 13:
            raise UserError("training.steps=13 is refused")
        stages[args.logdir.rpartition("/")[2]] = config.training.steps
        return True

    monkeypatch.setattr(train_world, "train", train)
    for name in ("text_encoder", "vae"):
        (folder / "out" / name).mkdir(parents=True, exist_ok=True)
    places = ["--logdir", f"{folder}/runs", "--output", f"{folder}/out", "--prompts", "2"]
    monkeypatch.setattr("sys.argv", ["train_world.py", *places, *flags])
    main()
    return stages


def test_each_stage_gets_its_settings_and_all_are_read_before_the_first(monkeypatch, tmp_path):
    two = ["--stages", "teacher", "causal", "--minutes", "9", "training.steps=8"]
    assert begun(monkeypatch, tmp_path, *two, "teacher:training.steps=9") == {"teacher": 9, "causal": 8}
    with pytest.raises(UserError, match="^stage causal: training.stepps"):
        begun(monkeypatch, tmp_path, *two, "causal:training.stepps=9")
    with pytest.raises(UserError, match="^stage teacher: training.global_batch=0"):
        begun(monkeypatch, tmp_path, *two, "teacher:training.global_batch=0")
    with pytest.raises(UserError, match="stage long, which --stages does not name"):
        begun(monkeypatch, tmp_path, *two, "long:training.steps=9")


def test_what_a_stage_refuses_itself_names_it(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="^stage vae: training.steps=13 is refused"):
        begun(monkeypatch, tmp_path, "--stages", "text", "vae", "--minutes", "9", "vae:training.steps=13")


def test_a_folder_that_another_stage_makes_is_missed_with_its_name(monkeypatch, tmp_path):
    """Before any stage is begun, and the earliest first."""
    one = ["--output", f"{tmp_path}/one", "--stages"]
    made = {"text": "one/text_encoder", "vae": "one/vae", "teacher": "one/teacher", "causal": "runs/causal_start"}
    for maker, path in made.items():
        told = f"{path} does not exist, and stage {maker} makes it; name that one, too: --stages {maker} four$"
        with pytest.raises(UserError, match=f"^stage four: .*={tmp_path}/{told}"):
            begun(monkeypatch, tmp_path, *one, "four")
        (tmp_path / path).mkdir(parents=True)
    assert list(begun(monkeypatch, tmp_path, *one, "four")) == ["four"]
    with pytest.raises(UserError, match="^stage long: training.init.student=.*/diagonal/export .* stage diagonal "):
        begun(monkeypatch, tmp_path, *one, "long")
    own = ["--minutes", "9", "training.init.student=assets/tiny/student"]
    assert list(begun(monkeypatch, tmp_path, *one, "long", *own)) == ["long"]
    with pytest.raises(UserError, match="^stage vae: training.init.vae=.* does not exist, and .* leave --warm out"):
        begun(monkeypatch, tmp_path, "--output", f"{tmp_path}/two", "--stages", "vae", "--warm")


def test_what_a_warm_start_lacks_is_made_without_it(monkeypatch, tmp_path):
    """The suggestions, one after the other, lead to a run."""
    where = ["--output", f"{tmp_path}/one"]
    for maker, folder in (("text", "text_encoder"), ("vae", "vae")):
        told = f"stage {maker} makes it; make it first, without --warm: --stages {maker}$"
        with pytest.raises(UserError, match=f"^stage teacher: .*/one/{folder} does not exist, and {told}"):
            begun(monkeypatch, tmp_path, *where, "--warm", "--stages", "teacher")
        assert list(begun(monkeypatch, tmp_path, *where, "--stages", maker)) == [maker]
        (tmp_path / "one" / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="^stage teacher: .*/one/teacher does not exist, .* leave --warm out$"):
        begun(monkeypatch, tmp_path, *where, "--warm", "--stages", "teacher")
    assert list(begun(monkeypatch, tmp_path, *where, "--stages", "teacher")) == ["teacher"]


def test_each_stage_is_named_as_it_begins(monkeypatch, tmp_path, capsys):
    begun(monkeypatch, tmp_path, "--stages", "teacher", "causal")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage ") and ":" in line]
    assert said == [f"stage {name}: {tmp_path}/runs/{name}" for name in ("teacher", "causal")]


def test_no_further_stage_is_begun_with_little_time_left(monkeypatch, tmp_path):
    stages = ["--stages", "teacher", "causal", "--minutes"]
    assert list(begun(monkeypatch, tmp_path, *stages, "0.9")) == ["teacher"]
    assert list(begun(monkeypatch, tmp_path, *stages, "2")) == ["teacher", "causal"]


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--warm"], "--warm: stage text"),
        (["--minutes", "0"], "--minutes 0.0"),
        (["--prompts", "0"], "--prompts 0"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, what, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_world.py", *flags])
    with pytest.raises(UserError, match=what):
        main()


def test_prompts_for_distillation_are_captions_and_are_written_once(tmp_path):
    file = tmp_path / "runs" / "prompts.txt"
    write_prompts(file, 5)
    lines, before = file.read_text().splitlines(), file.stat().st_mtime_ns
    assert len(lines) == 5 and all(any(parse_caption(line).values()) for line in lines)
    write_prompts(file, 5)
    assert file.stat().st_mtime_ns == before


def test_the_text_encoder_learns_every_attribute():
    learner = stage("text", "training.bank_clips=64", "training.global_batch=32", "training.micro_batch=32",
                    "training.optimizer.warmup_steps=0")  # fmt: skip
    first = learner.update(0)
    for step in range(1, 12):
        last = learner.update(step)
    assert all(last[name] < first[name] for name in VALUES)


def test_the_vae_sees_single_frames_first_then_clips_and_squares_about_the_subject():
    learner = stage("vae", "training.bank_clips=3", "training.codec.clip_frames=[5,9]", "training.steps=100",
                    "training.codec.crop=48")  # fmt: skip
    plans = [learner.plan(step) for step in range(100)]
    assert {frames for frames, _ in plans[:35]} == {1} and {frames for frames, _ in plans[35:]} == {5, 9}
    assert {crop for _, crop in plans} == {0, 48}
    step = plans.index((5, 48))
    batch = learner.batch(step, 0)
    assert batch["pixels"].shape == (2, 5, 3, 48, 48) and batch["eps"].shape == (2, 2, 16, 6, 6)
    chroma = batch["pixels"].amax(2) - batch["pixels"].amin(2)
    assert (chroma.flatten(1).amax(1) > 0.5).all()  # a subject is in each
    still = plans.index((1, 0))
    assert learner.batch(still, 0)["pixels"].shape == (1, 1, 3, 96, 160)
    for step in (still, plans.index((5, 48))):
        assert all(value.isfinite() for value in learner.update(step).values())


@pytest.mark.parametrize("file, network", [("teacher", "transformer"), ("causal", "student")])
def test_flow_stages_train_on_the_moving_world(file, network):
    small = f"training.init.{network}=configs/networks/tiny_transformer.json"
    learner = stage(file, small, "video.num_latent_frames=6", "training.bank_clips=2", "training.validation_clips=0")
    assert learner.bank.latents.shape == (2, 6, 16, 12, 20)
    losses = [float(learner.update(step)["loss"]) for step in range(2)]
    assert all(0 < loss < 10 for loss in losses)


def test_a_stage_that_is_cut_off_leaves_weights_to_start_from(tmp_path):
    small = ["training.init.transformer=configs/networks/tiny_transformer.json", "video.num_latent_frames=3",
             "training.bank_clips=2", "training.validation_clips=0"]  # fmt: skip
    learner = stage("teacher", *small)
    assert not run(learner, tmp_path, until=0.0)  # of time.monotonic(), so in its first step
    started = load_student(tmp_path / "export", CPU).state_dict()
    for name, value in learner.averaged.state_dict().items():
        torch.testing.assert_close(started[name].float(), value, rtol=1e-3, atol=1e-3)


class OneWord:
    """Predicts the right v under the words of one attribute, and is off by 1 under captions that lack its value."""

    def __init__(self, bank, text, attribute: str):
        self.bank, self.text, self.attribute = bank, text, attribute

    def v(self, x_t: Tensor, t: Tensor, said: list[str]) -> Tensor:
        values = [parse_caption(words)[self.attribute] for words in said]
        own = [vars(self.bank.scenes[int(i)])[self.attribute] for i in x_t[:, 0, 0, 0, 0]]
        return torch.tensor([float(a != b) for a, b in zip(values, own, strict=True)]).view(-1, 1, 1, 1, 1) + 0 * x_t


@pytest.mark.parametrize("attribute", ["shape", "motion", "direction"])
def test_a_gap_shows_which_word_a_network_reads(attribute, monkeypatch):
    """Of a network that reads one attribute alone, that one has a gap, of 1, and others none; but with the motion its
    direction changes as well."""
    bank = types.SimpleNamespace(scenes=World().scenes(3, 130), latents=torch.zeros(130, 1, 1, 1, 1))
    number = torch.arange(130.0).view(-1, 1, 1, 1, 1)
    bank.batch = lambda index: (number[index], None)
    monkeypatch.setattr(flow, "add_noise", lambda x0, eps, t: x0)  # so that the network knows the clip
    monkeypatch.setattr(flow, "v_target", lambda x0, eps: torch.zeros_like(x0))
    gaps = flow.caption_gaps(OneWord(bank, None, attribute), bank, lambda said: said, 0)
    assert gaps.keys() == {f"gap_{name}" for name in VALUES}
    assert gaps.pop(f"gap_{attribute}") == 1
    assert {name for name, gap in gaps.items() if gap} <= ({"gap_motion"} if attribute == "direction" else set())
