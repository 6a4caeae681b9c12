"""Every setting arrives: values other than the defaults go in at the configuration and are met where they act."""

import asyncio
import dataclasses
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import nemo_rl.algorithms.start as starting
from nemo_rl.algorithms.grpo import grpo_objective
from nemo_rl.algorithms.launch import rollout_source, sampling_params
from nemo_rl.algorithms.problems import Problems, load_problems
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.algorithms.start import worker_policy
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.types import Completion, GenerationRequest
from nemo_rl.distributed.executor import make_executor
from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.environments.registry import build_environments
from nemo_rl.errors import CheckpointError
from nemo_rl.interfaces import Executor, Sampler
from nemo_rl.metrics import Metrics
from nemo_rl.models.load import end_tokens, load_tokenizer
from nemo_rl.observe.sinks import log_folder
from nemo_rl.workers.handles import ColocatedGenerator
from nemo_rl.workers.policy import PolicyWorker
from tiny_run import launch, overrides, reward_file  # pyright: ignore[reportImplicitRelativeImport]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_llama))


def load(*settings: str) -> GRPOConfig:
    return load_config(None, settings, GRPOConfig).config


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("max_new_tokens=9", "max_new_tokens", 9),
        ("temperature=0.7", "temperature", 0.7),
        ("top_p=0.6", "top_p", 0.6),
        ("top_k=7", "top_k", 7),
        ("min_p=0.05", "min_p", 0.05),
        ("stop_token_ids=[7,8]", "stop_token_ids", (2, 7, 8)),
        ("stop_strings=[a,b]", "stop_strings", ("a", "b")),
    ],
)
def test_a_sampling_setting_arrives_in_the_requests(setting: str, field: str, value: object) -> None:
    default, changed = sampling_params(load(), [2]), sampling_params(load(f"policy.generation.{setting}"), [2])
    assert getattr(changed, field) == value
    assert dataclasses.replace(changed, **{field: getattr(default, field)}) == default


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("ratio_clip_min=0.11", "ratio_clip_min", 0.11),
        ("ratio_clip_max=0.33", "ratio_clip_max", 0.33),
        ("ratio_clip_c=4.5", "ratio_clip_c", 4.5),
        ("reference_policy_kl_penalty=0.02", "kl_weight", 0.02),
        ("reference_policy_kl_type=k1", "kl_type", "k1"),
        ("kl_input_clamp_value=5.0", "kl_input_clamp", 5.0),
        ("kl_output_clamp_value=3.0", "kl_output_clamp", 3.0),
        ("policy_loss=cispo", "policy_loss", "cispo"),
        ("policy_loss=reinforce", "policy_loss", "reinforce"),
        ("ratio_level=sequence", "sequence_level_ratio", True),
        ("use_on_policy_kl_approximation=true", "kl_reweighted", True),
    ],
)
def test_a_loss_setting_arrives_in_the_objective(setting: str, field: str, value: object) -> None:
    default, changed = grpo_objective(load()), grpo_objective(load(f"loss_fn.{setting}"))
    assert getattr(changed, field) == value != getattr(default, field)
    assert dataclasses.replace(changed, **{field: getattr(default, field)}) == default


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("token", 0.0, 2.0), ("sequence", 0.0, 2.0), ("icepop", 0.5, 5.0), ("sequence_mask", 0.999, 1.002)],
)
def test_a_correction_arrives_in_the_objective_with_its_bounds(kind: str, low: float, high: float) -> None:
    assert grpo_objective(load()).correction is None
    for bounds, expected in (("", (low, high)), (", low: 0.8, high: 1.3", (0.8, 1.3))):
        objective = grpo_objective(load(f"loss_fn.correction={{type: {kind}{bounds}}}"))
        assert (objective.correction, objective.correction_low, objective.correction_high) == (kind, *expected)


def test_a_kl_term_is_in_the_loss_or_in_the_reward_and_not_in_both() -> None:
    penalty = "loss_fn.reference_policy_kl_penalty=0.1"
    assert grpo_objective(load(penalty)).kl_weight == 0.1
    assert grpo_objective(load(penalty, "loss_fn.reference_policy_kl_place=reward")).kl_weight == 0


def test_only_a_batch_of_one_optimizer_step_is_on_policy() -> None:
    sizes = ("grpo.num_prompts_per_step=4", "grpo.num_generations_per_prompt=2")
    one, two = (load(*sizes, f"policy.train_global_batch_size={size}") for size in (8, 4))
    again = load(*sizes, "policy.train_global_batch_size=8", "grpo.num_epochs_per_step=2")
    assert [grpo_objective(config).on_policy for config in (one, two, again)] == [True, False, False]


def problems(tokenizer: PreTrainedTokenizerBase, *settings: str) -> Problems:
    return load_problems(load("grpo.num_prompts_per_step=3", "policy.train_global_batch_size=24", *settings), tokenizer)


def questions(loader: Iterator[Sequence[Any]], batches: int) -> list[str]:
    return [task.messages[-1]["content"] for _ in range(batches) for task in next(loader)]


def test_training_problems_are_none_of_the_test(tokenizer: PreTrainedTokenizerBase) -> None:
    mix = "mix: {sum_1_1: 0, sum_2_1: 1, sum_2_2: 0}}"  # 900 problems, so that 300 of them meet most of 200
    given = problems(
        tokenizer,
        f"data.train={{name: arithmetic, num_samples: 300, {mix}",
        f"data.test={{name: arithmetic, num_samples: 200, {mix}",
        "grpo.report_base_model=false",
    )
    seen = set(questions(given.loader, 100))
    assert len(seen) > 200
    assert not seen & {task.messages[-1]["content"] for task in given.test}


def test_validation_is_cut_to_the_samples_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    given = problems(tokenizer, "grpo.max_val_samples=4", "grpo.report_base_model=false")
    assert [task.index for task in given.validation] == [0, 1, 2, 3]


def test_the_order_of_the_data_is_the_one_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    def drawn(*settings: str) -> list[int]:
        loader = problems(tokenizer, "grpo.report_base_model=false", "data.test=null", *settings).loader
        return [task.index for _ in range(3) for task in next(loader)]

    assert drawn("data.shuffle=false") == list(range(9))
    assert drawn() != drawn("grpo.seed=1") != list(range(9))


def test_loader_processes_are_as_many_as_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    none, two = (problems(tokenizer, "grpo.report_base_model=false", f"data.num_workers={n}").loader for n in (0, 2))
    with pytest.raises(CheckpointError, match="num_workers was 0 and is 2"):
        two.load_state_dict(none.state_dict())


def test_prompts_are_made_as_the_data_section_says(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("From a file: {}")
    (tmp_path / "system").write_text("You add.")
    plain = ("grpo.report_base_model=false", "data.shuffle=false")
    bare = questions(problems(tokenizer, *plain).loader, 1)[0]
    for setting, expected in (
        ("data.prompt='Solve {} now'", f"Solve {bare} now"),
        (f"data.prompt_file={tmp_path / 'prompt'}", f"From a file: {bare}"),
    ):
        given = problems(tokenizer, *plain, setting)
        assert questions(given.loader, 1)[0] == expected
        held_out = (*given.validation, *given.test)
        assert {task.messages[-1]["content"][:5] for task in held_out} == {expected[:5]}
    task = next(problems(tokenizer, *plain, f"data.system_prompt_file={tmp_path / 'system'}").loader)[0]
    assert task.messages[0] == {"role": "system", "content": "You add."}
    assert "You add." in tokenizer.decode(task.token_ids)


def test_the_base_model_is_tried_with_every_other_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    given = problems(tokenizer, "data.test.num_samples=2", "grpo.report_base_model=true")
    assert given.base_test.keys() == {"number_only", "few_shot_text", "few_shot_chat"}
    first = {name: tasks[0].messages for name, tasks in given.base_test.items()}
    assert first["number_only"][-1]["content"].endswith("Answer with the number only.")
    assert "Answer:" in first["few_shot_text"][-1]["content"]
    assert len(first["few_shot_chat"]) == 9
    assert (
        len(
            {
                tuple(task.token_ids.tolist())
                for tasks in (given.test, *given.base_test.values())
                for task in tasks[:1]
                if task.token_ids is not None
            }
        )
        == 4
    )


def test_end_tokens_are_those_of_tokenizer_and_model(
    tiny_llama: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert end_tokens(str(tiny_llama), tokenizer) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0, 17]}')
    assert end_tokens(str(tmp_path), tokenizer) == (2, 0, 17)
    (tmp_path / "generation_config.json").unlink()
    assert end_tokens(str(tmp_path), tokenizer) == (2,)


class Recording:
    """A sampler that remembers what it was asked."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.requests: list[GenerationRequest] = []

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        self.requests = list(requests)
        return await self._sampler.generate(requests)

    def metrics(self) -> Metrics:
        return self._sampler.metrics()

    @property
    def seeds(self) -> list[int]:
        return [request.seed for request in self.requests]


@contextmanager
def sampling_from(
    tiny_llama: Path, folder: Path, *settings: str
) -> Generator[tuple[RolloutSource, Recording, Problems]]:
    """What a run samples with, put together as a run does, on a real model."""
    more = ("data.validation={name: arithmetic, num_samples: 2, environment: function}", "data.shuffle=false")
    config = load(*overrides(tiny_llama, reward_file(folder), folder / "run", *more, *settings))
    tokenizer = load_tokenizer(str(tiny_llama))
    given = load_problems(config, tokenizer)
    with LocalExecutor() as executor, asyncio.Runner() as runner:
        worker = executor.start(PolicyWorker, worker_policy(config.policy, str(tiny_llama)), str(tiny_llama))
        recording = Recording(ColocatedGenerator(worker))
        environments = build_environments(config.env)
        sampling = sampling_params(config, [2])
        yield (
            rollout_source(config, tokenizer, sampling, recording, environments, given.validation, runner),
            recording,
            given,
        )


def test_every_step_has_random_numbers_of_its_own_and_validation_is_greedy(tiny_llama: Path, tmp_path: Path) -> None:
    with sampling_from(tiny_llama, tmp_path) as (source, recording, given):
        tasks = next(given.loader)
        seeds: dict[str, list[int]] = {}
        for name, step in (("first", 1), ("second", 2), ("first again", 1)):
            source.groups(tasks, step)
            seeds[name] = recording.seeds
            assert {request.sampling for request in recording.requests} == {source.sampling}
        assert seeds["first"] == seeds["first again"]
        assert len({*seeds["first"], *seeds["second"]}) == 24  # 3 tasks x 4 answers x 2 steps
        source.validate()
        assert {request.sampling for request in recording.requests} == {
            dataclasses.replace(source.sampling, temperature=0.0)
        }
        assert len(recording.requests) == 2


def test_the_limits_of_rollouts_are_those_of_the_configuration(tiny_llama: Path, tmp_path: Path) -> None:
    limits = ("grpo.max_rollout_seconds=2.5", "grpo.max_failed_group_share=0.25", "grpo.seed=9")
    with sampling_from(tiny_llama, tmp_path, *limits) as (source, _, given):
        assert (source.deadline_seconds, source.max_failed_share, source.seed) == (2.5, 0.25, 9)
        assert (source.group_size, source.validation) == (4, given.validation)


class Started:
    """An executor that remembers what it started."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.started: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def make(self, kind: Any, **options: Any) -> Executor:
        self.asked = options
        executor = make_executor(kind, **options)
        start = executor.start

        def remember(*args: Any, **kwargs: Any) -> Any:
            self.started.append((args, kwargs))
            return start(*args, **kwargs)

        executor.start = remember
        return executor


def test_a_run_starts_its_worker_and_console_as_asked(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer is a folder of its own with a chat template of its own, and the logs are elsewhere."""
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path / "tokenizer")
    template = "{% for message in messages %}<<{{ message.content }}>>{% endfor %}"
    started = Started()
    monkeypatch.setattr(starting, "make_executor", started.make)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = (
        "policy.tokenizer.name='~/tokenizer'",
        f"policy.tokenizer.chat_template='{template}'",
        "policy.num_threads=2",
        "loss_fn.reference_policy_kl_penalty=0.1",
        "cluster.startup_timeout_seconds=77",
        "logger.print_sample_period=1",
        "logger.log_dir='~/logs'",
    )
    threads = torch.get_num_threads()
    try:
        launch(overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *settings))
    finally:
        torch.set_num_threads(threads)
    assert started.asked == {"startup_timeout_seconds": 77.0}
    (((worker, policy, source), options),) = started.started
    assert (worker, source, options["with_reference"]) == (PolicyWorker, str(tiny_llama), True)
    assert (policy.tokenizer.name, policy.tokenizer.chat_template) == (str(tmp_path / "tokenizer"), template)
    assert (policy.num_threads, options["resources"].num_cpus) == (2, 2.0)
    printed = capsys.readouterr().out
    assert printed.count("problem") == 3
    assert f"metrics      {tmp_path / 'logs' / 'metrics.jsonl'}\n" in printed
    assert (tmp_path / "logs" / "metrics.jsonl").is_file() and not (tmp_path / "run" / "metrics.jsonl").exists()
    kept = load_tokenizer(str(tmp_path / "run" / "step_3" / "policy" / "tokenizer"))
    assert kept.chat_template == template


def test_a_packaged_tokenizer_and_no_threads_of_ones_own(tmp_path: Path) -> None:
    """Ray would allow one thread, so the driver's number is handed on."""
    config = load("policy.tokenizer.name=embedded:SmolLM2-135M-Instruct")
    policy = worker_policy(config.policy, str(tmp_path))
    assert load_tokenizer(policy.tokenizer.name or "").eos_token == "<|im_end|>"
    assert policy.num_threads == torch.get_num_threads()
    assert worker_policy(load().policy, "model").tokenizer.name == "model"


def test_the_logs_are_in_the_folder_of_the_run_unless_asked_otherwise(tmp_path: Path) -> None:
    assert log_folder(load().logger, tmp_path) == tmp_path
