"""SFT and preference training on a tiny model: known first losses, limits, resuming, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch

from nemo_rl.algorithms.launch_examples import launch_preference, launch_sft
from nemo_rl.algorithms.preference import preference_objective
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.preference import DPOConfig
from nemo_rl.config.schema.sft import SFTConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.examples import ChatEncoder
from nemo_rl.data.micro_batches import micro_batches
from nemo_rl.data.types import ChatPair, Example, Message, Preference
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.models.load import load_tokenizer
from nemo_rl.objectives.preference import PreferenceObjective, pair_indices
from tiny_run import records, saved_tensors  # pyright: ignore[reportImplicitRelativeImport]

CONVERSATION = (("user", "0?"), ("assistant", "yes"), ("assistant", "no"))
"""A pair as long as each of those that `prefer` trains on."""


def settings(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"policy.model_name={model}",
        f"checkpointing.checkpoint_dir={folder}",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.train_global_batch_size=4",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.01, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        "data.validation.num_samples=8",
        "checkpointing.export_hf=false",
        "logger.tensorboard_enabled=false",
        *more,
    ]


def fine_tune(model: Path, folder: Path, steps: int, *more: str) -> list[dict[str, float | None]]:
    given = settings(model, folder, f"sft.max_num_steps={steps}", *more)
    assert launch_sft(load_config(None, given, SFTConfig)).step == steps
    return records(folder)


def prefer(model: Path, folder: Path, steps: int, *more: str) -> list[dict[str, float | None]]:
    """Pairs in which "yes" is always better than "no"."""
    folder.parent.mkdir(exist_ok=True)
    file = folder.parent / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(9))
    )
    data = f"{{name: local, path: '{file}'}}"
    given = settings(model, folder, f"dpo.max_num_steps={steps}", f"data.train={data}", "data.validation=null")
    given.remove("data.validation.num_samples=8")
    quiet = ("dpo.val_at_start=false", "dpo.val_at_end=false")
    assert launch_preference(load_config(None, [*given, *quiet, *more], DPOConfig)).step == steps
    return records(folder)


def test_sft_starts_where_all_tokens_are_alike_to_a_random_model(tiny_llama: Path, tmp_path: Path) -> None:
    first, *_, last = fine_tune(tiny_llama, tmp_path / "run", 1)
    assert first["val/loss"] == pytest.approx(math.log(49152), rel=0.01)
    assert float(last["val/loss"] or 0) < float(first["val/loss"] or 0)


def test_sft_resumes_to_the_same_bits(tiny_llama: Path, tmp_path: Path) -> None:
    off = ("sft.val_at_start=false", "sft.val_at_end=false")
    whole = fine_tune(tiny_llama, tmp_path / "whole", 4, *off)
    fine_tune(tiny_llama, tmp_path / "parts", 2, *off)
    assert fine_tune(tiny_llama, tmp_path / "parts", 4, *off) == whole
    left, right = saved_tensors(tmp_path / "whole", 4), saved_tensors(tmp_path / "parts", 4)
    assert left.keys() == right.keys() and len(left) > 20
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_sft_ends_with_its_epochs(tiny_llama: Path, tmp_path: Path) -> None:
    """Batches of 4 of 6 conversations: the first epoch ends within the second batch, the second with the third."""
    for epochs, last_step in ((1, 2), (2, 3)):
        given = settings(tiny_llama, tmp_path / str(epochs), f"sft.max_num_epochs={epochs}", "data.train.num_samples=6")
        outcome = launch_sft(load_config(None, [*given, "sft.val_at_start=false"], SFTConfig))
        assert outcome.finished and outcome.step == last_step


def test_early_stopping_survives_a_resume_and_says_so(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a learning rate no validation beats the one before the first step."""
    rule = ("sft.early_stopping.patience=3", "sft.val_period=1", "sft.val_at_start=true")
    still = ("policy.optimizer={name: torch.optim.SGD, kwargs: {lr: 0.0}}", *rule)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fine_tune(tiny_llama, parts, 2, *still)
    for folder in (whole, parts):
        given = settings(tiny_llama, folder, "sft.max_num_steps=9", *still)
        outcome = launch_sft(load_config(None, given, SFTConfig))
        assert outcome.finished and outcome.step == 3
    assert records(parts) == records(whole)
    summary = json.loads((parts / "summary.json").read_text())
    loss = f"{summary['validation_before']['loss']:.4g}"
    assert summary["ended"] == f"val:loss has not improved on {loss} in 3 validations"
    assert summary["validation_before"] == summary["validation_after"] == outcome.validation_after
    printed = capsys.readouterr().out.splitlines()
    assert f"ended            {summary['ended']}" in printed
    assert printed[-1].endswith("sft.early_stopping.patience=6")
    again = settings(tiny_llama, parts, "sft.max_num_steps=9", *still)
    assert launch_sft(load_config(None, again, SFTConfig)) == outcome
    assert "in 3 validations; raise sft.max_num_steps" in capsys.readouterr().out
    more = [*again, "sft.early_stopping.patience=6", "sft.max_num_steps=5"]
    assert launch_sft(load_config(None, more, SFTConfig)).step == 5


def test_dpo_starts_at_ln_2(tiny_llama: Path, tmp_path: Path) -> None:
    """The policy is its own reference then, and every pair a tie."""
    first, *_, last = prefer(tiny_llama, tmp_path / "run", 2)
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["train/accuracy"] == 0.5 and float(last["train/loss"] or 1) < math.log(2) - 1e-3


@pytest.mark.parametrize("share", [True, False])
def test_the_answers_of_a_pair_share_their_prompt(tiny_llama: Path, tmp_path: Path, share: bool) -> None:
    """One pair a step; the last token of an answer predicts nothing and is not computed."""
    one = ("policy.train_global_batch_size=1", f"policy.share_prefixes={str(share).lower()}")
    step = prefer(tiny_llama, tmp_path / "run", 1, *one)[0]
    encode = ChatEncoder(load_tokenizer(str(tiny_llama)))
    prompt, yes, no = (Message(role=role, content=text) for role, text in CONVERSATION)
    pair = encode.preference(ChatPair((prompt,), (yes,), (no,)))
    assert pair is not None
    prompt_length = int(pair.chosen.loss_mask.int().argmax())
    inputs = [int(example.loss_mask.nonzero()[-1]) for example in (pair.chosen, pair.rejected)]
    assert prompt_length > 20 and torch.equal(
        pair.chosen.token_ids[:prompt_length], pair.rejected.token_ids[:prompt_length]
    )
    assert step["train/tokens_computed"] == sum(inputs) - (prompt_length if share else 0)


def test_a_pair_is_never_split_while_it_fits() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(20):
        prompt = torch.randint(3, 99, (4,), generator=generator)
        chosen, rejected = (
            Example(
                torch.cat([prompt, torch.randint(3, 99, (length,), generator=generator)]), torch.arange(4 + length) > 3
            )
            for length in torch.randint(1, 12, (2,), generator=generator).tolist()
        )
        pairs.append(Preference(chosen, rejected, index=index))
    batch = TokenBatch.from_preferences(pairs)
    for share in (True, False):
        parts = list(micro_batches(batch, max_tokens=2 * 16, share_prefixes=share))
        assert sum(len(pair_indices(part)[0]) for part in parts) == 20 and len(parts) > 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("policy.train_mb_tokens=255", "has no room for both answers of a pair, which may have 256 tokens"),
        ("data.validation=null", "data.validation is not set"),
        ("data.max_input_seq_length=129", "exceeds policy.max_total_sequence_length = 128"),
        ("dpo.preference_loss_weight=0", "are both 0, so nothing is learnt"),
        ("dpo.label_smoothing=0.5", "less than 0.5"),
        ("dpo.preference_loss=dop", "did you mean 'dpo'"),
        ("dpo={preference_loss: kto, sft_loss_weight: 1.0}", "sft_loss_weight = 1.0 has no effect on .* = kto"),
        ("dpo={preference_loss: kto, preference_average_log_probs: true}", "no effect on preference_loss = kto"),
        ("dpo={preference_loss: ipo, label_smoothing: 0.1}", "no effect on preference_loss = ipo, only on dpo"),
        ("dpo.simpo_margin=2.0", "simpo_margin = 2.0 has no effect on preference_loss = dpo, only on simpo"),
        ("dpo.desirable_weight=5.0", "only on kto: leave it out"),
        ("dpo.early_stopping.patience=2", "val_period = 0 makes none"),
        ("dpo.early_stopping.metric_name=train:loss", "early_stopping.metric_name"),
        ("policy.generation={backend: hf}", "unknown key policy.generation"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [setting], DPOConfig)


def test_kto_asks_for_judged_answers(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.jsonl"
    file.write_text(json.dumps({"prompt": "1 + 1?", "completion": "2"}))
    data = f"data.train={{name: local, path: '{file}'}}"
    given = settings(tiny_llama, tmp_path / "run", "dpo.preference_loss=kto", "dpo.val_at_start=false", data)
    with pytest.raises(DataError, match=r"the records of .*plain.jsonl have no label; give the data a format"):
        launch_preference(load_config(None, given, DPOConfig))


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("preference_loss=ipo", "kind", "ipo"),
        ("reference_policy_kl_penalty=0.3", "beta", 0.3),
        ("label_smoothing=0.1", "label_smoothing", 0.1),
        ("preference_average_log_probs=true", "average_logprobs", True),
        ("preference_loss_weight=2.0", "preference_weight", 2.0),
        ("sft_loss_weight=0.5", "sft_weight", 0.5),
        ("sft_average_log_probs=false", "sft_average_logprobs", False),
    ],
)
def test_a_loss_setting_arrives_in_the_objective(setting: str, field: str, value: object) -> None:
    objective = preference_objective(load_config(None, [f"dpo.{setting}"], DPOConfig).config.dpo)
    assert getattr(objective, field) == value


def test_simpos_margin_arrives_in_the_objective() -> None:
    given = ["dpo={preference_loss: simpo, simpo_margin: 0.7}"]
    objective = preference_objective(load_config(None, given, DPOConfig).config.dpo)
    assert isinstance(objective, PreferenceObjective) and objective.margin == 0.7


def test_kto_starts_at_a_half(tiny_llama: Path, tmp_path: Path) -> None:
    """With the policy at the reference every ratio and the reference point are 0, and 1 - sigmoid(0) is a half."""
    rows = [{"prompt": f"{i}?", "completion": "no" if i % 2 else "yes", "label": i % 2 == 0} for i in range(8)]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.train={{name: local, path: '{tmp_path / 'judged.jsonl'}', format: {{type: judged}}}}"
    off = ("data.validation=null", "dpo.val_at_start=false", "dpo.val_at_end=false")
    given = settings(tiny_llama, tmp_path / "run", "dpo.preference_loss=kto", "dpo.max_num_steps=2", data, *off)
    given.remove("data.validation.num_samples=8")
    launch_preference(load_config(None, given, DPOConfig))
    steps = records(tmp_path / "run")
    assert steps[0]["train/loss"] == pytest.approx(0.5, abs=1e-5)
    assert float(steps[-1]["train/loss"] or 1) < 0.499
