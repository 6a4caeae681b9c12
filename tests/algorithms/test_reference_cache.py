"""Reference log-probabilities are computed once, change nothing, and are held within their memory."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_rl.algorithms.launch_examples import launch_preference
from nemo_rl.algorithms.preference_batch import Reference
from nemo_rl.algorithms.start import worker_policy
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.preference import DPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Example
from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.workers.handles import Policy
from nemo_rl.workers.train import TrainWorker
from tiny_run import records  # pyright: ignore[reportImplicitRelativeImport]


@pytest.fixture
def given_to_reference(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each computation under the reference weights was given."""
    sizes: list[int] = []
    compute = Reference.computed

    def counted(self: Reference, batch: TokenBatch) -> Tensor:
        sizes.append(batch.num_sequences)
        return compute(self, batch)

    monkeypatch.setattr(Reference, "computed", counted)
    return sizes


def three_epochs(model: Path, folder: Path, *more: str) -> list[dict[str, float | None]]:
    """Nine steps of 4 of 12 pairs, with 8 more pairs for a validation before every epoch and after the last."""
    settings = [
        f"policy.model_name={model}",
        f"checkpointing.checkpoint_dir={folder}",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.train_global_batch_size=4",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.01, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        "dpo.max_num_steps=20",
        "dpo.max_num_epochs=3",
        "dpo.val_at_start=true",
        "dpo.val_period=3",
        "dpo.val_at_end=false",
        "data.train={name: arithmetic, num_samples: 12}",
        "data.validation={name: arithmetic, num_samples: 8}",
        "checkpointing.export_hf=false",
        "logger.tensorboard_enabled=false",
    ]
    assert launch_preference(load_config(None, [*settings, *more], DPOConfig)).step == 9
    return records(folder)


OFF = "dpo.reference_cache_mib=0"


def test_each_record_is_computed_once_and_no_figure_changes_by_a_bit(
    tiny_llama: Path, tmp_path: Path, given_to_reference: list[int]
) -> None:
    """Without a shuffle the batches of every epoch are the same, and so are their bits."""
    kept = three_epochs(tiny_llama, tmp_path / "kept", "data.shuffle=false")
    assert given_to_reference == [16, 8, 8, 8]
    given_to_reference.clear()
    assert three_epochs(tiny_llama, tmp_path / "anew", "data.shuffle=false", OFF) == kept
    assert sum(given_to_reference) == 4 * 16 + 9 * 8


def test_in_other_batches_nothing_but_rounding_changes(tiny_llama: Path, tmp_path: Path) -> None:
    kept, anew = (three_epochs(tiny_llama, tmp_path / str(len(more)), *more) for more in ((), (OFF,)))
    assert len(kept) == len(anew) == 13
    for one, other in zip(kept, anew, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_resumed_run_fills_its_memory_anew(tiny_llama: Path, tmp_path: Path, given_to_reference: list[int]) -> None:
    whole = three_epochs(tiny_llama, tmp_path / "whole", "data.shuffle=false")
    given_to_reference.clear()
    settings = [f"checkpointing.checkpoint_dir={tmp_path / 'parts'}", "data.shuffle=false"]
    config = load_config(tmp_path / "whole" / "config.yaml", [*settings, "dpo.max_num_steps=4"], DPOConfig)
    assert launch_preference(config).step == 4
    assert three_epochs(tiny_llama, tmp_path / "parts", "data.shuffle=false") == whole
    assert given_to_reference == [16, 8, 8, 8, 8, 8, 16, 8]


def test_of_kto_the_judged_answers_are_kept_and_the_mismatched_ones_are_not(
    tiny_llama: Path, tmp_path: Path, given_to_reference: list[int]
) -> None:
    rows = [{"prompt": f"{i}?", "completion": "no" if i % 2 else "yes", "label": i % 2 == 0} for i in range(12)]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{name: local, path: '{tmp_path / 'judged.jsonl'}', format: {{type: judged}}}}"
    data = (f"data.train={source}", f"data.validation={source}", "dpo.val_period=0", "dpo.val_at_end=true")
    kto = ("dpo.preference_loss=kto", "data.shuffle=false")
    kept = three_epochs(tiny_llama, tmp_path / "kept", *kto, *data)
    assert given_to_reference == [12, 12] + 9 * [4] + [12]  # the validation has the records of training
    assert three_epochs(tiny_llama, tmp_path / "anew", *kto, *data, OFF) == kept


def sequences(*rows: list[int], first: int = 2) -> TokenBatch:
    """Each with loss from position `first` on."""
    return TokenBatch.from_examples([Example(torch.tensor(row), torch.arange(len(row)) >= first) for row in rows])


def test_memory_is_bounded_and_what_is_kept_is_known_by_tokens_and_mask(
    tiny_llama: Path, given_to_reference: list[int]
) -> None:
    config = load_config(None, ["policy.precision=float32", "policy.num_threads=1"], DPOConfig).config
    with LocalExecutor() as executor:
        source = str(tiny_llama)
        worker = executor.start(TrainWorker, worker_policy(config.policy, source), source, with_reference=True)
        policy = Policy(worker)
        reference = Reference(policy, max_bytes=2 * (256 + 4 * 3))
        batch = sequences([5, 6, 7, 8, 9], [5, 6, 10, 11, 12], [5, 6, 13, 14, 15])
        first = reference.logprobs(batch)
        torch.testing.assert_close(first, policy.logprobs(batch))
        assert reference.num_bytes == 2 * (256 + 4 * 3)
        torch.testing.assert_close(reference.logprobs(batch), first)
        assert given_to_reference == [3, 1]
        masked = sequences([5, 6, 7, 8, 9], first=3)
        torch.testing.assert_close(reference.logprobs(masked), torch.cat([torch.zeros(3), first[3:5]]))
        assert given_to_reference == [3, 1, 1] and reference.num_bytes == 2 * (256 + 4 * 3)
