"""A restored run continues bit for bit; what is truncated or of another model is refused before a weight changes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl.errors import BackendError, CheckpointError
from nemo_rl.models.load import load_tokenizer, model_identity
from nemo_rl.training.pytorch.checkpoint import TrainingState, export_hf, load_state, save_state
from nemo_rl.training.pytorch.optim import MasterWeights, build_optimizer, build_scheduler
from nemo_rl.training.pytorch.shards import clip_grad_norm
from tiny_models import embedded_folder, tiny_model

CHAIN = (
    {"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"start_factor": 0.1, "total_iters": 4}},
    {"name": "torch.optim.lr_scheduler.CosineAnnealingLR", "kwargs": {"T_max": 8}},
    {"milestones": [4]},
)


class Trained:
    """A tiny model with all that trains it."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        family: str = "llama",
        optimizer: str = "torch.optim.AdamW",
        lr: float = 1e-2,
    ) -> None:
        self.model: PreTrainedModel = tiny_model(family, seed=seed, dtype=dtype, tie_word_embeddings=True)
        self.masters = MasterWeights(self.model)
        self.optimizer = build_optimizer(self.masters.parameters, optimizer, {"lr": lr})
        self.scheduler = build_scheduler(self.optimizer, CHAIN)
        identity = model_identity(self.model.config)
        self.state = TrainingState(self.masters.named, self.optimizer, self.scheduler, identity)

    def steps(self, first: int, last: int) -> list[float]:
        """Train on batches `first` to `last` and return the losses."""
        losses: list[float] = []
        for index in range(first, last):
            tokens = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(index))
            loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            clip_grad_norm(self.masters.parameters, 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.masters.publish()
            losses.append(loss.item())
        return losses

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.masters.named.items()}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(embedded_folder()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("run") / "policy"
    run = Trained(0, torch.bfloat16)
    run.steps(0, 2)
    save_state(folder, run.state, tokenizer)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 3])
def test_a_restored_run_continues_bit_for_bit(
    dtype: torch.dtype, before: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    run, restored = Trained(0, dtype), Trained(1, dtype)
    run.steps(0, before)
    save_state(tmp_path / "policy", run.state, tokenizer)
    load_state(tmp_path / "policy", restored.state)
    restored.masters.publish()
    assert restored.steps(before, 6) == run.steps(before, 6)
    assert all(torch.equal(weight, restored.masters.named[name]) for name, weight in run.masters.named.items())
    assert all(map(torch.equal, run.model.parameters(), restored.model.parameters()))
    assert restored.scheduler.get_last_lr() == run.scheduler.get_last_lr()


def test_a_learning_rate_changed_on_resume_holds_from_then_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    run = Trained(0, torch.float32)
    run.steps(0, 6)  # two steps into the second of its schedules
    save_state(tmp_path / "policy", run.state, tokenizer)
    faster, restored = (Trained(0, torch.float32, lr=3e-2) for _ in range(2))
    load_state(tmp_path / "policy", restored.state)
    faster.steps(0, 6)
    for step in range(6, 9):
        assert restored.scheduler.get_last_lr() == faster.scheduler.get_last_lr()
        faster.steps(step, step + 1)
        restored.steps(step, step + 1)


def test_the_layout_is_that_of_nemo_rl(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"weights", "optimizer", "tokenizer", "checkpoint.json"}
    assert load_tokenizer(str(saved / "tokenizer"))("2 + 3").input_ids
    stored = dcp.FileSystemReader(saved / "weights").read_metadata().state_dict_metadata
    assert stored.keys() == Trained(0, torch.bfloat16).masters.named.keys()
    assert {item.properties.dtype for item in stored.values() if isinstance(item, TensorStorageMetadata)} == {
        torch.float32
    }


@pytest.mark.parametrize(
    "part", ["weights/__0_0.distcp", "weights/.metadata", "optimizer/__0_0.distcp", "checkpoint.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage", "one bit"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(saved: Path, part: str, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(saved, folder)
    content = (folder / part).read_bytes()
    (folder / part).unlink()
    if damage == "cut":
        (folder / part).write_bytes(content[: len(content) // 2])
    if damage == "garbage":
        (folder / part).write_bytes(b"\x93" * len(content))
    if damage == "one bit":
        middle = len(content) // 2
        (folder / part).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    run = Trained(1, torch.bfloat16)
    before = run.weights()
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        load_state(folder, run.state)
    assert all(torch.equal(weight, before[name]) for name, weight in run.masters.named.items())


@pytest.mark.parametrize(
    "manifest", ["[]", "{}", "null", '{"identity": 5, "optimizer": 5, "steps": "many", "files": []}']
)
def test_a_manifest_that_is_something_else_is_refused_in_one_sentence(
    saved: Path, manifest: str, tmp_path: Path
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(saved, folder)
    (folder / "checkpoint.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"is not a whole checkpoint: [^\n]*; resume from another one$"):
        load_state(folder, Trained(1, torch.bfloat16).state)


def test_a_schedule_shorter_than_the_checkpoint_is_refused_before_a_weight_changes(saved: Path, tmp_path: Path) -> None:
    run = Trained(1, torch.bfloat16)
    one_step = {"name": "torch.optim.lr_scheduler.OneCycleLR", "kwargs": {"max_lr": 1.0, "total_steps": 1}}
    scheduler = build_scheduler(run.optimizer, [one_step])
    before = run.weights()
    with pytest.raises(BackendError, match="cannot go on after optimizer step 2"):
        load_state(saved, TrainingState(run.masters.named, run.optimizer, scheduler, run.state.identity))
    assert all(torch.equal(weight, before[name]) for name, weight in run.masters.named.items())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"family": "qwen2"}, r"holds llama \(layers 2, .*vocabulary 128\), this run trains qwen2 \(layers 2"),
        (
            {"optimizer": "torch.optim.NAdam"},
            r"made with torch\.optim\.adamw\.AdamW and this run uses torch\.optim\.nadam",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_both_are_named(
    saved: Path, other: dict[str, str], words: str
) -> None:
    run = Trained(1, torch.bfloat16, **other)
    before = run.weights()
    with pytest.raises(CheckpointError, match=words):
        load_state(saved, run.state)
    assert all(torch.equal(weight, before[name]) for name, weight in run.masters.named.items())


def test_a_checkpoint_of_other_trainable_weights_is_refused(saved: Path) -> None:
    run = Trained(1, torch.bfloat16)
    fewer = {name: weight for name, weight in run.masters.named.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"different weights, the first is model\.norm\.weight"):
        load_state(saved, TrainingState(fewer, run.optimizer, run.scheduler, run.state.identity))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save_state(tmp_path / "file" / "policy", Trained(0, torch.float32).state, tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_in_plain_transformers_and_says_its_dtype(
    dtype: torch.dtype, tied: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=tied)
    masters = MasterWeights(model)
    for weight in masters.parameters:
        weight.data.mul_(1.001)
    export_hf(model, tokenizer, tmp_path, dtype, masters.named.items())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert dict(loaded.named_parameters()).keys() == masters.named.keys()
    assert all(torch.equal(weight, masters.named[name].to(dtype)) for name, weight in loaded.named_parameters())
    assert str(model.config.dtype).endswith("bfloat16")  # the model itself is as it was
    assert load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template
