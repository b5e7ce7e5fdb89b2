"""Reads stage files, YAML or TOML, and says in one sentence what is wrong with one; lists the ready recipes."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mplus_agents.errors import ConfigError
from mplus_agents.training.config import DataSection, DocumentSettings, SmallSettings, StageConfig

RECIPES = Path(__file__).parent / "recipes"
STAGE_SUFFIXES = (".yaml", ".yml", ".toml")
_ALLOWED = {  # pydantic's words for those that are not of this trade
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "a text",
    "model_type": "keys and values",
    "dict_type": "keys and values",
    "tuple_type": "a list",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_pattern_mismatch": "a name for a folder, without slashes and without a dot in front",
}
_TAGS: dict[str, type[BaseModel]] = {"small": SmallSettings, "document": DocumentSettings}


def ready_recipes() -> dict[str, list[Path]]:
    """Return the stage files of every recipe in the package, in order."""
    folders = sorted(path for path in RECIPES.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
    return {folder.name: _stage_files(folder) for folder in folders}


def find_stages(recipe: Sequence[str]) -> list[Path]:
    """Turn what a user names into stage files.

    Args:
        recipe: The name of a ready recipe, a folder of stage files, or stage files.

    Raises:
        ConfigError: There is no such recipe or file.
    """
    ready = ready_recipes()
    found: list[Path] = []
    for name in recipe:
        path = Path(name)
        if name in ready:
            found += ready[name]
        elif path.is_file():
            found.append(path)
        elif path.is_dir() and _stage_files(path):
            found += _stage_files(path)
        elif path.is_dir():
            raise ConfigError(f"{name!r} holds no stage files ({', '.join(STAGE_SUFFIXES)})")
        else:
            raise ConfigError(f"{name!r} is neither a ready recipe ({', '.join(ready)}) nor a stage file")
    return found


def load_stage(path: Path, overrides: Sequence[str] = ()) -> StageConfig:
    """Read one stage file.

    Args:
        path: A YAML or TOML file.
        overrides: `key=value` in place of what it says, keys with dots: `optimizer.lr=1e-3`.

    Raises:
        ConfigError: The file cannot be read, a key or value is not allowed, or a folder of documents does not exist;
            the message names file and key.
    """
    values = _read(path)
    for override in overrides:
        _override(values, override)
    if values.get("name") is None:
        values["name"] = path.stem
    try:
        stage = parse_stage(values, str(path))
    except ConfigError as error:
        if not overrides:
            raise
        hint = "a --set that starts with NAME: changes stage NAME alone"
        raise ConfigError(f"{error} (with --set {', '.join(overrides)}; {hint})") from error
    _check_folders(stage.data, str(path))
    return stage


def parse_stage(values: Mapping[str, Any], source: str) -> StageConfig:
    """Check the values of a stage.

    Args:
        values: As read from a file.
        source: Where they come from, for messages.

    Raises:
        ConfigError: A key or value is not allowed.
    """
    try:
        stage = StageConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_describe(error.errors())}") from error
    if isinstance(stage.recipe, DocumentSettings):
        _check_documents(stage.recipe, stage.data, source)
    return stage


def _check_documents(recipe: DocumentSettings, data: DataSection, source: str) -> None:
    """Let the document recipe's own classes check its settings."""
    from mplus_agents.training.document_stage import DocumentStage
    from mplus_agents.training.documents import SourceConfig

    options = {key: value for key, value in recipe.options.items() if key not in ("memory_dtype", "long_term_device")}
    where = "recipe.options"
    try:
        DocumentStage.from_dict(options)
        where = "data.sources"
        for values in data.sources:
            SourceConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {where}: {error}") from error
    if not data.sources:
        raise ConfigError(f"{source}: data.sources is empty; allowed: at least one folder or dataset")


def _check_folders(data: DataSection, source: str) -> None:
    for values in data.sources:
        location = str(values["location"])
        if values.get("kind", "folder") == "folder" and not Path(location).is_dir():
            raise ConfigError(f"{source}: data.sources: location is {location!r}; allowed: a folder that exists")


def _stage_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in STAGE_SUFFIXES)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys")
    return values


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML.

    Args:
        text: The text.
        source: Where it comes from, for the message.

    Raises:
        ConfigError: It is not YAML, or PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("reading YAML needs PyYAML: pip install 'mplus-agents[train]'") from error
    try:
        nodes = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    _check_keys(nodes, source)
    return values


def _check_keys(node: Any, source: str) -> None:
    """Refuse keys that stand twice in a mapping, of which YAML takes the last one without a word."""
    if not isinstance(getattr(node, "value", None), list):
        return
    pairs = [item for item in node.value if isinstance(item, tuple)]
    keys = [key.value for key, _ in pairs]
    twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
    if twice is not None:
        raise ConfigError(f"{source}: the key {twice!r} is given twice")
    for child in [value for _, value in pairs] or node.value:
        _check_keys(child, source)


def _override(values: dict[str, Any], override: str) -> None:
    key, is_given, text = override.partition("=")
    if not is_given or not key:
        raise ConfigError(f"--set {override!r}: allowed: key=value, such as optimizer.lr=1e-3")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} holds a value and no keys")
        values = inner
    values[last] = parse_yaml(text, f"--set {override!r}")


def _describe(errors: Sequence[ErrorDetails]) -> str:
    # Of several, the unknown key tells most: a mistyped name is missing under its right one as well.
    error = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    keys = [str(part) for part in error["loc"] if part not in _TAGS]
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        close = get_close_matches(keys[-1], known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {name!r}; {hint}known keys: {', '.join(known)}"
    if error["type"] == "missing":
        return f"the key {name!r} is missing"
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        given = error["input"].get("type") if isinstance(error["input"], dict) else error["input"]
        return f"{name}.type is {given!r}; allowed: {', '.join(_TAGS)}"
    allowed = _ALLOWED.get(error["type"]) or error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{name}: {allowed}"
    return f"{name} is {_shorten(repr(error['input']))}; allowed: {allowed}"


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = StageConfig
    for part in location:
        if part in _TAGS:
            section = _TAGS[str(part)]
        elif part in section.model_fields:
            section = next(_sections(section.model_fields[str(part)].annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
