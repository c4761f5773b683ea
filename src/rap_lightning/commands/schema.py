"""``rap-lightning schema``: the JSON schema of fit's configs, for editors that complete and check YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rap_lightning.cli.parser_internals import ParserJsonschema, get_import_path, new_object, subclasses_of
from rap_lightning.errors import ConfigError

DESCRIBED = ("rap_lightning.", "lightning.pytorch.", "torch.optim.")
"""Packages whose classes are described with their options. For other classes any option is accepted."""


def schema(output: str | None = None) -> int:
    """Write the JSON schema of fit's configs, with which an editor completes keys, shows help and marks mistakes.

    Example: rap-lightning schema --output rap-lightning.schema.json

    Then begin a config with the line  # yaml-language-server: $schema=rap-lightning.schema.json  (VS Code's YAML
    extension, and every editor with yaml-language-server). The schema has classes by short name and import path; your
    own classes are accepted with any options.

    Args:
        output: file to write; by default the schema is printed.
    """
    if output is not None and not Path(output).parent.is_dir():  # the schema takes seconds
        raise ConfigError(f"--output {output}: can't be written: its folder isn't there. Name a file in a folder.")
    text = json.dumps(config_schema(), indent=1) + "\n"
    if output is None:
        print(text, end="")
        return 0
    path = Path(output)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: can't be written: {error.strerror}. Name a file in a folder.") from error
    print(f"wrote {path}: begin a config with  # yaml-language-server: $schema={path}")
    return 0


def config_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of fit's configs, generated from the parser."""
    from rap_lightning.cli.trainer_cli import fit_parser

    made = ConfigSchema().generate(fit_parser())
    made["title"] = "rap-lightning fit"
    named = {"anyOf": [{"required": ["class_path"]}, {"required": ["init_args"]}]}  # an overlay may give either alone
    for section in ("model", "data"):  # either the options, or the user's own class with its options
        own = ConfigSchema.named(made["properties"][section])
        options = made["properties"][section]
        made["properties"][section] = {"if": named, "then": own, "else": options}
    # a partial config is valid: overlays are stacked, and flags give the rest
    return dict(_optional(made))


class ConfigSchema(ParserJsonschema):
    """jsonargparse's schema, in which a class may also be given by its short name, or be the user's own."""

    def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
        """The schema of an option that takes a class."""
        paths = [path for path in _subclasses(class_type) if path.startswith(DESCRIBED)]
        spec = self.unknown_class_path_schema()
        named: list[str] = []
        cases = []
        for path in paths:
            package, short = path.partition(".")[0], path.rpartition(".")[2]
            name = {"pattern": rf"^({package}\.(.*\.)?)?{short}$"}  # packages show a class at more than one path
            named += [short, path]
            options = self.class_path_schema(path, action)["properties"]["init_args"]
            cases.append(
                {
                    "if": {"properties": {"class_path": name}, "required": ["class_path"]},
                    "then": {"properties": {"init_args": options}},
                }
            )
        if cases:
            spec["properties"]["class_path"] = {"anyOf": [{"enum": named}, {"type": "string"}]}
            spec["allOf"] = cases
        text = {"anyOf": [{"enum": named}, {"type": "string"}]} if named else {"type": "string"}
        # the options of the default class may be given without its name
        return {"anyOf": [text, spec, {"type": "object", "not": {"required": ["class_path"]}}]}

    @staticmethod
    def named(options: dict[str, Any]) -> dict[str, Any]:
        """A class by import path, with the options of the section's own class, and maybe others."""
        known = {**options, "additionalProperties": True}
        properties = {"class_path": {"type": "string"}, "init_args": known, "dict_kwargs": {"type": "object"}}
        return {**new_object(), "properties": properties}

    def class_parser_schema(self, class_type: Any, action: Any, description: str | None = None) -> dict[str, Any]:
        """The schema of a class's options, where its package is described."""
        path = class_type if isinstance(class_type, str) else str(get_import_path(class_type))
        if not path.startswith(DESCRIBED):
            return {"type": "object"}
        found: dict[str, Any] = super().class_parser_schema(class_type, action, description)
        return found


def _subclasses(kind: Any) -> list[str]:
    try:
        return [path for path, _ in subclasses_of(kind)]
    except TypeError:  # a type of types has no list of subclasses
        return []


def _optional(node: Any) -> Any:
    """Drop what is required, except the name of a class, and except in conditions."""
    if isinstance(node, dict):
        rest = {
            key: value if key == "if" else _optional(value)
            for key, value in node.items()
            if key != "required" or isinstance(value, dict)
        }
        if "class_path" in node.get("required", ()):
            rest["required"] = ["class_path"]
        return rest
    return [_optional(value) for value in node] if isinstance(node, list) else node
