"""Pictures that live videos begin with: uploads that are taken and refused, over real sockets."""

import asyncio
import http.client
import io
import json

import numpy as np
import pytest
from api_case import until
from live_case import PROMPT, pipe, serve, visit  # noqa: F401  (fixtures)
from PIL import Image
from test_pictures import encoded, giant, gradient

from server.limits import MAX_UPLOAD

RED = encoded(Image.new("RGB", (300, 200), (200, 30, 30)))


@pytest.fixture(scope="module")
def port(serve):  # noqa: F811
    return serve()


def post(port: int, session: str, body: bytes) -> tuple[int, str]:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        line.request("POST", f"/v1/live/{session}/image", body)
        answer = line.getresponse()
        return answer.status, answer.read().decode()
    finally:
        line.close()


def test_a_video_begins_with_the_picture_that_was_uploaded(port, pipe):  # noqa: F811
    async def script(me):
        session = me.hello["session"]
        refused = await me.open(image=True)
        answer = await asyncio.to_thread(post, port, session, RED)
        await me.open(image=True, video="jpeg", schedule=None)
        begun = await me.chunks(2)
        await me.until("take", id=await me.send("set_image", image=False))
        plain = await me.chunks(1)
        take = await me.until("take", id=await me.send("set_image", image=True))
        return refused, answer, begun, plain, take, await me.chunks(1)

    refused, answer, begun, plain, take, again = visit(port, script)
    assert "no picture was uploaded" in refused["message"] and answer == (204, "")
    made = next(pipe.stream(PROMPT, seed=1, num_frames=9, image=RED))[0].astype(int)
    shown = np.asarray(Image.open(io.BytesIO(begun[0]["parts"][0]))).astype(int)
    assert np.abs(shown - made).mean() < 4, "JPEG apart, the first frame is what the API makes of the picture"
    assert plain[0]["parts"] != begun[0]["parts"] == again[0]["parts"] and plain[0]["take"] == 2
    assert take["warnings"] and take["parent"] is None


@pytest.mark.parametrize(
    "content, status, words",
    [
        (b"", 422, "cannot be read"), (b"no picture" * 100, 422, "cannot be read"), (RED[:80], 422, "cannot be read"),
        (giant(), 422, "image"), (encoded(Image.fromarray(gradient(8, 8)), "gif"), 422, "cannot be read"),
    ],
)  # fmt: skip
def test_a_bad_upload_is_refused_in_a_sentence_and_the_stream_goes_on(port, content, status, words):
    async def script(me):
        await me.open()
        return await asyncio.to_thread(post, port, me.hello["session"], content), await me.chunks(2)

    (found, text), chunks = visit(port, script)
    assert found == status and words in json.loads(text)["error"]["message"] and len(chunks) == 2


def test_uploads_are_for_connections_only_and_bounded(port):
    assert post(port, "guess", RED)[0] == 404

    async def flood(me):
        try:
            return await asyncio.to_thread(post, port, me.hello["session"], b"x" * (MAX_UPLOAD + 1))
        except ConnectionError:  # the server hung up while it was still being sent to
            return 413, ""

    assert visit(port, flood)[0] == 413


def test_unfinished_uploads_are_bounded(serve, caplog):  # noqa: F811
    """One a connection, as many as connections in all, whether or not those are still here."""
    port, lines = serve(visitors=2), []

    def begin(session: str) -> http.client.HTTPConnection:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        line.putrequest("POST", f"/v1/live/{session}/image")
        line.putheader("Content-Length", str(MAX_UPLOAD))
        line.endheaders()
        line.send(b"x" * 70_000)
        return line

    async def leave(me):
        lines.append(begin(me.hello["session"]))
        await on_their_way(len(lines))

    async def on_their_way(count: int) -> None:
        assert await asyncio.to_thread(until, lambda: len(serve.live.uploads) == count)

    async def script(me):
        session = me.hello["session"]
        lines.append(begin(session))
        await on_their_way(1)
        answers = [await asyncio.to_thread(post, port, session, RED) for _ in range(2)]
        lines.pop().close()
        await on_their_way(0)
        return answers, await asyncio.to_thread(post, port, session, RED)

    answers, after = visit(port, script)
    assert [status for status, _ in answers] == [429] * 2 and "wait" in answers[0][1] and after[0] == 204
    for _ in range(2):
        visit(port, leave)
    assert visit(port, lambda me: asyncio.to_thread(post, port, me.hello["session"], RED))[0] == 429
    for line in lines:
        line.close()
    assert until(lambda: not serve.live.uploads)
    assert not [record for record in caplog.records if record.exc_info], "an upload that is broken off is no fault"
