"""Reward models on a tiny model: ln 2 at first, convergence, resuming, and the same scores in plain Transformers."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import nemo_rl.algorithms.launch_examples as launching
from nemo_rl.algorithms.reward_model import rm_batch, rm_objective
from nemo_rl.cli import main
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.config.schema.reward_model import RMConfig
from nemo_rl.data.scored import ScoreEncoder
from nemo_rl.data.types import ChatPair, Message
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.models.load import load_tokenizer
from nemo_rl.objectives.preference import RewardModelObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from tiny_reward_model import (  # pyright: ignore[reportImplicitRelativeImport]
    rm_settings,
    train_reward_model,
    write_pairs,
)
from tiny_run import records, saved_tensors  # pyright: ignore[reportImplicitRelativeImport]

ROOT = Path(__file__).parents[2]
PAIRS = [
    ChatPair(
        (Message(role="user", content=question),),
        (Message(role="assistant", content=f"yes {answer}"),),
        (Message(role="assistant", content="no"),),
    )
    for question, answer in (("1?", "1"), ("Is it two, or is it three?", "it is two"), ("Is it?", "and " * 9))
]


class Negated(RewardModelObjective):
    """The same metrics with the loss the wrong way round."""

    def __call__(self, *given: Any) -> Any:
        loss, metrics = super().__call__(*given)
        return -loss, metrics


def test_held_out_accuracy_rises_from_a_half_and_with_the_wrong_sign_falls(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_reward_model(tiny_llama, tmp_path / "right", 8)
    start, first, *_, last = records(tmp_path / "right")
    assert start["val/loss"] == pytest.approx(math.log(2), abs=1e-7) and start["val/accuracy"] == 0.5
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7) and first["train/accuracy"] == 0.5
    assert first["train/chosen_reward"] == first["train/rejected_reward"] == first["train/margin"] == 0
    assert float(last["val/accuracy"] or 0) > 0.8 and float(last["val/margin"] or 0) > 0.1
    assert last["val/margin"] == pytest.approx(
        float(last["val/chosen_reward"] or 0) - float(last["val/rejected_reward"] or 0), abs=1e-5
    )
    monkeypatch.setattr(launching, "rm_objective", lambda config: Negated())
    train_reward_model(tiny_llama, tmp_path / "wrong", 8)
    assert float(records(tmp_path / "wrong")[-1]["val/accuracy"] or 0) < 0.2


def test_a_reward_model_resumes_to_the_same_bits(tiny_llama: Path, tmp_path: Path) -> None:
    off = ("rm.val_at_start=false", "rm.val_at_end=false")
    train_reward_model(tiny_llama, tmp_path / "whole", 4, *off)
    train_reward_model(tiny_llama, tmp_path / "parts", 2, *off)
    train_reward_model(tiny_llama, tmp_path / "parts", 4, *off)
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    left, right = saved_tensors(tmp_path / "whole", 4), saved_tensors(tmp_path / "parts", 4)
    assert left.keys() == right.keys() and "weights/score.weight" in left
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"]
)
def test_plain_transformers_gives_the_same_scores_alone_and_in_a_padded_batch(
    template: str | None, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where conversations end with the padding token, which classifiers do not read."""
    own = () if template is None else (f"policy.tokenizer.chat_template='{template}'",)
    train_reward_model(tiny_llama, tmp_path / "run", 4, "checkpointing.export_hf=true", *own)
    folder = tmp_path / "run" / "hf"
    assert f"{folder}  (loads with transformers.AutoModelForSequenceClassification)" in capsys.readouterr().out

    tokenizer = load_tokenizer(str(folder))
    encoded = [ScoreEncoder(tokenizer, tokenizer.pad_token_id).preference(pair) for pair in PAIRS]
    batch = rm_batch([pair for pair in encoded if pair is not None])
    policy = TrainedPolicyConfig.model_validate(
        {
            "model_name": str(folder),
            "train_global_batch_size": 4,
            "max_total_sequence_length": 128,
            "precision": "float32",
            "device": "cpu",
            "optimizer": {"kwargs": {"lr": 0.0}},
        }
    )
    ours = PyTorchBackend(policy, str(folder), tokenizer, head="scalar").values(batch)[batch.token_columns["loss_mask"]]

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [
        theirs.apply_chat_template([*pair.prompt, *answer], tokenize=False)
        for pair in PAIRS
        for answer in (pair.chosen, pair.rejected)
    ]
    inputs = theirs(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        padded = model(**inputs).logits[:, 0]
        alone = [model(**theirs(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0] for text in texts]
    assert ours.std() > 1e-3
    torch.testing.assert_close(ours, padded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_margins_of_the_data_and_centring_change_the_loss_as_asked(tiny_llama: Path, tmp_path: Path) -> None:
    """With equal scores, the loss is -log sigmoid(-scale * margin)."""
    data = f"data.train={write_pairs(tmp_path / 'sure.jsonl', range(6), margin=3.0)}"
    train_reward_model(tiny_llama, tmp_path / "run", 1, "rm.margin_scale=0.5", data)
    assert records(tmp_path / "run")[1]["train/loss"] == pytest.approx(math.log1p(math.exp(1.5)), rel=1e-6)
    settings = ["rm.margin_scale=0.5", "rm.centering_weight=0.01"]
    assert rm_objective(load_config(None, settings, RMConfig).config.rm) == RewardModelObjective(0.5, 0.01)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("policy.train_mb_tokens=255", "has no room for both answers of a pair, which may have 256 tokens"),
        ("data.validation=null", "data.validation is not set"),
        ("rm.margin_scale=-1.0", "greater than or equal to 0"),
        ("rm.centring_weight=0.1", "did you mean rm.centering_weight"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [setting], RMConfig)


def test_equal_answers_are_refused_before_a_step(tiny_llama: Path, tmp_path: Path) -> None:
    settings = rm_settings(tiny_llama, tmp_path / "run", 1)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1?", "chosen": "yes", "rejected": "yes", "margin": 1}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl.* has the same chosen and rejected answer"):
        launching.launch_rm(load_config(None, settings, RMConfig))


@pytest.mark.parametrize("config", ["rm_arithmetic_smollm2", str(ROOT / "examples" / "configs" / "rm.yaml")])
def test_a_recipe_is_planned(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "--dry-run", "--config", config]) == 0
    assert "memory estimate" in capsys.readouterr().out


def test_the_example_script_is_the_command() -> None:
    script = [sys.executable, "examples/run_rm.py", "--dry-run", "rm.seed=11"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "  seed: 11\n" in done.stdout
