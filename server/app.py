"""The server's front: puts access, jobs, live streams, metrics and the page together. It never loads a model."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_swagger import patch_fastapi
from pydantic import BaseModel, Field

from server.access import COOKIE, COOKIE_SECONDS, AccessPolicy
from server.errors import add_handlers, storage_error
from server.job_store import JobStore
from server.jobs import JobQueue
from server.limits import MAX_UPLOAD, Limits
from server.live import IMAGE, LiveServer
from server.metrics import Metrics
from server.middleware import Access, AnswerHeaders, BoundedBodies
from server.videos_api import MAX_BODY, Served, videos_router
from server.workers import WorkerPool

STATIC = Path(__file__).parent / "static"
OPEN_PATHS = ("/", "/health", "/health/live", "/docs", "/openapi.json", "/favicon.ico")
OPEN_FOLDERS = ("/static/", "/swagger/")
# Swagger UI is started by a script within its page, which shows nothing that a visitor has sent
DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'"
)
ABOUT = """Videos by a streaming text-to-video model: as jobs in the shape of OpenAI's videos API, and live over a
WebSocket (`/v1/live`, see docs/live-protocol.md). Where the server asks for keys: `Authorization: Bearer KEY`."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What serve.py is told beside the configuration."""

    live: Limits
    grace_seconds: float = 20.0  # that running jobs have to finish when the server is stopped
    loras: Sequence[str] = ()  # names that may be asked for


class Health(BaseModel):
    status: str = Field(
        description="ready, warming, full (no stream can be added, or the queue is full), unwritable (jobs cannot be "
        "stored; live streams go on) or stopping."
    )
    detail: str | None = Field(None, description="Why jobs cannot be stored.")
    workers: dict[str, int] = Field(description="Worker processes by state.")


def create_app(
    pool: WorkerPool,
    store: JobStore,
    policy: AccessPolicy,
    options: ServerOptions,
    on_start: Callable[[BaseException | None], None] = lambda fault: None,
) -> FastAPI:
    """The application. pool: not started yet; it and the store are closed when the server ends.

    on_start: called once the workers are warm, or with what has prevented it.
    """
    metrics = Metrics()
    queue = JobQueue(store, pool, metrics)
    pool.observe = metrics.observe
    stopping = False

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal stopping
        await queue.start()
        starting = asyncio.create_task(pool.start())  # /health answers meanwhile
        starting.add_done_callback(lambda task: task.cancelled() or on_start(task.exception()))
        try:
            yield
        finally:
            stopping = True
            starting.cancel()
            await queue.stop(options.grace_seconds)
            await pool.stop()

    app = FastAPI(
        title="Diagonal Distillation", description=ABOUT, version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )  # fmt: skip
    patch_fastapi(app, redirect_from_root_to_docs=False, swagger_ui_parameters={"tryItOutEnabled": True})
    add_handlers(app)
    # the last one is the first that a request passes
    app.add_middleware(BoundedBodies, large={"/v1/videos": MAX_BODY, IMAGE.format(session="[^/]+"): MAX_UPLOAD})
    app.add_middleware(Access, policy=policy, open_paths=OPEN_PATHS, open_folders=OPEN_FOLDERS)
    app.add_middleware(AnswerHeaders, content_policies={"/docs": DOCS_POLICY})
    # for the description alone: Access has asked for the key before
    keyed = [Depends(HTTPBearer(auto_error=False, description="An API key, where the server asks for one."))]
    served = Served(pool.config, options.live.max_seconds, options.loras)
    app.include_router(videos_router(queue, served), dependencies=keyed)
    app.include_router(LiveServer(pool, options.live).router())

    @app.get("/health", tags=["operation"], response_model_exclude_none=True, responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """200 while new work is taken, else 503: for a load balancer."""
        workers = pool.status()
        counts = await queue.counts()
        ready = [worker for worker in workers if worker["state"] == "ready"]
        live_full = all(worker["sessions"] >= worker["capacity"] for worker in ready)
        if stopping:
            status = "stopping"
        elif not ready:
            status = "warming"
        elif queue.fault:
            status = "unwritable"
        elif live_full or counts.get("queued", 0) >= store.limits.queue:
            status = "full"
        else:
            status = "ready"
        response.status_code = 200 if status == "ready" else 503
        states = [worker["state"] for worker in workers]
        detail = storage_error(queue.fault).message if queue.fault else None
        counted = {state: states.count(state) for state in sorted(set(states))}
        return Health(status=status, detail=detail, workers=counted)

    @app.get("/health/live", tags=["operation"])
    async def alive() -> dict[str, str]:
        """200 while the process answers: for what starts it again."""
        return {"status": "alive"}

    @app.get("/metrics", tags=["operation"], response_class=Response, dependencies=keyed)
    async def measured() -> Response:
        """Counters in Prometheus' text format."""
        text = metrics.text(await queue.counts(), pool.status())
        return Response(text, media_type=metrics.content_type)

    @app.post("/session", tags=["operation"], status_code=204, dependencies=keyed)
    async def session(request: Request) -> Response:
        """Exchange a key for a cookie, which a browser's WebSocket sends by itself."""
        answer = Response(status_code=204)
        if policy.keys:
            secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
            value = policy.keys.cookie(request.state.owner)
            answer.set_cookie(COOKIE, value, COOKIE_SECONDS, secure=secure, httponly=True, samesite="strict")
        return answer

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC))
    return app
