"""Tensor and sequence parallelism, applied from outside the model by a plan of names.

A plan says for a layer's linear maps whether their columns (output features) or their rows (input features) are divided
(Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). With sequence parallelism (Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198) the residual stream between them is divided over its tokens as well, so that a rank
keeps and normalises only its part; the attention and the feed-forward block gather it and give back their share.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from nemo_rl.errors import ConfigError
from nemo_rl.import_path import load_object
from nemo_rl.models.stream_model import StreamModel

_TOKENS, _HEADS = 1, 2
"""Dimensions of [1, S, H] and [1, S, A, D]."""

_IGNORED = {"moe_tp_experts", "packed_colwise", "ep_router", "grouped_gemm"}
"""Styles of experts, which tensor parallelism leaves whole: expert parallelism divides them."""

type Plan = Mapping[str, str]
"""Names of modules, `*` for any number, to styles in the words of Transformers' `tp_plan`."""


def tensor_plan(model: PreTrainedModel, custom: str | Mapping[str, str] | None) -> Plan:
    """The plan of a model: the one configured, else the one that its own code carries.

    Args:
        model: a language model.
        custom: a plan, or the import path of one or of a function of the model that makes one.

    Raises:
        ConfigError: there is no plan, or the import path leads to something else.
    """
    if isinstance(custom, str):
        found = load_object(custom, "custom_parallel_plan")
        custom = cast(Mapping[str, str], found(model) if callable(found) else found)
        if not isinstance(custom, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError("custom_parallel_plan must be a mapping of names to styles, or a function that makes one")
    if custom is not None:
        _check_names(model, custom)
    plan = dict(custom if custom is not None else cast(Mapping[str, str], model.tp_plan or {}))
    plan = {
        name: style
        for name, style in plan.items()
        if style not in _IGNORED and "experts." not in f"{name}." and name != "lm_head"  # which the embedding decides
    }
    if not plan:
        raise ConfigError(
            f"{type(model).__name__} has no plan for tensor parallelism; give policy.dtensor_cfg.custom_parallel_plan "
            "or set tensor_parallel_size to 1"
        )
    return plan


def _check_names(model: PreTrainedModel, plan: Plan) -> None:
    names = [name for name, _ in model.named_modules()]
    unused = [written for written in plan if not any(_pattern(written).fullmatch(name) for name in names)]
    if unused:
        raise ConfigError(
            f"custom_parallel_plan names {unused[0]!r}, and {type(model).__name__} has no such module; its modules are "
            f"named like {names[-1]!r}"
        )


def _pattern(written: str) -> re.Pattern[str]:
    return re.compile(re.escape(written).replace(r"\*", r"[^.]+"))


def apply_tensor_parallel(stream_model: StreamModel, mesh: DeviceMesh, plan: Plan, *, sequence_parallel: bool) -> None:
    """Divide the layers of a model, its embedding and its head over the ranks of a one-dimensional mesh, in place.

    Args:
        stream_model: every rank holds all of it before.
        mesh: of the tensor-parallel ranks.
        plan: see `tensor_plan`.
        sequence_parallel: divide the residual stream over its tokens too; their number must be divisible then.

    Raises:
        ConfigError: the heads cannot be divided, or the plan names what is not there.
    """
    model, trunk = stream_model.module, stream_model.trunk
    _check_heads(model, mesh.size())
    if sequence_parallel and not stream_model.takes_plans:
        raise ConfigError(
            f"{type(model).__name__} runs on padded rows, whose length ranks cannot divide; set "
            "policy.dtensor_cfg.sequence_parallel to false"
        )
    styles = _matched(model, plan)
    blocks = _divided_blocks(trunk, model, styles) if sequence_parallel else {}
    for name, (module, style) in styles.items():
        parallelize_module(module, mesh, _style(name, style, blocks))
    _divide_vocabulary(model, mesh, sequence_parallel)
    if sequence_parallel:
        _divide_tokens(trunk, mesh, dict(blocks.values()))


def _check_heads(model: PreTrainedModel, size: int) -> None:
    config = model.config.get_text_config()
    for what in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, what, None)
        if isinstance(count, int) and count % size:
            raise ConfigError(
                f"tensor_parallel_size {size} does not divide the model's {what} {count}: choose a divisor of it"
            )


def _matched(model: PreTrainedModel, plan: Plan) -> dict[str, tuple[nn.Module, str]]:
    """The modules that a plan names, by name; the head is divided with the embedding."""
    patterns = {name: _pattern(name) for name in plan}
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for written, pattern in patterns.items():
            is_end = module is model.get_output_embeddings() or module is model.get_input_embeddings()
            if pattern.fullmatch(name) and not is_end:
                found[name] = (module, plan[written])
    found |= _norms_of_heads(model, found)
    if not found:
        raise ConfigError(f"the parallel plan names no module of {type(model).__name__}: {sorted(plan)[:3]}")
    return found


def _norms_of_heads(
    model: PreTrainedModel, found: Mapping[str, tuple[nn.Module, str]]
) -> dict[str, tuple[nn.Module, str]]:
    """Norms of divided heads that a plan leaves out; each rank has the gradient that its heads give."""
    divided = {name.rpartition(".")[0] for name, (_, style) in found.items() if style == "colwise"}
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norms: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
        if name not in found and name.rpartition(".")[0] in divided and shapes and set(shapes) == {(head_dim,)}:
            norms[name] = (module, "replicated_with_grad_allreduce")
    return norms


type _Blocks = Mapping[str, tuple[nn.Module, bool]]
"""Children of the layers that mix features or tokens, by name, and whether a plan divides all that is in them."""


def _divided_blocks(trunk: nn.Module, model: PreTrainedModel, styles: Mapping[str, Any]) -> _Blocks:
    names = {module: name for name, module in model.named_modules()}
    blocks: dict[str, tuple[nn.Module, bool]] = {}
    for layer in cast(nn.ModuleList, trunk.layers):
        for child in layer.children():
            if _is_block(child):
                owners = [names[part] for part in child.modules() if any(True for _ in part.parameters(recurse=False))]
                blocks[names[child]] = (child, all(owner in styles for owner in owners))
    return blocks


def _is_block(child: nn.Module) -> bool:
    return any(len(parameter.shape) > 1 for parameter in child.parameters())


def _style(name: str, style: str, blocks: _Blocks) -> ParallelStyle:
    is_whole = any(name.startswith(f"{block}.") and whole for block, (_, whole) in blocks.items())
    match style:
        case "colwise":
            return ColwiseParallel()
        case "colwise_gather_output" | "colwise_rep":
            return ColwiseParallel(output_layouts=Replicate())
        case "rowwise":
            return RowwiseParallel(output_layouts=Shard(_TOKENS) if is_whole else Replicate())
        case "rowwise_split_input" | "rowwise_rep":
            return RowwiseParallel(
                input_layouts=Replicate(), output_layouts=Shard(_TOKENS) if is_whole else Replicate()
            )
        case "replicated_with_grad_allreduce":
            return SequenceParallel(sequence_dim=_HEADS, use_local_output=True)
        case _:
            raise ConfigError(
                f"the parallel plan gives {name} the style {style!r}; known are colwise, rowwise, "
                "colwise_gather_output, rowwise_split_input and replicated_with_grad_allreduce"
            )


def _divide_vocabulary(model: PreTrainedModel, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Divide embedding and head over the vocabulary; one of a kind of its own stays whole, and what is tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
    is_plain = type(embedding) is nn.Embedding
    if is_plain:
        output = Shard(_TOKENS) if sequence_parallel else Replicate()
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=output))
    elif sequence_parallel and not isinstance(embedding, nn.Identity):
        embedding.register_forward_hook(lambda _, __, output: scatter_tokens(cast(Tensor, output), mesh))
    if isinstance(head, nn.Linear) and (is_plain or not is_tied):
        weight = embedding.weight if is_tied else _divided(head.weight, mesh)
        head.register_parameter("weight", cast(nn.Parameter, weight))
        if head.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            head.register_parameter("bias", _divided(head.bias, mesh))


def _divided(parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]), parameter.requires_grad)


def _divide_tokens(trunk: nn.Module, mesh: DeviceMesh, blocks: Mapping[nn.Module, bool]) -> None:
    """Gather the residual stream in front of every block, give back a part behind it, and gather it at the end."""
    for layer in cast(nn.ModuleList, trunk.layers):
        for child in layer.children():
            if child in blocks:
                _gather_around(child, mesh, is_divided=blocks[child])
            elif any(True for _ in child.parameters()):
                parallelize_module(child, mesh, SequenceParallel(use_local_output=True))
    norm = cast(nn.Module, trunk.norm if hasattr(trunk, "norm") else trunk.final_layernorm)
    if isinstance(norm, nn.Identity):
        return  # of a pipeline stage that another one follows
    parallelize_module(norm, mesh, SequenceParallel(use_local_output=True))
    norm.register_forward_hook(lambda _, __, output: gather_tokens(output, mesh).to_local())


def _gather_around(block: nn.Module, mesh: DeviceMesh, *, is_divided: bool) -> None:
    def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        local = args[0] if args else kwargs["hidden_states"]
        whole = gather_tokens(local, mesh)
        given = whole if is_divided else whole.to_local()
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

    def scatter(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (scatter_tokens(output[0], mesh), *output[1:])
        return scatter_tokens(output, mesh)

    block.register_forward_pre_hook(gather, with_kwargs=True)
    if not is_divided:
        block.register_forward_hook(scatter)


def gather_tokens(local: Tensor, mesh: DeviceMesh) -> DTensor:
    """[1, S/t, H] of every rank -> [1, S, H], the same on all of them."""
    return DTensor.from_local(local, mesh, [Shard(_TOKENS)], run_check=False).redistribute(mesh, [Replicate()])


def scatter_tokens(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """[1, S, H], the same on all ranks -> this rank's [1, S/t, H]."""
    return (
        DTensor.from_local(whole, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(_TOKENS)]).to_local()
    )
