"""The reward-model environment: a trained model scores the conversation, many rollouts in one call."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from nemo_rl.data.types import Message, Outcome
from nemo_rl.environments.base import last_reply, named_rewards
from nemo_rl.errors import EnvironmentFailure
from nemo_rl.interfaces import WorkerHandle

type _Waiting = list[tuple[Sequence[Message], asyncio.Future[float]]]


class RewardModelEnvironment:
    """Gives `clip(scale * score + shift)` of the whole conversation, as a reward model reads it.

    Conversations that arrive together are scored together: the first waits for others for a moment, and a full batch
    goes at once.
    """

    def __init__(
        self,
        worker: WorkerHandle,
        *,
        max_batch_size: int,
        max_wait_seconds: float,
        scale: float = 1.0,
        shift: float = 0.0,
        bounds: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Take a worker whose `score(conversations) -> list[float | str]` tells scores, or why there is none.

        Args:
            worker: is stopped by `close`.
            max_batch_size: most conversations of a call.
            max_wait_seconds: how long the first of them waits for others.
            scale: multiplies the score.
            shift: is added to that.
            bounds: smallest and largest reward.
        """
        self._worker = worker
        self._max_batch_size = max_batch_size
        self._max_wait_seconds = max_wait_seconds
        self._scale, self._shift, self._bounds = scale, shift, bounds
        # What waits belongs to one event loop; a run may use several, one after the other.
        self._waiting: WeakKeyDictionary[asyncio.AbstractEventLoop, _Waiting] = WeakKeyDictionary()
        self._calls: set[asyncio.Task[None]] = set()

    async def step(self, messages: Sequence[Message], extra: Mapping[str, Any], state: Any = None) -> Outcome:
        """Judge the last message in its conversation, which ends.

        Returns:
            reward `reward`; metric `score`, what the model said.

        Raises:
            EnvironmentFailure: the conversation is too long or cannot be written, the score is not finite, or the
                worker failed.
        """
        last_reply(messages)
        score = named_rewards(await self._score(messages), source="the reward model")["reward"]
        low, high = self._bounds
        reward = self._scale * score + self._shift
        reward = reward if low is None else max(low, reward)
        reward = reward if high is None else min(high, reward)
        return Outcome(rewards={"reward": reward}, metrics={"score": score})

    async def close(self) -> None:
        """Stop the worker; conversations that are being scored raise `EnvironmentFailure`."""
        self._worker.stop()

    def _score(self, messages: Sequence[Message]) -> asyncio.Future[float]:
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(loop, [])
        answer: asyncio.Future[float] = loop.create_future()
        waiting.append((messages, answer))
        if len(waiting) == self._max_batch_size:
            self._send(waiting)
        elif len(waiting) == 1:
            loop.call_later(self._max_wait_seconds, self._send, waiting)
        return answer

    def _send(self, waiting: _Waiting) -> None:
        """Score what waits; a later timer finds what has come since, or nothing."""
        batch = [(messages, answer) for messages, answer in waiting if not answer.done()]  # without those cancelled
        waiting.clear()
        if batch:
            call = asyncio.get_running_loop().create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, batch: _Waiting) -> None:
        scores: Sequence[float | str]
        try:
            scores = await self._worker.call("score", [list(messages) for messages, _ in batch])
        except Exception as error:
            scores = [f"the reward model failed: {type(error).__name__}: {error}"] * len(batch)
        for (_, answer), score in zip(batch, scores, strict=True):
            if answer.done():
                continue
            if isinstance(score, str):
                answer.set_exception(EnvironmentFailure(score))
            else:
                answer.set_result(score)
