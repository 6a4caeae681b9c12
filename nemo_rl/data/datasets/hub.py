"""Data sets of the Hugging Face hub, or local folders laid out like one."""

from nemo_rl.data.datasets.records import RecordDataset, RecordFields, read_with_datasets


def load_hub(path: str, fields: RecordFields, *, split: str) -> RecordDataset:
    """Load one split with `datasets`; rows stay on disk until their tasks are asked for.

    Args:
        path: name on the hub, or a local folder.
        fields: the columns of the problem and of the answer.
        split: split of the data set, slices such as `train[:1%]` included.

    Raises:
        DataError: there is no such data set or split, it is empty, or it lacks a column.
    """
    records = read_with_datasets(path, source=path, split=split)
    return RecordDataset(records, fields, source=f"{path} (split {split!r})")
