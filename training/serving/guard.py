"""What stands before all paths of a server: who may ask how much, and what is logged and counted of it."""

import asyncio
import hashlib
import hmac
import logging
import math
import re
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elm_ecg.training.serving.errors import OWN_FAULT, APIError
from elm_ecg.training.serving.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_CALLERS = 10_000  # whose requests are counted at once
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# as clients and load balancers name requests
REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Rules:
    """Who may ask how much.

    Args:
        api_keys: each lets in; none: everybody is let in.
        hosts: names by which the server may be called; none: any. A page of another site cannot then make a browser ask it.
        max_body_bytes: of a request.
        max_seconds: from its first byte until all of it is here.
        requests_per_minute: of a key, or without keys of an address; 0: any number.
    """

    api_keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    max_body_bytes: int = 32 * 2**20
    max_seconds: float = 300.0
    requests_per_minute: int = 0


class Guard:
    """Middleware of all paths: a name for each request, its rules, a line in the log without what it says, and its count.

    A request's state has its `request_id`, and its `client`: who asks, by the digest of the key.
    """

    def __init__(self, app: Any, rules: Rules, metrics: Metrics, paths: Sequence[str]) -> None:
        self.app, self.rules, self.metrics, self.paths = app, rules, metrics, paths
        self._recent: OrderedDict[str, deque[float]] = OrderedDict()  # who asked last is last

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        scope["state"]["client"] = ""  # all of a server without keys are one
        begun, status = time.monotonic(), 499  # as nginx has it of a client that went away

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, self._limited(receive, headers), answer)
        except APIError as error:
            await error.response()(scope, receive, answer)
        except Exception:
            logger.exception("%s has failed.", request_id)
            if status != 499:  # the answer has begun
                raise
            await APIError(500, OWN_FAULT).response()(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()
            logger.info("%s %s %s %d %.3f s", request_id, scope["method"], path, status, time.monotonic() - begun)

    def _check(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if (
            self.rules.hosts
            and host.rsplit(":", 1)[0].strip("[]") not in self.rules.hosts
            and host not in self.rules.hosts
        ):
            raise APIError(403, "The Host of the request is another than that of this server.")
        if scope["path"] == "/health" or scope["method"] == "OPTIONS":  # load balancers and browsers ask without a key
            return
        caller = (scope.get("client") or ("",))[0]
        if self.rules.api_keys:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            matches = [hmac.compare_digest(key.strip(), known.encode()) for known in self.rules.api_keys]  # all of them
            if scheme.lower() != b"bearer" or not any(matches):
                raise APIError(
                    401, "There is no such API key; send it as `Authorization: Bearer KEY`.", code="invalid_api_key"
                )
            caller = scope["state"]["client"] = hashlib.sha256(key.strip()).hexdigest()
        if self.rules.requests_per_minute:
            self._count(caller)

    def _count(self, caller: str) -> None:
        """Counts a request of the last minute (APIError: they are too many)."""
        now, recent = time.monotonic(), self._recent.setdefault(caller, deque())
        self._recent.move_to_end(caller)
        if len(self._recent) > MAX_CALLERS:
            self._recent.popitem(last=False)
        while recent and recent[0] <= now - 60:
            recent.popleft()
        if len(recent) >= self.rules.requests_per_minute:
            raise APIError(
                429,
                f"More than {self.rules.requests_per_minute} requests in a minute.",
                code="rate_limit_exceeded",
                retry_after=math.ceil(recent[0] + 60 - now),
            )
        recent.append(now)

    def _limited(self, receive: Any, headers: dict[bytes, bytes]) -> Any:
        """`receive`, of a body that is neither too long nor too slow (APIError)."""
        limit = self.rules.max_body_bytes
        too_long = APIError(413, f"The request has more than {limit} bytes, the most that this server reads.")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise too_long
        size, whole, deadline = 0, False, time.monotonic() + self.rules.max_seconds

        async def limited() -> Any:
            nonlocal size, whole
            if whole:  # only the end of the connection is still to come
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError as error:
                raise APIError(408, "The request did not come to its end in time.") from error
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > limit:
                raise too_long
            return message

        return limited
