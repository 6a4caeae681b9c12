"""A student comes to say what its teachers would, on its own answers and on given ones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.distillation import DistillationObjective, DistributionOutputs
from tiny_letters import make_letters_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import VOWELS, make_tiny_llama, records  # pyright: ignore[reportImplicitRelativeImport]
from tiny_taught import make_teacher, off_policy_run, on_policy_run  # pyright: ignore[reportImplicitRelativeImport]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(student, tmp_path_factory.mktemp("teacher"))


def divergences(folder: Path) -> tuple[float, float]:
    """The mean of both divergences in the first step, and over the last five."""
    both = [
        ((line["train/forward_kl"] or 0.0) + (line["train/reverse_kl"] or 0.0)) / 2 for line in records(folder / "run")
    ]
    return both[0], sum(both[-5:]) / 5


LOSSES = {
    "forward_topk": ("loss_fn.kl_type=forward", "{}.topk_logits_k=16"),
    "reverse_topk": ("loss_fn.kl_type=reverse", "{}.topk_logits_k=16"),
    "mixed_topk_outside": ("loss_fn.kl_type=mixed", "loss_fn.zero_outside_topk=true", "{}.topk_logits_k=40"),
    "forward_full": ("loss_fn.kl_type=forward", "{}.topk_logits_k=null"),
    "reverse_full": ("loss_fn.kl_type=reverse", "{}.topk_logits_k=null"),
    "mixed_full": ("loss_fn.kl_type=mixed", "loss_fn.mixed_kl_weight=0.3", "{}.topk_logits_k=null"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("place", ["distillation", "off_policy_distillation"])
def test_the_student_approaches_the_teacher_and_turned_round_it_does_not(
    name: str, place: str, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = on_policy_run if place == "distillation" else off_policy_run
    settings = [text.format(place) for text in LOSSES[name]]
    run(student, teacher, tmp_path / "right", *settings, code=VOWELS)
    first, last = divergences(tmp_path / "right")
    assert last < 0.65 * first
    loss = DistillationObjective.__call__

    def negated(
        self: DistillationObjective, outputs: DistributionOutputs, tokens: TokenBatch
    ) -> tuple[Tensor, Metrics]:
        value, metrics = loss(self, outputs, tokens)
        return -value, metrics

    monkeypatch.setattr(DistillationObjective, "__call__", negated)
    run(student, teacher, tmp_path / "wrong", *settings, f"{place}.max_num_steps=10", code=VOWELS)
    assert divergences(tmp_path / "wrong")[1] > first


def test_full_vocabulary_is_top_k_of_all_tokens(student: Path, teacher: Path, tmp_path: Path) -> None:
    for name, k in (("full", "null"), ("all", "69")):
        settings = (f"distillation.topk_logits_k={k}", "distillation.max_num_steps=3")
        on_policy_run(student, teacher, tmp_path / name, *settings, code=VOWELS)
    one, other = (records(tmp_path / name / "run") for name in ("full", "all"))
    for left, right in zip(one, other, strict=True):
        for figure in (
            "train/loss",
            "train/forward_kl",
            "train/reverse_kl",
            "train/student_entropy",
            "train/grad_norm",
        ):
            assert left[figure] == pytest.approx(right[figure], rel=1e-4), figure
    assert all(line["train/teacher_topk_mass"] == pytest.approx(1.0) for line in other)


def test_each_task_has_the_teacher_of_its_environment(student: Path, teacher: Path, tmp_path: Path) -> None:
    other = make_teacher(student, tmp_path / "other", seed=2)
    common = ("distillation.max_num_steps=2", "distillation.topk_logits_k=null")
    on_policy_run(student, teacher, tmp_path / "one", *common, code=VOWELS)
    two = ("~teacher", f"+teachers={{function: {{model_name: {other}, precision: float32}}}}")
    on_policy_run(student, teacher, tmp_path / "routed", *common, *two, code=VOWELS)
    on_policy_run(student, other, tmp_path / "direct", *common, code=VOWELS)
    routed, direct = (records(tmp_path / name / "run") for name in ("routed", "direct"))
    assert [line["train/loss"] for line in routed] == [line["train/loss"] for line in direct]
    assert routed[0]["train/loss"] != records(tmp_path / "one" / "run")[0]["train/loss"]


def test_another_vocabulary_is_refused_at_the_door(student: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"have different vocabularies \(49152 and 69 tokens, the first that differs"):
        on_policy_run(student, other, tmp_path / "run", code=VOWELS)
    assert not (tmp_path / "run" / "run" / "metrics.jsonl").exists()


def test_more_top_tokens_than_there_are_is_refused(student: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"topk_logits_k = 70 is more than the vocabulary of 69 tokens"):
        on_policy_run(student, teacher, tmp_path, "distillation.topk_logits_k=70", code=VOWELS)


def test_a_task_without_a_teacher_is_named(student: Path, teacher: Path, tmp_path: Path) -> None:
    two = ("~teacher", f"+teachers={{elsewhere: {{model_name: {teacher}}}}}")
    with pytest.raises(ConfigError, match=r"teachers"):
        on_policy_run(student, teacher, tmp_path, *two, code=VOWELS)


@pytest.mark.parametrize("changes", [("policy.train_mb_tokens=20",), ("policy.share_prefixes=false",)])
def test_how_the_batch_is_cut_changes_nothing(
    changes: tuple[str, ...], student: Path, teacher: Path, tmp_path: Path
) -> None:
    common = ("distillation.max_num_steps=2", "distillation.topk_logits_k=8")
    on_policy_run(student, teacher, tmp_path / "whole", *common, code=VOWELS)
    on_policy_run(student, teacher, tmp_path / "cut", *common, *changes, code=VOWELS)
    whole, cut = (records(tmp_path / name / "run") for name in ("whole", "cut"))
    for left, right in zip(whole, cut, strict=True):
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-5)
        assert left["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=1e-4)


def test_columns_of_several_values_a_token_go_where_their_tokens_go() -> None:
    batch = TokenBatch(
        torch.arange(6), torch.tensor([0, 2, 6]), torch.tensor([0, 1]), {"wide": torch.arange(18).view(6, 3)}
    )
    assert batch.select([1]).token_columns["wide"].tolist() == torch.arange(6, 18).view(4, 3).tolist()
    assert batch.at(torch.tensor([1, 4])).token_columns["wide"].tolist() == [[3, 4, 5], [12, 13, 14]]
    assert TokenBatch.concat([batch.select([1]), batch.select([0])]).token_columns["wide"].shape == (6, 3)
    assert torch.equal(TokenBatch.from_bytes(batch.to_bytes()).token_columns["wide"], batch.token_columns["wide"])
