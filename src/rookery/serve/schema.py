"""What clients send, checked: OpenAI's requests with this engine's extras, and errors in OpenAI's shape.

Fields that OpenAI knows and this server has no use for are accepted and ignored; wrong values of known ones are not.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=4_000_000)]


class ApiError(Exception):
    """An answer of 4xx or 5xx with a text that says what to do."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Sampled(BaseModel):
    """How text goes on, for every route that writes some."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=5)] = 1.0
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Probability = 0.0
    typical_p: Probability = 1.0
    presence_penalty: Annotated[float, Field(ge=-10, le=10)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-10, le=10)] = 0.0
    penalty_decay: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool = False
    state: str | None = None
    """A kept state to go on from (`POST /v1/states`)."""
    keep_state: bool = False
    """Whether the state after the answer is kept; its id comes with the answer."""
    watch: bool = False
    """Whether a stream also tells, up to ten times a second, where it is and the norms of the first text's state."""

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> list[str]:
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if len(stops) > 16 or any(not text or len(text) > 1000 for text in stops):
            raise ValueError("stop takes up to 16 strings of 1 to 1000 characters")
        return stops

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Session.stream`, but for the seed."""
        names = ("temperature", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty")
        found = {name: getattr(self, name) for name in names}
        found |= {name: value for name in ("top_p", "penalty_decay") if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            try:
                # OpenAI's −100 means never
                found["logit_bias"] = {int(k): -float("inf") if v <= -100 else v for k, v in self.logit_bias.items()}
            except ValueError:
                raise ApiError(400, "logit_bias takes token ids as keys", param="logit_bias") from None
        return found


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """The schema of an answer."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: str = "answer"
    described: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class Completion(Sampled):
    """POST /v1/completions"""

    prompt: Text | list[Text] | list[int] | list[list[int]] = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None


class ContentPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "input_text", "output_text"]
    text: Text


class ToolCallFunction(BaseModel):
    """Which function is called with what."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """One call that the assistant made."""

    model_config = ConfigDict(extra="ignore")

    id: str = ""
    function: ToolCallFunction


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None

    def turn(self) -> dict[str, str]:
        """Role and text as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        if self.tool_calls:
            calls = [f'{{"name": "{c.function.name}", "arguments": {c.function.arguments}}}' for c in self.tool_calls]
            text = "\n".join([*([text] if text else []), "```json", *calls, "```"])
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Function(BaseModel):
    """A function that may be called."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object"})


class Tool(BaseModel):
    """A tool; only functions are known."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    """The one function that must be called."""

    name: str


class NamedTool(BaseModel):
    """The one tool that must be used."""

    type: Literal["function"] = "function"
    function: NamedFunction


class Chat(Sampled):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    reasoning_effort: str | None = None
    """One of the template's ways to think."""


class Embeddings(BaseModel):
    """POST /v1/embeddings"""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    input: Text | Annotated[list[Text] | list[int] | list[list[int]], Field(min_length=1, max_length=100_000)]
    encoding_format: Literal["float", "base64"] = "float"


class TextFormat(BaseModel):
    """The form of an answer as responses say it."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    described: dict[str, Any] | None = Field(default=None, alias="schema")

    def response_format(self) -> ResponseFormat:
        """The same as chats say it."""
        schema = None if self.described is None else JsonSchema(described=self.described)
        return ResponseFormat(type=self.type, json_schema=schema)


class TextOptions(BaseModel):
    """What is wanted of the text."""

    model_config = ConfigDict(extra="ignore")

    format: TextFormat = TextFormat()


class Responses(Sampled):
    """POST /v1/responses"""

    input: Text | Annotated[list[Message], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    previous_response_id: str | None = None
    store: bool = True
    text: TextOptions = TextOptions()
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    """None yet: functions are called through /v1/chat/completions."""


class NewState(BaseModel):
    """POST /v1/states"""

    model: str | None = None
    prompt: Text | list[int]
    state: str | None = None


class Rewind(BaseModel):
    """POST /v1/states/{id}/rewind"""

    tokens_seen: Annotated[int, Field(ge=0)]
