"""Which checkpoints stay, and what a run does about those it finds."""

import json
import shutil
from pathlib import Path

import pytest

from nemo_rl.algorithms.checkpoints import Checkpoints, TrainingInfo
from nemo_rl.config.schema.logging import CheckpointingConfig
from nemo_rl.errors import CheckpointError
from tiny_run import (  # pyright: ignore[reportImplicitRelativeImport]
    assert_same_run,
    launch,
    make_tiny_llama,
    overrides,
    records,
    reward_file,
)


class Notebook:
    """The smallest thing with a state: stands in for policy and loader."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def save(self, folder: Path, *, in_background: bool = False) -> None:
        folder.mkdir()
        (folder / "text").write_text(self.text)

    def finish_save(self, *, wait: bool = True) -> bool:
        return True

    def load(self, folder: Path) -> None:
        self.text = (folder / "text").read_text()

    def describe(self) -> dict[str, int]:
        return {"optimizer_steps": 0}

    def state_dict(self) -> dict[str, str]:
        return {"text": self.text}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.text = state["text"]


def kept(folder: Path, values: list[float | None], **settings: object) -> list[int]:
    config = CheckpointingConfig.model_validate({"checkpoint_dir": str(folder), **settings})
    checkpoints = Checkpoints(config, "")
    checkpoints.open_folder()
    for step, value in enumerate(values, start=1):
        metrics = {} if value is None else {"val/accuracy": value, "train/loss": value}
        checkpoints.save(TrainingInfo(step, metrics), Notebook(), Notebook())
    return checkpoints.steps()


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([0.1, 0.9, 0.5, 0.2, 0.3], {"keep_top_k": 2}, [2, 3, 5]),
        ([0.1, 0.9, 0.5, 0.2, 0.7], {"keep_top_k": 2}, [2, 5]),
        ([0.1, 0.9, 0.5, 0.2, 0.3], {"keep_top_k": None}, [1, 2, 3, 4, 5]),
        ([0.1, 0.9, 0.5, 0.2], {"keep_top_k": 1, "metric_name": "train:loss", "higher_is_better": False}, [1, 4]),
        ([None, 0.9, None, None, None], {"keep_top_k": 2}, [2, 5]),
        ([0.9, 0.8, 0.7, 0.6], {"keep_top_k": 2, "metric_name": None}, [3, 4]),
        ([0.9, float("nan"), 0.7, 0.6], {"keep_top_k": 1}, [1, 4]),
    ],
)
def test_the_best_checkpoints_stay_and_always_the_latest(
    values: list[float | None], settings: dict[str, object], expected: list[int], tmp_path: Path
) -> None:
    assert kept(tmp_path, values, **settings) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step}" for step in expected]


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("val:acuracy", "metric_name=val:acuracy, so the latest ones are kept; did you mean val:accuracy?"),
        ("val:reward", "metric_name=val:reward, so the latest ones are kept; val:NAME needs a validation"),
        ("val:accuracy", None),
        (None, None),
    ],
)
def test_a_ranking_figure_that_no_checkpoint_has_is_said_once(
    metric: str | None, says: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5], keep_top_k=2, metric_name=metric)
    assert [says in text for text in caplog.messages if says] == ([] if says is None else [True])
    assert (says is None) == (not caplog.messages)


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(path: Path, ignore_errors: bool = False) -> None:
        (path / "training_info.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nemo_rl.algorithms.checkpoints.shutil.rmtree", torn)
        with pytest.raises(KeyboardInterrupt):
            kept(tmp_path, [0.9, 0.1, 0.2], keep_top_k=1)
    checkpoints = Checkpoints(CheckpointingConfig(checkpoint_dir=str(tmp_path)), "")
    checkpoints.open_folder()
    assert [checkpoints.info(step).step for step in checkpoints.steps()] == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_3"]


def test_a_save_that_fails_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    class Broken(Notebook):
        def save(self, folder: Path, *, in_background: bool = False) -> None:
            super().save(folder)
            raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(CheckpointingConfig(checkpoint_dir=str(tmp_path)), "")
    checkpoints.save(TrainingInfo(1), Notebook("one"), Notebook("place"))
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(TrainingInfo(2), Broken(), Notebook())
    policy, loader = Notebook(), Notebook()
    assert checkpoints.resume(policy, loader).step == 1
    assert (policy.text, loader.text) == ("one", "place")


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, saved at 2 and 3; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    launch(overrides(tiny_llama, reward_file(folder.parent), folder, "checkpointing.save_period=2"))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_started_again_says_so_before_it_loads_anything(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished)
    outcome = launch(overrides(tmp_path / "no model", reward_file(finished.parent), finished))
    assert outcome.finished and outcome.step == 3
    assert capsys.readouterr().out.splitlines() == [
        f"{finished} holds this run, finished after step 3: max_num_steps = 3 is reached; raise grpo.max_num_steps "
        "(or max_num_epochs, or early_stopping.patience) to go on, or choose another checkpointing.checkpoint_dir to "
        "start afresh"
    ]
    assert snapshot(finished) == before


def test_a_run_finished_by_its_epochs_says_so_too_and_goes_on_with_more(tiny_llama: Path, tmp_path: Path) -> None:
    reward, data = reward_file(tmp_path), "data.train.num_samples=6"
    for model, epochs, step in ((tiny_llama, 1, 2), (tmp_path / "no model", 1, 2), (tiny_llama, 2, 3)):
        outcome = launch(overrides(model, reward, tmp_path / "run", data, f"grpo.max_num_epochs={epochs}"))
        assert outcome.finished and outcome.step == step


def test_a_finished_run_goes_on_with_more_steps(finished: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    outcome = launch(overrides(tiny_llama, reward_file(tmp_path), folder, "grpo.max_num_steps=4"))
    assert outcome.step == 4
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4]


def test_a_learning_rate_changed_on_resume_takes_effect(finished: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    changed = ("grpo.max_num_steps=4", "policy.optimizer.kwargs.lr=0.002")
    launch(overrides(tiny_llama, reward_file(tmp_path), folder, *changed))
    assert [record["train/learning_rate"] for record in records(folder)] == [0.01, 0.01, 0.01, 0.002]


def test_a_run_killed_between_its_last_step_and_its_end_is_brought_to_it(
    finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "summary.json").unlink()
    outcome = launch(overrides(tiny_llama, reward_file(tmp_path), folder, "checkpointing.export_hf=true"))
    assert outcome.finished and outcome.step == 3
    assert (folder / "hf" / "model.safetensors").is_file()
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert records(folder) == records(finished)


def refused(settings: list[str], folder: Path) -> str:
    """The message of the refusal, which must not have changed anything."""
    before = snapshot(folder)
    with pytest.raises(CheckpointError) as error:
        launch(settings)
    assert snapshot(folder) == before
    assert error.value.exit_code == 2
    return str(error.value)


def test_resume_never_refuses_a_folder_with_a_checkpoint(finished: Path, tiny_llama: Path) -> None:
    settings = overrides(tiny_llama, reward_file(finished.parent), finished, "checkpointing.resume=never")
    assert "already holds a run at step 3" in refused(settings, finished)


def test_a_checkpoint_of_another_model_is_refused_naming_both(finished: Path, tmp_path: Path) -> None:
    wider = make_tiny_llama(tmp_path / "wider", hidden_size=32)
    message = refused(overrides(wider, reward_file(tmp_path), finished, "grpo.max_num_steps=4"), finished)
    assert "hidden 16" in message and "hidden 32" in message


def test_a_changed_data_set_is_refused(finished: Path, tiny_llama: Path, tmp_path: Path) -> None:
    settings = ("grpo.max_num_steps=4", "data.train.num_samples=51")
    message = refused(overrides(tiny_llama, reward_file(tmp_path), finished, *settings), finished)
    assert "num_tasks was 50 and is 51" in message


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("file", ["training_info.json", "train_dataloader.pt"])
def test_a_truncated_file_of_a_checkpoint_is_named(tmp_path: Path, file: str) -> None:
    kept(tmp_path, [0.1, 0.2])
    tear(tmp_path / "step_2" / file)
    checkpoints = Checkpoints(CheckpointingConfig(checkpoint_dir=str(tmp_path)), "")
    with pytest.raises(CheckpointError, match=f"step_2/{file} is missing or damaged .* delete .*step_2 to resume"):
        checkpoints.resume(Notebook(), Notebook())


def test_a_run_with_a_truncated_checkpoint_is_refused_until_that_is_deleted(
    finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    tear(folder / "step_3" / "policy" / "weights" / "__0_0.distcp")
    settings = overrides(tiny_llama, reward_file(tmp_path), folder)
    assert str(folder / "step_3") in refused([*settings, "grpo.max_num_steps=4"], folder)

    shutil.rmtree(folder / "step_3")
    assert launch(settings).step == 3
    assert_same_run(finished, folder, 3)


def test_a_run_saves_and_stops_by_the_given_time(tiny_llama: Path, tmp_path: Path) -> None:
    slow = reward_file(
        tmp_path, "import time\n\ndef reward(completion: str) -> float:\n    time.sleep(1)\n    return 1\n"
    )
    folder = tmp_path / "run"
    settings = ("grpo.max_num_steps=100", "checkpointing.checkpoint_must_save_by=00:00:00:08")
    outcome = launch(overrides(tiny_llama, slow, folder, *settings))
    assert not outcome.finished and not outcome.interrupted
    assert 1 <= outcome.step < 10
    assert (folder / f"step_{outcome.step}").is_dir()
    assert len(records(folder)) == outcome.step
    assert json.loads((folder / "summary.json").read_text())["seconds_total"] < 12
