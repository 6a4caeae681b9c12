"""The problems of a run that samples: data sets, a loader, and what is small enough to be made ready at the start."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

from transformers import PreTrainedTokenizerBase

from nemo_rl.config.schema.data import ArithmeticDataConfig
from nemo_rl.config.schema.sampled import SampledRunConfig
from nemo_rl.data.datasets.arithmetic import best_prompts
from nemo_rl.data.datasets.registry import build_dataset, load_tasks
from nemo_rl.data.datasets.streams import Source, held
from nemo_rl.data.lengths import UNCACHED, LengthCache, LengthFilter
from nemo_rl.data.loader import TaskLoader, one_pass
from nemo_rl.data.processors import TaskProcessor, read_prompt_format
from nemo_rl.data.types import Task
from nemo_rl.errors import DataError


@dataclass(frozen=True, slots=True)
class Problems:
    """The data of a run, ready for the sampler; `base_test` are the test problems in every candidate prompt."""

    loader: TaskLoader
    validation: tuple[Task, ...]
    test: tuple[Task, ...]
    base_test: Mapping[str, tuple[Task, ...]]


def load_problems(
    config: SampledRunConfig, tokenizer: PreTrainedTokenizerBase, lengths: LengthCache = UNCACHED
) -> Problems:
    """Build the data sets and apply the chat template to what is small enough to be checked now.

    Args:
        config: of the run.
        tokenizer: whose chat template is applied.
        lengths: keeps the token counts of `data.too_long: filter`.

    Raises:
        DataError: data are missing or malformed, a set is empty, or a prompt is too long.
    """
    data = config.data
    prompt_format = read_prompt_format(data.prompt, data.prompt_file, data.system_prompt_file)
    processor = TaskProcessor(tokenizer, prompt_format, config.max_prompt_tokens, data.too_long)
    test = None if data.test is None else build_dataset(data.test, "test")
    train, validation = load_tasks(data, seed=config.loop.seed, held_out=test)
    if data.too_long == "filter":
        shorter = LengthFilter(config.max_prompt_tokens, tokenizer, lengths, data.num_workers)
        train = shorter.fitting(held(train, "too_long=filter cannot measure"), processor.length, (prompt_format,))
    loader = TaskLoader(
        train,
        config.num_prompts_per_draw,
        processor,
        shuffle=data.shuffle,
        seed=config.loop.seed,
        num_workers=data.num_workers,
    )

    def tasks(dataset: Source[Task] | None, process: TaskProcessor, limit: int | None = None) -> tuple[Task, ...]:
        if dataset is None:
            return ()
        usable = tuple(islice(one_pass(dataset, process), limit))
        if not usable:
            raise DataError("all prompts of a validation or test set are too long; raise data.max_input_seq_length")
        return usable

    base: dict[str, tuple[Task, ...]] = {}
    if config.loop.report_base_model and test is not None and isinstance(data.test, ArithmeticDataConfig):
        others = {name: form for name, form in best_prompts().items() if form != processor.prompt_format}
        for name, form in others.items():
            base[name] = tasks(test, replace(processor, prompt_format=form, max_input_length=None))
    return Problems(loader, tasks(validation, processor, config.loop.max_val_samples), tasks(test, processor), base)
