import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from nemo_rl.config.schema.logging import LoggerConfig
from nemo_rl.errors import DependencyError
from nemo_rl.observe.logger import read_metrics
from nemo_rl.observe.sinks import JsonlSink, MlflowSink, TensorBoardSink, WandbSink, build_sinks


def log_steps(path: Path, steps: range, *, first_step: int) -> None:
    sink = JsonlSink(path, first_step=first_step)
    for step in steps:
        sink.log(step, {"reward": step / 3}, {})
        sink.log(step, {"validation/accuracy": 1 / (step + 1)}, {})
    sink.close()


def test_file_of_a_resumed_run_equals_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    log_steps(tmp_path / "whole.jsonl", range(6), first_step=0)
    log_steps(tmp_path / "resumed.jsonl", range(5), first_step=0)
    with (tmp_path / "resumed.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # killed in the middle of a line
    log_steps(tmp_path / "resumed.jsonl", range(3, 6), first_step=3)

    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    log_steps(tmp_path / "metrics.jsonl", range(3), first_step=0)
    log_steps(tmp_path / "metrics.jsonl", range(1), first_step=0)

    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 0]


def test_reader_passes_over_torn_and_foreign_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "reward": 0.5}\nnoise\n[1]\n{"step": 1, "reward": 0.25}\n{"step": 2, "reward": 0.1}')

    assert read_metrics(path) == [{"step": 0, "reward": 0.5}, {"step": 1, "reward": 0.25}]
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_numbers_survive_exactly_and_non_finite_ones_are_valid_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(1, {"third": 1 / 3, "tiny": 5e-324, "nan": math.nan, "infinite": -math.inf}, {})

    line = (tmp_path / "metrics.jsonl").read_text()  # before close: a kill -9 here loses nothing
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"step": 1, "third": 1 / 3, "tiny": 5e-324, "nan": None, "infinite": None}
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["nan"])
    sink.close()


def test_tensorboard_events_hold_scalars_and_histograms_and_hide_what_a_resume_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, steps in ((0, range(4)), (2, range(2, 6))):
        sink = TensorBoardSink(tmp_path, first_step=first_step)
        for step in steps:
            sink.log(step, {"reward": step / 4}, {"length": (1.0, 2.0, 2.0), "empty": ()})
        sink.close()

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(step, step / 4) for step in range(6)]
    assert events.Histograms("length")[-1].histogram_value.num == 3
    with pytest.raises(KeyError):
        events.Histograms("empty")


def test_configured_sinks_stand_in_the_run_folder_or_in_log_dir(tmp_path: Path) -> None:
    for config, folder in ((LoggerConfig(), "run"), (LoggerConfig(log_dir=str(tmp_path / "logs")), "logs")):
        for sink in build_sinks(config, tmp_path / "run"):
            sink.log(1, {"reward": 0.5}, {})
            sink.close()
        assert read_metrics(tmp_path / folder / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]
        assert len(list((tmp_path / folder / "tensorboard").iterdir())) == 1
    (only,) = build_sinks(LoggerConfig(tensorboard_enabled=False), tmp_path / "quiet")
    only.close()


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_wandb_is_one_sentence_with_the_install_command(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match=r"logger\.wandb_enabled .* `uv sync --extra wandb`"):
        WandbSink(tmp_path, project="p")


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed")
def test_missing_mlflow_is_one_sentence_with_the_install_command(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match=r"logger\.mlflow_enabled .* `uv sync --extra mlflow`"):
        MlflowSink(tmp_path, experiment_name="e")


def test_wandb_keeps_its_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first_step in (0, 1):
        sink = WandbSink(tmp_path, project="p", first_step=first_step)
        sink.log(first_step, {"reward": 0.5, "length": 1.5}, {"length": (1.0, 2.0)})
        sink.close()

    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and all(run.name.endswith((tmp_path / "wandb_run_id").read_text()) for run in runs)


def test_mlflow_keeps_its_run_over_a_resume(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for first_step in (0, 1):
        sink = MlflowSink(tmp_path, experiment_name="e", tracking_uri=uri, first_step=first_step)
        sink.log(first_step, {"reward": 0.5, "broken": math.nan}, {})
        sink.close()

    run_id = (tmp_path / "mlflow_run_id").read_text()
    history = mlflow.MlflowClient(tracking_uri=uri).get_metric_history(run_id, "reward")
    assert [entry.step for entry in history] == [0, 1]
