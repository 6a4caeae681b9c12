"""From a checkpoint of any mesh to a Hugging Face model folder, without a process group and one tensor at a time."""

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel

from nemo_rl.atomic import atomic_folder
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.errors import CheckpointError, ConfigError
from nemo_rl.models.causal_lm import VALUE_HEAD
from nemo_rl.models.load import (
    SCORE,
    empty_model,
    is_stored_as_it_is,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    model_identity,
    resolve_model,
)
from nemo_rl.models.weight_files import WeightFiles, named_tensors, write_weight_files
from nemo_rl.training.pytorch.checkpoint import (
    MANIFEST,
    Manifest,
    check_files,
    describe_model,
    export_hf,
    read_manifest,
)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def byte_count(size: str) -> int:
    """Bytes of a size as Transformers writes it.

    >>> byte_count("5GB"), byte_count("1.5 mb")
    (5000000000, 1500000)

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", size.strip().upper())
    if match is None:
        raise ConfigError(f"{size!r} is no size of a file; write it as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[(match[2] or "").removeprefix("B")])


def convert_checkpoint(
    checkpoint: Path, folder: Path, config: Path | None = None, *, dtype: str = "bfloat16", max_bytes: int = 5 * 10**9
) -> str:
    """Write the weights of a checkpoint as a model folder that plain Transformers loads, with its tokenizer.

    Of a policy with a value head the policy is written; a reward model, or a critic of its own, becomes a model for
    sequence classification. What was not trained comes from the files of the model that the run began with.

    Args:
        checkpoint: `step_N/policy/weights` or a folder above it; of a critic of its own, `step_N/value/weights`.
        folder: to write; it may be there if it is empty.
        config: of the run, which names the model; None takes the one beside the checkpoint.
        dtype: of the floating-point tensors in the files, by its name in torch.
        max_bytes: of a file.

    Returns:
        The class of Transformers that loads it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another model, or `folder` holds something.
        ConfigError: the configuration names no model.
        ModelError: the model is not there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} holds something already; choose another --hf-ckpt-path or empty it")
    part = _part(checkpoint)
    manifest = read_manifest(part)
    for kind in ("weights/", "tokenizer/"):
        check_files(part, manifest, kind)
    stored = {
        name: item.size
        for name, item in dcp.FileSystemReader(part / "weights").read_metadata().state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata) and not name.startswith(VALUE_HEAD)
    }
    if any(".lora_A." in name for name in stored):
        raise CheckpointError(
            f"the checkpoint {part} holds adapters alone; take the folder hf/ that the run wrote at its end"
        )
    source = resolve_model(_model_name(config or part.parent / "config.yaml", part.name), cache_dir())
    model = empty_model(source, dtype=getattr(torch, dtype), is_scalar=SCORE in stored)
    _check_model(part, manifest, model, stored)
    rest = WeightFiles.find(source)
    try:
        with atomic_folder(folder) as work:
            if is_stored_as_it_is(model):
                _stream(part, model, stored, rest, work, max_bytes)
            else:
                _convert_whole(part, source, model.dtype, stored, work, max_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder} ({error}); free space or choose another folder") from error
    return "AutoModelForSequenceClassification" if SCORE in stored else "AutoModelForCausalLM"


def _part(checkpoint: Path) -> Path:
    """The folder of one trained model, which has a manifest."""
    for part in (checkpoint, checkpoint.parent, checkpoint / "policy"):
        if (part / MANIFEST).is_file() and (part != checkpoint.parent or checkpoint.name == "weights"):
            return part.absolute()
    raise CheckpointError(
        f"{checkpoint} is no checkpoint, for there is no {MANIFEST}; give a folder step_N/policy/weights or step_N"
    )


def _model_name(config: Path, part: str) -> str:
    """The model that a part of a run began with: section `policy`, or one by the part's own name."""
    try:
        sections = yaml.safe_load(config.read_text())
        own = sections.get(part)
        section = own if isinstance(own, dict) and "model_name" in own else sections["policy"]
        return str(section["model_name"])
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{config} names no model under policy.model_name ({error!r}); give --config") from error


def _check_model(part: Path, manifest: Manifest, model: PreTrainedModel, stored: Mapping[str, torch.Size]) -> None:
    identity = dict(model_identity(model.config))
    if manifest.identity != identity:
        raise CheckpointError(
            f"the checkpoint {part} is of another model: it holds {describe_model(manifest.identity)}, the "
            f"configuration names {describe_model(identity)}; give the --config of the run that it was made by"
        )
    known = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    if odd := sorted(stored.items() - known.items()):
        raise CheckpointError(f"the checkpoint {part} holds {odd[0][0]} {list(odd[0][1])}, which the model has not")


def _read(part: Path, name: str, size: torch.Size) -> Tensor:
    """One tensor of a checkpoint, float32."""
    found = {name: torch.empty(size)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(found, checkpoint_id=part / "weights", no_dist=True)
    return found[name]


def _stream(
    part: Path,
    model: PreTrainedModel,
    stored: Mapping[str, torch.Size],
    rest: WeightFiles | None,
    folder: Path,
    max_bytes: int,
) -> None:
    """Write what the model's files would hold, one tensor after the other."""
    tensors = named_tensors(model)
    if missing := sorted(tensors.keys() - stored.keys() - (rest.names if rest else set[str]())):
        raise CheckpointError(f"neither the checkpoint {part} nor the model that the run began with has {missing[0]}")

    def read(name: str) -> Tensor:
        if name in stored:
            return _read(part, name, stored[name])
        assert rest is not None
        return rest.read(name)

    dtype = model.dtype
    shapes = {name: (t.shape, dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()}
    write_weight_files(folder, shapes, read, max_bytes)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    shutil.copytree(part / "tokenizer", folder, dirs_exist_ok=True)


def _convert_whole(
    part: Path, source: str, dtype: torch.dtype, stored: Mapping[str, torch.Size], folder: Path, max_bytes: int
) -> None:
    """Let Transformers write a model whose files hold other tensors than it has, such as experts apart; all at once."""
    if SCORE in stored:
        model, _ = load_scalar_model(source, dtype=dtype)
    else:
        model, _ = load_causal_lm(source, dtype=dtype)
    for name, tensor in named_tensors(model).items():
        if name in stored:
            tensor.detach().copy_(_read(part, name, stored[name]))
    tokenizer = load_tokenizer(str(part / "tokenizer"))
    export_hf(model, tokenizer, folder, dtype, model.named_parameters(), max_bytes=max_bytes)
