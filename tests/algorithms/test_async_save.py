"""A checkpoint written in the background is that of the step at which it was begun; a kill leaves it or another."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from nemo_rl.algorithms.checkpoints import Checkpoints, TrainingInfo
from nemo_rl.config.schema.logging import CheckpointingConfig
from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from nemo_rl.errors import CheckpointError
from nemo_rl.models.load import load_tokenizer
from nemo_rl.objectives.supervised import SupervisedObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.shards import whole
from ranks import run_ranks
from tiny_batches import rollout_batch
from tiny_mesh import own_part
from tiny_models import embedded_folder, tiny_model
from tiny_run import assert_same_run, launch, overrides, reward_file


class Place:
    """Where the data stands: as many steps in as were taken."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Job:
    """A policy and its checkpoints, saved after every step."""

    def __init__(
        self, model: Path, run: Path, *, later: bool, precision: str = "float32", mesh: Mesh | None = None
    ) -> None:
        config = PolicyConfig.model_validate(
            {
                "model_name": str(model),
                "train_global_batch_size": 9,
                "max_total_sequence_length": 64,
                "precision": precision,
                "device": "cpu",
                "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-2}},
                "generation": {"backend": "hf", "max_new_tokens": 8},
            }
        )
        self.backend = PyTorchBackend(config, str(model), load_tokenizer(str(embedded_folder())), mesh=mesh)
        self.batch = rollout_batch(tiny_model("llama"))
        if mesh is not None:
            self.batch = own_part(self.batch, mesh)
        settings = CheckpointingConfig(checkpoint_dir=str(run), async_save=later, keep_top_k=2)
        self.checkpoints, self.place = Checkpoints(settings, ""), Place()
        self.checkpoints.open_folder()

    def step(self) -> None:
        self.backend.train(self.batch, SupervisedObjective())
        self.place.step += 1

    def save(self) -> None:
        self.checkpoints.save(TrainingInfo(self.place.step), self.backend, self.place)

    def resume(self) -> int:
        step = self.checkpoints.resume(self.backend, self.place).step
        assert step == self.place.step
        return step

    def state(self) -> dict[str, Tensor]:
        named, moments = self.backend._masters.named, self.backend._optimizer.state
        found = {name: whole(weight).clone() for name, weight in named.items()}
        for name, weight in named.items():
            found |= {f"{name}.{moment}": whole(value).clone() for moment, value in moments[weight].items()}
        return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    return folder


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let no checkpoint be written before the event."""
    go, save = threading.Event(), dcp.save

    def wait_and_save(*args: Any, **kwargs: Any) -> Any:
        assert go.wait(60)
        return save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", wait_and_save)
    return go


def test_what_is_written_later_is_what_was_there_when_the_save_was_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = held_back(monkeypatch)
    job = Job(model, tmp_path, later=True)
    job.step()
    before = job.state()
    job.save()
    job.step()
    assert not same(before, job.state())
    job.checkpoints.finish(wait=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tmp_step_1"]
    go.set()
    job.checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    resumed = Job(model, tmp_path, later=False)
    assert resumed.resume() == 1
    assert same(resumed.state(), before)
    resumed.step()
    assert same(resumed.state(), job.state())


def test_a_save_waits_for_the_one_before(model: Path, tmp_path: Path) -> None:
    job = Job(model, tmp_path, later=True)
    for step in range(1, 5):
        job.step()
        job.save()
        assert f"step_{step}" not in os.listdir(tmp_path) and job.checkpoints.steps() == [
            n for n in range(step - 2, step) if n > 0
        ]
    job.checkpoints.finish()
    assert job.checkpoints.steps() == [3, 4]


def test_a_failure_in_the_background_is_raised_at_the_next_save_and_leaves_the_checkpoint_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    job = Job(model, tmp_path, later=True)
    job.step()
    job.save()
    job.checkpoints.finish()
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", full)
        job.save()
        with pytest.raises(CheckpointError, match=r"^cannot write the checkpoint .*No space left"):
            job.save()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    job.save()
    job.checkpoints.finish()


def test_after_one_part_has_failed_no_other_is_still_being_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, critic = Job(model, tmp_path, later=True), Job(model, tmp_path / "other", later=True)
    job.checkpoints.include("value", critic.backend)
    save, slow = dcp.save, threading.Event()

    def full_or_slow(*args: Any, **kwargs: Any) -> Any:
        if "value" not in str(kwargs["checkpoint_id"]):
            raise OSError(28, "No space left on device")
        assert slow.wait(60)
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", full_or_slow)
        job.save()
        threading.Timer(0.5, slow.set).start()
        with pytest.raises(CheckpointError, match="No space left"):
            job.checkpoints.finish()
    assert critic.backend.finish_save(wait=False) and not list(tmp_path.glob("*step*"))
    job.save()
    job.checkpoints.finish()
    assert (tmp_path / "step_0" / "value" / "checkpoint.json").is_file()


@pytest.mark.parametrize(("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_goes_on_in_another_precision(first: str, second: str, model: Path, tmp_path: Path) -> None:
    job, resumed = (
        Job(model, tmp_path, later=False, precision=first),
        Job(model, tmp_path, later=True, precision=second),
    )
    job.step()
    job.save()
    assert resumed.resume() == 1
    assert same(job.state(), resumed.state())
    named = resumed.backend._masters.named
    for name, weight in resumed.backend.model.module.named_parameters():
        assert weight.dtype == getattr(torch, second) and torch.equal(weight, named[name].to(weight.dtype))
    resumed.step()


def save_on_a_mesh(rank: int, model: Path, run: Path) -> tuple[dict[str, Tensor], bool]:
    """Each rank is the driver of its own part; the first one's folder is that of all."""
    mesh = Mesh(ParallelSizes(shard=2), torch.device("cpu"))
    job = Job(model, run / f"rank{rank}", later=True, mesh=mesh)
    job.step()
    before = job.state()
    job.backend.save(run / "policy", in_background=True)
    for _ in range(3):
        job.step()  # its collectives meet none of the save
    job.backend.finish_save()
    resumed = Job(model, run / f"rank{rank}", later=True, mesh=mesh)
    resumed.backend.load(run / "policy")
    return before, same(before, resumed.state()) and not same(before, job.state())


def test_ranks_train_while_their_checkpoint_is_written(model: Path, tmp_path: Path) -> None:
    (first, first_same), (second, second_same) = run_ranks(save_on_a_mesh, 2, model, tmp_path)
    assert first_same and second_same and same(first, second)


def killed_in_its_second_save(model: Path, run: Path, later: bool, instant: int) -> None:
    """Die at the n-th time that the second save opens, makes, renames or removes something in the run's folder."""
    torch.set_num_threads(1)
    job = Job(model, run, later=later)
    job.step()
    job.save()
    job.checkpoints.finish()
    job.step()
    left = instant

    def die_at_last(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event.startswith(("open", "os.", "shutil.")) and str(run) in str(args):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die_at_last)
    job.save()
    job.step()
    job.checkpoints.finish()
    os._exit(0)


@pytest.mark.parametrize("later", [False, True])
def test_killed_at_any_instant_of_a_save_a_run_goes_on_from_the_checkpoint_before_or_the_new_one(
    later: bool, model: Path, tmp_path: Path
) -> None:
    whole_run = Job(model, tmp_path / "whole", later=False)
    states = []
    for _ in range(3):
        whole_run.step()
        states.append(whole_run.state())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_rl.training.pytorch.backend"])
    found: list[int] = []
    for instant in (1, 4, 8, 12, 40, 100, 1000):
        run = tmp_path / str(instant)
        process = context.Process(target=killed_in_its_second_save, args=(model, run, later, instant))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        resumed = Job(model, run, later=later)
        assert {path.name for path in run.iterdir()} <= {"step_1", "step_2"}
        found.append(resumed.resume())
        while resumed.place.step < 3:
            assert same(resumed.state(), states[resumed.place.step - 1])
            resumed.step()
        assert same(resumed.state(), states[2])
        if process.exitcode == 0:
            break
    assert found == sorted(found) and set(found) == {1, 2} and len(found) >= 5


def test_a_run_that_saves_in_the_background_is_the_run_that_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    reward, each = reward_file(tmp_path), "checkpointing.save_period=1"
    launch(overrides(tiny_llama, reward, tmp_path / "now", each))
    outcome = launch(overrides(tiny_llama, reward, tmp_path / "later", each, "checkpointing.async_save=true"))
    assert outcome.finished and (tmp_path / "later" / "step_3").is_dir()
    assert not list((tmp_path / "later").glob("tmp_*"))
    assert_same_run(tmp_path / "now", tmp_path / "later", 3)
