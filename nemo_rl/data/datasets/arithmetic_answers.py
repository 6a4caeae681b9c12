"""The arithmetic problems with answers to imitate, to compare or judged: conversations and pairs without a download."""

import hashlib
from dataclasses import dataclass
from random import Random

from nemo_rl.data.datasets.arithmetic import ArithmeticDataset
from nemo_rl.data.types import Chat, ChatPair, Message

_LARGEST_MISTAKE = 9


@dataclass(frozen=True, slots=True)
class ArithmeticChats:
    """Each problem, followed by its right answer."""

    problems: ArithmeticDataset

    def __len__(self) -> int:
        """Number of problems."""
        return len(self.problems)

    def __getitem__(self, index: int) -> Chat:
        """Problem `index` and its answer."""
        task = self.problems[index]
        return Chat((*task.messages, _answer(task.extra["ground_truth"])), index=index)

    @property
    def fingerprint(self) -> str:
        """That of the problems."""
        return self.problems.fingerprint


@dataclass(frozen=True, slots=True)
class ArithmeticPairs:
    """Each problem with its right answer, preferred to one that is off by 1 to 9 and never negative."""

    problems: ArithmeticDataset

    def __len__(self) -> int:
        """Number of problems."""
        return len(self.problems)

    def __getitem__(self, index: int) -> ChatPair:
        """Problem `index`, its answer and a wrong one."""
        task = self.problems[index]
        right = int(task.extra["ground_truth"])
        random = Random(f"{task.messages[-1]['content']}/{index}")
        mistake = random.randint(1, _LARGEST_MISTAKE) * random.choice((-1, 1))
        wrong = right + mistake if right + mistake >= 0 else right - mistake
        return ChatPair(task.messages, (_answer(right),), (_answer(wrong),), index=index)

    @property
    def fingerprint(self) -> str:
        """That of the problems."""
        return self.problems.fingerprint


@dataclass(frozen=True, slots=True)
class ArithmeticJudged:
    """Each problem with one answer of a pair: the right one, marked good, or at every second problem the wrong one."""

    pairs: ArithmeticPairs

    def __len__(self) -> int:
        """Number of problems."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> Chat:
        """Problem `index` and an answer to it."""
        pair, is_right = self.pairs[index], index % 2 == 0
        return Chat((*pair.prompt, *(pair.chosen if is_right else pair.rejected)), index=index, desirable=is_right)

    @property
    def fingerprint(self) -> str:
        """Hash of the pairs and of what is taken from them."""
        return hashlib.sha256(f"judged/{self.pairs.fingerprint}".encode()).hexdigest()


def _answer(number: object) -> Message:
    return Message(role="assistant", content=str(number))
