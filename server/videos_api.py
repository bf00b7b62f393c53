"""`/v1/videos` in the shape of OpenAI's videos API: create, status, content, list, delete, and a cancel of our own.

What differs from OpenAI's: any length and the one size that the model makes, `seed`, `schedule` and `lora` beside the
official parameters, Idempotency-Key, and no remixes, edits, extensions or characters.
"""

import asyncio
import base64
import binascii
import io
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser

from configs.errors import UserError, shown
from configs.geometry import TEMPORAL_STRIDE, pixel_frames
from configs.schema import DATED, Config
from model.schedule import PRESETS
from server.errors import ApiError, ErrorBody, sentence_of
from server.job_store import DONE, FAILED, ID, QUEUED, RUNNING, THUMBNAIL, VIDEO, Job, JobRequest, digest_of
from server.jobs import JobQueue
from server.limits import MAX_PROMPT, MAX_SEED, MAX_UPLOAD
from utils.files import parse_json
from utils.pictures import read_picture
from utils.prompts import check_prompt

MAX_BODY = MAX_UPLOAD * 4 // 3 + 2**16  # bytes of a request, whose picture may be in base64
SMALL_BODY = 64 * 1024  # bytes up to which bodies are not counted as uploads
UPLOADS_PER_KEY, UPLOADS = 4, 16  # at once
MultiPartParser.spool_max_size = MAX_UPLOAD  # in memory as a whole, so that no upload depends on a folder for it
MAX_FIELDS, MAX_FIELD = 20, 32 * 1024  # of a form; bytes of one
POLL_MS = "500"  # that the openai client waits between two looks at a job
SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


class ImageReference(BaseModel):
    model_config = ConfigDict(extra="forbid")
    image_url: str = Field(description="A data URL: data:image/png;base64,... Other addresses are not fetched.")


class VideoCreate(BaseModel):
    """What a video is to be."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"prompt": "a red circle moves right", "seconds": "5", "seed": 7, "schedule": "self_forcing"}]
        },
    )
    prompt: str = Field(description=f"A sentence of at most {MAX_PROMPT:,} characters.", max_length=MAX_PROMPT)
    model: str | None = Field(None, description="The name that /v1/models gives; may be left out.")
    size: str | None = Field(None, description="Width x height in pixels; the size that the server makes.")
    seconds: float | None = Field(
        None, description="Length, as a number or as text. Rounded up to whole chunks. Default: as configured.", gt=0
    )
    seed: int | None = Field(None, description="Of the noise; drawn where it is left out.", ge=0, le=MAX_SEED)
    schedule: str | None = Field(None, description="Preset of denoising steps. Default: as configured.")
    lora: str | None = Field(None, description="Name of an adapter that the server was started with.")
    input_reference: ImageReference | None = Field(
        None, description="The picture that the video begins with: in a form, a file (JPEG, PNG, WebP)."
    )


class JobError(BaseModel):
    code: str = Field(description="generation_failed, cancelled, interrupted, worker_died, storage or server_error.")
    message: str


class VideoObject(BaseModel):
    """A job and its video."""

    id: str
    object: Literal["video"] = "video"
    status: Literal["queued", "in_progress", "completed", "failed"] = Field(
        description="A cancelled job has failed with the code `cancelled`."
    )
    progress: int = Field(description="Percent.")
    model: str
    prompt: str
    seconds: str = Field(description="Length of the video.")
    size: str = Field(description="Width x height in pixels.")
    created_at: int = Field(description="Unix time.")
    completed_at: int | None = None
    expires_at: int | None = Field(None, description="When job and files are deleted.")
    error: JobError | None = None
    remixed_from_video_id: None = None
    seed: int = Field(description="With prompt, schedule and adapter, the same seed gives the same video.")
    schedule: str | None
    lora: str | None
    frames: int


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None = Field(description="What to give as `after` for the next page.")
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "local"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


@dataclass(frozen=True)
class Served:
    """What the server offers."""

    config: Config
    max_seconds: float
    loras: Sequence[str] = ()

    def request(self, given: VideoCreate, image: bool) -> JobRequest:
        """The checked request. Raises ApiError for parameters that are not supported."""
        config, video = self.config, self.config.video
        size = f"{video.width}x{video.height}"
        if given.model not in (None, config.name):
            raise _invalid("model", f"{given.model[:60]} is not served; use {config.name}", "model_not_found")
        if given.size not in (None, size):
            raise _invalid("size", f"{given.size[:20]} is not made here; use {size} (width x height)")
        schedule = DATED.get(given.schedule, given.schedule)
        if schedule is not None and schedule not in PRESETS:
            raise _invalid("schedule", f"{schedule[:60]} is unknown; use one of {', '.join([*PRESETS, *DATED])}")
        if given.lora is not None and given.lora not in self.loras:
            known = f"use one of {', '.join(self.loras)}" if self.loras else "this server has none"
            raise _invalid("lora", f"{given.lora[:60]} is unknown; {known}")
        if image and config.model.codec == "taehv":
            raise _invalid("input_reference", "...: this server's decoder cannot encode pictures; leave it out")
        try:
            check_prompt(given.prompt)
        except UserError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
        if given.seconds is not None and given.seconds > self.max_seconds:
            raise _invalid("seconds", f"{given.seconds:g} is too long; give at most {self.max_seconds:g}")
        frames = self.frames(given.seconds)
        return JobRequest(
            prompt=given.prompt,
            seconds=frames / video.fps,
            num_frames=frames,
            size=(video.height, video.width),
            seed=secrets.randbelow(MAX_SEED + 1) if given.seed is None else given.seed,
            schedule=schedule,
            lora=given.lora,
            image=image,
        )

    def frames(self, seconds: float | None) -> int:
        """Pixel frames of the fewest whole chunks that last so long."""
        if seconds is None:
            return pixel_frames(self.config.video.num_latent_frames)
        frames, chunk = max(1, math.ceil(seconds * self.config.video.fps)), self.config.stream.chunk_frames
        latents = 1 + math.ceil((frames - 1) / TEMPORAL_STRIDE)
        return pixel_frames(math.ceil(latents / chunk) * chunk)


class _Uploads:
    """Limits concurrent large uploads, per key and in total, since they are held in memory."""

    def __init__(self):
        self._running: list[str] = []

    @contextmanager
    def one(self, owner: str, request: Request) -> Iterator[None]:
        """A block that reads a body."""
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated[:20]) <= SMALL_BODY:
            yield
            return
        if len(self._running) >= UPLOADS or self._running.count(owner) >= UPLOADS_PER_KEY:
            sentence = "other uploads are still on their way; try again when they are there"
            raise ApiError(429, sentence, code="too_many_uploads", headers={"Retry-After": "1"})
        self._running.append(owner)
        try:
            yield
        finally:
            self._running.remove(owner)


async def _read(request: Request) -> tuple[VideoCreate, bytes | None]:
    """Parameters and picture of a form or of JSON."""
    kind, image = request.headers.get("content-type", "").partition(";")[0].strip().lower(), None
    if kind == "application/json":
        try:
            values = parse_json(await request.body())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, "the body is not valid JSON; send an object", code="invalid_json") from error
        if not isinstance(values, dict):
            raise ApiError(400, "the body is no JSON object; send one", code="invalid_json")
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        values = {}
        async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD) as form:
            for name, value in form.multi_items():
                if name in values or (name == "input_reference" and image is not None):
                    raise _invalid(name[:40], "... is given twice; give it once")
                if isinstance(value, UploadFile):
                    if name != "input_reference":
                        raise _invalid(name[:40], "... cannot be a file; only input_reference can")
                    image = await value.read()
                elif value:  # an empty field of a form is one that was left out
                    values[name] = value
    else:
        sentence = f"Content-Type={kind[:60]} is not read here; send multipart/form-data or application/json"
        raise ApiError(415, sentence, code="unsupported_media_type")
    try:
        given = VideoCreate.model_validate(values)
    except ValidationError as error:
        message, param = sentence_of(error.errors(include_url=False))
        raise ApiError(400, message, param=param, code="invalid_value") from error
    if given.input_reference is not None:
        if image is not None:
            raise _invalid("input_reference", "... is given twice; give it once")
        image = _data_url(given.input_reference.image_url)
    return given, image


def _data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[a-z+.-]{1,20};base64", head):
        raise _invalid("input_reference", f"{shown(url)} is not fetched; give a file, or data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid("input_reference", "... is no valid base64; encode the file again") from error


def _png(content: bytes, size: tuple[int, int]) -> bytes:
    """An uploaded picture as PNG at the size of the video."""
    if len(content) > MAX_UPLOAD:
        raise UserError(f"input_reference has {len(content):,} bytes; at most {MAX_UPLOAD:,} are taken")
    out = io.BytesIO()
    Image.fromarray(read_picture(content, size, "input_reference")).save(out, "png")
    return out.getvalue()


def _invalid(param: str, rest: str, code: str = "invalid_value") -> ApiError:
    """`param=rest`, or `param rest` where `rest` begins with dots."""
    text = param + rest.removeprefix("...") if rest.startswith("...") else f"{param}={rest}"
    return ApiError(400, text, param=param, code=code)


JobId = Annotated[str, Path(description="What creation gave as `id`.", examples=["video_" + 4 * "01234567"])]
ERRORS = {status: {"model": ErrorBody} for status in (400, 401, 404, 422, 429)}


def _body_schema(served: Served) -> dict[str, Any]:
    """OpenAPI schema, with examples, of the body of a creation, which is parsed manually because it has two formats."""
    schema = VideoCreate.model_json_schema()
    image = schema.pop("$defs")["ImageReference"]
    video = served.config.video
    examples = {
        "prompt": "a red circle moves right", "model": served.config.name, "size": f"{video.width}x{video.height}",
        "seconds": 5, "seed": 7, "schedule": "", "lora": "",
    }  # fmt: skip
    fields = {}
    for name, field in schema["properties"].items():
        kind = field.get("type") or field["anyOf"][0].get("type")
        fields[name] = {"type": kind, "description": field["description"], "example": examples.get(name)}
    file = {"type": "string", "format": "binary", "description": "A JPEG, PNG or WebP picture that it begins with."}
    form = {"type": "object", "required": ["prompt"], "properties": fields | {"input_reference": file}}
    schema["properties"]["input_reference"] = image
    return {
        "required": True,
        "content": {"multipart/form-data": {"schema": form}, "application/json": {"schema": schema}},
    }


def videos_router(queue: JobQueue, served: Served) -> APIRouter:
    """The routes. `request.state.owner` says whose request it is."""
    router = APIRouter(prefix="/v1", tags=["videos and models"], responses=ERRORS)
    uploads, decoding = _Uploads(), asyncio.Lock()  # one picture is unpacked at a time

    def shown(job: Job) -> VideoObject:
        request = job.request
        return VideoObject(
            id=job.id, status=job.status, progress=queue.progress(job), model=served.config.name,
            prompt=request.prompt, seconds=f"{request.seconds:g}", size=f"{request.size[1]}x{request.size[0]}",
            created_at=int(job.created_at), completed_at=_whole(job.completed_at), expires_at=_whole(job.expires_at),
            error=job.error and JobError(**job.error), seed=request.seed, schedule=request.schedule,
            lora=request.lora, frames=request.num_frames,
        )  # fmt: skip

    async def find(request: Request, id: str) -> Job:
        if not ID.fullmatch(id):
            raise ApiError(404, f"there is no video {id[:50]}; give the id that creation gave", code="video_not_found")
        return await queue.get(request.state.owner, id)

    @router.post("/videos", summary="Create a video", openapi_extra={"requestBody": _body_schema(served)})
    async def create(
        request: Request,
        response: Response,
        idempotency_key: Annotated[
            str | None,
            Header(description="A second request with the same key and body gives the same job.", max_length=200),
        ] = None,
    ) -> VideoObject:
        """Put a job into the queue. Ask for its status until it is `completed`, and then for its content."""
        with uploads.one(request.state.owner, request):
            given, image = await _read(request)
        asked = served.request(given, image is not None)
        digest = digest_of(given.model_dump(exclude={"input_reference"}), image)
        if image is not None:
            async with decoding:
                try:
                    image = await asyncio.to_thread(_png, image, asked.size)
                except UserError as error:
                    raise ApiError(400, str(error), param="input_reference", code="invalid_image") from error
        job, new = await queue.create(request.state.owner, asked, digest, idempotency_key, image)
        if not new:
            response.headers["Idempotent-Replayed"] = "true"
        return shown(job)

    @router.get("/videos", summary="List videos")
    async def page(
        request: Request,
        after: Annotated[str | None, Query(description="The id that the page begins after.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
    ) -> VideoList:
        """Jobs of this key, a page at a time."""
        if after is not None:
            await find(request, after)
        jobs, more = await queue.page(request.state.owner, after, limit, order == "desc")
        ids = [job.id for job in jobs]
        return VideoList(
            data=[shown(job) for job in jobs], first_id=(ids or [None])[0], last_id=(ids or [None])[-1], has_more=more
        )

    @router.get("/videos/{video_id}", summary="Status of a video")
    async def retrieve(request: Request, response: Response, video_id: JobId) -> VideoObject:
        job = await find(request, video_id)
        if job.status in (QUEUED, RUNNING):
            response.headers["openai-poll-after-ms"] = POLL_MS
        return shown(job)

    @router.delete("/videos/{video_id}", summary="Delete a video")
    async def delete(request: Request, video_id: JobId) -> VideoDeleted:
        """Remove a job and its files. One that waits or runs is cancelled first."""
        await find(request, video_id)
        await queue.remove(request.state.owner, video_id)
        return VideoDeleted(id=video_id)

    @router.post("/videos/{video_id}/cancel", summary="Cancel a video")
    async def cancel(request: Request, video_id: JobId) -> VideoObject:
        """Stop a job within one denoising step. It stays in the list as failed, with the code `cancelled`."""
        await find(request, video_id)
        return shown(await queue.cancel(request.state.owner, video_id))

    @router.get(
        "/videos/{video_id}/content",
        summary="Download a video",
        response_class=Response,
        responses={200: {"description": "The file.", "content": {"video/mp4": {}, "image/jpeg": {}}}},
    )
    async def content(
        request: Request,
        video_id: JobId,
        variant: Annotated[
            Literal["video", "thumbnail", "spritesheet"],
            Query(description="MP4, or a JPEG of a frame; a spritesheet is not made."),
        ] = "video",
    ) -> FileResponse:
        """The finished video, also in parts (Range)."""
        job = await find(request, video_id)
        if variant == "spritesheet":
            raise _invalid("variant", "spritesheet is not made here; use video or thumbnail")
        if job.status == FAILED:
            sentence = f"the video could not be made: {job.error['message']}"
            raise ApiError(404, sentence, code=job.error["code"])
        if job.status != DONE:
            raise ApiError(400, f"the video is {job.status}; ask again when it is completed", code="video_not_ready")
        ending, media = (VIDEO, "video/mp4") if variant == "video" else (THUMBNAIL, "image/jpeg")
        path = queue.file(job, ending)
        if not await asyncio.to_thread(path.is_file):
            raise ApiError(404, "the file is gone from the server; create the video again", code="file_not_found")
        return FileResponse(path, media_type=media, filename=path.name)

    @router.get("/models", summary="List models")
    async def models() -> ModelList:
        return ModelList(data=[ModelObject(id=served.config.name)])

    @router.get("/models/{model}", summary="A model")
    async def model(model: str) -> ModelObject:
        if model != served.config.name:
            raise ApiError(404, f"model={model[:60]} is not served; use {served.config.name}", code="model_not_found")
        return ModelObject(id=model)

    return router


def _whole(time: float | None) -> int | None:
    return None if time is None else int(time)
