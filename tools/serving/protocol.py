"""The OpenAI shapes: what a request may say, and how answers and errors look.

Nothing that changes an answer is ignored in silence: a field we do not implement is refused with its name, unless its
value asks for what happens anyway.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_STOPS = 4
GREEDY_BELOW = 1e-4
ROLES = ("system", "developer", "user", "assistant", "tool")
READ = {
    "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed",
}  # fmt: skip
READ_BY_CHAT = READ | {"messages", "tools"}
READ_BY_COMPLETIONS = READ | {"prompt"}
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
ONLY_AS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}


MAX_BODY_BYTES = 64 << 20
"""Of a request to an engine; the gateway allows less."""


class RequestError(Exception):
    """A request that cannot be answered as asked: HTTP status and the OpenAI error object's fields."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the largest score is taken as it is."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say: the model's own generation configuration."""

    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """What chat and completion requests have in common, checked."""

    stream: bool
    include_usage: bool
    max_new_tokens: int | None
    """None: as many as the server allows."""
    sampling: Sampling
    stops: tuple[str, ...]


@dataclass(frozen=True)
class ChatRequest(GenerationRequest):
    """A checked request to /v1/chat/completions."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


@dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
    """A checked request to /v1/completions: a text, or its token ids."""

    prompt: str | list[int]


def parse_object(body: bytes) -> dict[str, Any]:
    """The fields of a body that is a JSON object; RequestError 400 when it is not."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(400, "the body is not a JSON object")
    # `null` means the default throughout, as clients send it for what their user left out.
    return {name: value for name, value in fields.items() if value is not None}


def check_model(fields: Mapping[str, Any], model: str) -> None:
    """RequestError 404 when another model is asked for."""
    if fields.get("model", model) != model:
        message = f"there is no model {str(fields['model'])[:100]!r} here; this server has '{model}'"
        raise RequestError(404, message, param="model", code="model_not_found")


def parse_chat_request(body: bytes, model: str, defaults: Defaults) -> ChatRequest:
    """Check a request to /v1/chat/completions; RequestError (400, or 404 for another model) names the bad field."""
    fields = parse_object(body)
    _refuse_unsupported(fields, READ_BY_CHAT)
    check_model(fields, model)
    tools = fields.get("tools")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise RequestError(400, "tools is not a list of objects", param="tools")
    return ChatRequest(
        **_generation(fields, defaults),
        messages=_messages(fields.get("messages")),
        tools=tools if tools and fields.get("tool_choice") != "none" else None,
    )


def parse_completion_request(body: bytes, model: str, defaults: Defaults) -> CompletionRequest:
    """Check a request to /v1/completions; RequestError as for a chat. One prompt a request."""
    fields = parse_object(body)
    _refuse_unsupported(fields, READ_BY_COMPLETIONS)
    check_model(fields, model)
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    tokens = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
    if not prompt or not (isinstance(prompt, str) or tokens):
        raise RequestError(400, "prompt is neither one text nor the token ids of one", param="prompt")
    return CompletionRequest(**_generation(fields, defaults), prompt=prompt)


def _generation(fields: Mapping[str, Any], defaults: Defaults) -> dict[str, Any]:
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(400, "stream_options is not an object", param="stream_options")
    return {
        "stream": _boolean(fields, "stream"),
        "include_usage": _boolean(options, "include_usage"),
        "max_new_tokens": max_new_tokens(fields),
        "sampling": _sampling(fields, defaults),
        "stops": _stops(fields.get("stop", [])),
    }


def _refuse_unsupported(fields: Mapping[str, Any], read: set[str]) -> None:
    for name, value in fields.items():
        if name in read or name in WITHOUT_EFFECT:
            continue
        if name not in ONLY_AS:
            raise RequestError(400, f"{name[:100]!r} is not a field this server knows", param=name[:100])
        if value not in ONLY_AS[name]:
            possible = " or ".join(json.dumps(allowed) for allowed in ONLY_AS[name])
            raise RequestError(400, f"{name} is not supported by this engine; only {possible}", param=name)


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages is not a list with at least one message", param="messages")
    checked = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(400, f"{place} has no role out of {', '.join(ROLES)}", param=place)
        # Templates know no developer: it is the newer name of system.
        role = "system" if message["role"] == "developer" else message["role"]
        content = _content(message.get("content"), place)
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise RequestError(400, f"{place} has no content", param=place)
        calls = {"tool_calls": _tool_calls(message["tool_calls"], place)} if message.get("tool_calls") else {}
        checked.append({**message, "role": role, "content": content if content is not None else "", **calls})
    return checked


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Earlier tool calls with their arguments as an object: clients send JSON text, templates write JSON themselves."""
    problem = RequestError(400, f"{place}.tool_calls is not a list of function calls", param=place)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise problem
    checked = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise problem
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                message = f"{place}.tool_calls: the arguments of {function['name']} are not JSON"
                raise RequestError(400, message, param=place) from error
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _content(content: Any, place: str) -> str | None:
    """The text of a message's content, which is a string or a list of text parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(400, f"{place}.content is neither text nor a list of parts", param=place)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(400, f"{place}.content has a part that is not text; this model reads text", param=place)
        texts.append(part["text"])
    return "".join(texts)


def max_new_tokens(fields: Mapping[str, Any]) -> int | None:
    """`max_completion_tokens` and its older name `max_tokens`; where both are given the smaller one holds."""
    given = []
    for name in ("max_tokens", "max_completion_tokens"):
        if name in fields:
            value = fields[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(400, f"{name} is not a whole number of at least 1", param=name)
            given.append(value)
    return min(given, default=None)


def _sampling(fields: Mapping[str, Any], defaults: Defaults) -> Sampling:
    temperature = _number(fields, "temperature", defaults.temperature, low=0, high=2)
    top_p = _number(fields, "top_p", defaults.top_p, low=0, high=1)
    seed = fields.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise RequestError(400, "seed is not a whole number", param="seed")
    return Sampling(temperature, top_p, secrets.randbits(63) if seed is None else seed)


def _number(fields: Mapping[str, Any], name: str, default: float, *, low: float, high: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(400, f"{name} is not a number", param=name)
    if not low <= value <= high:  # also what is not a finite number
        raise RequestError(400, f"{name} is {value}, not between {low} and {high}", param=name)
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(400, f"{name} is neither true nor false", param=name)
    return value


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise RequestError(400, "stop is neither a text nor a list of texts", param="stop")
    if len(stops) > MAX_STOPS:
        raise RequestError(400, f"stop has more than {MAX_STOPS} texts", param="stop")
    return tuple(stops)


@dataclass(frozen=True)
class Answer:
    """Identity and shape of one answer, repeated in all of its chunks."""

    model: str
    id: str
    created: int
    chat: bool

    @staticmethod
    def new(model: str, *, chat: bool) -> Answer:
        """A fresh identity; `chat` tells /v1/chat/completions from /v1/completions."""
        return Answer(model, f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time()), chat)

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {**self._head(""), "choices": [_choice(content, finish_reason)], "usage": usage}

    def chunk(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        content = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return {**self._head(".chunk"), "choices": [_choice(content, finish_reason)]}

    def opening(self) -> dict[str, Any]:
        """The first piece of a streamed chat, which says who speaks."""
        return {**self._head(".chunk"), "choices": [_choice({"delta": {"role": "assistant", "content": ""}}, None)]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece of a streamed answer whose request asked for the usage."""
        return {**self._head(".chunk"), "choices": [], "usage": usage}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def models_list(name: str, started: int, facts: dict[str, Any]) -> dict[str, Any]:
    """The answer of /v1/models."""
    model = {"id": name, "object": "model", "created": started, "owned_by": "steadfast", **facts}
    return {"object": "list", "data": [model]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; a stop token counts as generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
