"""The live protocol over real sockets: every control, its receipts, and what is sent."""

import asyncio
import io
import json
import threading

import av
import numpy as np
import pytest
from live_case import OTHER, PROMPT, pipe, serve, visit  # noqa: F401  (fixtures)
from PIL import Image

from configs.geometry import pixel_frames
from configs.load import load_config
from pipeline.stream import StreamSession
from server.controls import MessageError, Reader
from server.encoding import FragmentEncoder
from server.limits import MAX_TAKES


@pytest.fixture(scope="module")
def port(serve):  # noqa: F811
    return serve()


def test_a_video_is_played_as_one_file_of_fragments(port, pipe):  # noqa: F811
    async def script(me):
        take = await me.open(schedule=None, seconds=3)
        init = await me.until("init")
        made = await me.chunks(5)
        return take, init, made, await me.until("ended"), me.hello

    take, init, made, ended, hello = visit(port, script)
    assert take["parent"] is None and take["takes"] == [1] and take["nfe"] == pipe.schedule.nfe(take["chunks"])
    assert [(c["chunk"], c["frame"], c["frames"]) for c in made] == [
        (k, pixel_frames(3 * k), 9 if k == 0 else 12) for k in range(5)
    ]
    assert ended["reason"] == "length" and made[0]["steps"] == len(pipe.schedule.timesteps(0))
    asked = np.concatenate(list(pipe.stream(PROMPT, seed=1, num_frames=57)))
    encoder = FragmentEncoder(hello["fps"], (32, 48))
    assert init["parts"][0] == encoder.init
    for c in made:
        assert c["parts"][0] == encoder.encode(asked[c["frame"] : c["frame"] + c["frames"]], c["frame"])
    with av.open(io.BytesIO(b"".join([init["parts"][0], *(c["parts"][0] for c in made)]))) as file:
        shown = [frame.to_ndarray(format="gray") for frame in file.decode(video=0)]
    grey = asked @ np.array([0.2126, 0.7152, 0.0722])
    assert len(shown) == 57 and np.abs(np.stack(shown) - grey).mean() < 12, "noise, in H.264"
    assert Image.open(io.BytesIO(made[0]["parts"][1])).width == 96
    assert hello["protocol"] == 1 and "avc1." in hello["mime"] and hello["first_frames"] == 9
    for k in (1, 4):  # each fragment plays without those before it, at its own time
        with av.open(io.BytesIO(init["parts"][0] + made[k]["parts"][0])) as file:
            times = [frame.time for frame in file.decode(video=0)]
        assert times == pytest.approx([(made[k]["frame"] + i) / hello["fps"] for i in range(12)])


def test_each_control_has_two_receipts_and_shows_from_the_chunk_that_is_named(port):
    async def script(me):
        await me.open()
        opened = await me.until("applied")
        seen = {}
        for kind, fields in (
            ("set_prompt", {"prompt": OTHER}), ("set_seed", {"seed": 5}), ("set_schedule", {"schedule": {"steps": [3]}})
        ):  # fmt: skip
            id = await me.send(kind, **fields)
            await me.until("ack", id=id)
            seen[kind] = await me.until("applied", id=id)
        return opened, seen, [m for m in me.heard if m.get("kind") == "fragment"]

    opened, seen, made = visit(port, script)
    assert (opened["take"], opened["chunk"], opened["frame"]) == (1, 0, 0)
    by_chunk = {c["chunk"]: c for c in made}
    for kind, field, value in (("set_prompt", "prompt", OTHER), ("set_seed", "seed", 5), ("set_schedule", "steps", 3)):
        place = seen[kind]
        assert by_chunk[place["chunk"]][field] == value and by_chunk[place["chunk"] - 1][field] != value
        assert by_chunk[place["chunk"]]["frame"] == place["frame"]


def test_takes_branch_and_are_kept(port):
    """The same chunks again by `seek`, other ones by `branch`, of any take that is kept."""

    async def script(me):
        async def go(kind, **fields):
            take = await me.until("take", id=await me.send(kind, **fields))
            return take, [c["parts"][0] for c in await me.chunks(3)]

        take = await me.open()
        first = [c["parts"][0] for c in await me.chunks(5)]
        _, again = await go("seek", chunk=2)
        assert again == first[2:5], "the same again"
        branch, other = await go("branch", chunk=2, take=1, prompt=OTHER, seed=8)
        assert branch["parent"] == 1 and branch["frame"] == 21 and branch["takes"] == [1, 2, 3]
        assert other[0] != first[2]
        _, back = await go("seek", chunk=2, take=1)
        assert back == first[2:5], "the first one, as it was"
        take, branched = await go("seek", chunk=2, take=3)
        assert branched == other and (take["prompt"], take["seed"]) == (OTHER, 8), "the branch, from its first chunk on"
        _, start = await go("branch", chunk=0, take=1, schedule={"steps": [1]})
        assert start != first[:3]
        error = await me.until("error", id=await me.send("seek", chunk=1, take=77))
        assert "not kept" in error["message"]
        assert (await me.chunks(1))[0]["take"] == take["take"] + 1, "and what was playing goes on"
        for _ in range(MAX_TAKES):
            take, _ = await go("seek", chunk=0)
        assert len(take["takes"]) == MAX_TAKES, "the newest"
        again = await me.open()
        assert again["takes"] == [take["take"] + 1]
        error = await me.until("error", id=await me.send("branch", chunk=0, take=take["take"]))
        assert "not kept" in error["message"], "a new video begins with nothing"

    visit(port, script)


def test_a_pause_holds_the_next_chunk(port):
    async def script(me):
        await me.open()
        await me.chunks(2)
        id = await me.send("pause")
        place = await me.until("applied", id=id)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await me.chunks(1)
        assert max(c["chunk"] for c in me.heard if c.get("kind") == "fragment") < place["chunk"]
        id = await me.send("resume")
        on = await me.until("applied", id=id)
        assert (on["chunk"], on["frame"]) == (place["chunk"], place["frame"])
        return place, [m for m in me.heard if m.get("chunk") == place["chunk"] and m.get("kind") == "fragment"]

    place, made = visit(port, script)
    assert [c["frame"] for c in made] == [place["frame"]], "the chunk after the pause is the one that was named"


@pytest.mark.parametrize("switch", ["cut", "recache", "blend"])
def test_what_is_said_before_the_first_chunk_goes_for_that(port, monkeypatch, switch):
    make, said = StreamSession._next, threading.Event()

    def held(session, *args):
        assert said.wait(60)
        return make(session, *args)

    async def script(me):
        await me.open()
        id = await me.send("set_prompt", prompt=OTHER, switch=switch)
        await me.until("ack", id=id)
        await asyncio.sleep(patience[0])  # in which it reaches the worker, too
        said.set()
        changed = await me.chunks(3)
        await me.open(prompt=OTHER)
        return changed, await me.chunks(3)

    patience, late = [0.2, 1, 5, 25], 2
    while late > 1 and patience:
        said.clear()
        with monkeypatch.context() as patch:
            patch.setattr(StreamSession, "_next", held)
            changed, other = visit(port, script)
        late = [chunk["prompt"] == PROMPT for chunk in changed].count(True)
        del patience[0]
    assert late <= 1, "but for a chunk that was begun before it came"
    if not late:
        assert (changed[0]["parts"] == other[0]["parts"]) == (switch != "blend")


def test_nothing_is_made_far_ahead_of_what_is_shown(serve):  # noqa: F811
    port = serve(ahead_seconds=1.0)

    async def script(me):
        me.auto_shown = False
        await me.open()
        made = await me.chunks(2)  # 21 frames; 16 are a second
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                made += await me.chunks(1)
        await me.line.send(json.dumps({"type": "shown", "take": 1, "frame": 10**9}))  # counts as what was sent
        made += await me.chunks(2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                made += await me.chunks(1)
        return made

    assert [c["chunk"] for c in visit(port, script)] == list(range(4))


def test_a_schedule_is_described_before_anything_is_opened(port):
    async def script(me):
        id = await me.send("describe", schedule={"steps": [4, 3, 2], "context": "clean"})
        return await me.until("schedule", id=id)

    answer = visit(port, script)
    assert answer["nfe"] == 4 + 3 + 2 and answer["chunks"] == 2 and "clean" in answer["table"] and answer["fps"] > 0


def test_what_the_model_does_not_know_is_said(port):
    async def script(me):
        take = await me.open(prompt="a red panda")
        id = await me.send("set_prompt", prompt="a bamboo circle")
        return take["warnings"], (await me.until("applied", id=id))["warnings"]

    for warnings, word in zip(visit(port, script), ("panda", "bamboo"), strict=True):
        assert len(warnings) == 1 and f"leaves out of the prompt: {word}; it shows" in warnings[0]


GOOD = {"type": "open", "id": 1, "prompt": PROMPT}


@pytest.mark.parametrize(
    "message",
    [
        "x", "[]", "{}", "null", "[" * 5000, "9" * 5000, '{"type": 3, "id": 1}', '{"type": ["open"], "id": 1}',
        '{"type": "open"}', json.dumps(GOOD | {"id": -1}), json.dumps(GOOD | {"id": True}),
        json.dumps(GOOD | {"id": 2**53}), json.dumps(GOOD | {"id": "1"}), json.dumps({"type": "open", "id": 1}),
        json.dumps(GOOD | {"prompt": 3}), json.dumps(GOOD | {"prompt": " "}), json.dumps(GOOD | {"prompt": "x" * 2001}),
        json.dumps(GOOD | {"prompt": "\ud800"}), json.dumps(GOOD | {"seed": -1}), json.dumps(GOOD | {"seed": 1.5}),
        json.dumps(GOOD | {"seconds": 1e9}), json.dumps(GOOD | {"seconds": float("nan")}),
        json.dumps(GOOD | {"image": "x.png"}), json.dumps(GOOD | {"video": "gif"}),
        json.dumps(GOOD | {"schedule": [4, 3]}), json.dumps(GOOD | {"schedule": {}}),
        json.dumps(GOOD | {"schedule": {"steps": [9]}}), json.dumps(GOOD | {"schedule": {"steps": []}}),
        json.dumps(GOOD | {"schedule": {"steps": [2] * 13}}), json.dumps(GOOD | {"schedule": {"steps": [True]}}),
        json.dumps(GOOD | {"schedule": {"preset": "../x"}}), json.dumps(GOOD | {"schedule": {"preset": ["x"]}}),
        json.dumps(GOOD | {"schedule": {"preset": "self_forcing", "steps": [2]}}),
        json.dumps(GOOD | {"schedule": {"steps": [2], "context": "../x"}}),
        '{"type": "set_prompt", "id": 1, "prompt": "x", "switch": ["cut"]}', '{"type": "seek", "id": 1, "chunk": "0"}',
        '{"type": "seek", "id": 1}', '{"type": "shown", "take": 1}', '{"type": "shown", "take": 1, "frame": 1e400}',
    ],
)  # fmt: skip
def test_a_message_without_sense_is_a_sentence(message, pipe):  # noqa: F811
    with pytest.raises(MessageError) as error:
        Reader(pipe.config, 600).read(message)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["schedule={preset: self_forcing}"],
        ["schedule={preset: release}"],
        ["schedule.first=990", "schedule.last=300", "schedule.shift=3"],
        ["schedule={timesteps: [[1000, 400], [990, 300]]}", "stream.context=renoise", "stream.context_timestep=50"],
        ["schedule.steps=9" + "1" * 14],
    ],
)
def test_the_steps_that_hello_tells_are_the_configured_schedule(tiny_assets, settings):
    reader = Reader(load_config(tiny_assets / "tiny.yaml", settings), 600)
    asked = {"steps": [len(row) for row in reader.schedule.timesteps_by_chunk]}
    for schedule in (asked, asked | {"context": reader.schedule.context}):
        assert reader.read(json.dumps(GOOD | {"schedule": schedule})).schedule == reader.schedule
