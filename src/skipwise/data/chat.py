"""Conversations: their token ids, labels and turn markers. chat_records.py reads them.

The tokenizer's chat template writes a conversation. Labels are on the assistant's turns, each with
the token that ends it. A template with a `{% generation %}` block marks them itself. For any other
template, turn i begins where the rendering of the turns before it ends, and stops where the
rendering with it ends. Both are compared with the full text. Where a template writes an earlier
turn differently from the last one (Qwen 3 removes its reasoning), a stand-in for the content shows
where the turn begins and ends.

A skip must not cut a turn marker, such as `<|im_start|>assistant` or `<|im_end|>`: a chunk may
start with a turn or inside its content.

Shapes:  L_x = tokens of the conversation
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipwise.data.chat_records import Conversation, ConversationError
from skipwise.errors import SkipwiseError

_STAND_IN = "\ue010\ue011\ue010"  # private characters, which no text holds


class ChatTokens(np.ndarray):
    """(L_x,) token ids, with `masked` and `in_marker` (L_x,) bool. Slices and copies keep both.

    Labels of masked tokens are -100. No chunk may start with a token that is inside a turn marker.
    """

    masked: np.ndarray
    in_marker: np.ndarray

    def __getitem__(self, key: Any) -> Any:
        out = super().__getitem__(key)
        if isinstance(out, ChatTokens):
            out.masked, out.in_marker = self.masked[key], self.in_marker[key]
        return out

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, ChatTokens) and hasattr(source, "masked"):
            self.masked, self.in_marker = source.masked, source.in_marker


def chat_tokens(tokens: Any, masked: np.ndarray, in_marker: np.ndarray) -> ChatTokens:
    out = np.asarray(tokens).view(ChatTokens)
    out.masked, out.in_marker = masked, in_marker
    return out


@dataclass(frozen=True, kw_only=True)
class ChatSpans:
    """Which tokens of a token store are masked, and which are in turn markers.

    Each array holds the begin and the end of every span in turn, in ascending order.
    """

    masked: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    markers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_conversations: int = 0
    num_tokens: int = 0  # of the conversations

    def __bool__(self) -> bool:
        return self.num_conversations > 0

    @property
    def num_labels(self) -> int:
        """Tokens of the assistant's turns."""
        return self.num_tokens - int((self.masked[1::2] - self.masked[::2]).sum())

    def attach(self, tokens: np.ndarray, indices: np.ndarray) -> ChatTokens:
        """The tokens at these indices of the store, with what is known about them."""
        spans = (self.masked, self.markers)
        return chat_tokens(tokens, *(np.searchsorted(x, indices, "right") % 2 == 1 for x in spans))


Spans = tuple[np.ndarray, np.ndarray]  # of one document: masked, markers


def spans_of(tokens: np.ndarray) -> Spans | None:
    """The spans of a conversation; None for text."""
    if not isinstance(tokens, ChatTokens):
        return None
    padded = (np.concatenate([[False], x, [False]]) for x in (tokens.masked, tokens.in_marker))
    masked, markers = (np.flatnonzero(x[1:] != x[:-1]).astype(np.int64) for x in padded)
    return masked, markers


def spans_in_store(spans: Sequence[Spans | None], lengths: np.ndarray, start: int) -> ChatSpans:
    """The spans of documents that follow each other from token `start` of a store."""
    begins = start + np.cumsum(lengths) - lengths
    chats = [(x, begin) for x, begin in zip(spans, begins, strict=True) if x is not None]
    none = np.zeros(0, np.int64)
    return ChatSpans(
        masked=np.concatenate([none, *(x[0] + begin for x, begin in chats)]),
        markers=np.concatenate([none, *(x[1] + begin for x, begin in chats)]),
        num_conversations=len(chats),
        num_tokens=int(lengths[[x is not None for x in spans]].sum()),
    )


def encode_conversation(tokenizer: Any, conversation: Conversation) -> ChatTokens:
    """The tokens of `apply_chat_template`, with labels on the assistant's turns.

    Raises:
        ConversationError: the template refuses it, or its assistant turns cannot be found.
        SkipwiseError: no chat template, or a tokenizer without offsets.
    """
    check_template(tokenizer, str(conversation.place or "a record"))
    rendered = _Rendered(tokenizer, conversation)
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    batch = tokenizer(rendered.text, padding=False, **options)
    starts, ends = np.array(batch["offset_mapping"], np.int64).reshape(-1, 2).T
    turns = [rendered.find(i) for i in range(len(conversation.messages))]
    masked = np.ones(len(starts), bool)
    generated = rendered.marked_by_template()
    if generated is not None:
        masked = generated == 0
    for i, turn in enumerate(turns):
        given = i < conversation.num_given
        if conversation.messages[i]["role"] != "assistant" or (generated is not None and not given):
            continue
        if isinstance(turn, str):
            raise ConversationError(f"turn {i + 1}: {turn}")
        if given:  # part of a prompt
            masked[starts < turn.end] = True
            continue
        masked[(starts >= turn.start) & (starts < turn.end)] = False
        for k in np.flatnonzero((starts < turn.start) & (ends > turn.start)):
            masked[k] = not rendered.text[starts[k] : turn.start].isspace()  # "_answer" is kept
    if masked.all():
        raise ConversationError("the chat template leaves no token of the assistant's turns")
    ids = np.asarray(batch["input_ids"], np.uint32)
    return chat_tokens(ids, masked, _in_marker(turns, starts))


def check_template(tokenizer: Any, where: str) -> None:
    """Raise a SkipwiseError where the tokenizer cannot write conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise SkipwiseError(
            f"{where}: the tokenizer has no chat template to write a conversation with\n"
            "put the chat_template.jinja of the instruct model into the model's folder, or give "
            "text: data.text_field=NAME, eval.chat_template=false"
        )
    if not tokenizer.is_fast:
        raise SkipwiseError(
            f"{where}: {type(tokenizer).__name__} does not report which characters each token of a "
            "conversation covers\nuse a model folder with a tokenizer.json"
        )


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """Character indices in the full text; None where unknown."""

    begin: int | None  # of its marker
    start: int  # of its content; of the assistant: of what the model generates
    content_end: int | None
    end: int  # of an assistant's turn: behind the token that ends it


class _Rendered:
    """A conversation as its template writes it, and the turns in that text."""

    def __init__(self, tokenizer: Any, conversation: Conversation) -> None:
        self.tokenizer, self.options = tokenizer, conversation.options
        self.messages, self.refusal = conversation.messages, ""
        self.added = list(tokenizer.get_added_vocab())
        self.prefixes: dict[tuple[int, bool], str] = {}
        self.text = self.render(self.messages)
        if not self.text:
            raise ConversationError(f"the chat template refuses it: {self.refusal or 'no text'}")
        calls = [c for m in self.messages for c in m.get("tool_calls") or ()]
        for what, given in (("tools", self.options.get("tools") or ()), ("tool calls", calls)):
            found = [one.get("function") or one for one in given if isinstance(one, dict)]
            if not all(str(one.get("name")) in self.text for one in found):
                raise ConversationError(f"the chat template does not write its {what}")

    def render(self, turns: list[dict[str, Any]], generation: bool = False) -> str:
        """The text of these turns; "" where the template raises an error."""
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation, **self.options
            )
        except Exception as error:  # of many types
            self.refusal = (str(error).splitlines() or [type(error).__name__])[0]
            return ""

    def marked_by_template(self) -> np.ndarray | None:
        """(L_x,) ones where the template's `{% generation %}` block has written the text."""
        template = self.tokenizer.get_chat_template(None, self.options.get("tools"))
        if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template):
            return None
        options = {"return_dict": True, "return_assistant_tokens_mask": True, **self.options}
        encoded = self.tokenizer.apply_chat_template(self.messages, **options)
        return np.array(encoded["assistant_masks"])

    def find(self, i: int) -> _Turn | str:
        """Where turn i is in the text, or why it cannot be found."""
        message, before = self.messages[i], self._first(i)
        begin = len(before) if self.text.startswith(before) and (before or not i) else None
        if message["role"] != "assistant":
            head, _ = self._around(i, alone=True)
            if not head or not self.text.startswith(head):
                return "its content is not found"
            start = end = len(head)
        else:
            start, end = self._answer_start(i, before), self._answer_end(i)
            if start is None or end is None or end < start:
                where = "the turns before it" if start is None else "it"
                return f"the template writes {where} differently when other turns follow"
            written = self.text[start:end].rstrip()
            if self._last_token_end(written) == len(written):
                end = start + len(written)  # the template, not the model, writes the line break
        content = (message.get("content") or "").strip()
        at = self.text.find(content, start) if content else -1
        content_end = at + len(content) if at >= 0 else None
        return _Turn(begin=begin, start=start, content_end=content_end, end=end)

    def _first(self, num: int, generation: bool = False) -> str:
        """The text of the first turns."""
        key = num, generation
        if key not in self.prefixes:
            self.prefixes[key] = self.render(self.messages[:num], generation) if num else ""
        return self.prefixes[key]

    def _around(self, i: int, alone: bool) -> tuple[str, str]:
        """What is before and behind the content of turn i, with or without the later turns."""
        turns = [*self.messages[:i], {**self.messages[i], "content": _STAND_IN}]
        text = self.render(turns if alone else turns + self.messages[i + 1 :])
        head, found, tail = text.partition(_STAND_IN)
        return (head, tail) if found else ("", "")

    def _answer_start(self, i: int, before: str) -> int | None:
        """Where the model starts to generate turn i: behind the generation prompt."""
        prompt = self._first(i, generation=True)
        start = len(prompt) if prompt and self.text.startswith(prompt) else None
        if start is not None and prompt != before:
            return start
        # Without a generation prompt, the marker is what the template writes before the content.
        head, _ = self._around(i, alone=False)
        if not head or not self.text.startswith(head):
            return start
        return len(head) if start is None or self.text[start : len(head)].strip() else start

    def _answer_end(self, i: int) -> int | None:
        """The end of turn i, with the token that ends it."""
        through = self._first(i + 1)
        if through and self.text.startswith(through):
            return len(through)
        closing, tail = self._around(i, alone=True)[1], self._around(i, alone=False)[1]
        pairs = zip(closing, tail, strict=False)
        same = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        kept = closing if same == closing else same[: self._last_token_end(same)]
        return len(self.text) - len(tail) + len(kept) if kept and self.text.endswith(tail) else None

    def _last_token_end(self, text: str) -> int:
        """The end of the last added token in a text, such as `<|im_end|>`; 0 if there is none."""
        found = ((text.rfind(token), len(token)) for token in self.added)
        return max((at + size for at, size in found if at >= 0), default=0)


def _in_marker(turns: list[_Turn | str], starts: np.ndarray) -> np.ndarray:
    """(L_x,) bool: a chunk that started with this token would cut a turn marker."""
    out = np.zeros(len(starts), bool)
    content_end: int | None = None
    for turn in turns:
        if isinstance(turn, str):
            content_end = None
            continue
        begin = turn.start if turn.begin is None else turn.begin
        if content_end is not None:  # the end of the turn before
            out |= (starts >= content_end) & (starts < begin)
        out |= (starts > begin) & (starts < turn.start)
        content_end = turn.content_end
    if content_end is not None:
        out |= starts >= content_end
    out[:1] = False
    return out
