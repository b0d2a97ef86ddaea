"""YAML to `Config`, and every mistake in it at once, with file, line, key and what would be right.

Differences from plain `yaml.safe_load`, all on the safe side: `1e-3` is a float; `012` and `1:30` are not numbers;
a key given twice, an alias, a tag, and a file above 1 MB are errors. `yes`/`no`/`on`/`off` are booleans as in
YAML 1.1, so that a string field given `no` can say what happened.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from pretrain.config.schema import Config
from pretrain.errors import ConfigError
from pretrain.redact import redact_setting, redact_text

MAX_BYTES = 1_000_000
Key = tuple[str | int, ...]
Settings = TypeVar("Settings", bound=pydantic.BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the number formats that people expect, without aliases, with sequences as tuples."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name is PyYAML's
        first: [(tag, rule) for tag, rule in rules if tag.endswith((":bool", ":null", ":merge"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.tag:
            what = "aliases (*name)" if isinstance(event, yaml.AliasEvent) else f"tags ({event.tag})"
            raise yaml.MarkedYAMLError(
                problem=f"{what} are not used in configs; write the value out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string that `_Loader` would read as something else."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
    )
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|nan))$"
        ),
        list("-+.0123456789"),
    )


class _Located:
    """Plain values of a YAML text, with the line and the raw text of every key."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.where: dict[Key, str] = {}
        self.raw: dict[Key, str] = {}
        self.problems: list[str] = []

    def read(self, text: str) -> Any:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._plain(loader, node, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigError(f"{self.name}:{line}: not valid YAML: {error.problem}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{self.name}: not valid YAML: {error}") from None

    def _plain(self, loader: _Loader, node: yaml.Node, key: Key) -> Any:
        self.where.setdefault(key, f"{self.name}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, key)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self._plain(loader, child, (*key, i)) for i, child in enumerate(node.value))
        self.raw[key] = node.value
        return loader.construct_object(node)

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name, line = str(name_node.value), f"{self.name}:{name_node.start_mark.line + 1}"
            if name in values:
                self.problems.append(
                    f"{line}: {'.'.join(map(str, (*key, name)))}: given twice in one section"
                )
            self.where[(*key, name)] = line
            values[name] = self._plain(loader, value_node, (*key, name))
        return values

    def override(self, text: str, values: dict[str, Any]) -> None:
        """Apply one `key.sub=value`; the value is read as YAML."""
        dotted, equals, value = text.partition("=")
        key = tuple(dotted.strip().split("."))
        if not equals or not all(key):
            self.problems.append(f"override {text!r}: write it as key.sub=value, for instance optim.lr=1e-3")
            return
        source = _Located(f"override {text!r}")
        parsed = source.read(value)
        section = values
        for name in key[:-1]:
            inner = section.get(name)
            section[name] = section = dict(inner) if isinstance(inner, dict) else {}
        section[key[-1]] = parsed
        for place, raw in source.raw.items():
            self.raw[(*key, *place)] = raw
        for depth in range(1, len(key) + 1):
            self.where.setdefault(key[:depth], source.name)
        for place in [*source.where, ()]:
            self.where[(*key, *place)] = source.name


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read one stage from YAML and apply overrides such as `optim.lr=1e-3`.

    Raises `ConfigError` with every mistake found, each with its line.
    """
    return parse(read_text(Path(path), "config"), str(path), overrides)


def read_text(path: Path, what: str) -> str:
    """The text of a small settings file, which messages call a `what`; raises `ConfigError` where it cannot be had."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: a {what} is at most {MAX_BYTES} bytes; is this the right file?")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {error}") from None


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Config:
    """`load` for a text; `name` stands for the file in messages."""
    return read_settings(Config, text, name, overrides)


def read_settings(schema: type[Settings], text: str, name: str, overrides: Sequence[str] = ()) -> Settings:
    """A YAML text as an object of `schema`, the schema of a config or of another settings file."""
    located = _Located(name)
    values = located.read(text)
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: a config is a mapping of sections ({', '.join(schema.model_fields)})")
    for override in overrides:
        located.override(override, values)
    problems = located.problems
    try:
        settings = schema.model_validate(values)
    except pydantic.ValidationError as error:
        problems += [_explain(problem, located, schema) for problem in error.errors(include_url=False)]
    problems += _secrets(values, located)
    if problems:
        raise ConfigError(
            f"{len(problems)} mistake{'s' if len(problems) > 1 else ''} in the configuration:\n"
            + redact_text("\n".join(f"  {problem}" for problem in problems))
        )
    return settings


def _secrets(value: Any, located: _Located, key: Key = ()) -> list[str]:
    """A complaint for each text that looks like a secret, without showing it."""
    if isinstance(value, dict):
        return [text for name, inner in value.items() for text in _secrets(inner, located, (*key, name))]
    if isinstance(value, tuple):
        return [text for i, inner in enumerate(value) for text in _secrets(inner, located, (*key, i))]
    name = ".".join(map(str, key))
    if not isinstance(value, str) or redact_setting(name, value) == value:
        return []
    return [
        f"{located.where.get(key, located.name)}: {name}: looks like a secret, which has no place here: settings are "
        "shown, saved and tracked. Give it in the environment"
    ]


def dump(config: Config) -> str:
    """The config as YAML that `parse` reads back to an equal object."""
    values = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def _explain(problem: Any, located: _Located, schema: type[pydantic.BaseModel]) -> str:
    key: Key = problem["loc"]
    known = next((key[:n] for n in range(len(key), -1, -1) if key[:n] in located.where), ())
    named = known if known in located.raw else key  # below a plain value pydantic adds the kind that it tried
    where = f"{located.where.get(known, located.name)}: {'.'.join(map(str, named)) or 'config'}: "
    match problem["type"]:
        case "extra_forbidden":
            return where + _unknown(key, schema)
        case "missing":
            return where + "is required"
        case "value_error":
            return where + str(problem["ctx"]["error"])
        case "string_type" if isinstance(problem["input"], bool) and key in located.raw:
            raw = located.raw[key]
            return where + f'YAML reads {raw} as a boolean; a string is needed: write "{raw}" in quotes'
        case "literal_error":
            return (
                where
                + f"{_shown(problem['input'])} is not allowed; one of: {problem['ctx']['expected']}"
                + _nearest(str(problem["input"]), re.findall(r"'([^']+)'", problem["ctx"]["expected"]))
            )
        case "model_type" | "dict_type":
            return where + f"is a section with keys, given {_shown(problem['input'])}"
        case "tuple_type":
            return where + f"needs a list such as [16, 16], given {_shown(problem['input'])}"
        case _:
            message = problem["msg"].removeprefix("Input should be ")
            return where + f"must be {message}, given {_shown(problem['input'])}"


def _unknown(key: Key, schema: type[pydantic.BaseModel]) -> str:
    section: Any = schema
    for name in key[:-1]:
        if isinstance(name, str):  # a number counts the entries of a list: they are all of one type
            section = _section_type(section, name)
    allowed = [field.alias or name for name, field in section.model_fields.items()] if section else []
    return f"unknown key{_nearest(str(key[-1]), allowed)}; allowed here: {', '.join(allowed)}"


def _section_type(section: Any, name: str) -> Any:
    annotation = section.model_fields[name].annotation if section and name in section.model_fields else None
    return next(
        (o for o in _parts(annotation) if isinstance(o, type) and issubclass(o, pydantic.BaseModel)), None
    )


def _parts(annotation: Any) -> list[Any]:
    """A type and all that it is made of, such as the sections of an optional list of them."""
    return [annotation, *(part for inner in get_args(annotation) for part in _parts(inner))]


def _nearest(given: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
