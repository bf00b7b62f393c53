"""A rank that has gone, seen by others whose main thread waits as for a GPU."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SEVERAL_RANKS
from ranks_case import group, on_ranks

from trainer.parallel import rank_watch
from trainer.parallel.control_group import ControlGroup
from trainer.parallel.rank_watch import ENDED, LOST, LostRank, RankWatch, explain_lost_rank
from utils import exits


def waiting(out: str) -> bool:
    """A rank that never ends by itself; the one in the middle is killed. The first one serves the store, and ends after
    the last one, which hears of it however late."""
    rank_watch.BEAT_S, rank_watch.GRACE_S = 0.1, 0.2
    with group() as ranks:
        control = ControlGroup(600)
        last = control.gather(rank_watch._own_process())[2]

        def end_after_the_last(error: LostRank) -> None:
            while not rank_watch._has_ended(last):
                time.sleep(0.01)
            exits.end_now(error)

        if ranks.first:
            rank_watch.end_now = end_after_the_last
        with explain_lost_rank(control, "start it again", 600):
            sys.stderr = (Path(out) / f"{ranks.rank}").open("w")
            control.wait()
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
    return True


@SEVERAL_RANKS
def test_who_waits_for_its_gpu_ends_in_a_sentence_that_names_the_rank_that_has_gone(tmp_path):
    outcomes = on_ranks(3, waiting, str(tmp_path))
    assert [outcome.exit_code for outcome in outcomes] == [2, -9, 2]
    for rank in (0, 2):
        said = (tmp_path / f"{rank}").read_text()
        assert said.startswith(f"error: rank {rank} has lost rank 1 (it has ended, or does not answer), so the run")
        assert said.endswith("then start it again\n") and said.count("\n") == 1


class Store(dict):
    """What the watch asks of torch's."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key].encode() for key in keys]

    def set(self, key: str, value: str) -> None:
        self[key] = value


@pytest.fixture
def watch(monkeypatch) -> RankWatch:
    """Rank 0's of three, whose other ranks are on other machines; nothing runs."""
    store = Store({"0": "0", "1": "0", "2": "0"})
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(rank_watch.dist, "TCPStore", lambda *_, **__: None)
    monkeypatch.setattr(rank_watch.dist, "PrefixStore", lambda *_: store)
    far = ("another machine", 1, "")
    control = SimpleNamespace(rank=0, world=3, wait=lambda: None, gather=lambda own: [own, far, far])
    return RankWatch(control, 5.0, lambda lost: None)


def test_a_rank_that_is_silent_for_too_long_has_gone_unless_it_ended_well(watch, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(rank_watch.time, "monotonic", lambda: clock.now)
    counts = rank_watch._Counts(3)
    assert watch._look(counts) is None
    for second in range(1, 7):
        clock.now += 1
        watch.store |= {"0": str(second), "1": str(second)}
        if second < 6:
            assert watch._look(counts) is None, second
    assert watch._look(counts) == 2
    watch.store["2"] = ENDED
    clock.now += 60
    watch.store |= {"0": "60", "1": "60"}
    assert watch._look(counts) is None
    watch.store[LOST] = "1"  # as another rank has noticed
    assert watch._look(counts) == 1


def test_only_processes_that_can_be_seen_are_looked_at(watch):
    assert watch.here == [0]


def test_a_process_that_has_ended_is_told_from_one_that_runs():
    own, number = rank_watch._own_process(), os.fork()
    if number == 0:
        os._exit(0)
    os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert rank_watch._has_ended((own[0], number, rank_watch._state(number)[1]))
    os.waitpid(number, 0)
    assert rank_watch._has_ended((own[0], number, own[2]))
    assert not rank_watch._has_ended(own)
    assert rank_watch._has_ended((own[0], own[1], "1"))  # another process has its number now


def test_a_process_can_be_ended_from_a_thread(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    exits.end_now(LostRank("rank 0 has lost rank 1"))
    assert codes == [exits.WRONG_INPUT] and capsys.readouterr().err == "error: rank 0 has lost rank 1\n"
