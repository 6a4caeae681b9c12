"""A backend trains mixtures of experts as `policy.moe` says, and what its steps change is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.errors import ConfigError
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.routing import selection_biases
from tiny_batches import rollout_batch
from tiny_models import embedded_folder, tiny_model


def backend(folder: Path, **moe: Any) -> PyTorchBackend:
    config = PolicyConfig.model_validate(
        {
            "model_name": str(folder),
            "train_global_batch_size": 9,
            "max_total_sequence_length": 64,
            "precision": "float32",
            "device": "cpu",
            "optimizer": {"name": "torch.optim.SGD", "kwargs": {"lr": 0.1}},
            "generation": {"backend": "hf", "max_new_tokens": 8},
            "moe": moe,
        }
    )
    return PyTorchBackend(config, str(folder), AutoTokenizer.from_pretrained(embedded_folder()))


def test_biases_that_steps_moved_are_saved_restored_and_exported(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "model")
    trained = backend(tmp_path / "model", bias_update_rate=0.125)
    metrics = trained.train(rollout_batch(model), ClippedPolicyObjective())
    assert metrics["experts/busiest"].value > 1
    moved = selection_biases(trained.model.module)
    assert all(bias.abs().max() == 0.125 for bias in moved.values())
    trained.save(tmp_path / "saved")
    trained.export(tmp_path / "exported")
    resumed = backend(tmp_path / "model", bias_update_rate=0.125)
    resumed.load(tmp_path / "saved")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    for found in (resumed.model.module, exported):
        assert all(torch.equal(bias, moved[name]) for name, bias in selection_biases(found).items())


def test_a_model_without_such_biases_is_refused_at_the_start(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no biases that choose experts; set policy\.moe\.bias_update_rate to 0"):
        backend(tmp_path, bias_update_rate=0.1)
