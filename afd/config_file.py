"""Reads the run's configuration: defaults < YAML file < dotted overrides; and writes it back, resolved."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from afd.config import RunConfig


class ConfigError(ValueError):
    """The user's configuration is wrong; the message is one line that names the field, expected and got."""


# Knobs of DeepSpeed's JSON under the names people look for them in the YAML.
_OWNED_BY_DEEPSPEED = frozenset(
    {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "optimizer", "lr", "learning_rate", "scheduler", "zero_optimization", "zero_stage", "bf16", "fp16", "precision",
        "batch_size", "micro_batch_size", "weight_decay",
    }
)  # fmt: skip


def load_config(path: Path | None, overrides: Sequence[str] = (), *, output_dir: str | None = None) -> RunConfig:
    """Read a YAML file and dotted overrides such as `rollout.group_size=4` into a checked configuration.

    A file may start from another one: `base: quickstart.yaml`, relative to its own folder. An override's value is
    YAML, but for a field that takes words or a path it is the text as it stands, unless that is quoted, empty or null.

    Args:
        path: the file; None for the defaults.
        overrides: `section.field=value`, over the file.
        output_dir: over both, as it stands.
    Raises:
        ConfigError: one line naming the field, what was expected and what came.
    """
    tree = {} if path is None else _read_tree(path, seen=())
    for override in overrides:
        _apply_override(tree, override)
    if output_dir is not None:
        tree["output_dir"] = output_dir or None  # "" is a variable that is not set, hardly this folder
    _refuse_unknown(tree, RunConfig, prefix="")
    try:
        return RunConfig(**tree)
    except ValidationError as error:
        raise ConfigError(": ".join(first_problem(error))) from error


def first_problem(error: ValidationError) -> tuple[str, ...]:
    """Where a model refused its values first (left out for the model as a whole), and what was expected and came."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not isinstance(first["input"], dict):  # else it is a section, whose validator says what came
        message += f", got {first['input']!r}"
    return (".".join(map(str, first["loc"])), message) if first["loc"] else (message,)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.2: no key twice in a mapping, no dates, and only `true` and `false` are booleans. 1.1 also takes `off`,
    `no`, `on` and `yes`, which are words here (fields that are true or false understand them all the same)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as written, before anything is merged into it.

        Raises:
            ValueError: a key appears twice.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"key {key.value!r} appears twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return node


_NOT_IN_YAML_1_2 = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_IN_YAML_1_2]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def parse_yaml(text: str) -> Any:
    """A YAML 1.2 document.

    Raises:
        ValueError: no valid YAML, or a key twice in a mapping; one line.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _read_tree(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a file laid over those of its `base`."""
    if not path.is_file():
        raise ConfigError(f"--config {path} does not exist" if not seen else f"base {path} of {seen[-1]} is missing")
    if path.resolve() in seen:
        raise ConfigError(f"base of {seen[-1]} must not lead back to {path}")
    try:
        tree = parse_yaml(path.read_text()) or {}
    except ValueError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path} must hold a mapping of sections, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"base of {path} must be the name of a YAML file, got {base!r}")
    return _laid_over(_read_tree(path.parent / base, seen=(*seen, path.resolve())), tree)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    path = key.removeprefix("--").split(".")
    if not separator or not all(path):
        raise ConfigError(f"override must read section.field=value, got {override!r}")
    try:
        value = _as_it_stands(text) if _takes_text(path) else parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {key} must have a YAML value, got {text!r}") from error
    node = tree
    for part in path[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {part!r} is a value, not a section")
        node = child
    node[path[-1]] = value


def _takes_text(path: Sequence[str]) -> bool:
    """Whether the field of this dotted name takes words or a path (or null), and nothing else."""
    annotation: Any = RunConfig
    for part in path:
        fields = getattr(annotation, "model_fields", {})
        if part not in fields:
            return False
        annotation = fields[part].annotation
    kinds = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    return {str, Path, NoneType}.issuperset(kinds)


def _as_it_stands(text: str) -> Any:
    """An override's text, which YAML would cut at ` #` or take for a date or a number; null and quotes are YAML's."""
    return parse_yaml(text) if text in ("", "~", "null") or text[0] in "'\"" else text


def _refuse_unknown(tree: dict[str, Any], section: type[BaseModel], *, prefix: str) -> None:
    """Unknown keys, with the closest known one; knobs that DeepSpeed's JSON owns are named as such."""
    fields = section.model_fields
    for key, value in tree.items():
        where = f"{prefix}{key}"
        if key not in fields:
            if key in _OWNED_BY_DEEPSPEED:
                raise ConfigError(f"{where} belongs in the DeepSpeed JSON (--ds_config), not in the YAML configuration")
            known = dict(_leaves(RunConfig, ""))
            close = difflib.get_close_matches(str(key), [*fields, *known], n=1, cutoff=0.5)
            owner = (
                next((full for full in known.values() if full.rsplit(".", 1)[-1] == close[0]), None) if close else None
            )
            suggestion = f"{prefix}{close[0]}" if close and close[0] in fields else owner
            raise ConfigError(f"unknown key {where}" + (f", did you mean {suggestion}?" if suggestion else ""))
        nested = fields[key].annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            if not isinstance(value, dict):
                raise ConfigError(f"{where} must be a section with fields {sorted(nested.model_fields)}, got {value!r}")
            _refuse_unknown(value, nested, prefix=f"{where}.")


def _leaves(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    """(name, dotted name) of every field that is not a section."""
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from _leaves(nested, f"{prefix}{name}.")
        else:
            yield name, f"{prefix}{name}"
