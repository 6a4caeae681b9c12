"""Adapters are PEFT's: the same numbers, gradients and files; compressed weights train them just as well."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from nemo_rl.config.schema.lora import LoRAConfig
from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.models.lora import Adapters, LoRALinear, add_adapters, whole_weights
from nemo_rl.models.peft_format import adapter_config, adapter_weights, load_adapter, save_adapter
from nemo_rl.models.quantize import FrozenLinear
from tiny_models import tiny_config, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

CPU = torch.device("cpu")
TOKENS = torch.randint(128, (3, 11), generator=torch.Generator().manual_seed(0))


def with_adapters(
    family: str = "llama", dtype: torch.dtype = torch.float32, *, fresh: bool = False, **settings: Any
) -> tuple[PreTrainedModel, Adapters]:
    """A model with adapters, whose B is random too unless it is `fresh`."""
    model = tiny_model(family, dtype=dtype)
    adapters = add_adapters(model, LoRAConfig(enabled=True, dim=4, alpha=8, **settings), CPU)
    generator = torch.Generator().manual_seed(1)
    for layer in adapters.layers.values():
        if not fresh:
            nn.init.normal_(layer.lora_B.weight, std=0.1, generator=generator)
    return model, adapters


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_oss", "deepseek_v3"])
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_can_be_merged(family: str, dtype: torch.dtype) -> None:
    plain = tiny_model(family, dtype=dtype)
    fresh, _ = with_adapters(family, dtype, fresh=True)
    assert torch.equal(logits(fresh), logits(plain))
    model, _ = with_adapters(family, dtype)
    merged = copy.deepcopy(plain)
    weights = dict(whole_weights(model))
    assert weights.keys() == dict(plain.named_parameters()).keys()
    merged.load_state_dict(weights, strict=False)  # there may be buffers too
    far = (logits(merged) - logits(plain)).norm()
    # rounding may send a token to another expert
    bound = 1e-5 if dtype == torch.float32 else 0.3 if family == "gpt_oss" else 0.1
    assert (logits(model) - logits(merged)).norm() < bound * far
    assert all(weight.dtype == dtype for _, weight in whole_weights(model))


def test_only_adapters_are_trained_and_they_are_float32() -> None:
    model, adapters = with_adapters(dtype=torch.bfloat16, target_modules=["q_proj", "*.layers.1.mlp.*"])
    assert sorted(adapters.layers) == [
        "model.layers.0.self_attn.q_proj",
        *(f"model.layers.1.mlp.{name}" for name in ("down_proj", "gate_proj", "up_proj")),
        "model.layers.1.self_attn.q_proj",
    ]
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{m}.weight": torch.float32 for name in adapters.layers for m in "AB"}


def test_everything_but_the_head_is_adapted_unless_it_is_excluded() -> None:
    for settings in ({}, {"match_all_linear": True}):
        assert len(with_adapters(**settings)[1].layers) == 2 * 7
    assert len(with_adapters(exclude_modules=["mlp.*", "k_proj", "lm_head"])[1].layers) == 2 * 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_prj"]}, "the model has no linear layer q_prj; did you mean q_proj"),
        ({"exclude_modules": ["self_attn.qproj"]}, "no linear layer self_attn.qproj; did you mean q_proj"),
        ({"target_modules": ["attention"]}, "no linear layer attention; did you mean q_proj, k_proj, v_proj, o_proj"),
        ({"target_modules": ["lm_head"]}, "lm_head is no linear layer of the model's trunk"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is no linear layer of the model's trunk"),
        ({"exclude_modules": ["*_proj"]}, "leaves no linear layer to adapt"),
    ],
)
def test_a_name_that_means_no_layer_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_adapters(**settings)
    assert says in str(error.value)


def peft_loaded(folder: Path, model: PreTrainedModel | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model or tiny_model(), folder, is_trainable=True).eval()


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["*.0.mlp.*"]}])
def test_peft_loads_what_is_saved_and_has_the_same_numbers_and_gradients(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model, adapters = with_adapters(**settings)
    save_adapter(tmp_path, dict(adapter_weights(model)), adapter_config(model, adapters, "base"))
    theirs = peft_loaded(tmp_path)
    assert torch.equal(logits(theirs), logits(model))
    for one in (model, theirs):
        (logits(one) * torch.linspace(-1, 1, 128)).square().sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    own = {f"base_model.model.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys() and len(own) == 2 * len(adapters.layers)
    for name, gradient in own.items():
        assert gradient is not None and gradient.norm() > 0
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6 * float(gradient.norm()))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 40_000


def test_names_of_the_file_are_short_where_they_mean_the_same() -> None:
    for targets, listed in {
        ("q_proj", "v_proj"): ["q_proj", "v_proj"],
        ("layers.0.*.q_proj",): ["model.layers.0.self_attn.q_proj"],
    }.items():
        assert adapter_config(*with_adapters(target_modules=targets), "base")["target_modules"] == listed


def their_adapter(folder: Path, **settings: Any) -> Any:
    arguments: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_model(), peft.LoraConfig(**{**arguments, **settings})).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        theirs.save_pretrained(folder)
    return theirs


def test_what_peft_saved_is_loaded(tmp_path: Path) -> None:
    theirs = their_adapter(tmp_path)
    model, adapters = with_adapters(target_modules=["q_proj", "up_proj"])
    load_adapter(model, adapters, tmp_path)
    assert torch.equal(logits(model), logits(theirs))


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"r": 2}, ConfigError, "is LORA with r=2 and lora_alpha=8: set lora_cfg.dim and alpha"),
        ({"use_rslora": True}, ConfigError, "has use_rslora, which is not plain LoRA"),
        ({"target_modules": ["q_proj"]}, ModelError, "of different layers, the first is model.layers.0.mlp.up_proj"),
    ],
)
def test_another_adapter_is_refused(settings: dict[str, Any], kind: type[Exception], says: str, tmp_path: Path) -> None:
    their_adapter(tmp_path, **settings)
    with pytest.raises(kind) as error:
        load_adapter(*with_adapters(target_modules=["q_proj", "up_proj"]), tmp_path)
    assert says in str(error.value)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load an adapter from"):
        load_adapter(*with_adapters(), tmp_path)


def test_the_head_of_a_reward_model_is_trained_and_saved_with_the_adapters(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)).eval()
    model = copy.deepcopy(plain)
    adapters = add_adapters(model, LoRAConfig(enabled=True, dim=4, alpha=8), CPU)
    nn.init.normal_(model.get_parameter("score.weight"))
    for layer in adapters.layers.values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name} == {
        "score.weight"
    }
    save_adapter(tmp_path, dict(adapter_weights(model)), adapter_config(model, adapters, "base"))
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(peft_loaded(tmp_path, plain)), logits(model))


def test_dropout_acts_within_its_context_alone_and_follows_the_seed() -> None:
    for position in ("pre", "post"):
        model, adapters = with_adapters(dropout=0.5, dropout_position=position)
        still = logits(model)
        before = torch.get_rng_state()
        drawn: list[Tensor] = []
        for seed in (1, 1, 2):
            with adapters.dropout(seed):
                drawn.append(logits(model))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert torch.equal(logits(model), still) and not torch.equal(drawn[0], still)
    x = torch.ones(20_000, 1)
    layer = LoRALinear(nn.Linear(1, 1), LoRAConfig(enabled=True, dim=1, alpha=1, dropout=0.3), torch.Generator())
    nn.init.ones_(layer.lora_B.weight)
    layer.train()
    kept = (layer(x) - nn.Linear.forward(layer, x)).detach()
    assert (kept == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert kept.mean() == pytest.approx(layer.lora_A.weight.item(), rel=0.05)  # what is left counts for more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_compressed_weights_train_adapters_as_the_weights_they_restore(form: str, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "target_modules": ["q_proj", "up_proj"]}
    model, adapters = with_adapters(**settings, quantize=form)
    linears = [layer for layer in model.base_model.modules() if isinstance(layer, FrozenLinear)]
    assert len(linears) == 14 and {layer.weight.element_size() for layer in linears} == {1}
    restored, _ = with_adapters(**settings)
    fresh, _ = with_adapters(**settings, quantize=form, fresh=True)
    restored.load_state_dict(dict(whole_weights(fresh)), strict=False)
    assert (
        restored.get_parameter("model.layers.1.mlp.down_proj.weight")
        != tiny_model(dtype=dtype).get_parameter("model.layers.1.mlp.down_proj.weight")
    ).float().mean() > 0.5
    for one in (restored, model):
        (logits(one).float() * torch.linspace(-1, 1, 128)).sum().backward()
    near = 1e-5 if dtype == torch.float32 else 0.05
    for name in adapters.layers:
        for kind in ("lora_A", "lora_B"):
            found, expected = (one.get_parameter(f"{name}.{kind}.weight").grad for one in (model, restored))
            assert expected.norm() > 0 and (found - expected).norm() < near * expected.norm(), name
    merged = tiny_model(dtype=dtype)
    merged.load_state_dict(dict(whole_weights(model)))
    assert (logits(merged) - logits(model)).norm() < near * logits(model).norm()


def test_names_sent_to_a_sampler_are_those_of_the_file(tmp_path: Path) -> None:
    model, adapters = with_adapters()
    save_adapter(tmp_path, dict(adapter_weights(model)), adapter_config(model, adapters, "base"))
    sent, filed = dict(adapter_weights(model)), load_file(tmp_path / "adapter_model.safetensors")
    assert sent.keys() == filed.keys()
    assert all(torch.equal(sent[name], filed[name]) for name in sent)
