"""The demo's image start: uploads that are taken and refused, over real sockets."""

import asyncio
import http.client
import io
import json

import numpy as np
import pytest
from PIL import Image
from test_demo import PLAY, PROMPT, TOKEN, fetch, pipe, serve, visit  # noqa: F401  (fixtures)
from test_pictures import encoded, giant, gradient

from server.demo_app import MAX_UPLOAD

RED = encoded(Image.new("RGB", (300, 200), (200, 30, 30)))


def post(port: int, path: str, body: bytes, **headers) -> tuple[int, str]:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        line.request("POST", f"/{path}", body, headers)
        answer = line.getresponse()
        return answer.status, answer.read().decode()
    finally:
        line.close()


def test_a_video_begins_with_the_picture_that_was_uploaded(serve, pipe):  # noqa: F811
    port = serve()

    async def script(me):
        visitor = me.hello["visitor"]
        await me.send(**PLAY, image=True)
        refused = await me.until("error")
        status, text = await asyncio.to_thread(post, port, f"image/{visitor}", RED)
        await me.play(image=True)
        chunks = await me.chunks(2)
        await me.send(type="stop")
        await me.until("stopped")
        record = await asyncio.to_thread(fetch, port, f"clip/{visitor}.json")
        await me.play()
        plain = await me.chunks(1)
        again = await asyncio.to_thread(fetch, port, f"clip/{visitor}.json")
        return refused, status, text, chunks, json.loads(record[1]), plain, json.loads(again[1])

    refused, status, text, chunks, record, plain, again = visit(port, script)
    assert "no picture was uploaded" in refused["message"] and (status, text) == (204, "")
    assert [len(chunk["frames"]) for chunk in chunks] == [9, 12]
    made = pipe(PROMPT, seed=1, num_frames=9, image=RED).videos[0].frames[0].astype(int)
    shown = np.asarray(Image.open(io.BytesIO(chunks[0]["frames"][0]))).astype(int)
    assert np.abs(shown - made).mean() < 4, "JPEG apart, the first frame is what the API makes of the picture"
    assert plain[0]["frames"] != chunks[0]["frames"]
    assert len(record["image_sha256"]) == 64 and again["image_sha256"] is None


@pytest.mark.parametrize(
    "content, status, words",
    [
        (b"", 422, "cannot be read"), (b"no picture" * 100, 422, "cannot be read"), (RED[:80], 422, "cannot be read"),
        (giant(), 422, "image"), (encoded(Image.fromarray(gradient(8, 8)), "gif"), 422, "cannot be read"),
    ],
)  # fmt: skip
def test_a_bad_upload_is_refused_in_a_sentence_and_the_visit_goes_on(serve, content, status, words):  # noqa: F811
    port = serve()

    async def script(me):
        answer = await asyncio.to_thread(post, port, f"image/{me.hello['visitor']}", content)
        await me.play()
        return answer, await me.chunks(1)

    (found, text), chunks = visit(port, script)
    assert found == status and words in json.loads(text)["detail"] and len(chunks) == 1


def test_uploads_are_bounded_and_for_visitors_only(serve):  # noqa: F811
    port = serve(token=TOKEN)
    query = "?token=open%20sesame%20123"

    async def script(me):
        path = f"image/{me.hello['visitor']}"
        return [
            await asyncio.to_thread(post, port, *request)
            for request in ((path, RED), (f"image/guess{query}", RED), (f"{path}{query}", RED))
        ]

    answers = visit(port, script, query)
    assert [status for status, _ in answers] == [403, 404, 204]
    assert post(port, f"image/x{query}", RED, Origin="http://evil.example")[0] == 403

    async def flood(me):
        try:
            return await asyncio.to_thread(post, port, f"image/{me.hello['visitor']}{query}", b"x" * (MAX_UPLOAD + 1))
        except ConnectionError:  # the server hung up while it was still being sent to
            return 413, ""

    assert visit(port, flood, query)[0] == 413


def test_what_the_model_does_not_know_is_said_with_each_take(serve):  # noqa: F811
    port = serve()

    async def script(me):
        await me.send(**PLAY | {"prompt": "a red panda"})
        begun = await me.until("take")
        await me.send(type="say", prompt="a bamboo circle")
        return begun["warnings"], (await me.until("said"))["warnings"]

    for warnings, word in zip(visit(port, script), ("panda", "bamboo"), strict=True):
        assert len(warnings) == 1 and f"leaves out of the prompt: {word}. It knows these words: " in warnings[0]
