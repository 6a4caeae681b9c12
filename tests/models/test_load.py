"""Loading by name: what loads is exactly what the files hold, and what cannot be loaded says why in one sentence."""

import json
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging

from nemo_rl.errors import ModelError
from nemo_rl.models.load import load_causal_lm, load_tokenizer, model_identity, quiet_libraries, resolve_model
from tiny_models import FAMILIES, embedded_folder, tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_of_every_family_loads_bit_for_bit(family: str, tmp_path: Path) -> None:
    saved = tiny_model(family)
    saved.save_pretrained(tmp_path)
    loaded, config = load_causal_lm(resolve_model(str(tmp_path), tmp_path), dtype=torch.float32)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert model_identity(config) == model_identity(tiny_config(family))
    assert load_causal_lm(str(tmp_path), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_identity_tells_models_apart_and_survives_json() -> None:
    identity = model_identity(tiny_config("llama"))
    assert json.loads(json.dumps(identity)) == identity
    assert identity != model_identity(tiny_config("qwen2"))
    assert identity != model_identity(tiny_config("llama", num_hidden_layers=3))


def test_names_are_told_apart(tmp_path: Path) -> None:
    assert resolve_model("Qwen/Qwen2.5-1.5B", tmp_path) == "Qwen/Qwen2.5-1.5B"
    with pytest.raises(ModelError, match=r"does not exist; give a folder"):
        resolve_model("./no/such/folder", tmp_path)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path), tmp_path)
    with pytest.raises(ModelError, match="choose one of SmolLM2-135M-Instruct"):
        resolve_model("embedded:nothing", tmp_path)


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated or damaged"):
        load_causal_lm(str(tmp_path), dtype=torch.float32)


def test_weights_that_the_files_lack_are_never_made_up(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_config(num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack 9 tensors .*model\.layers\.2"):
        load_causal_lm(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["t5", "never-heard-of"])
def test_an_architecture_that_is_no_causal_language_model_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load_causal_lm(str(tmp_path), dtype=torch.float32)


def test_a_tokenizer_can_pad_and_takes_another_chat_template(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    plain = load_tokenizer(str(embedded_folder()))
    plain.pad_token = None
    plain.save_pretrained(source)
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}!")
    for template in ("{{ messages[0].content }}!", str(tmp_path / "template.jinja")):
        tokenizer = load_tokenizer(str(source), template)
        assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    with pytest.raises(ModelError, match="neither a Jinja template nor a readable file"):
        load_tokenizer(str(source), "no-such-file.jinja")


def test_a_tokenizer_that_is_missing_or_cannot_stop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))
    endless = load_tokenizer(str(embedded_folder()))
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_the_hub_is_not_heard_retrying() -> None:
    hub_logging.set_verbosity_warning()
    retrying = logging.getLogger("huggingface_hub.utils._http")
    assert retrying.isEnabledFor(logging.WARNING)
    quiet_libraries()
    assert not retrying.isEnabledFor(logging.WARNING)


def test_a_tokenizer_needs_no_model_beside_it(tmp_path: Path) -> None:
    load_tokenizer(str(embedded_folder())).save_pretrained(tmp_path)
    assert resolve_model(str(tmp_path), tmp_path, part="tokenizer") == str(tmp_path)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer_config\.json, so it is not a .* tokenizer folder"):
        resolve_model(str(tmp_path), tmp_path, part="tokenizer")
