"""Saving and restoring a policy's training state bit for bit, and exporting it as a Hugging Face folder.

A saved folder has the layout of NeMo RL, both parts in the format of torch.distributed.checkpoint:

    weights/          the trainable weights by name; float32 masters where they exist
    optimizer/        `state.<name>.<moment>` of each weight
    tokenizer/        as Transformers saves it
    checkpoint.json   which model this is, how far the schedule has come, and a checksum of every file
"""

import copy
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl.errors import CheckpointError
from nemo_rl.models.load import Identity
from nemo_rl.training.pytorch.optim import advance
from nemo_rl.training.pytorch.spread import Alone, Spread

MANIFEST = "checkpoint.json"
_BLOCK = 1 << 20
"""Bytes of a file that are read at a time."""


class Manifest(BaseModel):
    """What `checkpoint.json` says.

    Attributes:
        identity: of the model (`model_identity`).
        optimizer: its class.
        steps: optimizer steps taken.
        files: CRC-32 of every other file, by its path in the folder.
    """

    identity: dict[str, str | int]
    optimizer: str
    steps: NonNegativeInt
    files: dict[str, int]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that a training step reads and changes; loading fills these very objects.

    Attributes:
        weights: what the optimizer steps, by name (`MasterWeights.named`), and what else a step changes.
        optimizer: over weights that have names here.
        scheduler: of that optimizer.
        identity: of the model (`model_identity`).
        is_shared: every rank of the process group has such a state, and all of them save and load together. What is
            written does not depend on how weights are spread, so a checkpoint of one mesh is one of any other.
    """

    weights: Mapping[str, Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler
    identity: Identity
    is_shared: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank writes what is there once."""
        return not self.is_shared or dist.get_rank() == 0


def save_state(folder: Path, state: TrainingState, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the training state into `folder`; call it within `atomic_folder` so that a kill leaves no half of it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    _writer(folder, state, tokenizer, _parts(state))()


def begin_save(
    folder: Path, state: TrainingState, tokenizer: PreTrainedTokenizerBase, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Copy the training state to host memory, which takes that much again until it is written.

    Args:
        folder: as of `save_state`.
        state: free to change once this returns.
        tokenizer: saved at once.
        group: of a shared state, all its ranks under gloo, whose collectives must not meet those of training.

    Returns:
        What writes the rest, for another thread; it raises as `save_state` does.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    stager = DefaultStager(StagingOptions(*[False] * 4))  # into plain memory, now: also that of a CPU is copied
    copied = cast(dict[str, dict[str, Any]], stager.stage(_parts(state)))
    stager.close()
    return _writer(folder, state, tokenizer, copied, group)


def load_state(folder: Path, state: TrainingState) -> None:
    """Restore weights and optimizer exactly as they were saved, and take the schedule to the step it had reached.

    Hyper-parameters, the learning rate among them, stay those that `state` was built with: what a run is given when it
    is continued holds from then on, and with the same settings it continues bit for bit. Everything is checked before
    the first weight changes. With master weights, call `publish` afterwards.

    Args:
        folder: what `save_state` wrote.
        state: with a scheduler that has not taken a step.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or of another model, optimizer or set of weights.
        BackendError: the schedule does not go as far as the checkpoint.
    """
    manifest = _verify(folder, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(manifest.steps):
            advance(state.scheduler)
    with _failing_as(f"the checkpoint {folder} is damaged; resume from an earlier one"):
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in _read(folder / "optimizer", _moment_targets(folder / "optimizer", state), state).items():
            name, _, moment = key.removeprefix("state.").rpartition(".")
            by_name.setdefault(name, {})[moment] = value
        names = _stepped_names(state)
        moments = {index: by_name[name] for index, name in enumerate(names) if name in by_name}
        _read(folder / "weights", {name: weight.detach() for name, weight in state.weights.items()}, state)
        state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})


def export_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Tensor]],
    spread: Spread | None = None,
    max_bytes: int = 50 * 10**9,
) -> None:
    """Write a model folder that plain Transformers loads: safetensors, configuration, tokenizer.

    Of a model that is spread every rank must call this; the first one writes.

    Args:
        model: gives the architecture, and what it keeps besides parameters.
        tokenizer: saved beside it.
        folder: made if it is not there.
        dtype: of the floating-point tensors in the files.
        weights: all parameters of this rank by name, tied ones once.
        spread: where the tensors are; None is here.
        max_bytes: of a file.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    kept = model.state_dict(keep_vars=True).items()
    others = ((name, tensor) for name, tensor in kept if not isinstance(tensor, nn.Parameter))
    spread = spread or Alone()
    leads = not spread.is_shared or dist.get_rank() == 0
    exported: dict[str, Tensor] = {}
    for name, full in spread.stream(chain(others, weights)):
        if leads:
            exported[name] = full.to("cpu", dtype if full.is_floating_point() else full.dtype).contiguous()
    if not leads:
        return
    with _failing_as(f"cannot write the model folder {folder}"):
        model.save_pretrained(folder, state_dict=exported, max_shard_size=max_bytes)
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _parts(state: TrainingState) -> dict[str, dict[str, Any]]:
    """The tensors of a checkpoint by folder and name."""
    weights = {name: weight.detach() for name, weight in state.weights.items()}
    return {"weights": weights, "optimizer": _named_optimizer_state(state)}


def _writer(
    folder: Path,
    state: TrainingState,
    tokenizer: PreTrainedTokenizerBase,
    parts: Mapping[str, dict[str, Any]],
    group: dist.ProcessGroup | None = None,
) -> Callable[[], None]:
    """Save the tokenizer; returns what writes the tensors, and last of all the manifest of `state` as it is now."""
    sentence = f"cannot write the checkpoint {folder}"
    manifest = Manifest(
        identity=dict(state.identity), optimizer=_kind(state.optimizer), steps=state.scheduler.last_epoch, files={}
    )
    with _failing_as(sentence):
        folder.mkdir(parents=True, exist_ok=True)
        if state.leads:
            tokenizer.save_pretrained(folder / "tokenizer")

    def write() -> None:
        with _failing_as(sentence):
            for part, tensors in parts.items():
                with _quietly():
                    dcp.save(tensors, checkpoint_id=folder / part, process_group=group, no_dist=not state.is_shared)
            if not state.leads:
                return
            files = {path.relative_to(folder).as_posix(): _checksum(path) for path in _files(folder)}
            (folder / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json(indent=2))

    return write


def _named_optimizer_state(state: TrainingState) -> dict[str, Any]:
    """The optimizer's state by weight name instead of position, which another sharding or order would change."""
    held = state.optimizer.state_dict()
    return {
        f"state.{name}.{moment}": value
        for index, name in enumerate(_stepped_names(state))
        for moment, value in held["state"].get(index, {}).items()
    }


def _stepped_names(state: TrainingState) -> list[str]:
    """Names in the order in which the optimizer counts its parameters."""
    names = {id(weight): name for name, weight in state.weights.items()}
    return [names[id(weight)] for group in state.optimizer.param_groups for weight in group["params"]]


def read_manifest(folder: Path) -> Manifest:
    """What a checkpoint says about itself.

    Raises:
        CheckpointError: it is not whole.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {MANIFEST}: {said}; resume from another one"
        ) from error


def check_files(folder: Path, manifest: Manifest, part: str = "") -> None:
    """Compare the files of a checkpoint, or of a part of it, with their checksums.

    Raises:
        CheckpointError: one is damaged or missing.
    """
    for name, checksum in manifest.files.items():
        if name.startswith(part) and (not (folder / name).is_file() or _checksum(folder / name) != checksum):
            raise CheckpointError(
                f"the checkpoint file {folder / name} is damaged or missing; resume from an earlier checkpoint"
            )


def _verify(folder: Path, state: TrainingState) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.identity != dict(state.identity):
        raise CheckpointError(
            f"the checkpoint {folder} is of another model: it holds {describe_model(manifest.identity)}, this run "
            f"trains {describe_model(state.identity)}; give the model that it was made from or start in another folder"
        )
    if manifest.optimizer != _kind(state.optimizer):
        raise CheckpointError(
            f"the checkpoint {folder} was made with {manifest.optimizer} and this run uses "
            f"{_kind(state.optimizer)}; use the same optimizer or start in another folder"
        )
    if state.leads:
        check_files(folder, manifest)
    with _failing_as(f"the checkpoint {folder} is damaged; resume from an earlier one"):
        stored = _metadata(folder / "weights").state_dict_metadata
    held = {name: item.size for name, item in stored.items() if isinstance(item, TensorStorageMetadata)}
    if odd := sorted(set(held.items()) ^ _shapes(state)):
        raise CheckpointError(
            f"the checkpoint {folder} and this run train different weights, the first is {odd[0][0]}; "
            f"give the settings that it was made with or start in another folder"
        )
    return manifest


def _shapes(state: TrainingState) -> set[tuple[str, torch.Size]]:
    """Names and shapes of the weights of all ranks."""
    own = {(name, weight.shape) for name, weight in state.weights.items()}
    if not state.is_shared:
        return own
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return set().union(*everyone)


def describe_model(identity: Identity) -> str:
    """Name a model for people."""
    sizes = ", ".join(f"{label} {value}" for label, value in identity.items() if label != "architecture")
    return f"{identity.get('architecture')} ({sizes})"


def _kind(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _checksum(path: Path) -> int:
    """CRC-32 of a file: 2 GB/s, three times as fast as a digest that withstands intent."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _read(folder: Path, targets: dict[str, Any], state: TrainingState) -> dict[str, Any]:
    """Fill the tensors of `targets` in place."""
    with _quietly():
        dcp.load(targets, checkpoint_id=folder, no_dist=not state.is_shared)
    return targets


def _moment_targets(folder: Path, state: TrainingState) -> dict[str, Any]:
    """New tensors for what an optimizer's folder holds of these weights, those of their shape spread as they are."""
    targets: dict[str, Any] = {}
    for key, item in _metadata(folder).state_dict_metadata.items():
        weight = state.weights.get(key.removeprefix("state.").rpartition(".")[0])
        if weight is None:
            continue  # of another pipeline stage
        if not isinstance(item, TensorStorageMetadata):
            targets[key] = None
        elif weight.shape == item.size:
            targets[key] = torch.empty_like(weight.detach(), dtype=item.properties.dtype)
        else:
            targets[key] = torch.empty(item.size, dtype=item.properties.dtype)
    return targets


def _metadata(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


@contextmanager
def _quietly() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _failing_as(sentence: str) -> Generator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{sentence} ({error})") from error
    except dcp.api.CheckpointException as error:  # derives from BaseException and holds one failure per rank
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{sentence} ({first})") from error
