"""The paths of a server: OpenAI's chat completions, and what watches over it."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from elm_ecg.training.serving.chats import Prepared, ServedModel
from elm_ecg.training.serving.engine import EngineDownError, Piece, QueueFullError
from elm_ecg.training.serving.errors import OWN_FAULT, APIError, as_api_error
from elm_ecg.training.serving.guard import Guard, Rules
from elm_ecg.training.serving.metrics import Metrics
from elm_ecg.training.serving.protocol import (
    ChatCompletion,
    ChatRequest,
    Collected,
    Error,
    Health,
    Model,
    Models,
    as_logprobs,
)

logger = logging.getLogger(__name__)

PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/metrics")
READERS = 4  # requests whose ECGs are read at once
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Error}, "5XX": {"model": Error}}
T = TypeVar("T")


@dataclass
class Server:
    """The models of a server and what it is doing.

    Args:
        models: no two of one name.
        max_queue: chats whose answers have not begun; more are turned away.
        max_seconds: from a chat's request to the end of its answer.
        cors_origins: of pages in browsers that may ask; none by default.
        log_requests: write the texts of chats and answers into the log.
    """

    models: Sequence[ServedModel]
    rules: Rules = field(default_factory=Rules)
    max_queue: int = 256
    max_seconds: float = 300.0
    cors_origins: Sequence[str] = ()
    log_requests: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.by_name = {model.name: model for model in self.models}
        self.engines = list({id(model.engine): model.engine for model in self.models}.values())
        self.is_ending = False  # new chats are turned away
        self.waiting = self.running = 0
        self.started = int(time.time())
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="elm-reader")

    def model(self, name: str) -> ServedModel:
        """The model of this name (APIError: there is none)."""
        if name not in self.by_name:
            raise APIError(
                404,
                f"There is no model {name!r:.100} here, but {', '.join(self.by_name)}.",
                param="model",
                code="model_not_found",
            )
        return self.by_name[name]

    async def prepare(self, model: ServedModel, request: ChatRequest, client: str) -> Prepared:
        """See [`ServedModel.prepare`]; in a thread (APIError: the request is at fault)."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, model.prepare, request, client)
        except (ValueError, ImportError) as error:
            raise APIError(400, str(error)) from error

    async def pieces(self, model: ServedModel, prepared: Prepared, begun: float) -> AsyncGenerator[Piece, None]:
        """The answers of an engine, which are counted, and end in time (TimeoutError).

        Args:
            begun: when the request came, by the clock of the event loop.
        """
        metrics, clock, is_first = self.metrics, asyncio.get_running_loop().time, True
        metrics.prompt_tokens.labels(model.name).inc(len(prepared.prompt.input_ids))
        try:
            async with aclosing(model.engine.generate(prepared.prompt, prepared.options)) as pieces:
                while True:
                    async with asyncio.timeout_at(begun + self.max_seconds):
                        piece = await anext(pieces, None)
                    if piece is None:
                        break
                    if is_first:
                        is_first = False
                        self.running += 1
                        metrics.running.set(self.running)
                        metrics.first_token.observe(clock() - begun)
                    metrics.tokens.labels(model.name).inc(piece.num_tokens)
                    metrics.cached_tokens.labels(model.name).inc(piece.num_cached)
                    yield piece
        finally:
            if not is_first:
                self.running -= 1
                metrics.running.set(self.running)
                metrics.seconds.observe(clock() - begun)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Counts a chat that waits for its answer (EngineDownError, QueueFullError: it may not)."""
        if self.is_ending:
            raise EngineDownError("The server is ending; ask again later.")
        if self.waiting >= self.max_queue:
            raise QueueFullError(f"{self.waiting} chats wait for their answers already; ask again later.")
        self.waiting += 1
        self.metrics.waiting.set(self.waiting)
        try:
            yield
        finally:
            self.waiting -= 1
            self.metrics.waiting.set(self.waiting)


class Chat:
    """A request on its way to its answers."""

    def __init__(self, server: Server, request: Request, asked: ChatRequest) -> None:
        self.server, self.request, self.asked = server, request, asked
        self.model = server.model(asked.model)
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.begun = asyncio.get_running_loop().time()
        self._log("asked", [{"role": message.role, "text": _texts(message)} for message in asked.messages])

    async def begin(self) -> None:
        """Prepares the prompt, and waits for the first piece of an answer."""
        with self.server.waits():
            async with asyncio.timeout_at(self.begun + self.server.max_seconds):
                self.prepared = await self.server.prepare(self.model, self.asked, self.request.state.client)
            options = self.prepared.options
            self.collected = Collected(len(self.prepared.prompt.input_ids), options.n, options.top_logprobs is not None)
            self._pieces = self.server.pieces(self.model, self.prepared, self.begun)
            self._first = await anext(self._pieces)

    async def answer(self) -> ChatCompletion:
        """All answers."""
        await self.begin()
        async for piece in self._all():
            self.collected.add(piece)
        self._log("answered", self.collected.texts)
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model.name,
            choices=self.collected.choices,
            usage=self.collected.usage,
            notices=self.prepared.notices,
        )

    async def events(self) -> AsyncGenerator[str, None]:
        """The answers as server-sent events, once they have begun. What goes wrong on the way is the last of them."""
        try:
            for choice in range(self.prepared.options.n):
                notices = {} if choice else {"notices": self.prepared.notices}
                yield self._event([_delta(choice, {"role": "assistant", "content": ""})], **notices)
            async for piece in self._all():
                self.collected.add(piece)
                logprobs = as_logprobs(piece.logprobs).model_dump() if piece.logprobs else None
                if piece.text or logprobs:
                    yield self._event([_delta(piece.choice, {"content": piece.text}, logprobs)])
                if piece.finish_reason is not None:
                    yield self._event([_delta(piece.choice, {}, None, piece.finish_reason)])
            if self._tells_usage:
                yield self._event([], usage=self.collected.usage.model_dump())
            self._log("answered", self.collected.texts)
            yield "data: [DONE]\n\n"
        except Exception as error:
            known = as_api_error(error)
            if known is None:
                logger.exception("%s has failed.", self.request.state.request_id)
            yield f"data: {json.dumps((known or APIError(500, OWN_FAULT)).content)}\n\n"

    async def _all(self) -> AsyncGenerator[Piece, None]:
        async with aclosing(self._pieces) as pieces:
            yield self._first
            async for piece in pieces:
                yield piece

    @property
    def _tells_usage(self) -> bool:
        options = self.asked.stream_options
        return options is not None and bool(options.include_usage)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if self._tells_usage else {}
        chunk = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
            **usage,
            **more,
        }
        return f"data: {json.dumps(chunk)}\n\n"

    def _log(self, what: str, texts: Any) -> None:
        if self.server.log_requests:
            logger.info("%s %s %s", self.request.state.request_id, what, json.dumps(texts))


def _texts(message: Any) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content if part.type == "text")


def _delta(
    choice: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


async def _until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives, which ends when the client goes away."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "The client went away.")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(server: Server) -> FastAPI:
    """The application of a server, whose engines start and end with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        for engine in server.engines:
            await engine.start()
        yield
        for engine in server.engines:
            await engine.close()

    app = FastAPI(
        title="elm serve",
        version=version("elm-ecg"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    with_key = [Depends(HTTPBearer(auto_error=False))] if server.rules.api_keys else []  # `Guard` looks at it
    _add_chats(app, server, with_key)
    _add_watching(app, server, with_key)
    _add_errors(app)
    _add_guard(app, server)
    return app


def _add_chats(app: FastAPI, server: Server, with_key: Sequence[Any]) -> None:
    """The path on which models are asked."""

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
        dependencies=with_key,
    )
    async def complete(request: Request, asked: ChatRequest) -> Response:
        """The next message of a chat; with `stream` as events."""
        try:
            chat = Chat(server, request, asked)
            if not asked.stream:
                return JSONResponse((await _until_gone(request, chat.answer())).model_dump())
            await _until_gone(request, chat.begin())
        except APIError:
            raise
        except Exception as error:
            known = as_api_error(error)
            if known is None:
                raise
            raise known from error
        return StreamingResponse(
            chat.events(),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )


def _add_watching(app: FastAPI, server: Server, with_key: Sequence[Any]) -> None:
    """The paths that say what there is, and how it is."""

    @app.get("/v1/models", dependencies=with_key)
    async def models() -> Models:
        """All models that can be asked."""
        return Models(data=[Model(id=name, created=server.started) for name in server.by_name])

    @app.get("/v1/models/{model:path}", dependencies=with_key)
    async def model(model: str) -> Model:
        """One of them."""
        return Model(id=server.model(model).name, created=server.started)

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether the server answers."""
        healthy = all([await engine.healthy() for engine in server.engines])
        status: Any = "ending" if server.is_ending else "ok" if healthy else "down"
        response.status_code = 200 if status == "ok" else 503
        return Health(status=status)

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=with_key)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    """All errors in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException) -> Response:
        known = error if isinstance(error, APIError) else APIError(error.status_code, str(error.detail))
        response = known.response()
        response.headers.update(error.headers or {})  # which methods a path has
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _as_error(error).response()


def _add_guard(app: FastAPI, server: Server) -> None:
    """What stands before all paths; that of browsers is outermost, as pages read errors too."""
    app.add_middleware(Guard, rules=server.rules, metrics=server.metrics, paths=PATHS)
    if server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )


def _as_error(error: RequestValidationError) -> APIError:
    """What a request lacks, or has too much. Of a field that may be of several kinds it is what fits best that is told of."""
    worst = max(error.errors(), key=lambda one: len(one["loc"]))
    # without the names of the kinds that were tried, such as list[TextPart]
    place = ".".join(str(one) for one in worst["loc"][1:] if str(one).isidentifier() or isinstance(one, int))
    place = place.removesuffix(".str")
    told = "is no field that this server knows" if worst["type"] == "extra_forbidden" else worst["msg"]
    told = told.removeprefix("Value error, ")
    if worst["loc"] == ("body",):
        told = f"{told}; send JSON, with content-type: application/json"
    return APIError(400, f"{place or 'The request'}: {told}.", param=place or None)
