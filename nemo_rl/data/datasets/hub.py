"""Data sets of the Hugging Face hub, or local folders laid out like one."""

from nemo_rl.data.datasets.records import Table, read_with_datasets


def open_hub(path: str, *, split: str, subset: str | None = None) -> Table:
    """Load one split with `datasets`; rows stay on disk until they are asked for.

    Args:
        path: name on the hub, or a local folder.
        split: split of the data set, slices such as `train[:1%]` included.
        subset: subset (configuration) of the data set; None is its default.

    Raises:
        DataError: there is no such data set, subset or split.
    """
    source = path if subset is None else f"{path} (subset {subset!r})"
    records = read_with_datasets(path, source=source, split=split, subset=subset)
    return Table(records, f"{source} (split {split!r})")
