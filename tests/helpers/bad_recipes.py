"""Recipes that are wrong, made from the recipe's own types: each key with values of all kinds."""

import dataclasses
import random
import typing
from typing import Annotated

import yaml

from skipwise.config.recipe import Range, Recipe

VALUES = [  # as YAML
    *("", "null", "~", "true", "no", "0", "-0.0", "-1", "1", "2", "0.5", "-1e-300", "1e-320"),
    *(".nan", ".inf", "-.inf", "nan", "inf", "-inf", "NaN", "1e308", "1e400", "1e10", "2e-5"),
    *("2147483647", "2147483648", "4294967296", str(2**63), str(10**30), "9" * 400, "9" * 5000),
    *("0x100", "0o17", "1_000", "1:30", "32k", "3.5k", "1e300k", "-4k", "12345678m", "k"),
    *("x", "'x\ty'", '"a\\nb"', '"\\0"', '"\\uD800"', "../../x", "/etc/passwd", "..", ".", "a/b"),
    *("[]", "[[]]", "[0]", "[-1]", "[a, [b]]", "[.nan]", "{}", "{a: 1}", "{1: 2}", "{[1]: 2}"),
    *("{path: 5}", "[{path: null}]", "[{path: [a]}]", "[{path: a, weight: .inf}]", "[{}]"),
    *("[{path: a, weight: true}]", "[{path: a, max_tokens: -1}]", "[{path: a, text_field: [b]}]"),
    *("2024-01-01", "2024-13-99", "!!binary aGk=", "!!set {a}", "!!float x", "!!int ''"),
    *("!!python/object/apply:os.system [ls]", "!!bool maybe", "!!timestamp x", "!!omap [a]", "&a"),
    *("*a", "&a [*a]", "&a {x: *a}", "[&d {sources: [*d]}]", "[" * 5000, "{a: " * 2000, "- - -"),
    *(
        "{a: .nan}",
        "{a: [.inf]}",
        "{a: 1, a: 2}",
        "'" + "y" * 5000 + "'",
        "{'" + "k" * 500 + "': 1}",
    ),
    *("[&a [1,1,1], &b [*a,*a,*a,*a], &c [*b,*b,*b,*b], &d [*c,*c,*c,*c], [*d,*d,*d,*d,*d,*d]]",),
    *("https://me:secret@host/x", "hf_" + "x" * 34, "[hf_" + "x" * 34 + "]", "{hub_token: abc}"),
]
VALID = (
    "model: m\ntarget_length: 32k\ndata:\n  sources: [a, {path: b, weight: 2}]\nlora: {rank: 8}\n"
)


def keys(cls=Recipe, prefix=""):
    """(dotted key, its annotation) of every key, LoRA's too."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inner = next((h for h in (hint, *inside(hint)) if dataclasses.is_dataclass(h)), None)
        yield f"{prefix}{name}", hint
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")


def inside(hint):
    """The types of a union."""
    return () if typing.get_origin(hint) is Annotated else typing.get_args(hint)


def edges(hint):
    """The numbers at and just beyond the ends of a range."""
    rule = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)), None)
    if rule is None:
        return []
    ends = [rule.low, rule.high, rule.low - 1, rule.high + 1]
    return [yaml.safe_dump(n).split("\n")[0] for n in (*ends, rule.low - 1e-9, rule.high + 1e-3)]


def files(number, seed=0):
    """Recipe files as bytes: a wrong value at each key in turn, then a valid file damaged."""
    rng, every = random.Random(seed), list(keys())
    for turn in range(number):
        key, hint = every[turn % len(every)]
        value = rng.choice([*VALUES, *edges(hint) * 3])
        *section, last = key.split(".")
        text = f"{section[0]}:\n  {last}: {value}\n" if section else f"{last}: {value}\n"
        text += "".join(
            f"{k}: {v}\n" for k, v in (("model", "m"), ("target_length", "64")) if k != key
        )
        yield text.encode("utf-8", "surrogatepass")
    whole = VALID.encode()
    for _ in range(number // 4):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        yield bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
    yield from (VALID.encode(code) for code in ("utf-16", "utf-32", "utf-8-sig", "cp037"))
    yield from (b"", b"\0", b"\xff\xfe", b"\x80" * 99, whole + b"seed: 1\nseed: 2\n", whole * 2)
    yield from (b"a" * 3_000_000, b"[" * 60_000, b"{a: " * 60_000, b"? " * 9_000, b"- " * 9_000)


def overrides(number, seed=1):
    """`key=value` as it is typed."""
    rng, every = random.Random(seed), list(keys())
    for turn in range(number):
        key, hint = every[turn % len(every)]
        yield f"{key}={rng.choice([*VALUES, *edges(hint) * 3])}"
    yield from (
        "=",
        "a",
        "a=",
        ".=1",
        "a..b=1",
        "load.=1",
        "model.x=1",
        "lora.rank.x=2",
        "=1",
        "\n=1",
    )


def outside(value):
    """Keys of an accepted recipe whose value is outside its stated range."""
    found = []
    hints = typing.get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(value):
        inner, hint = getattr(value, field.name), hints[field.name]
        if dataclasses.is_dataclass(inner):
            found += outside(inner)
        for rule in (
            getattr(hint, "__metadata__", ()) if typing.get_origin(hint) is Annotated else ()
        ):
            numbers = inner if isinstance(inner, tuple) else (inner,)
            numbers = [n for n in numbers if isinstance(n, int | float)]
            if isinstance(rule, Range):
                found += [
                    (field.name, n)
                    for n in numbers
                    if not rule.low <= n <= rule.high or n in rule.excluded
                ]
        found += [(field.name, n) for n in leaves(inner) if isinstance(n, float) and n != n]
    return found


def leaves(value):
    """Every value in nested lists and mappings."""
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return [leaf for item in items for leaf in leaves(item)]
    return [value]
