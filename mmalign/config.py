"""From a YAML file and `key.sub=value` overrides to the settings dataclass of a job, strictly.

A key that no setting has, a value of the wrong type and a missing required key are errors that say what came, what was
expected and which key to change. Nothing is repaired silently, nothing inherits from another file.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

Settings = TypeVar("Settings")


def load(schema: type[Settings], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Reads `path` (none: every default), applies `overrides` in order and builds `schema` from the result."""
    values: dict[str, Any] = {}
    if path is not None:
        values = _read(Path(path))
    for override in overrides:
        _apply(values, override)
    return build(schema, values)


def build(schema: type[Settings], values: Mapping[str, Any], prefix: str = "") -> Settings:
    """`schema`, a (nested) dataclass, from plain values. Raises ValueError naming every wrong key, after `prefix`."""
    problems = _unknown_keys(schema, values, prefix)
    if problems:
        raise ValueError("\n".join(problems))
    try:
        return TypeAdapter(schema).validate_python(dict(values) | _chosen(schema, values, prefix))
    except ValidationError as error:
        raise ValueError("\n".join(prefix + _explain(detail) for detail in error.errors())) from None


@dataclasses.dataclass(frozen=True)
class Choice:
    """For `Annotated[A | B, Choice({"a": A, "b": B})]`: a section whose keys depend on its `kind`, the first one where
    none is given. With `of`, the kind of another section decides."""

    options: Mapping[str, Any]
    of: str | None = None

    def pick(self, name: str, values: Mapping[str, Any]) -> Any:
        """The dataclass of section `name` among `values`. Raises ValueError for a kind that does not exist."""
        section = values.get(self.of or name)
        kind = section.get("kind") if isinstance(section, Mapping) else getattr(section, "kind", None)
        if kind is None:
            kind = next(iter(self.options))
        if kind not in self.options:
            raise ValueError(f"{self.of or name}.kind is {kind!r}; expected one of {', '.join(self.options)}")
        return self.options[kind]


def _choices(schema: Any) -> dict[str, Choice]:
    hints = typing.get_type_hints(schema, include_extras=True)
    found = {
        name: [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Choice)]
        for name, hint in hints.items()
    }
    return {name: parts[0] for name, parts in found.items() if parts}


def _chosen(schema: Any, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The sections whose keys depend on a kind, built."""
    built = {}
    for name, choice in _choices(schema).items():
        section = {} if values.get(name) is None else values[name]
        option = choice.pick(name, values)
        built[name] = build(option, section, f"{prefix}{name}.") if isinstance(section, Mapping) else section
    return built


def short_form(key: str) -> BeforeValidator:
    """For `Annotated[Section, short_form("kind")]`: a plain word, `section: ema`, stands for `section: {kind: ema}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def to_dict(settings: Any) -> dict[str, Any]:
    """The resolved settings as plain values, ready for YAML or JSON."""
    return dataclasses.asdict(settings)


def to_yaml(settings: Any) -> str:
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected keys and values")
    return values or {}


def _apply(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ValueError(f"cannot read {override!r}; overrides look like training.learning_rate=1e-5")
    *parents, last = name.split(".")
    section = values
    for parent in parents:
        child = section.setdefault(parent, {})
        if child is None:
            child = section[parent] = {}
        if not isinstance(child, dict):
            raise ValueError(f"{name}: {parent} is a {type(child).__name__}, not a section with keys of its own")
        section = child
    section[last] = yaml.safe_load(text)


def _unknown_keys(schema: Any, values: Any, prefix: str = "") -> list[str]:
    nested = _dataclass_of(schema)
    if isinstance(values, list) and typing.get_origin(schema) in (list, tuple):
        part = typing.get_args(schema)[0]
        return [one for place, item in enumerate(values) for one in _unknown_keys(part, item, f"{prefix}{place}.")]
    if nested is None or not isinstance(values, Mapping):
        return []
    hints, choices = typing.get_type_hints(nested), _choices(nested)
    names = [field.name for field in dataclasses.fields(nested)]
    problems = []
    for key, value in values.items():
        if key in names:
            hint = choices[key].pick(key, values) if key in choices else hints[key]
            problems += _unknown_keys(hint, value, f"{prefix}{key}.")
            continue
        nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
        hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"expected one of {', '.join(names)}"
        problems.append(f"unknown key {prefix}{key}: {hint}")
    return problems


def _dataclass_of(annotation: Any) -> Any:
    """The dataclass in `X`, `X | None`; None where there is none."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((part for part in typing.get_args(annotation) if dataclasses.is_dataclass(part)), None)
    return None


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith(("function-", "nullable")))
    if detail["type"] == "missing":
        return f"missing key {key}"
    return f"{key} is {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def describe(schema: Any, indent: str = "  ") -> str:
    """Every key of `schema` with its default, under the comment that its dataclass gives it; nested keys indented."""
    hints, choices = typing.get_type_hints(schema), _choices(schema)
    comments = _comments(schema)
    lines = []
    for field in dataclasses.fields(schema):
        lines += [f"{indent}# {comment}" for comment in comments.get(field.name, [])]
        if field.name in choices:
            lines += _describe_choice(field.name, choices[field.name], indent)
            continue
        nested = _dataclass_of(hints[field.name])
        default = _default(field)
        if nested is None or default is None:
            lines.append(f"{indent}{field.name}: {_plain(default)}")
        else:
            lines.append(f"{indent}{field.name}:")
        if nested is not None:
            lines.append(describe(nested, indent + "  "))
    return "\n".join(lines)


def _describe_choice(name: str, choice: Choice, indent: str) -> list[str]:
    """The section once for each kind."""
    return [
        line
        for kind, option in choice.options.items()
        for line in (f"{indent}{name}:  # with {choice.of or name}.kind: {kind}", describe(option, indent + "  "))
    ]


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def _plain(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "(required)"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _comments(schema: Any) -> dict[str, list[str]]:
    """The comment lines above each field, or the comment behind it, from the source of the dataclass."""
    found: dict[str, list[str]] = {}
    pending: list[str] = []
    for line in inspect.getsource(schema).splitlines():
        text = line.strip()
        field = re.match(r"(\w+)\s*:[^#]*(#.*)?", text)
        if text.startswith("#"):
            pending.append(text.lstrip("# "))
        elif field:
            behind = [field[2].lstrip("# ")] if field[2] else []
            found[field[1]], pending = [*pending, *behind], []
        else:
            pending = []
    return found
