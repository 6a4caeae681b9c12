"""The configuration of an evaluation."""

import difflib
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import CommandConfig, NonNegativeInt, PositiveInt, Section, Share, conflict
from nemo_rl.config.schema.cluster import ClusterConfig
from nemo_rl.config.schema.environments import EnvironmentConfig, MathEnvironmentConfig
from nemo_rl.config.schema.generation import VLLMEngineConfig
from nemo_rl.config.schema.policy import TokenizerConfig
from nemo_rl.config.schema.sources import template_fault

ARITHMETIC = "arithmetic"
"""The problems that are generated offline."""

MMLU_LANGUAGES = (
    *("AR-XY", "BN-BD", "DE-DE", "ES-LA", "FR-FR", "HI-IN", "ID-ID"),
    *("IT-IT", "JA-JP", "KO-KR", "PT-BR", "SW-KE", "YO-NG", "ZH-CN"),
)
"""Languages into which MMLU is translated."""

MATH_BENCHMARKS = ("aime2024", "aime2025", "math", "math500", "gsm8k")
"""Benchmarks whose answer is a number or an expression."""

CHOICE_BENCHMARKS = (
    *("gpqa", "gpqa_diamond", "mmlu", "mmlu_pro"),
    *(f"mmlu_{language}" for language in MMLU_LANGUAGES),
)
"""Benchmarks whose answer is the letter of an option."""

BENCHMARK_NAMES = (ARITHMETIC, *MATH_BENCHMARKS, *CHOICE_BENCHMARKS)

_FILES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")


class EvalLoopConfig(Section):
    """What is measured."""

    metric: Literal["pass@k", "avg@n", "cons@k"] = "pass@k"
    """`pass@k`: the chance that one of `k_value` answers is right (unbiased); `avg@n`: the mean score of all answers;
    `cons@k`: the chance that the most frequent of `k_value` answers is right, ties by their share."""

    num_tests_per_prompt: PositiveInt = 1
    """Answers to each problem: n."""

    k_value: PositiveInt = 1
    """The k of `pass@k` and `cons@k`; `avg@n` takes all answers."""

    seed: NonNegativeInt = 42
    """Decides every sampled token and the order of shuffled options."""

    save_path: str | None = "results/eval"
    """Folder of `samples.jsonl`, `samples.parquet`, `summary.json` and `config.yaml`; None keeps nothing."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.metric != "avg@n" and self.k_value > self.num_tests_per_prompt:
            raise conflict(
                f"eval.k_value = {self.k_value} is more than eval.num_tests_per_prompt = {self.num_tests_per_prompt}:"
                " lower the first or raise the second",
                "k_value",
                "num_tests_per_prompt",
            )
        return self


class EvalEngineConfig(VLLMEngineConfig):
    """The vLLM engine; `hf` takes `max_model_len` and `precision` from here too."""

    max_model_len: PositiveInt = 2048  # pyright: ignore[reportIncompatibleVariableOverride] (sections are frozen)
    """Longest sequence in tokens, prompt and answer together."""

    precision: Literal["auto", "float32", "bfloat16"] = (  # pyright: ignore[reportIncompatibleVariableOverride]
        "bfloat16"
    )
    """Number format of the weights; `auto` is `bfloat16` where the hardware computes in it, `float32` elsewhere."""


class EvalGenerationConfig(Section):
    """The model, and how its answers are sampled."""

    backend: Literal["hf", "vllm"] = "hf"
    """The engine."""

    model_name: str
    """`embedded:NAME`, a local folder or a name on the Hugging Face hub."""

    max_new_tokens: PositiveInt | None = None
    """Longest answer in tokens; None is what a prompt leaves of `vllm_cfg.max_model_len`, which bounds it anyway."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divides the logits before sampling; 0 always takes the most likely token."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens whose probability reaches this; 1 keeps all."""

    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Sample from this many of the most likely tokens; None, 0 and -1 keep all."""

    min_p: Share = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 keeps all."""

    stop_token_ids: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Tokens that end an answer besides the model's own end tokens."""

    stop_strings: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Texts that end an answer."""

    max_batch_size: PositiveInt = 64
    """Answers that `hf` samples side by side."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where `hf` puts the model; `auto` is the GPU when there is one."""

    num_threads: PositiveInt | None = None
    """CPU threads of the model's arithmetic; None is PyTorch's own choice."""

    vllm_cfg: EvalEngineConfig = EvalEngineConfig()
    """The vLLM engine; `hf` takes `max_model_len` and `precision` from here too."""


class EvalDataConfig(Section):
    """The problems, and how they become prompts."""

    dataset_name: str
    """A benchmark by name (see docs/evaluation.md), a local file, or a data set of the hub as `owner/name`."""

    path: str | None = None
    """A local file or folder with the benchmark's records, to read instead of the hub."""

    split: str | None = None
    """Split of the data set, slices such as `test[:10]` included; None is the benchmark's own, or `test` elsewhere."""

    problem_key: str = "problem"
    """Field of the problem, in files and data sets of one's own."""

    solution_key: str = "answer"
    """Field of the known answer, in files and data sets of one's own."""

    file_format: Literal["csv", "json", "parquet"] | None = None
    """Format of a file of one's own; None goes by its name."""

    environment: str | None = None
    """Name of the environment (a key of `env`) that judges the answers; None is the one that fits the benchmark."""

    num_samples: PositiveInt | None = None
    """Only the first so many problems; None takes all, of `arithmetic` 200."""

    prompt: str | None = None
    """Template of the user message, `{}` stands for the problem; None is the benchmark's own."""

    prompt_file: str | None = None
    """A file that holds the template instead of `prompt`."""

    system_prompt_file: str | None = None
    """A file that holds the system message; None uses the chat template's own."""

    max_input_seq_length: PositiveInt | None = None
    """Longest prompt in tokens; None, and anything above, is what `generation.vllm_cfg.max_model_len` allows."""

    too_long: Literal["error", "skip"] = "error"
    """What happens to a prompt above the limit: stop before the run, or leave it out and count it."""

    @property
    def benchmark(self) -> str | None:
        """The benchmark that is meant, in any case of letters; None for data of one's own."""
        return next((name for name in BENCHMARK_NAMES if name.casefold() == self.dataset_name.casefold()), None)

    @property
    def is_file(self) -> bool:
        """Whether `dataset_name` is a file of one's own, here or at a web address."""
        return self.file_format is not None or Path(self.dataset_name).suffix in _FILES

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.benchmark is None and not self.is_file and "/" not in self.dataset_name:
            close = difflib.get_close_matches(self.dataset_name, BENCHMARK_NAMES, n=1)
            known = f"did you mean {close[0]}?" if close else f"known are {', '.join(BENCHMARK_NAMES)}"
            raise conflict(
                f"data.dataset_name = {self.dataset_name!r} is no benchmark, no data file and no owner/name of the hub:"
                f" {known}",
                "dataset_name",
            )
        if self.benchmark == ARITHMETIC and self.path is not None:
            raise conflict("data.path is set and arithmetic problems are generated: leave it out", "path")
        return self

    @model_validator(mode="after")
    def _one_template(self) -> Self:
        if self.prompt is not None and self.prompt_file is not None:
            raise conflict("prompt and prompt_file are both set: keep one", "prompt", "prompt_file")
        if fault := template_fault(self.prompt):
            raise fault
        return self


class EvalConfig(CommandConfig):
    """An evaluation."""

    default_recipe: ClassVar[str] = "eval_arithmetic_smollm2"

    eval: EvalLoopConfig = EvalLoopConfig()
    """What is measured."""

    generation: EvalGenerationConfig
    """The model, and how its answers are sampled."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer of the model."""

    data: EvalDataConfig
    """The problems, and how they become prompts."""

    env: dict[str, EnvironmentConfig] = Field(default_factory=dict[str, EnvironmentConfig])
    """The environments by name; `math` and `multiple_choice` are there without being written."""

    cluster: ClusterConfig = ClusterConfig()
    """Where the worker runs and what it may use."""

    @property
    def environments(self) -> dict[str, EnvironmentConfig]:
        """The environments that are written, and those that are there anyway."""
        return {
            "math": MathEnvironmentConfig(type="math"),
            "multiple_choice": MathEnvironmentConfig(type="math", extraction="multiple_choice"),
            **self.env,
        }

    @property
    def judge(self) -> str:
        """Name of the environment that judges the answers."""
        return self.data.environment or ("multiple_choice" if self.data.benchmark in CHOICE_BENCHMARKS else "math")

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if self.judge not in self.environments:
            raise conflict(
                f"data.environment = {self.judge!r} is not in env: use one of {', '.join(self.environments)}",
                "data.environment",
            )
        return self

    @model_validator(mode="after")
    def _answers_are_read(self) -> Self:
        if self.eval.metric == "cons@k" and self.environments[self.judge].type != "math":
            raise conflict(
                f"eval.metric = cons@k counts the answers that env.{self.judge} reads, and only a math environment"
                " tells them: use pass@k or avg@n",
                "eval.metric",
            )
        return self

    @model_validator(mode="after")
    def _answers_are_right_or_wrong(self) -> Self:
        judge = self.environments[self.judge]
        graded = judge.type == "reward_model" and (judge.reward_min, judge.reward_max) != (0, 1)
        if self.eval.metric == "pass@k" and graded:
            raise conflict(
                f"eval.metric = pass@k counts right answers, and env.{self.judge} is a reward model, whose scores are"
                " graded: use avg@n",
                "eval.metric",
            )
        return self

    @model_validator(mode="after")
    def _answers_differ(self) -> Self:
        tests, greedy = self.eval.num_tests_per_prompt, self.generation.temperature == 0 or self.generation.top_k == 1
        if tests > 1 and greedy:
            raise conflict(
                f"sampling is greedy, so all of eval.num_tests_per_prompt = {tests} answers to a problem would be the"
                " same: raise generation.temperature above 0 (with top_k not 1) or set the number to 1",
                "generation.temperature",
                "eval.num_tests_per_prompt",
            )
        return self

    @model_validator(mode="after")
    def _device_is_there(self) -> Self:
        if self.generation.device == "cuda" and self.cluster.executor == "ray" and self.cluster.gpus_per_node == 0:
            raise conflict(
                "generation.device = cuda needs a GPU, and cluster.gpus_per_node = 0 asks Ray for none: set the second"
                " to 1 or the first to cpu",
                "generation.device",
                "cluster.gpus_per_node",
            )
        return self
