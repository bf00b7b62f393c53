"""/v1/videos by the official client, over real sockets; the workers pretend."""

import base64
import io
import json
import re
import urllib.error
import urllib.request

import av
import openai
import pytest
from api_case import ALICE, BOB, PROMPT, Running, until
from conftest import ROOT
from PIL import Image

from configs.load import load_config
from server.job_store import JobLimits
from server.videos_api import Served
from server.workers import JobFailed, WorkerDied

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI's own service ends; the shape stays


def client(server: Running, key: str = ALICE) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=0, timeout=100)


def picture(kind: str = "png", size=(200, 100)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind)
    return out.getvalue()


FORM = "multipart/form-data; boundary=a"


def with_image(url) -> bytes:
    return json.dumps({"prompt": PROMPT, "input_reference": {"image_url": url}}).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Running(tmp_path_factory.mktemp("jobs")) as running:
        yield running


@pytest.fixture(scope="module")
def videos(server):
    return client(server).videos


def send(server, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict | bytes]:
    headers = {"Authorization": f"Bearer {ALICE}"} | {name.replace("_", "-"): text for name, text in headers.items()}
    request = urllib.request.Request(server.url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=100) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    return status, json.loads(content) if content[:1] == b"{" else content


def test_the_official_client_makes_lists_downloads_and_deletes_a_video(server, videos):
    made = videos.create_and_poll(prompt=PROMPT, seconds="4", size="96x64", model="tiny", extra_body={"seed": 7})
    assert (made.status, made.progress, made.error, made.object) == ("completed", 100, None, "video")
    assert made.model_extra["seed"] == 7 and made.seconds == "4.3125" and made.size == "96x64"
    assert made.created_at <= made.completed_at < made.expires_at
    content = videos.download_content(made.id)
    with av.open(io.BytesIO(content.read())) as file:
        assert sum(1 for _ in file.decode(video=0)) == made.model_extra["frames"] == 69
    thumbnail = videos.download_content(made.id, variant="thumbnail")
    assert Image.open(io.BytesIO(thumbnail.read())).size == (96, 64)
    assert videos.retrieve(made.id) == made and made.id in [video.id for video in videos.list()]
    spec = server.pool.specs[-1]
    assert (spec.prompt, spec.seed, spec.frames, spec.schedule, spec.image) == (PROMPT, 7, 69, None, None)
    gone = videos.delete(made.id)
    assert gone.deleted and gone.object == "video.deleted" and gone.id == made.id
    with pytest.raises(openai.NotFoundError, match="deleted or expired"):
        videos.retrieve(made.id)


def test_pages_follow_one_another(server, videos):
    ids = [videos.create(prompt=f"{PROMPT} {i}").id for i in range(5)]
    page = videos.list(limit=2)
    assert [video.id for video in page.data] == ids[:2:-1] and page.has_more and page.last_id == ids[3]
    walked = [video.id for video in videos.list(limit=2, order="asc")]  # all pages
    assert walked[-5:] == ids and len(set(walked)) == len(walked)
    for id in ids:
        videos.delete(id)


@pytest.mark.parametrize("way", ["file", "json"])
def test_a_picture_reaches_the_worker_at_the_size_that_is_made(server, videos, way):
    if way == "file":
        made = videos.create(prompt=PROMPT, input_reference=("a.png", picture(), "image/png"))
    else:
        url = "data:image/jpeg;base64," + base64.b64encode(picture("jpeg")).decode()
        body = json.dumps({"prompt": PROMPT, "input_reference": {"image_url": url}, "schedule": "release"}).encode()
        status, made = send(server, "POST", "/v1/videos", body, Content_Type="application/json")
        assert status == 200 and made["schedule"] == "release_2026_11"
        made = videos.retrieve(made["id"])
    assert until(lambda: videos.retrieve(made.id).status == "completed")
    spec = server.pool.specs[-1]
    assert spec.image.shape == (64, 96, 3) and spec.image[0, 0, 0] > 250 > 5 > spec.image[0, 0, 1]
    assert (spec.schedule is not None) == (way == "json")


@pytest.mark.parametrize(
    "options, param, said",
    [
        ({"size": "1280x720"}, "size", "use 96x64"),
        ({"seconds": "soon"}, "seconds", "number"),
        ({"seconds": "3600"}, "seconds", "at most 60"),
        ({"seconds": "-1"}, "seconds", "greater than 0"),
        ({"seconds": "nan"}, "seconds", "seconds=nan"),
        ({"model": "sora-2"}, "model", "use tiny"),
        ({"prompt": "  "}, "prompt", "empty"),
        ({"prompt": "x" * 2001}, "prompt", "2000"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"extra_body": {"seed": -5}}, "seed", "greater than or equal to 0"),
        ({"extra_body": {"seed": "1.5"}}, "seed", "integer"),
        ({"extra_body": {"schedule": "fast"}}, "schedule", "self_forcing"),
        ({"extra_body": {"lora": "../../etc/passwd"}}, "lora", "use one of cartoon"),
        ({"extra_body": {"guidance_scale": 3}}, "guidance_scale", "no parameter here"),
        ({"extra_body": {"negative_prompt": "blurred"}}, "negative_prompt", "no parameter here"),
        ({"input_reference": ("a.png", b"no picture")}, "input_reference", "no whole JPEG"),
        ({"input_reference": ("a.png", picture()[:60])}, "input_reference", "no whole JPEG"),
        ({"input_reference": ("a.gif", picture("gif"))}, "input_reference", "no whole JPEG"),
        ({"input_reference": ("a.png", picture(size=(9000, 9000)))}, "input_reference", "pixels"),
        ({"input_reference": ("a.png", b"x" * (8 * 2**20 + 1))}, "input_reference", "8,388,608"),
    ],
)  # fmt: skip
def test_what_is_not_made_here_is_a_sentence(videos, options, param, said):
    with pytest.raises(openai.BadRequestError) as refused:
        videos.create(**{"prompt": PROMPT} | options)
    error = refused.value
    assert said in error.body["message"] and "\n" not in error.body["message"] and len(error.body["message"]) < 300
    assert error.type == "invalid_request_error" and (param is None or error.param == param) and error.code


@pytest.mark.parametrize(
    "method, path, body, kind, status",
    [
        ("POST", "/v1/videos", with_image("http://127.0.0.1/x.png"), "application/json", 400),
        ("POST", "/v1/videos", with_image("file:///etc/passwd"), "application/json", 400),
        ("POST", "/v1/videos", with_image("data:image/png;base64,???"), "application/json", 400),
        ("POST", "/v1/videos", with_image(3), "application/json", 400),
        ("POST", "/v1/videos", b"{", "application/json", 400),
        ("POST", "/v1/videos", b"[]", "application/json", 400),
        ("POST", "/v1/videos", b"[" * 60_000, "application/json", 400),
        ("POST", "/v1/videos", b'{"prompt": NaN}', "application/json", 400),
        ("POST", "/v1/videos", b'{"prompt": "\xff"}', "application/json", 400),
        ("POST", "/v1/videos", b'{"prompt": "\\ud800"}', "application/json", 400),
        ("POST", "/v1/videos", b"x", "multipart/form-data", 400),
        ("POST", "/v1/videos", b"x", FORM, 400),
        ("POST", "/v1/videos", b"--a\r\nContent-Disposition: form-data\r\n\r\nx\r\n--a--", FORM, 400),
        ("POST", "/v1/videos", b"&".join(b"a%d=1" % i for i in range(100)), "application/x-www-form-urlencoded", 400),
        ("POST", "/v1/videos", b"prompt=" + b"x" * 50_000, "application/x-www-form-urlencoded", 400),
        ("POST", "/v1/videos", b"prompt=a&prompt=b", "application/x-www-form-urlencoded", 400),
        ("POST", "/v1/videos", b"<prompt/>", "text/xml", 415),
        ("POST", "/v1/videos", b"x" * (12 * 2**20), "application/json", 413),
        ("POST", "/session", b"x" * 100_000, "text/plain", 413),
        ("GET", "/v1/videos?limit=0", None, "", 400),
        ("GET", "/v1/videos?limit=1000", None, "", 400),
        ("GET", "/v1/videos?order=sideways", None, "", 400),
        ("GET", "/v1/videos?after=video_x", None, "", 404),
        ("GET", f"/v1/videos/video_{'0' * 32}", None, "", 404),
        ("GET", "/v1/videos/..%2f..%2fjobs.sqlite/content", None, "", 404),
        ("GET", "/v1/videos/jobs.sqlite/content", None, "", 404),
        ("GET", "/v1/videos/%00/content", None, "", 404),
        ("DELETE", "/v1/videos/%ff", None, "", 404),
        ("POST", f"/v1/videos/video_{'0' * 32}/remix", b"{}", "application/json", 404),
        ("PUT", "/v1/videos", b"{}", "application/json", 405),
        ("GET", "/v1/models/sora-2", None, "", 404),
        ("GET", "/nowhere", None, "", 404),
    ],
)  # fmt: skip
def test_malformed_requests_are_answered_in_one_shape(server, method, path, body, kind, status):
    got, answer = send(server, method, path, body, Content_Type=kind)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"} and "\n" not in answer["error"]["message"]


@pytest.mark.parametrize("seconds, frames", [(0.001, 9), (9 / 16, 9), (0.6, 21), (21 / 16, 21), (5, 81), (60, 969)])
def test_lengths_are_rounded_up_to_whole_chunks(seconds, frames):
    assert Served(load_config("configs/tiny.yaml"), 60).frames(seconds) == frames


def test_each_key_sees_its_own_videos_and_none_sees_none(server, videos):
    mine = videos.create(prompt=PROMPT)
    other = client(server, BOB).videos
    assert mine.id not in [video.id for video in other.list()]
    for look in (other.retrieve, other.delete, other.download_content):
        with pytest.raises(openai.NotFoundError):
            look(mine.id)
    with pytest.raises(openai.AuthenticationError, match="key is wrong") as refused:
        client(server, ALICE + "x").videos.list()
    assert refused.value.code == "invalid_api_key" and ALICE not in str(refused.value)
    assert send(server, "GET", "/v1/videos", Authorization="")[0] == 401
    assert send(server, "GET", f"/v1/videos?key={ALICE}", Authorization="")[0] == 401, "no key in an address"


def test_an_idempotency_key_gives_the_same_job(server, videos):
    headers = {"Idempotency-Key": "order 1"}
    first = videos.create(prompt=PROMPT, extra_headers=headers)
    again = videos.with_raw_response.create(prompt=PROMPT, extra_headers=headers)
    assert again.parse().id == first.id and again.headers["idempotent-replayed"] == "true"
    assert client(server, BOB).videos.create(prompt=PROMPT, extra_headers=headers).id != first.id
    with pytest.raises(openai.UnprocessableEntityError, match="another request"):
        videos.create(prompt="a blue square moves up", extra_headers=headers)


def test_progress_content_too_early_cancel_and_delete_of_a_running_job(tmp_path):
    with Running(tmp_path) as server:
        videos, pool = client(server).videos, server.pool
        pool.gate.clear()
        running, waiting, third = (videos.create(prompt=f"{PROMPT} {i}") for i in range(3))
        assert until(lambda: pool.running)
        status = videos.with_raw_response.retrieve(running.id)
        assert status.parse().status == "in_progress" and status.headers["openai-poll-after-ms"] == "500"
        assert videos.retrieve(waiting.id).status == "queued"
        with pytest.raises(openai.BadRequestError, match="ask again") as early:
            videos.download_content(waiting.id)
        assert early.value.code == "video_not_ready"
        for video in (running, waiting):
            status, answer = send(server, "POST", f"/v1/videos/{video.id}/cancel")
            assert status == 200 and answer["status"] == "failed" and answer["error"]["code"] == "cancelled"
        assert send(server, "POST", f"/v1/videos/{running.id}/cancel")[0] == 400
        assert until(lambda: videos.retrieve(third.id).status == "in_progress")
        assert videos.delete(third.id).deleted and until(lambda: not pool.running)
        assert [file.name for file in tmp_path.glob("video_*")] == []
        pool.gate.set()
        assert videos.create_and_poll(prompt=PROMPT).status == "completed"


def test_faults_are_told_and_a_job_whose_worker_died_is_made_once_more(server, videos, caplog):
    pool = server.pool
    pool.faults = [JobFailed("chunk 2 has latents that are not finite")]
    failed = videos.create_and_poll(prompt=PROMPT)
    assert failed.status == "failed" and "not finite" in failed.error.message
    assert failed.error.code == "generation_failed"
    with pytest.raises(openai.NotFoundError, match="not finite"):
        videos.download_content(failed.id)
    pool.faults = [WorkerDied("worker 0 ended")]
    assert videos.create_and_poll(prompt=PROMPT).status == "completed"
    pool.faults = [WorkerDied("worker 0 ended")] * 2
    assert videos.create_and_poll(prompt=PROMPT).error.code == "worker_died"
    assert not caplog.records
    pool.faults = [RuntimeError("a mistake of ours")]
    assert videos.create_and_poll(prompt=PROMPT).error.code == "server_error"
    assert [record.message for record in caplog.records] == ["a job broke off"]


def test_queues_are_bounded_and_fair_between_keys(tmp_path):
    limits = JobLimits(queue=6, queue_per_key=4, kept_per_key=5)
    with Running(tmp_path, limits=limits) as server:
        alice, bob, pool = client(server).videos, client(server, BOB).videos, server.pool
        pool.gate.clear()
        assert alice.create(prompt="alice 0") and until(lambda: pool.running)
        for i in range(1, 4):
            alice.create(prompt=f"alice {i}")
        with pytest.raises(openai.RateLimitError, match="in work") as full:
            alice.create(prompt="alice 4")
        assert full.value.response.headers["retry-after"] == "10"
        for i in range(3):
            bob.create(prompt=f"bob {i}", seconds="14" if i == 0 else "1")
        with pytest.raises(openai.RateLimitError, match="6 videos are waiting"):
            bob.create(prompt="bob 3")
        assert send(server, "GET", "/health")[1]["status"] == "full" and send(server, "GET", "/health")[0] == 503
        pool.gate.set()
        assert until(lambda: len(pool.specs) == 7 and not pool.running)
        order = [spec.prompt for spec in pool.specs]
        # one turn of 14 seconds is worth two and more of those of five
        assert order == ["alice 0", "bob 0", "alice 1", "alice 2", "bob 1", "alice 3", "bob 2"]
        alice.create(prompt="alice 4")
        with pytest.raises(openai.RateLimitError, match="delete some"):
            alice.create(prompt="alice 5")


def test_metrics_health_and_openapi(server, videos):
    videos.create_and_poll(prompt=PROMPT)
    status, text = send(server, "GET", "/metrics")
    assert status == 200 and b'diagonal_workers{state="ready"} 1.0' in text and b"# HELP" in text
    assert b'diagonal_jobs_finished_total{outcome="completed"}' in text and b"alice" not in text
    assert send(server, "GET", "/metrics", Authorization="")[0] == 401
    assert send(server, "GET", "/health", Authorization="") == (200, {"status": "ready", "workers": {"ready": 1}})
    assert send(server, "GET", "/health/live", Authorization="")[0] == 200
    api = send(server, "GET", "/openapi.json")[1]
    assert {"/v1/videos", "/v1/videos/{video_id}/content", "/metrics"} <= set(api["paths"])
    body = api["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body["multipart/form-data"]["schema"]["properties"]) == {
        "prompt", "model", "size", "seconds", "seed", "schedule", "lora", "input_reference"}  # fmt: skip
    assert api["paths"]["/v1/videos"]["get"]["security"] and b"swagger-ui" in send(server, "GET", "/docs")[1]
    assert len(send(server, "GET", "/swagger/swagger-ui-bundle.js", Authorization="")[1]) > 100_000
    assert [model.id for model in client(server).models.list()] == ["tiny"]


def test_parts_of_a_file_can_be_asked_for(server, videos):
    made = videos.create_and_poll(prompt=PROMPT)
    whole = send(server, "GET", f"/v1/videos/{made.id}/content")[1]
    assert send(server, "GET", f"/v1/videos/{made.id}/content", Range="bytes=4-7") == (206, whole[4:8] )
    with pytest.raises(openai.BadRequestError, match="not made here"):
        videos.download_content(made.id, variant="spritesheet")


def test_the_documented_example_runs(server, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    monkeypatch.setenv("KEY", ALICE)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "server.md", "exec"), {})
    with av.open("video.mp4") as file:
        assert file.streams.video[0].frames == 81
