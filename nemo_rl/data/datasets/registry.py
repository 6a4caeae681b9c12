"""From a data section of the configuration to a data set."""

from nemo_rl.config.schema.data import (
    ArithmeticDataConfig,
    CustomDataConfig,
    DataSpec,
    HubDataConfig,
    LocalDataConfig,
)
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset, unrepeatable_questions
from nemo_rl.data.datasets.custom import load_custom
from nemo_rl.data.datasets.hub import load_hub
from nemo_rl.data.datasets.local import load_local
from nemo_rl.data.datasets.records import RecordFields
from nemo_rl.data.types import TaskDataset


def build_dataset(spec: DataSpec, split: str, *, held_out: TaskDataset | None = None) -> TaskDataset:
    """Build the data set that a spec describes.

    Args:
        spec: its section of the configuration.
        split: `train`, `validation` or `test`; generated data sets draw every split from a random stream of its own.
        held_out: a generated data set whose repeatable problems this one must not contain.

    Raises:
        DataError: the data are missing, empty or malformed.
        ConfigError: a custom data set cannot be imported.
    """
    match spec:
        case ArithmeticDataConfig():
            return ArithmeticDataset(
                spec.num_samples,
                seed=spec.seed,
                split=split,
                mix=dict[str, float](spec.mix.items()),
                exclude=unrepeatable_questions(held_out) if isinstance(held_out, ArithmeticDataset) else frozenset(),
                environment=spec.environment,
            )
        case LocalDataConfig():
            return load_local(spec.path, RecordFields(spec.prompt_key, spec.answer_key, spec.environment))
        case HubDataConfig():
            fields = RecordFields(spec.prompt_key, spec.answer_key, spec.environment)
            return load_hub(spec.path, fields, split=spec.split)
        case CustomDataConfig():
            return load_custom(spec.path, spec.kwargs)
