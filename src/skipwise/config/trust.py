"""Whose word counts: what this user has written or typed, and what looks like a secret.

A file of a run folder can come from anybody. `seal` signs what this user wrote with a key in the
user's own state folder (HMAC-SHA256), and `is_sealed` tells whether the key of this user made it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipwise.errors import SkipwiseError

_MAX_TEXT = 4096  # characters of a value
_NO_TEXT = re.compile("[\\0\ud800-\udfff]")
_SECRET_KEY = re.compile(
    r"(^|[_-])(token|secret|password|passwd|passphrase|credentials?|(api|access|private|auth)_?key)$",
    re.IGNORECASE,
)
_SECRET = re.compile(
    r"\b(hf_|gh[opsu]_)[A-Za-z0-9]{30,}|\b(github_pat_|glpat-|xox[abp]-)[\w-]{20,}"
    r"|\bsk-(?:[a-z]+-)*[A-Za-z0-9_]{24,}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?<=://)(?!git@)[^/\s@]+(?=@)"  # user and password in a URL
    r"|(?<=[?&])[\w-]*(?:token|key|secret|password|signature)=[^&\s]+",
    re.IGNORECASE,
)


def seal(content: Any) -> str:
    """The signature of a JSON value by this user's key, which is made at first use."""
    text = json.dumps(content, sort_keys=True).encode()
    return hmac.new(_key(), text, hashlib.sha256).hexdigest()


def is_sealed(content: Any, signature: Any) -> bool:
    """Whether `seal` of this user made the signature."""
    return isinstance(signature, str) and hmac.compare_digest(seal(content), signature)


def consent_to_code(model: str, revision: str | None) -> str:
    """The record that this user typed load.trust_remote_code=true for a model."""
    return seal(_code_of(model, revision))


def has_consent(record: Any, model: str, revision: str | None) -> bool:
    """Whether this user made the record of `consent_to_code` for that model."""
    return is_sealed(_code_of(model, revision), record)


def secret_in(value: Any, key: str = "") -> str:
    """What a value seems to hold that must stay out of files; empty if nothing."""
    if value and not isinstance(value, bool | int | float) and _SECRET_KEY.search(key):
        return "a secret"
    return "a token, key or password" if isinstance(value, str) and _SECRET.search(value) else ""


def without_secrets(text: str) -> str:
    """The text with *** for each token, password in a URL, or value of a key for secrets."""
    return _SECRET.sub("***", text)


def _code_of(model: str, revision: str | None) -> list[Any]:
    folder = Path(model).expanduser()
    return ["remote code", str(folder.resolve()) if folder.is_dir() else model, revision]


def _key() -> bytes:
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise SkipwiseError("no home folder: set XDG_STATE_HOME to a folder of yours") from error
    file = Path(state) / "skipwise" / "key"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = file.with_name(f"key.{os.getpid()}.part")
        if not file.exists():
            with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as opened:
                opened.write(secrets.token_bytes(32))
            with suppress(FileExistsError):  # the first of several processes wins
                os.link(part, file)
            part.unlink()
        key = file.read_bytes()
    except OSError as error:
        raise SkipwiseError(
            f"{file} cannot be written: {error.strerror}\nset XDG_STATE_HOME to a folder of yours"
        ) from error
    if len(key) != 32:
        raise SkipwiseError(f"{file} is damaged\nremove it; it is made again")
    return key


def checked(value: Any, where: str) -> Any:
    """The value, if it has no secret, no number that is not finite, and text of a usual length."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not key.isprintable() or len(key) > 100:
                raise SkipwiseError(f"{where} has the key {shown(key)}: give a name")
            checked(item, f"{where}.{key}")
            if why := secret_in(item, key):
                raise SkipwiseError(_secret(f"{where}.{key}", why))
    elif isinstance(value, list | tuple):
        for item in value:
            checked(item, where)
    elif isinstance(value, str):
        if len(value) > _MAX_TEXT or _NO_TEXT.search(value):
            raise SkipwiseError(
                f"{where} is {shown(value)}: give Unicode text of at most {_MAX_TEXT:,} characters"
            )
        if why := secret_in(value):
            raise SkipwiseError(_secret(where, why))
    elif isinstance(value, int | float) and not abs(value) < 2**63:
        raise SkipwiseError(f"{where} is {shown(value)}: give a finite number")
    elif value is not None and not isinstance(value, bool | int | float):
        raise SkipwiseError(f"{where} is {shown(value)}: give text or a number")
    return value


def _secret(where: str, why: str) -> str:
    return (
        f"{where} holds {why}, and a recipe is kept in clear and published\n"
        "leave it out, and set it in the environment or by the login command of the service"
    )


def shown(value: Any) -> str:
    """A value in an error message: one line, cut off."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**60 else "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."
