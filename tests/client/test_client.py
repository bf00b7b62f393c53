"""The Python client, against the live server over real sockets."""

import asyncio
import inspect
import json
import threading
import time

import av
import pytest
from live_case import OTHER, PROMPT, pipe, serve  # noqa: F401  (fixtures)
from PIL import Image
from test_pictures import encoded, gradient
from websockets.asyncio import server

from client import BlockingLiveClient, Chunk, LiveClient, LiveError, Recorder, Refused, StreamEnded, record, steer


@pytest.fixture(scope="module")
def url(serve):  # noqa: F811
    return f"http://127.0.0.1:{serve()}"


def frames(path) -> list[float]:
    """Times of the frames that a file shows, seconds."""
    with av.open(str(path)) as file:
        return [frame.time for frame in file.decode(video=0)]


def test_a_stream_is_recorded_into_a_file_that_plays(url, tmp_path, capsys):
    assert record.main([url, PROMPT, str(tmp_path / "x.mp4"), "--seconds", "3"]) == 0
    assert "57 frames" in capsys.readouterr().out
    assert frames(tmp_path / "x.mp4") == pytest.approx([i / 16 for i in range(57)])
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_prompts_come_in_at_their_time(url, tmp_path, capsys):
    """From the chunk on that shows it, up to the last one; what is made when the video begins is not kept back."""
    cues = [PROMPT, f"1:{OTHER}", f"4.5:{PROMPT}", f"5:{OTHER}", f"6.4:{PROMPT}"]
    assert steer.main([url, str(tmp_path / "x.mp4"), *cues, "--seconds", "6.5"]) == 0
    at = [int(line.split()[1].rstrip(":")) for line in capsys.readouterr().out.splitlines()]
    assert at[0] == 0 and 9 <= at[1] <= 57 and at[1] % 12 == 9
    assert at[2:] == [69, 69, 93]  # 72, 80 and 102 are in chunks that begin with these frames
    assert len(frames(tmp_path / "x.mp4")) == 105


def test_a_prompt_after_the_end_is_refused(url, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        steer.main([url, str(tmp_path / "x.mp4"), PROMPT, f"9:{OTHER}", "--seconds", "4"])
    assert ended.value.code == 2 and "comes after the end of the video" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_prompts_out_of_order_are_refused(tmp_path, capsys):
    assert steer.cue("close-up: a circle") == (0, "close-up: a circle"), "a prompt's own colon"
    for cues in (["4:a", "2:b"], ["0:a", "nan:b"], ["-1:a"], ["a", "b"], ["a", "4s:b"]):
        with pytest.raises(SystemExit) as ended:
            steer.main(["http://127.0.0.1:9", str(tmp_path / "x.mp4"), "--", *cues])
        assert ended.value.code == 2 and "in the order of their times" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.gif", "x", "gone/x.mp4"])
def test_a_file_that_cannot_be_recorded_is_refused_before_anything_is_made(tmp_path, capsys, name):
    for main, given in ((record.main, [PROMPT, str(tmp_path / name)]), (steer.main, [str(tmp_path / name), PROMPT])):
        assert main(["http://127.0.0.1:9", *given]) == 2  # where nothing answers
        assert f"error: {tmp_path / name} " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_replaced_only_where_that_is_asked_for(url, tmp_path, capsys):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"before")
    for main, given in ((record.main, [PROMPT, str(path)]), (steer.main, [str(path), PROMPT])):
        assert main(["http://127.0.0.1:9", *given]) == 2  # where nothing answers
        assert f"error: {path} is there; choose another name, or --overwrite" in capsys.readouterr().err
        assert path.read_bytes() == b"before"
        assert main([url, *given, "--seconds", "1", "--overwrite"]) == 0
        assert len(frames(path)) == 21 and [file.name for file in tmp_path.iterdir()] == ["x.mp4"]
        path.write_bytes(b"before")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to("nowhere")
    for name in ("folder.mp4", "link.mp4"):
        with pytest.raises(ValueError, match=f"{name} is there and is no file; choose another name$"):
            Recorder(tmp_path / name, overwrite=True)


def test_a_file_that_came_after_the_check_is_not_replaced(tmp_path):
    recorder = Recorder(tmp_path / "x.mp4")
    (tmp_path / "x.mp4").write_bytes(b"another's")
    with recorder:
        recorder.write(chunk_of(0, b"one"))
    assert (tmp_path / "x.mp4").read_bytes() == b"another's" and recorder.path.read_bytes() == b"init one"


@pytest.mark.parametrize("url", ["127.0.0.1:9", "ftp://127.0.0.1:9", ""])
def test_an_address_that_is_none_is_a_sentence(tmp_path, capsys, url):
    assert record.main([url, PROMPT, str(tmp_path / "x.mp4")]) == 2
    assert "is no address of a server; give one such as http://" in capsys.readouterr().err


def chunk_of(k: int, data: bytes) -> Chunk:
    """Chunk number k, of ten frames."""
    return Chunk({"take": 1, "chunk": k, "frame": 10 * k, "frames": 10}, b"init ", (data,), b"")


def test_two_recordings_of_one_name_are_two_files(tmp_path, caplog):
    """Neither writes into the other's; the name is of what ended first, and a file of before may be replaced."""
    path = tmp_path / "x.mp4"
    path.write_bytes(b"before")
    (tmp_path / "x.partial.mp4").write_bytes(b"killed")
    with Recorder(path, overwrite=True) as first, Recorder(path, overwrite=True) as second:
        for k, data in enumerate((b"one ", b"two ")):
            first.write(chunk_of(k, data))
            second.write(chunk_of(k, data.upper()))
        assert path.read_bytes() == b"before"
        assert first.partial.read_bytes() == b"init one two " and second.partial.read_bytes() == b"init ONE TWO "
    assert second.path == path and path.read_bytes() == b"init ONE TWO "
    assert first.path == tmp_path / "x.partial-2.mp4" and first.path.read_bytes() == b"init one two "
    assert "another video has become" in caplog.text
    assert (tmp_path / "x.partial.mp4").read_bytes() == b"killed" and len(list(tmp_path.iterdir())) == 3


def test_ctrl_c_is_a_sentence(tmp_path, capsys, monkeypatch):
    def interrupted(coroutine):
        coroutine.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run", interrupted)
    path = str(tmp_path / "x.mp4")
    for main, given in ((record.main, [PROMPT, path]), (steer.main, [path, PROMPT])):
        assert main(["http://127.0.0.1:9", *given]) == 130
        assert "stopped; " in capsys.readouterr().err


def test_a_branch_takes_the_place_of_what_was_recorded(url, tmp_path):
    async def run():
        seen = []
        async with LiveClient(url) as live:
            with Recorder(tmp_path / "x.mp4") as recorder:
                await live.open(PROMPT, seconds=4)
                branched = None
                async for chunk in live:
                    recorder.write(chunk)
                    seen.append(chunk)
                    if chunk.chunk == 3 and branched is None:
                        branched = await live.branch(2, prompt=OTHER, seed=3)
            place = await branched.applied
            return seen, place, dict(live.takes)

    seen, place, takes = asyncio.run(run())
    assert (place.take, place.chunk, place.frame) == (2, 2, 21) and takes[2]["parent"] == 1
    chunks = [(chunk.take, chunk.chunk) for chunk in seen]
    before = sum(take == 1 for take, _ in chunks)  # those that had been sent when the server heard of the branch, too
    assert before >= 4 and chunks[:before] == [(1, chunk) for chunk in range(before)]
    assert chunks[before:] == [(2, 2), (2, 3), (2, 4), (2, 5)]
    assert seen[-1].prompt == OTHER and seen[-1].thumbnail[:2] == b"\xff\xd8"
    assert frames(tmp_path / "x.mp4") == pytest.approx([i / 16 for i in range(69)])


def against(says, script):
    """What the coroutine function `script(live)` returns beside a server that answers by `says[type of control]`:
    messages, numbers of chunks, and PAUSE."""

    clients, sent = [], 0

    class Counting(LiveClient):
        heard = 0

        def _heard(self, message):
            super()._heard(message)
            self.heard += 1

        def _seen(self, data):
            super()._seen(data)
            self.heard += 1

    async def serve_one(socket):
        nonlocal sent
        await socket.send(json.dumps({"type": "hello", "protocol": 1}))
        async for text in socket:
            control = json.loads(text)
            for message in says[control["type"]]:
                if message is PAUSE:
                    while clients[0].heard < sent or not clients[0]._items.empty():
                        await asyncio.sleep(0.01)
                    continue
                sent += 1
                if isinstance(message, int):
                    head = {"kind": "jpeg", "take": 0, "chunk": message, "frame": 0, "frames": 0, "sizes": [0]}
                    head = json.dumps(head).encode()
                    await socket.send(len(head).to_bytes(4, "little") + head)
                else:
                    await socket.send(json.dumps({"id": control["id"]} | message))

    async def one():
        async with server.serve(serve_one, "127.0.0.1", 0) as serving:
            port = serving.sockets[0].getsockname()[1]
            async with Counting(f"http://127.0.0.1:{port}", paced=True) as live:
                clients.append(live)
                return await asyncio.wait_for(script(live), 120)

    return asyncio.run(one())


PAUSE = object()  # until the client has read what there is
ACK, ENDED = {"type": "ack"}, {"type": "ended", "reason": "length", "message": "the end"}
TAKE = {"type": "take", "take": 1, "takes": []}
NO = {"type": "error", "message": "is not kept"}


@pytest.mark.parametrize(
    "opened, branched, chunks",
    [
        ([0], [ACK, 1, ENDED, PAUSE, TAKE, 2, ENDED], [0, 1, 2]),
        ([0, 1, ENDED], [ACK, PAUSE, TAKE, 2, ENDED], [0, 1, 2]),
        ([0], [ACK, 1, ENDED, PAUSE, NO], [0, 1]),
        ([0, 1, ENDED], [ACK, PAUSE, NO], [0, 1]),
    ],
)
def test_the_end_of_a_take_is_not_the_end_where_another_was_asked_for(opened, branched, chunks):
    """Whether that end was on its way already, or comes after; it is the end where the other take cannot be."""

    async def script(live):
        await live.open(PROMPT)
        seen = [(await anext(live)).chunk]
        await live.branch(0)
        return seen + [chunk.chunk async for chunk in live]

    assert against({"open": [ACK, TAKE, *opened], "branch": branched}, script) == chunks


def test_a_control_that_never_shows_is_told():
    """Rather than waited for without end: the video ended before, or another take began."""

    async def script(live):
        opened = await live.open(PROMPT)
        seed = await live.set_seed(3)
        branch = await live.branch(0)
        after = await live.set_prompt(OTHER)
        said = []
        for receipt in (seed, branch, after):
            with pytest.raises(LiveError) as error:
                await receipt.applied
            said.append(str(error.value))
        return (await opened.applied).chunk, said

    applied = {"type": "applied", "take": 1, "chunk": 0, "frame": 0, "warnings": []}
    says = {"open": [ACK, TAKE, applied], "set_seed": [ACK], "branch": [ACK, TAKE], "set_prompt": [ACK, ENDED]}
    assert against(says, script) == (0, ["a later take began before it showed", "the end", "the end"])


def test_what_the_server_says_no_to_is_an_error(url, serve, tmp_path):  # noqa: F811
    full = f"http://127.0.0.1:{serve(streams=1)}"

    async def run():
        async with LiveClient(url) as live:
            with pytest.raises(LiveError, match="nothing has been opened"):
                await live.set_seed(3)
            with pytest.raises(LiveError, match="is unknown"):
                await live.open(PROMPT, schedule={"preset": "none"})
            with pytest.raises(LiveError, match=r"cannot be read.*\(422\)"):
                await live.open(PROMPT, image=b"no picture")
            assert (await live.describe({"steps": [2]}))["nfe"] == 4
            receipt = await live.open(PROMPT, image=encoded(Image.fromarray(gradient(64, 64))), video="jpeg")
            first = await anext(live)
            assert len(first.parts) == 9 and not first.init and (await receipt.applied).take == 1
            with pytest.raises(ValueError, match="is JPEG"), Recorder(tmp_path / "x.mp4") as recorder:
                recorder.write(first)
            seek = await live.seek(7)
            with pytest.raises(LiveError, match="not kept"):
                await seek.applied
            await live.pause()
            await live.resume()
            await live.close()
            async for _ in live:
                pass
        async with LiveClient(full) as one, LiveClient(full) as other:
            await one.open(PROMPT)
            with pytest.raises(Refused, match="no room for another stream") as refused:
                await other.open(PROMPT)
            assert refused.value.retry_after > 0

    asyncio.run(run())
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_is_a_sentence(tmp_path, capsys):
    assert record.main(["http://127.0.0.1:9", PROMPT, str(tmp_path / "x.mp4")]) == 2
    assert "cannot be reached" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_broken_connection_is_told(url, serve):  # noqa: F811
    async def run():
        async with LiveClient(url) as live:
            receipt = await live.open(PROMPT)
            place = await receipt.applied
            live._socket.transport.abort()
            with pytest.raises(StreamEnded) as ended:
                async for _ in live:
                    pass
            with pytest.raises(LiveError):
                await live.set_prompt(OTHER)
            return ended.value.reason, place

    reason, place = asyncio.run(run())
    assert reason == "closed" and place.chunk == 0


def test_a_program_without_asyncio_plays_steers_and_records(url, tmp_path):
    """The same chunks as the other client gets; a program that is busy between two keeps its connection."""

    async def other():
        async with LiveClient(url) as live:
            await live.open(PROMPT, seconds=3)
            return [chunk.data async for chunk in live]

    with BlockingLiveClient(url) as live, Recorder(tmp_path / "x.mp4") as recorder:
        opened = live.open(PROMPT, seconds=3)
        made = []
        for chunk in live:
            recorder.write(chunk)
            made.append(chunk.data)
            time.sleep(0.05)
        assert made == asyncio.run(other()) and live.applied(opened).frame == 0
        live.open(PROMPT, seconds=8)  # longer than what the server makes in advance
        changed = None
        for chunk in live:
            if chunk.chunk == 1:
                changed = changed or live.set_prompt(OTHER)
        assert chunk.prompt == OTHER and live.applied(changed).chunk >= 2
        assert live.describe({"steps": [2]})["nfe"] > 0 and live.hello["fps"] == 16
    assert len(frames(tmp_path / "x.mp4")) == 57


def test_a_program_without_asyncio_hears_of_errors_and_leaves_nothing(url):
    def clients() -> int:  # the server has threads of its own
        return sum(thread.name == "live client" for thread in threading.enumerate())

    with pytest.raises(LiveError, match="cannot be reached"), BlockingLiveClient("http://127.0.0.1:9"):
        pass
    with BlockingLiveClient(url) as live:
        assert clients() == 1
        with pytest.raises(LiveError, match="nothing has been opened"):
            live.pause()
        live.open(PROMPT, seconds=60)
        next(live)
        live.close()
        assert len(list(live)) < 20
        with pytest.raises(StreamEnded):
            live.open(PROMPT)
    with pytest.raises(KeyError), BlockingLiveClient(url) as live:
        live.open(PROMPT)
        raise KeyError
    assert clients() == 0


def test_both_clients_have_the_same_calls():
    ours = {name: getattr(LiveClient, name) for name in vars(LiveClient) if not name.startswith("_")}
    calls = {name for name, call in ours.items() if inspect.iscoroutinefunction(call)}
    assert calls and calls <= set(vars(BlockingLiveClient))
