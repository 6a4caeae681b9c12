"""Teachers are compared with the student at the door, and each scores the sequences of its own tasks."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from nemo_rl.algorithms.teachers import Teachers, find_teachers
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.distillation import DistillationConfig
from nemo_rl.config.schema.policy import ModelConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.distributed.executor import make_executor
from nemo_rl.errors import ConfigError
from nemo_rl.objectives.distillation import DistillationObjective, DistributionOutputs, distillation_loss
from nemo_rl.objectives.logprobs import LogitHead
from nemo_rl.workers.teacher import TeacherWorker
from tiny_batches import rollout_batch
from tiny_models import tiny_model


def worker(folder: Path, *, seed: int, hidden_size: int) -> TeacherWorker:
    tiny_model(seed=seed, hidden_size=hidden_size).save_pretrained(folder)
    config = ModelConfig(model_name=str(folder), precision="float32", device="cpu", num_threads=1)
    return TeacherWorker(config, str(folder))


@pytest.mark.parametrize("topk", [5, None])
def test_each_teacher_scores_the_tasks_of_its_environment(topk: int | None, tmp_path: Path) -> None:
    pair = [worker(tmp_path / str(seed), seed=seed, hidden_size=size) for seed, size in ((1, 32), (2, 48))]
    batch = rollout_batch(tiny_model())
    with ExitStack() as stack:
        executor = stack.enter_context(make_executor("local", startup_timeout_seconds=60))
        handles = tuple(executor.start(lambda teacher=teacher: teacher) for teacher in pair)
        teachers = Teachers(handles, {"teachers.sums": 0, "teachers.words": 1}, topk)
        environments = ["sums"] * 3 + ["words"] * 3 + ["sums"] * 3
        scored = teachers.score(teachers.assign(batch, environments))
    owners = scored.per_token(scored.sequence_columns["teacher"])
    assert scored.sequence_columns["teacher"].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    for index, teacher in enumerate(pair):
        rows = (owners == index) & batch.token_columns["loss_mask"]
        if topk is None:
            own = teacher.last_hidden(batch)
            found = scored.token_columns["teacher_hidden"]
            torch.testing.assert_close(found[rows, : own.shape[1]], own[rows], rtol=1e-5, atol=1e-5)
            assert not found[rows, own.shape[1] :].any()
        else:
            logprobs, ids = teacher.topk_logprobs(batch, topk)
            torch.testing.assert_close(scored.token_columns["teacher_logprobs"][rows], logprobs[rows])
            assert torch.equal(scored.token_columns["teacher_ids"][rows], ids[rows])


def test_tokens_of_one_teacher_never_meet_the_head_of_another() -> None:
    """A micro-batch whose tasks all have the narrow teacher holds too few hidden states for the wide one's head."""
    generator = torch.Generator().manual_seed(0)
    heads = tuple(LogitHead(torch.randn(7, width, generator=generator)) for width in (3, 5))
    batch = TokenBatch(
        torch.arange(4),
        torch.tensor([0, 4]),
        torch.tensor([0]),
        {"teacher_hidden": torch.randn(4, 3, generator=generator)},
        {"teacher": torch.tensor([0])},
    )
    hidden = torch.randn(4, 2, generator=generator)
    student = LogitHead(torch.randn(7, 2, generator=generator))
    loss, _ = DistillationObjective()(DistributionOutputs(hidden, student, heads), batch)
    teacher = heads[0](batch.token_columns["teacher_hidden"]).log_softmax(-1)
    torch.testing.assert_close(loss, distillation_loss(student(hidden), teacher))


def test_a_task_of_an_environment_without_a_teacher_is_named() -> None:
    batch = TokenBatch(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"'code', for which teachers has none: add teachers\.code"):
        Teachers((), {"teachers.math": 0}, 4).assign(batch, ["code"])


def load(student: Path, *settings: str) -> DistillationConfig:
    return load_config(None, [f"policy.model_name={student}", *settings], DistillationConfig).config


def test_padding_of_the_vocabulary_may_differ_and_is_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(49152 + 64, mean_resizing=False)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    for student, teacher in ((tiny_llama, tmp_path), (tmp_path, tiny_llama)):
        assert find_teachers(load(student, f"teacher.model_name={teacher}")).vocab_size == 49152


def test_sections_that_are_alike_are_one_teacher(tiny_llama: Path) -> None:
    same, other = (f"{{model_name: {tiny_llama}, logprob_mb_tokens: {size}}}" for size in (100, 200))
    teachers = f"+teachers={{math: {same}, sums: {same}, words: {other}}}"
    config = load(tiny_llama, "~teacher", teachers)
    teaching = find_teachers(config)
    assert teaching.place == {"teachers.math": 0, "teachers.sums": 0, "teachers.words": 1}
    assert (len(teaching.models), config.num_models) == (2, 3)
