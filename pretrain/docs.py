"""The README's table of settings, written from the schema: `python -m pretrain.docs --write`, or `--check`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
from pydantic import BaseModel

from pretrain import command
from pretrain.config import Config
from pretrain.errors import ConfigError

BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
REMEDY = "run `python -m pretrain.docs --write`"

Schema = dict[str, Any]


class Setting(NamedTuple):
    """One key of a config, in Markdown."""

    key: str
    allowed: str
    default: str
    description: str


def settings(of: type[BaseModel] = Config) -> list[Setting]:
    """Every key that a config, or another settings file, may hold, in the schema's order."""
    schema = of.model_json_schema()
    return list(_walk(schema, schema.get("$defs", {}), "", "required"))


def table(of: type[BaseModel] = Config) -> str:
    """The settings as a Markdown table, without a line break at its end."""
    rows = [Setting("key", "allowed", "default", "what it is"), Setting(*["---"] * 4), *settings(of)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _walk(section: Schema, definitions: Schema, prefix: str, when_missing: str) -> Iterator[Setting]:
    for name, schema in section["properties"].items():
        key = prefix + name
        options = schema.get("anyOf", [schema])
        inner = next((definitions[_name_of(o)] for o in options if "$ref" in o), None)
        if inner is None:
            default = _shown(schema["default"]) if "default" in schema else when_missing
            yield Setting(f"`{key}`", _allowed(schema), default, schema.get("description", ""))
            for item in (definitions[_name_of(o["items"])] for o in options if "$ref" in o.get("items", {})):
                yield from _walk(item, definitions, f"{key}[].", f"required in `{key}`")
        elif len(options) > 1:  # a section or null
            yield from _walk(inner, definitions, f"{key}.", f"required with `{key}`")
        else:
            yield from _walk(inner, definitions, f"{key}.", when_missing)


def _name_of(reference: Schema) -> str:
    return str(reference["$ref"].rpartition("/")[2])


def _allowed(schema: Schema) -> str:
    """The values that a schema lets through."""
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(_shown(value) for value in schema["enum"])
    if "const" in schema:
        return _shown(schema["const"])
    if "$ref" in schema.get("items", {}):
        return "list of sections"
    if schema["type"] == "array":
        items = [_allowed(item) for item in schema.get("prefixItems", [])]
        return f"[{', '.join(items) if items else _allowed(schema['items']) + ', ...'}]"
    return str(schema["type"]) + _bounds(schema)


def _bounds(schema: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {schema[name]:.12g}" for name, sign in signs.items() if name in schema)


def _shown(value: Any) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, list):
        return f"`[{', '.join(_shown(item).strip('`') for item in value)}]`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _with_table(readme: str) -> str:
    """The text with its table renewed; raises `ConfigError` where it does not mark the place for one."""
    renewed, count = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: f"{BEGIN}\n{table()}\n{END}",
        readme,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ConfigError(f"the README has no place for the table: {BEGIN} ... {END}")
    return renewed


@click.command()
@click.argument("readme", type=click.Path(path_type=Path, exists=True, dir_okay=False), default="README.md")
@click.option("--write/--check", default=False, help="Renew the table, or only say whether it is current.")
def docs(readme: Path, write: bool) -> None:
    """Keep README's table of settings equal to the schema."""
    before = readme.read_text(encoding="utf-8")
    after = _with_table(before)
    if write:
        readme.write_text(after, encoding="utf-8")
    elif after != before:
        raise ConfigError(f"the table of settings in {readme} is not that of the schema: {REMEDY}")


if __name__ == "__main__":
    command.run(docs, "python -m pretrain.docs")
