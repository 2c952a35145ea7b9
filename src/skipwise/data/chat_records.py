"""Records that hold a conversation: messages, ShareGPT, prompt and completion, instructions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_ALIASES = {  # ShareGPT and its variants
    **{name: name for name in ("system", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles of an assistant's turn
_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
)
FIELDS = {  # all that decide a conversation, for formats that are read by column
    *_LISTS,
    *(name for pair in _PAIRS for name in pair),
    *("input", "context", "system", "tools", "chat_template_kwargs"),
}


class ConversationError(Exception):
    """Why a conversation cannot be trained on."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The turns of a record, as `apply_chat_template` takes them."""

    messages: list[dict[str, Any]]
    num_given: int = 0  # first messages, a prompt, which is not trained on
    options: dict[str, Any] = field(default_factory=dict)  # of the template: tools, ...
    place: Any = None  # where it was read: a BadRecord without a reason

    @property
    def size(self) -> int:
        return sum(len(message["content"] or "") for message in self.messages)


def has_conversation(names: Iterable[str]) -> bool:
    """Whether fields of these names may make a conversation."""
    names = set(names)
    return not names.isdisjoint(_LISTS) or has_pair(names)


def has_pair(names: Iterable[str]) -> bool:
    """Whether fields of these names are a prompt and its answer."""
    names = set(names)
    return any(names.issuperset(pair) for pair in _PAIRS)


def find_conversation(record: Any) -> Conversation | str | None:
    """The conversation of a record, the reason why it cannot be used, or None without one."""
    if not isinstance(record, dict):
        return None
    given: Any = []
    turns = next((t for t in (_parsed(record.get(k)) for k in _LISTS) if isinstance(t, list)), None)
    if turns is None:
        pair = next((p for p in _PAIRS if record.get(p[0]) and record.get(p[1])), None)
        if pair is None:
            return None
        given, turns = (record[name] for name in pair)
        context = record.get("input") or record.get("context")
        if pair[0] == "instruction" and context:
            given = f"{given}\n\n{context}"
    try:
        prompt, answers = _messages(given, "user"), _messages(turns, "assistant")
        if system := record.get("system"):
            prompt = _messages(system, "system") + prompt
        options = _parsed(record.get("chat_template_kwargs")) or {}
        if not isinstance(options, dict):
            raise ConversationError("chat_template_kwargs is not an object")
        if tools := _parsed(record.get("tools")):
            if not isinstance(tools, list):
                raise ConversationError("tools is not a list, or not JSON")
            options = {**options, "tools": tools}
    except (ConversationError, TypeError, ValueError, RecursionError) as error:
        return str(error)
    if not any(message["role"] == "assistant" for message in answers):
        roles = ", ".join(dict.fromkeys(message["role"] for message in answers))
        return f"no turn of the assistant; its roles are {roles or 'none'}"
    return Conversation(messages=prompt + answers, num_given=len(prompt), options=options)


def _parsed(value: Any) -> Any:
    """A value that some data sets hold as JSON text; another text as it is."""
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ConversationError(f"a {type(value).__name__} in place of a text or a list of turns")
    return [_message(number, _without_none(turn)) for number, turn in enumerate(value, 1)]


def _message(number: int, turn: Any) -> dict[str, Any]:
    """A turn with `role` and `content`, and its other keys, such as `tool_calls`."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(role, str):
        raise ConversationError(f"turn {number} has no role")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        others = [p for p in parts if not isinstance(p, dict) or not isinstance(p.get("text"), str)]
        if others:
            kind = others[0].get("type", "unknown") if isinstance(others[0], dict) else "unknown"
            raise ConversationError(f"turn {number} has a part of type {kind}, which is not text")
        content = "".join(part["text"] for part in parts)
    if role.lower() in _CALLS:
        call = _parsed(content)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ConversationError(f"turn {number} is a call that is not JSON with a name")
        call = {"type": "function", "function": {"arguments": {}, **call}}
        turn, role, content = {"tool_calls": [call]}, "assistant", ""
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise ConversationError(f"turn {number} has no text in its content")
    try:
        (content or "").encode()
    except UnicodeEncodeError:  # it would crash the tokenizer
        raise ConversationError(f"turn {number} contains half of a surrogate pair") from None
    rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value")}
    return {"role": _ALIASES.get(role.lower(), role), "content": content, **rest}


def _without_none(value: Any) -> Any:
    """The value without keys that are None: Parquet gives every turn the keys of all turns."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
