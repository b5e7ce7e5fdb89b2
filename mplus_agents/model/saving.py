"""Writes a model in our own format: one folder, config.json with an `mplus` section, safetensors, never pickle.

Original tensors only, bit for bit. A model whose read adapter is fused does not hold them any more, so they are copied
from the files it came from, if these are still the same.
"""

from __future__ import annotations

import json
import shutil
from os import PathLike
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import PretrainedConfig

from mplus_agents.config import MPlusConfig
from mplus_agents.errors import CheckpointError
from mplus_agents.model.base import state_tensors
from mplus_agents.model.checkpoint import CONFIG_KEY, PUBLISHED_KEYS, CheckpointFiles
from mplus_agents.model.fingerprint import PARTS, Fingerprint
from mplus_agents.model.mplus import MPlusModel

_SIDE_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.json", "merges.txt", "*.model")


def save_model(model: MPlusModel, folder: str | PathLike[str]) -> None:
    """Write a model.

    Args:
        model: The model.
        folder: Where to write; made if it is not there.

    Raises:
        CheckpointError: The folder holds a checkpoint already, or the original weights are not at hand any more.
    """
    target = Path(folder)
    if (target / "config.json").exists() or any(target.glob("*.safetensors*")):
        raise CheckpointError(f"{str(target)!r} holds a checkpoint already, or a part of one; choose another folder")
    source = CheckpointFiles(Path(model.source)) if model.source and Path(model.source).is_dir() else None
    if source is not None:
        _check_unchanged(model, source)
    elif model.is_fused or model.genesis is not None:
        raise CheckpointError(
            "the original weights cannot be written: fusing the read adapter is one-way, and the files they came from "
            f"are gone ({model.source})"
        )
    target.mkdir(parents=True, exist_ok=True)
    if source is not None:
        _copy_tensors(source, target)
    else:
        tensors = {name: tensor.detach().contiguous() for name, tensor in state_tensors(model).items()}
        save_torch_state_dict(tensors, target)
        _copy_side_files(model, target)
    if model.decoder.generation_config is not None:
        model.decoder.generation_config.save_pretrained(str(target))
    # The config last: without it the folder is no checkpoint, so an interrupted save cannot be loaded by mistake.
    write_config(target, model.decoder.config, model.config)


def write_config(folder: Path, decoder_config: PretrainedConfig, config: MPlusConfig) -> None:
    """Write `config.json` in the package's own format, without the place that the decoder was loaded from.

    Args:
        folder: The folder of the checkpoint.
        decoder_config: The decoder's.
        config: What the memory is.
    """
    left_out = {*PUBLISHED_KEYS, "_name_or_path"}
    values = {key: value for key, value in decoder_config.to_dict().items() if key not in left_out}
    values |= {"architectures": ["MPlusModel"], CONFIG_KEY: config.to_dict()}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_tensors(source: CheckpointFiles, target: Path) -> None:
    patterns = (*source.files, "model.safetensors.index.json", *_SIDE_FILES)
    for path in sorted({path for pattern in patterns for path in source.folder.glob(pattern)}):
        shutil.copy2(path, target / path.name)


def _copy_side_files(model: MPlusModel, target: Path) -> None:
    """Bring along the tokenizer of the decoder that a model was made from."""
    if model.base_folder is None:
        return
    for path in sorted({path for pattern in _SIDE_FILES for path in model.base_folder.glob(pattern)}):
        shutil.copy2(path, target / path.name)


def _check_unchanged(model: MPlusModel, source: CheckpointFiles) -> None:
    fingerprint = Fingerprint()
    for file_name in source.files:
        with source.reader(file_name) as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if not name.endswith("rotary_emb.inv_freq"):
                    fingerprint.add(name, handle.get_tensor(name))
    digests = fingerprint.digests()
    changed = [part for part in PARTS if digests[part] != model.fingerprint[part]]
    if changed:
        raise CheckpointError(f"the files in {str(source.folder)!r} have changed since they were loaded", changed)
