"""A checkpoint of any mesh becomes a folder that plain Transformers loads, in one process and little memory."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from nemo_rl.errors import CheckpointError, ConfigError, NemoRLError
from nemo_rl.models.load import load_tokenizer
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.convert import byte_count, convert_checkpoint
from nemo_rl.training.pytorch.loading import Head
from ranks import run_ranks
from tiny_mesh import MODEL, size_keys
from tiny_models import embedded_folder, tiny_model

SCRIPT = Path(__file__).parents[2] / "examples" / "converters" / "convert_dcp_to_hf.py"
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def write_model(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    model = tiny_model(family, dtype=torch.bfloat16, **sizes)
    model.generation_config.top_k = 7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return folder


def save_moved(rank: int, source: Path, step: Path, sizes: ParallelSizes, head: Head = "language") -> None:
    """Save a checkpoint of weights that are not those of the source, as one rank of a mesh."""
    del rank
    config = PolicyConfig.model_validate(
        {
            "model_name": str(source),
            "train_global_batch_size": 9,
            "max_total_sequence_length": 64,
            "precision": "float32",
            "device": "cpu",
            "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-2}},
            "generation": {"backend": "hf", "max_new_tokens": 8},
            "dtensor_cfg": size_keys(sizes),
        }
    )
    mesh = Mesh(sizes, torch.device("cpu")) if sizes.world_size > 1 else None
    backend = PyTorchBackend(config, str(source), load_tokenizer(str(embedded_folder())), head=head, mesh=mesh)
    with torch.no_grad():
        for weight in backend.model.module.parameters():
            weight.mul_(1.5).add_(0.01)
    backend.save(step / "policy")
    (step / "config.yaml").write_text(yaml.safe_dump({"policy": {"model_name": str(source)}}))


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """What `save_moved` saves."""
    with torch.no_grad():
        for weight in model.float().parameters():
            weight.mul_(1.5).add_(0.01)
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def load_with_report(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return loaded


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=True, **MODEL)


@pytest.fixture(scope="module")
def step(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "step_2"
    save_moved(0, source, folder, ParallelSizes())
    return folder


@pytest.mark.parametrize("sizes", [ParallelSizes(pipeline=2, shard=2), ParallelSizes(tensor=2)], ids=str)
def test_a_checkpoint_of_a_mesh_loads_with_equal_logits(sizes: ParallelSizes, source: Path, tmp_path: Path) -> None:
    run_ranks(save_moved, sizes.world_size, source, tmp_path / "step_1", sizes)
    kind = convert_checkpoint(tmp_path / "step_1", tmp_path / "hf", dtype="float32", max_bytes=20_000)
    assert kind == "AutoModelForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(model), logits(moved(AutoModelForCausalLM.from_pretrained(source))))
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert {path.name for path in files} == set(index["weight_map"].values()) and len(files) > 3
    assert max(path.stat().st_size for path in files[1:]) < 24_000
    assert index["metadata"]["total_size"] == 4 * sum(weight.numel() for weight in model.parameters())
    assert "lm_head.weight" not in index["weight_map"]  # tied


def test_the_command_of_nemo_rl_writes_model_tokenizer_and_configurations(
    source: Path, step: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    given = [f"--config={step / 'config.yaml'}", f"--dcp-ckpt-path={step / 'policy' / 'weights'}"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *given, f"--hf-ckpt-path={out}", "--max-shard-size=1GB"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{out} (loads with transformers.AutoModelForCausalLM)\n"), done.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert GenerationConfig.from_pretrained(out).top_k == 7
    assert (
        AutoTokenizer.from_pretrained(out).chat_template
        == AutoTokenizer.from_pretrained(embedded_folder()).chat_template
    )
    model, report = load_with_report(out)
    assert not any(report.values()) and model.dtype == torch.bfloat16
    expected = moved(AutoModelForCausalLM.from_pretrained(source))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected.get_parameter(name).bfloat16())


@pytest.mark.parametrize("head", ["language_and_value", "scalar"])
def test_of_a_policy_with_a_critic_the_policy_is_written_and_a_reward_model_is_a_classifier(
    head: Head, source: Path, tmp_path: Path
) -> None:
    save_moved(0, source, tmp_path / "step_1", ParallelSizes(), head)
    kind = convert_checkpoint(tmp_path / "step_1" / "policy", tmp_path / "hf", dtype="float32")
    if head == "scalar":
        assert kind == "AutoModelForSequenceClassification"
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
        assert model.config.num_labels == 1 and torch.equal(
            model.score.weight, torch.full_like(model.score.weight, 0.01)
        )
        weight = (
            tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True, **MODEL).get_input_embeddings().weight
        )
        assert torch.equal(model.get_input_embeddings().weight, weight.float() * 1.5 + 0.01)
    else:
        assert kind == "AutoModelForCausalLM"
        model, report = load_with_report(tmp_path / "hf")
        assert not any(report.values())
        assert torch.equal(logits(model), logits(moved(AutoModelForCausalLM.from_pretrained(source))))


def test_a_model_whose_files_hold_other_tensors_is_written_as_transformers_does(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "deepseek_v3")
    save_moved(0, source, tmp_path / "step_1", ParallelSizes())
    convert_checkpoint(tmp_path / "step_1", tmp_path / "hf", dtype="float32", max_bytes=50_000)
    model, report = load_with_report(tmp_path / "hf")
    assert not any(report.values()) and len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert torch.equal(logits(model), logits(moved(AutoModelForCausalLM.from_pretrained(source))))


def refused(kind: type[NemoRLError], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as error:
        convert_checkpoint(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_another_models_checkpoint_is_refused_and_both_are_named(step: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "wider", hidden_size=64, **MODEL)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"policy": {"model_name": str(tmp_path / "wider")}}))
    said = refused(CheckpointError, step, tmp_path / "hf", config)
    assert "hidden 32" in said and "hidden 64" in said and str(step) in said
    assert not (tmp_path / "hf").exists()


def test_what_is_missing_damaged_or_in_the_way_is_refused_in_a_sentence(step: Path, tmp_path: Path) -> None:
    assert "is no checkpoint" in refused(CheckpointError, tmp_path / "step_9", tmp_path / "hf")
    copy = Path(shutil.copytree(step, tmp_path / "step_2"))
    file = copy / "policy" / "weights" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{file} is damaged or missing" in refused(CheckpointError, copy, tmp_path / "hf")
    (copy / "config.yaml").unlink()
    assert "give --config" in refused(ConfigError, step, tmp_path / "hf", copy / "config.yaml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "holds something already" in refused(CheckpointError, step, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"] and not (tmp_path / "hf").exists()
    with pytest.raises(ConfigError, match="is no size"):
        byte_count("large")


def grown(function: Callable[[], object]) -> int:
    """By how many bytes the memory of this process grows, at most, while a function runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here

    def resident(field: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[field].split()[0]) * 1024

    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def measure(rank: int, source: Path, run: Path) -> int:
    del rank
    save_moved(0, source, run / "step_1", ParallelSizes())
    small = write_model(run / "small")
    save_moved(0, small, run / "step_2", ParallelSizes())
    convert_checkpoint(run / "step_2", run / "first", dtype="float32")  # what is imported and kept besides
    return grown(lambda: convert_checkpoint(run / "step_1", run / "hf", dtype="float32"))


def test_the_model_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 24}
    source = write_model(tmp_path / "source", **sizes)
    (growth,) = run_ranks(measure, 1, source, tmp_path)
    written = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert written > 70e6 and growth < 0.3 * written, (growth, written)
