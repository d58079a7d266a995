"""Errors of the HTTP application, all in the protocol's shape."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from elastic.inference.serving.protocol import error_body

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


class RefusedError(Exception):
    """A request that gets an error.

    Args:
        status: of HTTP; 499 where nobody is left to read it.
        message: what was given, what was expected, the way out.
        param: the setting that is wrong.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """The protocol's error object."""
        return error_of(self.status, str(self), self.param)


def error_of(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The protocol's error object for an HTTP status."""
    usual = "invalid_request_error" if status < 500 else "server_error"
    return error_body(message, _KINDS.get(status, usual), param)


def handle_errors(app: FastAPI) -> None:
    """Let every error leave the application in the protocol's shape."""
    app.add_exception_handler(RefusedError, _on_refused)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_unforeseen)


def _response(status: int, message: str, param: str | None = None) -> Response:
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(error_of(status, message, param), status, headers=headers)


async def _on_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _response(error.status, str(error), error.param)


async def _on_invalid(_: Request, error: Exception) -> Response:
    """400 with the first thing that is wrong, named by its place in the body."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    return _response(400, f"{place}: {first['msg']}" if place else first["msg"], place or None)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _response(error.status_code, str(error.detail))


async def _on_unforeseen(_: Request, error: Exception) -> Response:
    return _response(500, f"the server failed: {type(error).__name__}; its log says more")
