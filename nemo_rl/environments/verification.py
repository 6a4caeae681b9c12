"""Judge a mathematical answer with math-verify. Runs in worker processes: imports no torch, knows no deadline."""

from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from nemo_rl.environments.answers import Verdict

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
_MAX_SHOWN = 200


def judge(completion: str, gold: str) -> Verdict:
    """Compare the final answer in a completion (boxed first, then LaTeX, then a plain expression) with the gold answer.

    math-verify's own time limits are alarms of the main thread and are left off: the caller kills the process instead.
    """
    expected = _parse_gold(gold)
    if not expected:
        return Verdict(False, None, gold_readable=False)
    # parsing_timeout and timeout_seconds accept None, as math-verify's own documentation says, but are annotated int.
    found = parse(completion, [_LATEX, ExprExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not found:
        return Verdict(False, None)
    # The last element is the text as written; turning a SymPy object into text can itself take for ever.
    written = next((item for item in reversed(found) if isinstance(item, str)), None)
    correct = verify(list(expected), found, timeout_seconds=None)
    return Verdict(correct, written if written is None else written[:_MAX_SHOWN])


@lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    anchored = gold if "\\boxed" in gold or "$" in gold else f"\\boxed{{{gold}}}"
    return tuple(parse(anchored, [_LATEX], parsing_timeout=None))  # pyright: ignore[reportArgumentType]
