"""Errors as OpenAI's clients read them."""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from elm_ecg.training.evaluation.answers import NotFiniteError
from elm_ecg.training.serving.engine import EngineDownError, QueueFullError
from elm_ecg.training.serving.protocol import Error, ErrorDetail

TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
MAX_LETTERS = 2000  # of a message, as it may quote the request
OWN_FAULT = "The server has failed; its log says why, under this request's x-request-id."


class APIError(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the client: no path of this machine, and nothing of another request; cut at `MAX_LETTERS`.
        param: the field of the request that is at fault.
        retry_after: seconds after which it is worth another try.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message)
        if len(message) > MAX_LETTERS:
            message = f"{message[:MAX_LETTERS]}..."
        self.message, self.param, self.code, self.retry_after = message, param, code, retry_after

    @property
    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return Error(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """As HTTP has it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status_code == 401:
            headers["www-authenticate"] = "Bearer"
        # ASCII: a text of the request may hold halves of letters, which no UTF-8 has
        return _Ascii(self.content, self.status_code, headers)


class _Ascii(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def as_api_error(error: Exception) -> APIError | None:
    """What an error of an engine means for the client; None for one that nobody expected, whose text is not for clients."""
    if isinstance(error, QueueFullError):
        return APIError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineDownError):
        return APIError(503, str(error), code="engine_down", retry_after=5)
    if isinstance(error, NotFiniteError):
        return APIError(500, "The model gives NaN or infinity for the scores of tokens, so that it has no answer.")
    if isinstance(error, TimeoutError):
        return APIError(408, "The answer took longer than this server allows (--max_seconds); ask for fewer tokens.")
    return None
