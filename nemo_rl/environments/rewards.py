"""Reward functions that return several named rewards, for the `function` environment."""

from nemo_rl.environments.answers import last_number, plain_number


def correct_and_final(completion: str, ground_truth: str) -> dict[str, float]:
    """Whether the last number in a reply is the right one (`correct`), and whether the reply ends with it (`format`).

    >>> correct_and_final("2 and 3 make 5.", "5"), correct_and_final("It is 6, I think", "5")
    ({'correct': 1.0, 'format': 1.0}, {'correct': 0.0, 'format': 0.0})
    """
    words = completion.split()
    right = plain_number(ground_truth)
    return {
        "correct": float(right is not None and last_number(completion) == right),
        "format": float(bool(words) and plain_number(words[-1]) is not None),
    }
