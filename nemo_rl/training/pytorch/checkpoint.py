"""Saving and restoring a policy's training state bit for bit, and exporting it as a Hugging Face folder.

A saved folder has the layout of NeMo RL, both parts in the format of torch.distributed.checkpoint:

    weights/          the trainable weights by name; float32 masters where they exist
    optimizer/        `state.<name>.<moment>` of each weight; `settings`, the hyper-parameters and the scheduler
    tokenizer/        as Transformers saves it
    checkpoint.json   which model this is, and the size of every file
"""

import copy
import json
import pickle
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl.errors import CheckpointError
from nemo_rl.models.load import Identity

MANIFEST = "checkpoint.json"
_SETTINGS = "settings"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that a training step reads and changes; loading fills these very objects.

    Attributes:
        weights: what the optimizer steps, by name (`MasterWeights.named`).
        optimizer: over exactly these weights.
        scheduler: of that optimizer.
        identity: of the model (`model_identity`).
    """

    weights: Mapping[str, Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler
    identity: Identity


def save_state(folder: Path, state: TrainingState, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the training state into `folder`; call it within `atomic_folder` so that a kill leaves no half of it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _failing_as(f"cannot write the checkpoint {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "weights", {name: weight.detach() for name, weight in state.weights.items()})
        _write(folder / "optimizer", _named_optimizer_state(state))
        tokenizer.save_pretrained(folder / "tokenizer")
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
        manifest = {"identity": dict(state.identity), "optimizer": _kind(state.optimizer), "files": sizes}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def load_state(folder: Path, state: TrainingState) -> None:
    """Restore weights, optimizer and scheduler exactly as they were saved; learning rates are the saved ones.

    Everything is checked before the first weight changes. With master weights, call `publish` afterwards.

    Raises:
        CheckpointError: the checkpoint is missing or truncated, or of another model, optimizer or set of weights.
    """
    _verify(folder, state)
    with _failing_as(f"the checkpoint {folder} is damaged; resume from an earlier one"):
        stored = _read(folder / "optimizer", {})
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in stored.items():
            if key.startswith("state."):
                name, _, moment = key.removeprefix("state.").rpartition(".")
                by_name.setdefault(name, {})[moment] = value
        names = _stepped_names(state)
        moments = {index: by_name[name] for index, name in enumerate(names) if name in by_name}
        _read(folder / "weights", {name: weight.detach() for name, weight in state.weights.items()})
        settings = pickle.loads(stored[_SETTINGS])
        state.optimizer.load_state_dict({"state": moments, "param_groups": settings["param_groups"]})
        state.scheduler.load_state_dict(settings["scheduler"])


def export_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder that plain Transformers loads: safetensors, configuration, tokenizer.

    Args:
        model: gives the architecture, and every tensor that `weights` has none of.
        tokenizer: saved beside it.
        folder: made if it is not there.
        dtype: of the floating-point tensors in the files.
        weights: better ones by name, such as float32 masters.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    unique = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    tensors = {**dict(unique.values()), **(weights or {})}  # one name for tied weights, the first
    exported = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    with _failing_as(f"cannot write the model folder {folder}"):
        model.save_pretrained(folder, state_dict=exported)
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _named_optimizer_state(state: TrainingState) -> dict[str, Any]:
    """The optimizer's state by weight name instead of position, which another sharding or order would change."""
    held = state.optimizer.state_dict()
    named = {
        f"state.{name}.{moment}": value
        for index, name in enumerate(_stepped_names(state))
        for moment, value in held["state"].get(index, {}).items()
    }
    settings = {"param_groups": held["param_groups"], "scheduler": state.scheduler.state_dict()}
    return {**named, _SETTINGS: pickle.dumps(settings)}  # as bytes: nested values would be taken apart into keys


def _stepped_names(state: TrainingState) -> list[str]:
    """Names in the order in which the optimizer counts its parameters."""
    names = {id(weight): name for name, weight in state.weights.items()}
    return [names[id(weight)] for group in state.optimizer.param_groups for weight in group["params"]]


def _verify(folder: Path, state: TrainingState) -> None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}; resume from another one") from error
    if manifest["identity"] != dict(state.identity):
        raise CheckpointError(
            f"the checkpoint {folder} is of another model: it holds {_sentence(manifest['identity'])}, this run trains "
            f"{_sentence(state.identity)}; give the model that it was made from or start in another folder"
        )
    if manifest["optimizer"] != _kind(state.optimizer):
        raise CheckpointError(
            f"the checkpoint {folder} was made with {manifest['optimizer']} and this run uses "
            f"{_kind(state.optimizer)}; use the same optimizer or start in another folder"
        )
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise CheckpointError(
                f"the checkpoint file {folder / name} is truncated or missing ({found} of {size} bytes); "
                f"resume from an earlier checkpoint"
            )
    with _failing_as(f"the checkpoint {folder} is damaged; resume from an earlier one"):
        stored = _metadata(folder / "weights").state_dict_metadata
    held = {name: item.size for name, item in stored.items() if isinstance(item, TensorStorageMetadata)}
    if odd := sorted(set(held.items()) ^ {(n, w.shape) for n, w in state.weights.items()}):
        raise CheckpointError(
            f"the checkpoint {folder} and this run train different weights, the first is {odd[0][0]}; "
            f"give the settings that it was made with or start in another folder"
        )


def _sentence(identity: Identity) -> str:
    sizes = ", ".join(f"{label} {value}" for label, value in identity.items() if label != "architecture")
    return f"{identity['architecture']} ({sizes})"


def _kind(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _write(folder: Path, tensors: Mapping[str, Any]) -> None:
    with _single_process():
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)


def _read(folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Fill the tensors of `targets` in place; what the folder holds beyond them is added in new ones."""
    for name, item in _metadata(folder).state_dict_metadata.items():
        if name not in targets:
            is_tensor = isinstance(item, TensorStorageMetadata)
            targets[name] = torch.empty(item.size, dtype=item.properties.dtype) if is_tensor else None
    with _single_process():
        dcp.load(targets, checkpoint_id=folder, no_dist=True)
    return targets


def _metadata(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


@contextmanager
def _single_process() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _failing_as(sentence: str) -> Generator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{sentence} ({error})") from error
    except dcp.api.CheckpointException as error:  # derives from BaseException and holds one failure per rank
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{sentence} ({first})") from error
