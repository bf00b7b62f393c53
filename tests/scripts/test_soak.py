"""The soak: what it says of made-up rows, and a whole one of two cycles three times on a CPU."""

import pytest

from configs.errors import UserError
from scripts import soak


def rows(count: int, **last: float) -> list[dict]:
    """A steady run; `last`: values of the last third."""
    steady = {"host": 100.0, "allocated": 10.0, "seconds_per_step": 2.0, "generator_loss": 4.0, "critic_loss": 1.0}
    return [steady | (last if i >= count - count // 3 else {}) for i in range(count)]


def over(found: dict) -> set[str]:
    return {name for name, (_, _, share, limit) in found.items() if share > limit}


def test_growth_and_drift_are_seen_and_the_first_cycles_are_not():
    assert not over(soak.steadiness(rows(30)))
    assert over(soak.steadiness(rows(30, host=101.5))) == {"host"}
    assert over(soak.steadiness(rows(30, allocated=10.2, seconds_per_step=2.1))) == {"allocated", "seconds a step"}
    slow = rows(30)
    slow[0] = slow[1] = slow[0] | {"seconds_per_step": 50.0, "host": 1.0}
    found = soak.steadiness(slow)
    assert not over(found) and found["seconds a step"][:2] == (2.0, 2.0)
    course = [line.split() for line in soak.course(slow, 10).splitlines() if line.split()[0].isdigit()]
    assert course == [[start, "10", "100", "2"] for start in ("0", "10", "20")]


def test_a_resumed_run_that_differs_is_seen():
    whole = rows(6)
    assert not over(soak.exactness(whole, rows(2), 1e-4))
    other = [*rows(1), rows(1)[0] | {"critic_loss": 1.001}]
    found = soak.exactness(whole, other, 1e-4)
    assert over(found) == {"critic_loss, resumed"} and found["critic_loss, resumed"][2] == pytest.approx(1e-3)


def test_a_soak_trains_resumes_and_reports(tmp_path, capsys):
    small = ["device=cpu", "video.height=32", "video.width=48", "video.num_latent_frames=6"]
    small += [word for role in ("student", "teacher", "critic") for word in (f"--{role}", "tiny/1")]
    small += ["training.distill.dfake_gen_update_ratio=1", "--folder", str(tmp_path / "soak")]
    code = soak.main(["--cycles", "6", "--every", "2", *small])  # so short a time is no steady one
    text = capsys.readouterr().out
    assert code in (0, 1) and "6 cycles on 1 process;" in text and "no warnings" in text
    assert [line.split()[0] for line in text.splitlines() if line[:1].isdigit()] == ["6", "0", "2", "4"]
    for name in soak.LOSSES:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}, resumed")]
        assert "+0.00%" in line
    assert not (tmp_path / "soak").exists()


def test_bad_calls_are_refused(tmp_path):
    with pytest.raises(UserError, match="--cycles=20 is not 3 or more times --every=10"):
        soak.parse(["--cycles", "20"])
    (tmp_path / "other").touch()
    with pytest.raises(UserError, match="is not empty"):
        soak.main(["--folder", str(tmp_path)])
