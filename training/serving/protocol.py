"""Requests and answers as OpenAI's clients write and read them, with ECGs as parts of a message.

What a field asks that no answer here would do is an error; a field that leaves the answer as it is may say what it likes.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from elm_ecg.training.serving.engine import Piece, TokenLogprob

MAX_CHOICES = 16
MAX_LEADS = 256  # of a map of the body's surface; the parser takes seconds for a million
LOWEST_LOGPROB = -9999.0  # JSON has no infinity; as OpenAI's
# letters, as of keys and names of files
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


def _whole(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half of a letter (a lone surrogate)") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Given):
    """A text of a message."""

    type: Literal["text"]
    text: Text


class ECG(_Given):
    """An ECG: the bytes of a file of any format that `read_ecg` knows, or its samples."""

    data: str | None = Field(None, description="content of one file, as base64")
    format: Name | None = Field(
        None, description="what the name of the file ends in, such as xml; the content tells the format"
    )
    samples: list[list[float | None]] | None = Field(
        None, max_length=MAX_LEADS, description="[leads][samples]; null where a sample is missing"
    )
    sampling_rate: float | None = Field(None, description="in hertz; of a file that does not say it, and of samples")
    unit: Text | None = Field(None, description="mV, uV or V; of samples without it mV")
    lead_names: list[Text] | None = Field(
        None, max_length=MAX_LEADS, description="of the rows; of twelve without them the standard leads"
    )
    start: float | None = Field(None, description="second at which the part begins that is read of a longer record")

    @model_validator(mode="after")
    def _one_of_both(self) -> "ECG":
        if (self.data is None) == (self.samples is None):
            raise ValueError("an ECG has either data, the content of a file as base64, or samples")
        if self.format is not None and self.samples is not None:
            raise ValueError("format is of data; samples have none")
        return self


class ECGPart(_Given):
    """An ECG of a message."""

    type: Literal["ecg"]
    ecg: ECG


class ImageURL(_Given):
    """A picture, in the URL itself: nothing is fetched."""

    url: str = Field(description="data:image/png;base64,... (or jpeg, webp)")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Given):
    """A picture of an ECG, for models that read drawings."""

    type: Literal["image_url"]
    image_url: ImageURL


class _Message(_Given):
    name: None = None


class SystemMessage(_Message):
    """Instructions, in place of those that the model was trained with."""

    role: Literal["system", "developer"]
    content: Text | list[TextPart]


class UserMessage(_Message):
    """A question, with the ECGs that it is about."""

    role: Literal["user"]
    content: Text | list[Annotated[TextPart | ECGPart | ImagePart, Field(discriminator="type")]]


class AssistantMessage(_Message):
    """An answer of an earlier turn; what OpenAI's may hold beside its text has to be empty."""

    role: Literal["assistant"]
    content: Text | list[TextPart]
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning_content: None = None


class StreamOptions(_Given):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(_Given):
    """The only format of answers."""

    type: Literal["text"]


class ChatRequest(_Given):
    """A chat, whose next message is asked for."""

    model: str
    messages: list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]] = Field(
        min_length=1
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="without it 0: the likeliest words")
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: (
        Annotated[Text, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=4)]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # would change the answer: only what changes nothing
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    # change nothing
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class Logprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class PlaceLogprobs(Logprob):
    """A token that was written, and the likeliest in its place."""

    top_logprobs: list[Logprob]


class Logprobs(BaseModel):
    """Of the tokens of an answer."""

    content: list[PlaceLogprobs]


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """One of the answers to a request."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class CachedTokens(BaseModel):
    """Of a prompt."""

    cached_tokens: int


class Usage(BaseModel):
    """How many tokens were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatCompletion(BaseModel):
    """The answers to a request; `notices` are sentences about its ECGs, as `elm predict` writes them."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    notices: list[str]


class Model(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "elm_ecg"


class Models(BaseModel):
    """All that can be asked."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether the server answers: `ok`, `ending` after SIGTERM, or `down` while an engine is."""

    status: Literal["ok", "ending", "down"]


class ErrorDetail(BaseModel):
    """What is wrong: for people, and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error, as OpenAI's clients read it."""

    error: ErrorDetail


def as_logprobs(pieces: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> Logprobs:
    """Log-probabilities in OpenAI's form."""
    return Logprobs(
        content=[
            PlaceLogprobs(
                **_logprob(one.text, one.logprob), top_logprobs=[Logprob(**_logprob(*other)) for other in one.top]
            )
            for one in pieces
        ]
    )


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    # of a part of a letter nobody knows the bytes
    content = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": logprob if math.isfinite(logprob) else LOWEST_LOGPROB, "bytes": content}


class Collected:
    """The pieces of all answers to a request, put together.

    Args:
        num_prompt_tokens: of the request.
        n: answers.
    """

    def __init__(self, num_prompt_tokens: int, n: int, with_logprobs: bool) -> None:
        self.num_prompt_tokens, self.with_logprobs = num_prompt_tokens, with_logprobs
        self.num_tokens = self.num_cached = 0
        self.texts = [""] * n
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(n)]
        self._reasons: list[Any] = [None] * n

    def add(self, piece: Piece) -> None:
        """Adds a piece."""
        self.num_tokens += piece.num_tokens
        self.num_cached += piece.num_cached
        self.texts[piece.choice] += piece.text
        self._logprobs[piece.choice] += piece.logprobs
        self._reasons[piece.choice] = piece.finish_reason

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_tokens,
            total_tokens=self.num_prompt_tokens + self.num_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=self.num_cached),
        )

    @property
    def choices(self) -> list[Choice]:
        """The answers, once all have ended."""
        return [
            Choice(
                index=index,
                message=AnswerMessage(content=text),
                logprobs=as_logprobs(logprobs) if self.with_logprobs else None,
                finish_reason=reason,
            )
            for index, (text, logprobs, reason) in enumerate(
                zip(self.texts, self._logprobs, self._reasons, strict=True)
            )
        ]
