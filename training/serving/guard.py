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

from starlette.requests import ClientDisconnect

from elm_ecg.training.serving.errors import OWN_FAULT, APIError
from elm_ecg.training.serving.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_CALLERS = 10_000  # whose requests are counted at once
BODIES = 16  # of the largest size that are held at once; as objects of Python they take several times as much
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
        max_seconds: from its first byte until all of it is here, and for a client to read what is sent.
        requests_per_minute: of a key, or without keys of an address; 0: any number.

    A body is held until its answer ends: of all together at most `BODIES` times the largest.
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
        self.num_bytes = 0  # of the bodies of all requests that are not answered yet
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
        body = _Body(self, receive, headers)
        begun, status = time.monotonic(), 499  # as nginx has it of a client that went away

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                closed = [(b"connection", b"close")] if body.is_unread else []
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *closed]
            try:
                async with asyncio.timeout(self.rules.max_seconds):
                    await send(message)
            except TimeoutError as error:
                raise ClientDisconnect from error

        try:
            self._check(scope, headers)
            body.check()
            await self.app(scope, body, answer)
        except APIError as error:
            await error.response()(scope, receive, answer)
        except ClientDisconnect:
            logger.warning("%s: the client does not read its answer.", request_id)
        except Exception:
            logger.exception("%s has failed.", request_id)
            if status != 499:  # the answer has begun
                raise
            await APIError(500, OWN_FAULT).response()(scope, receive, answer)
        finally:
            self.num_bytes -= body.size
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


class _Body:
    """The `receive` of a request whose body is neither too long nor too slow, as `Rules` has it.

    Args:
        guard: which knows how much all requests hold.
    """

    def __init__(self, guard: Guard, receive: Any, headers: dict[bytes, bytes]) -> None:
        self.guard, self.receive = guard, receive
        self.length = headers.get(b"content-length", b"0")
        self.is_unread = self.length != b"0" or b"transfer-encoding" in headers  # more may come
        self.size = 0  # bytes that are here
        self._is_whole, self._deadline = False, time.monotonic() + guard.rules.max_seconds

    def check(self) -> None:
        """APIError: there is, or will be, too much of it."""
        limit = self.guard.rules.max_body_bytes
        if self.size > limit or (self.length.isdigit() and int(self.length[:20]) > limit):
            raise APIError(413, f"The request has more than {limit} bytes, the most that this server reads.")
        if self.guard.num_bytes > BODIES * limit:
            raise APIError(
                429, "The server holds as many requests as it can; ask again later.", code="queue_full", retry_after=1
            )

    async def __call__(self) -> Any:
        """As of ASGI (APIError)."""
        if self._is_whole:  # only the end of the connection is still to come
            return await self.receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self.receive()
        except TimeoutError as error:
            raise APIError(408, "The request did not come to its end in time.") from error
        self._is_whole = not message.get("more_body", False)
        self.is_unread = self.is_unread and not self._is_whole
        length = len(message.get("body", b""))
        self.size += length
        self.guard.num_bytes += length
        self.check()
        return message
