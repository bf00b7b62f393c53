"""Errors in the shape that OpenAI's API has: {"error": {"message", "type", "param", "code"}}."""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from configs.errors import UserError
from utils.files import DiskFull, is_disk_full
from utils.logs import get_logger

log = get_logger(__name__)


class ApiError(Exception):
    """An error response: one sentence, and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        message = message.encode("utf-8", "replace").decode()  # quoted values may not be encodable
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class ErrorDetail(BaseModel):
    message: str = Field(description="One sentence: what is wrong, and what to do.")
    type: str = Field(description="invalid_request_error, authentication_error, rate_limit_error, server_error, ...")
    param: str | None = Field(description="The parameter that it is about.")
    code: str | None = Field(description="What a program can tell it by.")


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "seconds=soon is no number; give 0.1 to 60",
                        "type": "invalid_request_error",
                        "param": "seconds",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )
    error: ErrorDetail


def storage_error(error: Exception) -> ApiError:
    """What clients are told if the server's disk cannot be written; its paths are not theirs to know."""
    if isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
    elif isinstance(error, UserError):
        reason = "the disk is full" if is_disk_full(error) else "its folder cannot be written"
    else:  # SQLite's
        reason = str(error)
    sentence = f"jobs cannot be stored now ({reason}); try again later"
    return ApiError(503, sentence, code="storage", headers={"Retry-After": "30", "Connection": "close"})


def sentence_of(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first error of pydantic as a sentence, and the name of its parameter."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return f"{param} is no parameter here; leave it out", param
    if first["type"] == "missing":
        return f"{param} is missing; give it", param
    if first["type"] == "json_invalid":
        return "the body is not valid JSON; send an object", None
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{param}={str(first['input'])[:40]} is not accepted: it {reason[:200]}", param


def add_handlers(app: FastAPI) -> None:
    """Make `app` return all errors in this format."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = sentence_of(error.errors())
        return ApiError(400, message, param=param, code="invalid_value").response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404 and message == "Not Found":
            message = f"there is no {request.method} {request.url.path[:80]} here; /openapi.json lists what there is"
        if error.status_code == 405:
            message = f"{request.url.path[:80]} takes no {request.method[:10]}; /openapi.json lists what it takes"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return ApiError(400, "the body was broken off; send it again", code="incomplete").response()

    @app.exception_handler(sqlite3.Error)
    @app.exception_handler(DiskFull)
    async def storage(request: Request, error: Exception) -> JSONResponse:
        log.warning(f"jobs cannot be stored: {error}")
        return storage_error(error).response()

    @app.exception_handler(OSError)
    async def system(request: Request, error: OSError) -> JSONResponse:
        if not is_disk_full(error):
            raise error
        return await storage(request, error)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        """A bug; Starlette raises it again, and uvicorn logs it."""
        return ApiError(500, "the server could not do this; its log says why", code="server_error").response()
