"""The safetensors files of a model folder: slices of them read into place, and whole ones written bit by bit."""

import json
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard  # pyright: ignore[reportPrivateUsage]

from nemo_rl.errors import ModelError
from nemo_rl.models.local import local_part

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the words of https://huggingface.co/docs/safetensors."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where the tensors of a model are on this machine.

    Attributes:
        folder: of the files.
        files: the file of each tensor, by the tensor's name.
    """

    folder: Path
    files: Mapping[str, str]

    @property
    def names(self) -> Set[str]:
        """Of the tensors."""
        return self.files.keys()

    @classmethod
    def find(cls, source: str) -> "WeightFiles | None":
        """The safetensors files of a model folder, or of a hub name that is in the cache; None if they are not here.

        Args:
            source: what `nemo_rl.models.load.resolve_model` returned.
        """
        folder = Path(source)
        if not folder.is_dir():
            config = try_to_load_from_cache(source, "config.json")
            if not isinstance(config, str):
                return None
            folder = Path(config).parent
        try:
            if (folder / _INDEX).is_file():
                files = cast("dict[str, str]", json.loads((folder / _INDEX).read_text())["weight_map"])
            else:
                with safe_open(folder / _ONE, framework="pt") as opened:
                    files = dict.fromkeys(opened.keys(), _ONE)
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        return cls(folder, files) if all((folder / file).is_file() for file in set(files.values())) else None

    def read(self, name: str) -> Tensor:
        """All of a tensor.

        Raises:
            ModelError: its file is damaged.
        """
        with _reading(self.folder / self.files[name]) as opened:
            return cast(Tensor, opened.get_tensor(name))

    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Give an empty module (`nemo_rl.models.load.empty_model`) memory, and each tensor what this rank holds of it.

        What is in no file starts at zero: a head that is new. Values are cast to the module's dtypes.

        Args:
            module: whole, or divided over the ranks of a mesh while it was empty.
            device: where its tensors are put.

        Raises:
            ModelError: a file is damaged, or holds a tensor of another shape.
        """
        _materialise(module, device)
        by_file: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in named_tensors(module).items():
            if name in self.files:
                by_file[self.files[name]][name] = tensor
            else:
                local_part(tensor.detach()).zero_()
        for file, tensors in sorted(by_file.items()):
            with _reading(self.folder / file) as opened:
                for name, tensor in tensors.items():
                    _copy_part(tensor.detach(), name, opened)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    state = cast("dict[str, Tensor]", module.state_dict(keep_vars=True))
    unique = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if unique[id(tensor)] == name}


def write_weight_files(
    folder: Path, shapes: Mapping[str, tuple[torch.Size, torch.dtype]], read: Callable[[str], Tensor], max_bytes: int
) -> None:
    """Write tensors into files as Transformers reads them, one tensor in memory at a time.

    Args:
        folder: that is there.
        shapes: shape and dtype in the file of each tensor, by name.
        read: gives a tensor, in any dtype.
        max_bytes: of the tensors in one file, unless a single one is larger.
    """
    groups: list[list[str]] = [[]]
    sizes = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[one] for one in groups[-1]) + size > max_bytes:
            groups.append([])
        groups[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = _ONE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_file(folder / file, {name: shapes[name] for name in names}, read)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))


def _write_file(
    path: Path, shapes: Mapping[str, tuple[torch.Size, torch.dtype]], read: Callable[[str], Tensor]
) -> None:
    """Eight bytes of the header's length, the header in JSON, and the tensors behind each other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (_, dtype) in shapes.items():
            file.write(memoryview(read(name).to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy()))


@contextmanager
def _reading(path: Path) -> Generator[Any]:
    """Open a file; what is mapped of it counts as memory of this process until it is closed."""
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weight file {path} is truncated or damaged ({error}); fetch the model again") from error


def _materialise(module: nn.Module, device: torch.device) -> None:
    """Give every tensor without memory some, uninitialised; tied parameters stay tied."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            owners[id(parameter)].append((part, name))
    # as `Module.to_empty` does, which would take the computed buffers away
    fill = module._apply  # pyright: ignore[reportPrivateUsage]
    fill(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    for (first, its_name), *others in owners.values():
        for part, name in others:
            part.register_parameter(name, first.get_parameter(its_name))


def _copy_part(tensor: Tensor, name: str, opened: Any) -> None:
    """Copy what this rank holds of a tensor out of an open file, and no more than that."""
    stored = opened.get_slice(name)
    if stored.get_shape() != list(tensor.shape):
        raise ModelError(f"the weight files have {name} in the shape {stored.get_shape()}, not {list(tensor.shape)}")
    local = local_part(tensor)
    if local.numel() > 0:
        region = _region(tensor) if isinstance(tensor, DTensor) else ()
        local.copy_(stored[region] if region else opened.get_tensor(name))


def _region(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's part of a tensor is in the whole.

    Where two axes of the mesh divide one dimension, tensor parallelism (the last axis) did so first and FSDP divided
    what that left; its placement says so by its kind.
    """
    start, length = [0] * tensor.ndim, list(tensor.shape)
    mesh = tensor.device_mesh
    for axis in reversed(range(mesh.ndim)):
        placement = tensor.placements[axis]
        if isinstance(placement, Shard | _StridedShard):
            dim, index = placement.dim, mesh.get_local_rank(axis)
            chunk = -(-length[dim] // mesh.size(axis))
            begin = min(chunk * index, length[dim])
            start[dim] += begin
            length[dim] = min(chunk, length[dim] - begin)
    assert length == list(local_part(tensor).shape)
    return tuple(slice(first, first + count) for first, count in zip(start, length, strict=True))
