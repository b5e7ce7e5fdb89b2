"""A checkpoint's files: where they are, which tensors they hold, and what its config says in our words.

Nothing is loaded here beyond headers. Only safetensors files are read, never pickled ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from mplus_agents.config import AdapterConfig, MemoryConfig, MemoryRule, MPlusConfig
from mplus_agents.errors import CheckpointError, ConfigError
from mplus_agents.model.families import head_dim

Layout = Literal["mplus", "memoryllm", "own"]
_BUILT_IN = {"mplus-tiny": Path(__file__).parent.parent / "assets" / "mplus-tiny"}
CONFIG_KEY = "mplus"  # our section in config.json

# What a published config may say, for the keys that change what the network computes (research: config fields read by
# the published modelling code). Other keys of the published training code have no effect on inference.
_PUBLISHED_VALUES: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "add_bos_embedding": (True,),
    "drop_memory_per_layer": (True, False),
    "add_decoder_lora": (True, False),
}
_PUBLISHED_MPLUS_VALUES: dict[str, tuple[object, ...]] = {
    "add_selector": (True,),
    "drop_memory_per_layer": (True,),
    "update_ltm_mode": ("immediate",),
    "num_selector_layers": (2,),
    "selector_layers": (None,),
    "maintain_memory_keys": (False,),
}
# Keys of published configs that our own format says in its own section.
PUBLISHED_KEYS = frozenset(
    {
        *_PUBLISHED_VALUES.keys() - {"model_type", "hidden_act"},
        *_PUBLISHED_MPLUS_VALUES,
        "num_tokens",
        "num_blocks",
        "num_ltm_blocks",
        "num_memory_tokens",
        "ltm_initial_size",
        "selector_hidden_dim",
        "add_encoder_retriever",
        "detach_hidden_state",
        "map_from_hidden_states",
        "update_ltm_frequency",
        "initial_rf_when_moving_stm_to_ltm",
        "decay_frequency",
        "lora_config",
        "torch_dtype",
    }
)
_LORA_VALUES: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": (None,),
    "layers_to_transform": (None,),
}
_LORA_IGNORED = {"inference_mode", "lora_dropout", "peft_type", "task_type", "init_lora_weights"}


class CheckpointFiles:
    """The safetensors files and the config of one checkpoint folder.

    Args:
        folder: A folder with `config.json` and safetensors files.

    Raises:
        CheckpointError: The folder has no config, no safetensors files, or one of them cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise CheckpointError(f"no checkpoint in {str(folder)!r}: config.json is missing")
        try:
            self.config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"config.json in {str(folder)!r} is not JSON: {error}") from error
        self.file_of = self._list_tensors()

    @classmethod
    def open(cls, path_or_hub_id: str | PathLike[str]) -> Self:
        """Find a checkpoint in a folder or on the hub.

        Args:
            path_or_hub_id: A folder, the id of a repository on the Hugging Face hub, or `mplus-tiny`, which the package
                brings along.

        Raises:
            CheckpointError: There is no such folder, and the hub has no such repository or is out of reach.
        """
        folder = _BUILT_IN.get(str(path_or_hub_id), Path(path_or_hub_id))
        if folder.is_dir():
            return cls(folder)
        name = str(path_or_hub_id)
        try:
            downloaded = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"])
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{name!r} is neither a folder nor a hub repository at hand ({reason})") from error
        return cls(Path(downloaded))

    @property
    def layout(self) -> Layout:
        """The kind of checkpoint: published M+, published MemoryLLM, or our own format."""
        if CONFIG_KEY in self.config:
            return "own"
        if "num_ltm_blocks" in self.config:
            return "mplus"
        if "num_blocks" in self.config and "num_tokens" in self.config:
            return "memoryllm"
        raise CheckpointError(
            f"{str(self.folder)!r} is not an M+ or MemoryLLM checkpoint (config.json has neither {CONFIG_KEY!r} nor "
            "'num_blocks'); a plain decoder becomes one by MPlusModel.from_base"
        )

    @contextmanager
    def reader(self, file_name: str) -> Iterator[Any]:
        """Open one file.

        Args:
            file_name: A value of `file_of`.

        Yields:
            A safetensors handle.
        """
        try:
            with safe_open(str(self.folder / file_name), framework="pt") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file_name} cannot be read: {error}") from error

    def get(self, name: str) -> torch.Tensor:
        """Load one tensor to host memory.

        Args:
            name: The tensor's name.
        """
        with self.reader(self.file_of[name]) as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
            return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape, from the headers alone."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file_name in self.files:
            with self.reader(file_name) as handle:
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
        return shapes

    @property
    def files(self) -> list[str]:
        """The safetensors files, in order."""
        return sorted(set(self.file_of.values()))

    def _list_tensors(self) -> dict[str, str]:
        index_path = self.folder / "model.safetensors.index.json"
        if index_path.is_file():
            try:
                weight_map: dict[str, str] = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(f"{index_path.name} is not an index of tensors: {error!r}") from error
            missing = sorted(name for name in set(weight_map.values()) if not (self.folder / name).is_file())
            if missing:
                raise CheckpointError("files named by the index are missing", missing)
            files = sorted(set(weight_map.values()))
        elif (self.folder / "model.safetensors").is_file():
            files, weight_map = ["model.safetensors"], {}
        else:
            raise CheckpointError(
                f"{str(self.folder)!r} holds no safetensors file (pickled .bin files are not read: convert them first)"
            )
        found: dict[str, str] = {}
        for file_name in files:
            with self.reader(file_name) as handle:
                found.update(dict.fromkeys(handle.keys(), file_name))
        absent = sorted(set(weight_map) - set(found))
        if absent:
            raise CheckpointError("tensors named by the index are missing", absent)
        return found


def translate_config(
    files: CheckpointFiles, decoder: PretrainedConfig, retrieval_dim: int, memory_rule: MemoryRule | None
) -> MPlusConfig:
    """Say in our words what a checkpoint's config says.

    Args:
        files: The checkpoint.
        decoder: Its decoder's configuration.
        retrieval_dim: p, from the retriever's tensors; 0 without one.
        memory_rule: The rule to use in place of the default.

    Raises:
        ConfigError: A value is not supported, or a needed key is missing.
    """
    if files.layout == "own":
        config = MPlusConfig.from_dict(files.config[CONFIG_KEY])
        if memory_rule is None:
            return config
        return MPlusConfig.from_dict({**config.to_dict(), "memory": {**config.memory.to_dict(), "rule": memory_rule}})
    raw = files.config
    is_mplus = files.layout == "mplus"
    _check_values(raw, {**_PUBLISHED_VALUES, **(_PUBLISHED_MPLUS_VALUES if is_mplus else {})}, "config.json")
    num_new, num_blocks = _whole_number(raw, "num_tokens"), _whole_number(raw, "num_blocks")
    num_retrieved_blocks = _whole_number(raw, "num_ltm_blocks") if is_mplus else 0
    optional: dict[str, Any] = {}
    if is_mplus:
        selector_dim = raw.get("selector_hidden_dim", retrieval_dim)
        if selector_dim != retrieval_dim:
            raise ConfigError(f"selector_hidden_dim is {selector_dim!r}; the retriever's tensors have {retrieval_dim}")
        optional = {
            "merge_every": _whole_number(raw, "update_ltm_frequency"),
            "initial_recall_count": float(_number(raw, "initial_rf_when_moving_stm_to_ltm")),
            "recall_decay": float(_number(raw, "decay_frequency")),
        }
    memory = MemoryConfig(
        num_layers=decoder.num_hidden_layers,
        hidden_size=decoder.hidden_size,
        num_kv_heads=decoder.num_key_value_heads,
        head_dim=head_dim(decoder),
        retrieval_dim=retrieval_dim,
        tokens_per_injection=num_new,
        max_short_term=(num_blocks - num_retrieved_blocks) * num_new,
        num_retrieved=num_retrieved_blocks * num_new,
        max_long_term=150_000 if is_mplus else 0,
        rule=memory_rule or "released",
        **optional,
    )
    return MPlusConfig(memory, _translate_lora(raw), rounds_rope=True, retrieval_query="prompt")


def _translate_lora(raw: Mapping[str, Any]) -> AdapterConfig | None:
    lora = raw.get("lora_config")
    if lora is None:
        return None
    if not isinstance(lora, dict):
        raise ConfigError(f"lora_config is {lora!r}; allowed: a mapping, or null")
    if raw.get("add_decoder_lora") is not True:
        raise ConfigError("add_decoder_lora is not true beside a lora_config; allowed: two adapters, or none at all")
    _check_values(lora, _LORA_VALUES, "lora_config")
    known = {"r", "lora_alpha", "target_modules", *_LORA_VALUES, *_LORA_IGNORED}
    unknown = sorted(set(lora) - known)
    if unknown:
        raise ConfigError(f"lora_config: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
    targets = lora.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ConfigError(f"lora_config: target_modules is {targets!r}; allowed: a list of names")
    return AdapterConfig(_whole_number(lora, "r"), float(_number(lora, "lora_alpha")), tuple(targets))


def _check_values(raw: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]], what: str) -> None:
    for key, values in allowed.items():
        if key in raw and raw[key] not in values:
            listed = " or ".join(map(repr, values))
            raise ConfigError(f"{what}: {key} is {raw[key]!r}; allowed: {listed}")


def _number(raw: Mapping[str, Any], key: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"config.json: {key} is {value!r}; allowed: a number")
    return value


def _whole_number(raw: Mapping[str, Any], key: str) -> int:
    value = _number(raw, key)
    if value != int(value) or value < 0:
        raise ConfigError(f"config.json: {key} is {value!r}; allowed: a whole number")
    return int(value)
