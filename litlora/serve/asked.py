"""Requests in OpenAI's form, checked field by field. Torch-free but for what it makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from litlora.data.conversation import Conversation, Place
from litlora.data.records.fields import read_record
from litlora.data.records.messages import read_messages
from litlora.data.records.tools import read_tools
from litlora.errors import UserError
from litlora.serve.sampling import Sampling

IDLE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""
OF_MESSAGES = {"refusal", "annotations", "audio"}
"""What OpenAI's answers have, and come back with as messages; nothing is lost without it."""
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 16, 16, 20


class Wrong(UserError):
    """A request that cannot be answered, and the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Asked:
    """What a client asks for."""

    model: str
    sampling: Sampling
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    """Whether a stream ends with the usage."""
    strength: float = 1.0
    """Of the adapter."""
    conversation: Conversation | None = None
    """Of a chat."""
    prompts: list[str | list[int]] = field(default_factory=list)
    """Of plain completions: texts, or token ids."""
    schema: dict[str, Any] | None = None
    """The JSON schema that the answer must follow."""


class Fields:
    """The fields of a request's body."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Wrong(f"the body must be a JSON object, not {type(body).__name__}")
        # null stands for a field's default.
        self.left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """A field, which must be of one of these types."""
        value = self.left.pop(name, default)
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if value is default or (fits and (bool in kinds or not isinstance(value, bool))):
            return value
        names = " or ".join(kind.__name__ for kind in kinds)
        raise Wrong(f"{name} must be {names}, not {type(value).__name__}", name)

    def only(self, name: str, allowed: Any) -> None:
        """A field that may have no other value than these."""
        if self.left.pop(name, allowed[0]) not in allowed:
            raise Wrong(f"{name} can be {' or '.join(map(repr, allowed))} only", name)

    def done(self) -> None:
        """Raises Wrong for a field that was not read."""
        for name in IDLE:
            self.left.pop(name, None)
        if self.left:
            name = next(iter(self.left))
            raise Wrong(f"{name}: this field is not known here; leave it out", name)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    defaults: Sampling
    """Of what it leaves out."""
    max_answer_tokens: int


def read_chat(body: Any, limits: Limits) -> Asked:
    """The body of /v1/chat/completions. Raises UserError."""
    fields = Fields(body)
    asked = _common(fields, limits, longest=("max_completion_tokens", "max_tokens"))
    wants = fields.take("logprobs", bool, False)
    top = fields.take("top_logprobs", int, 0)
    if top and not wants:
        raise Wrong("top_logprobs needs logprobs true", "top_logprobs")
    asked = _with_logprobs(asked, top if wants else None, "top_logprobs")
    schema = _schema(fields)
    fields.only("parallel_tool_calls", (True, None))
    choice = fields.left.get("tool_choice", "auto")
    fields.only("tool_choice", ("auto", "none"))
    given = {name: fields.left.pop(name) for name in ("messages", "tools") if name in fields.left}
    fields.done()
    if choice == "none":
        given.pop("tools", None)
    if schema is not None and "tools" in given:
        raise Wrong(
            "response_format leaves no room for calls of tools; ask with one of them", "response_format"
        )
    return replace(asked, conversation=_conversation(given), schema=schema)


def _schema(fields: Fields) -> dict[str, Any] | None:
    """The JSON schema of a response_format; None for text."""
    form = Fields(fields.take("response_format", dict, {}))
    kind = form.take("type", str, "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise Wrong(
            f"response_format.type {kind}: must be text, json_object or json_schema", "response_format"
        )
    found = {"type": "object"} if kind == "json_object" else None
    if kind == "json_schema":
        named = Fields(form.take("json_schema", dict, {}))
        found = named.take("schema", dict)
        if found is None:
            raise Wrong("response_format.json_schema has no schema", "response_format")
        for name in ("name", "description", "strict"):  # every schema is followed strictly
            named.left.pop(name, None)
        named.done()
    form.done()
    return found


def _conversation(given: Mapping[str, Any]) -> Conversation:
    if "messages" not in given:
        raise Wrong("messages is missing", "messages")
    place = Place("the request", "its messages")
    record = read_record(given, place, {}, (), ("messages",))
    messages = read_messages(given["messages"], "messages", record)
    conversation = Conversation(tuple(messages), place, read_tools(record))
    unknown = [name for name in record.unused if name.rpartition(".")[2] not in OF_MESSAGES]
    if unknown:
        raise Wrong(f"{unknown[0]}: this field is not known here; leave it out", "messages")
    return conversation


def read_completion(body: Any, limits: Limits) -> Asked:
    """The body of /v1/completions. Raises UserError."""
    fields = Fields(body)
    asked = _common(fields, limits, longest=("max_tokens",))
    asked = _with_logprobs(asked, fields.take("logprobs", int), "logprobs")
    fields.only("echo", (False, None))
    fields.only("best_of", (1, None, asked.n))
    fields.only("suffix", ("", None))
    prompt = fields.take("prompt", (str, list))
    fields.done()
    if prompt is None:
        raise Wrong("prompt is missing", "prompt")
    prompts = [prompt] if isinstance(prompt, str) or (prompt and _is_ids(prompt)) else prompt
    if not prompts or not all(isinstance(one, str) or _is_ids(one) for one in prompts):
        raise Wrong("prompt must be a text, a list of token ids, or a list of these", "prompt")
    if len(prompts) * asked.n > MOST_CHOICES:
        raise Wrong(f"prompt and n ask for more than {MOST_CHOICES} answers", "prompt")
    return replace(asked, prompts=prompts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


def _common(fields: Fields, limits: Limits, longest: tuple[str, ...]) -> Asked:
    """What both kinds of requests have."""
    model = fields.take("model", str)
    if model is None:
        raise Wrong("model is missing", "model")
    defaults = limits.defaults
    given = {name: fields.take(name, int) for name in longest}
    max_new_tokens = next((value for value in given.values() if value is not None), defaults.max_new_tokens)
    if max_new_tokens > limits.max_answer_tokens:
        name = next((name for name, value in given.items() if value is not None), longest[0])
        raise Wrong(f"{name} {max_new_tokens}: can be at most {limits.max_answer_tokens}", name)
    fields.only("logit_bias", ({}, None))
    changes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": _stops(fields)}
    kinds = {"top_k": int, "seed": int}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"):
        changes[name] = fields.take(name, kinds.get(name, float), getattr(defaults, name))
    for name in ("frequency_penalty", "seed"):
        changes[name] = fields.take(name, kinds.get(name, float), getattr(defaults, name))
    n = fields.take("n", int, 1)
    if not 1 <= n <= MOST_CHOICES:
        raise Wrong(f"n {n}: must be from 1 to {MOST_CHOICES}", "n")
    options = Fields(fields.take("stream_options", dict, {}))
    include_usage = options.take("include_usage", bool, False)
    options.left.pop("include_obfuscation", None)
    options.done()
    stream, strength = fields.take("stream", bool, False), fields.take("strength", float, 1.0)
    if not -10 <= strength <= 10:
        raise Wrong(f"strength {strength}: must be from -10 to 10", "strength")
    return Asked(model, replace(defaults, **changes), n, stream, include_usage, float(strength))


def _stops(fields: Fields) -> tuple[str, ...]:
    stop = fields.take("stop", (str, list), [])
    stops = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(one, str) and one for one in stops):
        raise Wrong("stop must be a text or a list of texts, none of them empty", "stop")
    if len(stops) > MOST_STOPS:
        raise Wrong(f"stop has {len(stops)} texts; it can have {MOST_STOPS}", "stop")
    return tuple(stops)


def _with_logprobs(asked: Asked, count: int | None, name: str) -> Asked:
    if count is not None and not 0 <= count <= MOST_LOGPROBS:
        raise Wrong(f"{name} {count}: must be from 0 to {MOST_LOGPROBS}", name)
    return replace(asked, sampling=replace(asked.sampling, logprobs=count))
