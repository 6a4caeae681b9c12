"""Every loss on given answers teaches a tiny model to repeat a word, and the wrong sign of it does not.

The prompt is one of ten words, the right answer is the same word, the wrong one another word. Validation compares the
right answers with wrong ones that training never showed. A model that has learnt nothing prefers the right answer as
often as not; a loss the wrong way round makes it prefer the wrong one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_rl.algorithms.launchers import launch
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.registry import RUNS
from nemo_rl.objectives.preference import KTOObjective, PreferenceObjective
from nemo_rl.objectives.supervised import SupervisedObjective
from tiny_models import tiny_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import records  # pyright: ignore[reportImplicitRelativeImport]

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a vocabulary of words."""
    folder = tmp_path_factory.mktemp("words")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["unknown", "start", "end", "user", "assistant", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def data(folder: Path, kind: str) -> dict[str, str]:
    """A file for training, whose wrong answers are up to 6 words further on, and one for validation (7 to 9)."""
    files = {}
    for split, distances in (("train", range(1, 7)), ("validation", range(7, 10))):
        pairs = [(word, WORDS[(place + far) % 10]) for place, word in enumerate(WORDS) for far in distances]
        rows: list[dict[str, Any]] = []
        for word, other in pairs:
            match kind:
                case "sft":
                    rows.append({"prompt": word, "completion": word})
                case "kto":
                    rows += [{"prompt": word, "completion": it, "label": it == word} for it in (word, other)]
                case _:
                    rows.append({"prompt": word, "chosen": word, "rejected": other})
        path = folder / f"{kind}_{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = f"{{name: local, path: '{path}'{', format: {type: judged}' if kind == 'kto' else ''}}}"
    return files


def train(model: Path, folder: Path, kind: str, *settings: str) -> list[dict[str, float]]:
    """Train for 20 steps of 20 records; return the figures of the validation before and after."""
    command = "sft" if kind == "sft" else "dpo"
    folder.mkdir()
    given = [
        f"policy.model_name={model}",
        f"checkpointing.checkpoint_dir={folder / 'run'}",
        "checkpointing.enabled=false",
        "checkpointing.export_hf=false",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.train_global_batch_size=20",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.01, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        *(f"data.{split}={source}" for split, source in data(folder, kind).items()),
        f"{command}.max_num_steps=20",
        f"{command}.val_at_start=true",
        f"{command}.val_at_end=true",
        "logger.tensorboard_enabled=false",
        *(f"dpo.{setting}" for setting in settings),
    ]
    launch(load_config(None, given, RUNS[command]))
    lines = [line for line in records(folder / "run") if "val/loss" in line]
    return [{name: float(value or 0) for name, value in line.items()} for line in lines]


def margin(figures: dict[str, float]) -> float:
    """By how much KTO's reward of right answers exceeds that of wrong ones."""
    return figures["val/chosen_reward"] - figures["val/rejected_reward"]


def accuracy(figures: dict[str, float]) -> float:
    """How often the right answer of a pair has the higher reward; a tie counts half."""
    return figures["val/accuracy"]


CASES: dict[str, tuple[str, list[str], Callable[[dict[str, float]], float], float]] = {
    "sft": ("sft", [], lambda figures: figures["val/token_probability"], 0.8),
    "dpo": ("dpo", [], accuracy, 0.9),
    "cdpo": ("dpo", ["label_smoothing=0.1"], accuracy, 0.9),
    "ipo": ("ipo", ["preference_average_log_probs=true"], accuracy, 0.9),
    "hinge": ("hinge", [], accuracy, 0.9),
    "simpo": ("simpo", ["reference_policy_kl_penalty=2.0"], accuracy, 0.9),
    "orpo": ("orpo", ["sft_loss_weight=1.0"], accuracy, 0.9),
    "kto": ("kto", [], margin, 0.4),
}
"""Kind of loss, settings, the figure of the validation that tells, and what learning lifts it above."""


@pytest.mark.parametrize("name", CASES)
def test_it_learns_and_the_wrong_sign_does_not(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, settings, figure, threshold = CASES[name]
    preference = [f"preference_loss={kind}", *settings] if kind != "sft" else []
    untrained, right = train(model, tmp_path / "right", kind, *preference)
    for objective in (SupervisedObjective, PreferenceObjective, KTOObjective):
        monkeypatch.setattr(objective, "__call__", negated(objective))
    _, wrong = train(model, tmp_path / "wrong", kind, *preference)
    assert figure(wrong) < figure(untrained) < 0.7 * threshold < threshold < figure(right)


def negated(objective: type[Any]) -> Any:
    """The same metrics with the loss the wrong way round."""
    call = objective.__call__

    def negative(self: Any, *given: Any) -> Any:
        loss, metrics = call(self, *given)
        return -loss, metrics

    return negative
