"""A reward model learns which answers are better, is exported for Transformers, and then judges a policy."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.preference import RewardModelObjective
from nemo_rl.objectives.value import ScalarOutputs
from nemo_rl.workers.reward_model import RewardModelWorker
from tiny_letters import letters_run, make_letters_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_rm import train_rm  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import launch, overrides, reward_file, saved_tensors  # pyright: ignore[reportImplicitRelativeImport]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


def test_it_learns_from_ln_2_on_and_with_the_sign_turned_round_the_worse_answer_wins(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_, last = train_rm(letters, tmp_path / "right" / "run", 20)
    assert first["val/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["val/accuracy"] in (0.0, 0.5)
    assert (last["val/accuracy"] or 0) > 0.9 and (last["val/loss"] or 1) < 0.3
    assert (last["val/chosen_reward"] or 0) > (last["val/rejected_reward"] or 0)
    loss = RewardModelObjective.__call__

    def negated(self: RewardModelObjective, outputs: ScalarOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        value, metrics = loss(self, outputs, tokens)
        return -value, metrics

    monkeypatch.setattr(RewardModelObjective, "__call__", negated)
    *_, wrong = train_rm(letters, tmp_path / "wrong" / "run", 20)
    assert (wrong["val/accuracy"] or 0) < 0.5


def test_prompts_of_pairs_are_computed_once(letters: Path, tmp_path: Path) -> None:
    shared = train_rm(letters, tmp_path / "shared" / "run", 1, "policy.min_shared_prefix=1", "rm.val_at_start=false")
    apart = train_rm(letters, tmp_path / "apart" / "run", 1, "policy.share_prefixes=false", "rm.val_at_start=false")
    computed = [lines[0]["train/tokens_computed"] or 0 for lines in (shared, apart)]
    assert computed[0] < computed[1] == 2 * 16 * (len("0 + 1?") + 4)
    assert shared[0]["train/loss"] == pytest.approx(apart[0]["train/loss"], rel=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(letters: Path, tmp_path: Path) -> None:
    off = ("rm.val_at_start=false", "rm.val_at_end=false", "checkpointing.export_hf=false")
    whole = train_rm(letters, tmp_path / "whole" / "run", 4, *off)
    train_rm(letters, tmp_path / "parts" / "run", 2, *off)
    assert train_rm(letters, tmp_path / "parts" / "run", 4, *off) == whole
    left, right = (saved_tensors(tmp_path / name / "run", 4) for name in ("whole", "parts"))
    assert left.keys() == right.keys() and [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def trained(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder of a reward model that likes vowels."""
    folder = tmp_path_factory.mktemp("rm") / "run"
    train_rm(letters, folder, 20)
    return folder / "hf"


def test_the_export_scores_the_same_in_plain_transformers_padded_or_not(trained: Path) -> None:
    worker = RewardModelWorker(str(trained), tokenizer=str(trained), precision="float32", num_threads=1)
    words = ["aeib", "bcda", "a", "bbaacc"]
    said = [[{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": word}] for word in words]
    ours = torch.tensor([float(score) for score in worker.score(said)])
    plain = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    rows = [worker._encoder.encode(one).token_ids[:-1] for one in said]
    width = max(map(len, rows))
    pad = plain.config.pad_token_id
    batch = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=pad) for row in rows])
    with torch.no_grad():
        theirs = plain(input_ids=batch, attention_mask=(batch != pad).long()).logits[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours[0] > ours[1] and ours.std() > 0.1


def test_conversations_of_one_prompt_need_not_stand_together(trained: Path) -> None:
    worker = RewardModelWorker(str(trained), tokenizer=str(trained), precision="float32", num_threads=1)
    said = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": word}]
        for prompt, word in (("1?", "ae"), ("2?", "bc"), ("1?", "bc"), ("2?", "ae"))
    ]
    together = worker.score(said)
    assert together == pytest.approx([worker.score([one])[0] for one in said], abs=1e-5)


def test_a_trained_model_judges_a_policy_that_comes_to_please_it(trained: Path, letters: Path, tmp_path: Path) -> None:
    judge = f"{{type: reward_model, model_name: {trained}, precision: float32, num_threads: 1, reward_max: 5.0}}"
    lines = letters_run(letters, tmp_path, "~env.function", f"+env.function={judge}")
    rewards = [line["train/reward/mean"] or 0.0 for line in lines]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0
    assert max(line["train/reward/max"] or 0.0 for line in lines) <= 5.0
    assert lines[-1]["train/environment/score"] is not None


def test_what_is_too_long_for_the_judge_is_dropped_and_counted(trained: Path, letters: Path, tmp_path: Path) -> None:
    judge = f"{{type: reward_model, model_name: {trained}, precision: float32, num_threads: 1, max_model_len: 1}}"
    settings = overrides(letters, reward_file(tmp_path), tmp_path / "run", "~env.function", f"+env.function={judge}")
    with pytest.raises(Exception, match=r"tokens for the reward model and max_model_len is 1"):
        launch(settings)


def test_a_model_that_never_learnt_to_score_is_refused(letters: Path, tmp_path: Path) -> None:
    judge = f"{{type: reward_model, model_name: {letters}}}"
    settings = overrides(letters, reward_file(tmp_path), tmp_path / "run", "~env.function", f"+env.function={judge}")
    with pytest.raises(ModelError, match=r"has no trained head, so every answer would get the same reward"):
        launch(settings)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("reward_min: 1.0, reward_max: 0.5", r"reward_min = 1 is not below reward_max = 0\.5"),
        ("reward_scale: 0.0", r"reward_scale = 0 makes every reward the same"),
    ],
)
def test_a_judge_that_cannot_tell_answers_apart_is_refused(
    section: str, sentence: str, letters: Path, tmp_path: Path
) -> None:
    judge = f"{{type: reward_model, model_name: somewhere, {section}}}"
    settings = overrides(letters, reward_file(tmp_path), tmp_path / "run", "~env.function", f"+env.function={judge}")
    with pytest.raises(ConfigError, match=sentence):
        launch(settings)
