"""Every rank reads its own part of a model's files: the bits of the whole model, in the memory of the part."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from nemo_rl.models.load import load_tokenizer
from nemo_rl.models.local import local_part
from nemo_rl.models.weight_files import WeightFiles
from nemo_rl.training.pytorch import loading as loading_module
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.loading import Head
from ranks import run_ranks
from tiny_batches import rollout_batch
from tiny_mesh import MODEL, own_part, size_keys
from tiny_models import embedded_folder, tiny_model

MESHES: dict[str, tuple[ParallelSizes, dict[str, Any]]] = {
    "fsdp2": (ParallelSizes(shard=2), {}),
    "tp": (ParallelSizes(tensor=2), {}),
    "fsdp2-tp-sp": (ParallelSizes(shard=2, tensor=2), {"sequence_parallel": True}),
    "fsdp2-3-tp": (ParallelSizes(shard=3, tensor=2), {}),
    "hsdp": (ParallelSizes(replicate=2, shard=2), {}),
    "ep": (ParallelSizes(shard=4, expert=2), {}),
    "pp": (ParallelSizes(pipeline=2), {}),
    "pp-fsdp2": (ParallelSizes(pipeline=2, shard=2), {}),
}

SOURCES: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": partial(tiny_model, "llama", tie_word_embeddings=True, dtype=torch.bfloat16, **MODEL),
    "untied": partial(tiny_model, "llama", tie_word_embeddings=False, dtype=torch.bfloat16, **MODEL),
    "gpt_oss": partial(tiny_model, "gpt_oss", dtype=torch.bfloat16),
}


def make(folder: Path, mesh: Mesh, settings: dict[str, Any], *, precision: str, head: Head) -> PyTorchBackend:
    config = PolicyConfig.model_validate(
        {
            "model_name": str(folder),
            "train_global_batch_size": 9,
            "max_total_sequence_length": 64,
            "precision": precision,
            "device": "cpu",
            "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-2}},
            "generation": {"backend": "hf", "max_new_tokens": 8},
            "dtensor_cfg": {**size_keys(mesh.sizes), **settings},
        }
    )
    return PyTorchBackend(config, str(folder), load_tokenizer(str(embedded_folder())), head=head, mesh=mesh)


def held(backend: PyTorchBackend) -> dict[str, Tensor]:
    """What a rank holds: parameters by all their names, and all buffers."""
    module = backend.model.module
    parameters = module.named_parameters(remove_duplicate=False)
    return {name: local_part(tensor.detach()).clone() for name, tensor in (*parameters, *module.named_buffers())}


def ties(backend: PyTorchBackend) -> list[tuple[str, str]]:
    first: dict[int, str] = {}
    named = backend.model.module.named_parameters(remove_duplicate=False)
    return [(first.setdefault(id(parameter), name), name) for name, parameter in named]


def load_both_ways(rank: int, name: str, folder: Path, precision: str, head: Head) -> tuple[list[str], float]:
    """What differs between the two ways, and the share of the model that a rank holds."""
    del rank
    sizes, settings = MESHES[name]
    mesh, wrong = Mesh(sizes, torch.device("cpu")), []
    with pytest.MonkeyPatch.context() as patch:
        for loader in ("load_causal_lm", "load_scalar_model"):
            patch.setattr(loading_module, loader, None)
        ours = make(folder, mesh, settings, precision=precision, head=head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFiles, "find", lambda _: None)
        theirs = make(folder, mesh, settings, precision=precision, head=head)
    one, other = held(ours), held(theirs)
    wrong += [f"names {sorted(one.keys() ^ other.keys())}"] * (one.keys() != other.keys())
    wrong += [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
    wrong += ["ties"] * (ties(ours) != ties(theirs))
    left, right = (dict(backend.model.module.named_parameters()) for backend in (ours, theirs))
    wrong += [f"{name} is spread otherwise" for name in left if placed(left[name]) != placed(right[name])]
    if head != "scalar":
        batch = own_part(rollout_batch(tiny_model("llama")), mesh)
        wrong += ["log-probabilities"] * (not torch.equal(ours.logprobs(batch), theirs.logprobs(batch)))
    total = sum(parameter.numel() for parameter in SOURCES[folder.name]().parameters())
    return wrong, sum(local_part(parameter).numel() for parameter in left.values()) / total


def placed(tensor: Tensor) -> Any:
    return (tensor.requires_grad, tensor.placements if isinstance(tensor, DTensor) else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, make_model in SOURCES.items():
        make_model().save_pretrained(path / name, max_shard_size="20KB")
        assert len(list((path / name).glob("*.safetensors"))) > 3
    return path


@pytest.mark.parametrize(
    ("mesh", "source", "precision", "head"),
    [
        ("ep", "gpt_oss", "float32", "language"),
        ("fsdp2", "tied", "float32", "language_and_value"),
        ("fsdp2", "untied", "bfloat16", "scalar"),
        ("tp", "untied", "float32", "language"),
        ("fsdp2-tp-sp", "tied", "float32", "language"),
        ("fsdp2-3-tp", "untied", "float32", "language"),
        ("hsdp", "untied", "bfloat16", "language"),
        ("pp", "tied", "bfloat16", "language"),
        ("pp-fsdp2", "tied", "float32", "language"),
    ],
)
def test_what_a_rank_reads_is_its_part_of_the_whole_model(
    mesh: str, source: str, precision: str, head: Head, folder: Path
) -> None:
    found = run_ranks(load_both_ways, MESHES[mesh][0].world_size, mesh, folder / source, precision, head)
    assert [wrong for wrong, _ in found] == [[]] * len(found)
    assert all(share < 0.8 for _, share in found)


def load_whole(rank: int, folder: Path) -> list[str]:
    """What a rank logs about a model whose files hold other tensors than it has."""
    del rank
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("nemo_rl")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    mesh = Mesh(ParallelSizes(shard=2), torch.device("cpu"))
    backend = make(folder, mesh, {}, precision="float32", head="language")
    assert backend.logprobs(own_part(rollout_batch(tiny_model("deepseek_v3")), mesh)).isfinite().all()
    return said


def test_a_model_whose_files_hold_other_tensors_is_loaded_whole_and_says_so(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    for said in run_ranks(load_whole, 2, tmp_path):
        assert [text for text in said if "loaded whole by every rank" in text and str(tmp_path) in text]


def resident(field: str) -> int:
    """Bytes, `VmHWM` or `VmRSS`, of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def peak_growth(load: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    load()
    return resident("VmHWM") - before


def measure(rank: int, folder: Path, whole: bool) -> int:
    """By how much the memory of a rank grows, at most, when it loads its part, or the whole first."""
    del rank
    mesh, kept = Mesh(ParallelSizes(shard=2), torch.device("cpu")), []
    with pytest.MonkeyPatch.context() as patch:
        if whole:
            patch.setattr(WeightFiles, "find", lambda _: None)
        # what is imported and kept besides
        make(folder.parent / "small", mesh, {}, precision="float32", head="language")
        return peak_growth(lambda: kept.append(make(folder, mesh, {}, precision="float32", head="language")))


def test_a_rank_needs_the_memory_of_its_part_and_of_one_file(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, num_key_value_heads=8, **sizes)).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path / "large", max_shard_size="20MB")
    tiny_model("llama").save_pretrained(tmp_path / "small")
    files = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    share = sum(files)  # in float32, of which each rank has half
    assert share > 90e6 and len(files) >= 5
    del model
    parts = run_ranks(measure, 2, tmp_path / "large", False)
    assert max(parts) <= 1.2 * share + max(files), parts
    assert min(run_ranks(measure, 2, tmp_path / "large", True)) > 1.2 * share + max(files)
