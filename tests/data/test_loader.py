import io
import json
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from child_processes import forget_other_processes, spawned  # pyright: ignore[reportImplicitRelativeImport]
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset
from nemo_rl.data.loader import TaskLoader, one_pass
from nemo_rl.data.types import Task
from nemo_rl.errors import CheckpointError, DataError


def keep(task: Task) -> Task:
    return task


def without_threes(task: Task) -> Task | None:
    return None if task.index % 3 == 0 else task


def nothing(task: Task) -> None:
    return None


def loader(num_tasks: int = 10, num_prompts: int = 4, seed: int = 5, **options: object) -> TaskLoader:
    options.setdefault("processor", keep)
    return TaskLoader(ArithmeticDataset(num_tasks), num_prompts, seed=seed, **options)


def draw(batches: Iterator[list[Task]], number: int) -> list[list[int]]:
    return [[task.index for task in next(batches)] for _ in range(number)]


def test_every_epoch_shows_every_task_once_and_no_batch_is_short() -> None:
    stream = loader()
    batches = draw(stream, 10)
    assert [len(batch) for batch in batches] == [4] * 10
    flat = [index for batch in batches for index in batch]
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "epochs repeat their order"
    assert stream.epoch == 4


def test_the_seed_decides_the_order_and_neighbouring_seeds_share_none() -> None:
    assert draw(loader(seed=1), 10) == draw(loader(seed=1), 10)
    first, second = ([task for batch in draw(loader(seed=seed), 10) for task in batch] for seed in (0, 1))
    orders = [{tuple(flat[start : start + 10]) for start in range(0, 40, 10)} for flat in (first, second)]
    assert not orders[0] & orders[1]
    assert draw(loader(shuffle=False), 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@settings(deadline=None, max_examples=40)
@given(
    num_tasks=st.integers(2, 13),
    num_prompts=st.integers(1, 9),
    before=st.integers(0, 8),
    shuffle=st.booleans(),
    skip=st.booleans(),
)
def test_a_run_interrupted_anywhere_goes_on_with_the_same_tasks(
    num_tasks: int, num_prompts: int, before: int, shuffle: bool, skip: bool
) -> None:
    def fresh() -> TaskLoader:
        return loader(num_tasks, num_prompts, shuffle=shuffle, processor=without_threes if skip else keep)

    whole = fresh()
    expected = draw(whole, before + 6)
    interrupted = fresh()
    draw(interrupted, before)
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert draw(resumed, 3) == expected[before : before + 3]
    again = fresh()
    again.load_state_dict(resumed.state_dict())
    assert draw(again, 3) == expected[before + 3 :]
    assert (again.epoch, again.num_drawn, again.num_skipped) == (whole.epoch, whole.num_drawn, whole.num_skipped)


def test_a_state_survives_torch_save_and_can_be_loaded_over_a_loader_in_use() -> None:
    stream = loader()
    draw(stream, 3)
    buffer = io.BytesIO()
    torch.save(stream.state_dict(), buffer)
    buffer.seek(0)
    following = draw(stream, 5)
    stream.load_state_dict(torch.load(buffer))
    assert draw(stream, 5) == following


def test_loader_processes_change_neither_order_nor_resume() -> None:
    multiprocessing.set_forkserver_preload(["torchdata.stateful_dataloader", "nemo_rl.data.loader"])
    expected = draw(loader(), 6)
    workers = loader(num_workers=1)
    assert draw(workers, 3) == expected[:3]
    resumed = loader(num_workers=1)
    resumed.load_state_dict(json.loads(json.dumps(workers.state_dict())))
    assert draw(resumed, 3) == expected[3:]


def test_a_state_stays_as_it_was_while_the_loader_goes_on() -> None:
    stream = loader(num_workers=1)
    draw(stream, 2)
    state = stream.state_dict()
    expected = draw(stream, 3)
    resumed = loader(num_workers=1)
    resumed.load_state_dict(state)
    assert draw(resumed, 3) == expected


def test_ctrl_c_does_not_reach_loader_processes() -> None:
    forget_other_processes()
    stream, expected = loader(num_workers=1), draw(loader(), 40)
    assert draw(stream, 1) == expected[:1]
    workers = spawned(recursive=True)
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    assert workers and draw(stream, 39) == expected[1:]


@pytest.mark.parametrize("change", [{}, {"data": []}, {"num_drawn": None}, {"loader": {}}, {"loader": 3}])
def test_a_state_of_another_shape_is_refused(change: dict[str, object]) -> None:
    stream = loader()
    state = stream.state_dict() | change if change else {}
    with pytest.raises(CheckpointError, match="not in the form"):
        stream.load_state_dict(state)


def test_changed_data_or_order_are_refused_on_resume() -> None:
    state = loader().state_dict()
    with pytest.raises(CheckpointError, match="num_tasks was 10 and is 11"):
        loader(num_tasks=11).load_state_dict(state)
    with pytest.raises(CheckpointError, match="num_workers was 0 and is 2"):
        loader(num_workers=2).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed was 5 and is 6"):
        loader(seed=6).load_state_dict(state)
    with pytest.raises(CheckpointError, match="shuffle was True and is False"):
        loader(shuffle=False).load_state_dict(state)
    other = TaskLoader(ArithmeticDataset(10, seed=1), 4, keep, seed=5)
    with pytest.raises(CheckpointError, match="fingerprint was"):
        other.load_state_dict(state)


def test_skipped_tasks_are_counted_and_batches_stay_full() -> None:
    stream = loader(processor=without_threes)
    drawn = Counter(index for batch in draw(stream, 6) for index in batch)
    assert drawn == Counter([1, 2, 4, 5, 7, 8] * 4)
    assert stream.num_skipped >= 12
    with pytest.raises(DataError, match="all 10 tasks were skipped"):
        next(loader(processor=nothing))


def test_an_evaluation_sees_every_task_once_in_order() -> None:
    dataset = ArithmeticDataset(10)
    assert [task.index for task in one_pass(dataset, keep)] == list(range(10))
    assert [task.index for task in one_pass(dataset, without_threes)] == [1, 2, 4, 5, 7, 8]


def test_an_evaluation_of_the_first_tasks_processes_no_others() -> None:
    processed: list[int] = []

    def process(task: Task) -> Task | None:
        processed.append(task.index)
        return without_threes(task)

    assert [task.index for task in islice(one_pass(ArithmeticDataset(10), process), 2)] == [1, 2]
    assert processed == [0, 1, 2]


def test_an_empty_data_set_or_batch_is_refused() -> None:
    with pytest.raises(DataError, match="0 prompts"):
        loader(num_prompts=0)
    with pytest.raises(DataError, match="empty"):
        TaskLoader([], 4, keep)  # type: ignore[arg-type]


def test_torchdata_still_needs_its_deprecation_warning_silenced() -> None:
    with pytest.warns(UserWarning, match="'set_vital' is deprecated"):
        StatefulDataLoader([0])
