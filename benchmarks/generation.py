"""Compare `hf` generation with Transformers' `model.generate` on the same requests.

Eight prompts of about 44 tokens, eight samples of each, every request with a budget of its own of 16 to 64 new tokens
and no stop token, so that both sides owe the same number of tokens. The budgets stand for answers that end by
themselves at different lengths.

- model.generate: one batch of 64 left-padded rows, its own cache and `sdpa` attention. It has no budget per row, so it
  runs to the longest one; only the tokens that were asked for count.
- ours: `HFGenerator` with a batch of 64. It also returns the log-probability of every token, which the other side does
  not.

Costs are CPU milliseconds for each wanted token. Both sides hold the same weights; `equal rows` is the share of
requests that both answer with the same tokens (greedy only; in bfloat16 near ties may fall either way).

    uv run --group bench benchmarks/generation.py [--dtype float32 bfloat16] [--out FILE]
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from measure import Comparison, parse_arguments, print_header, print_machine, take_turns, write_results
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from nemo_rl.data.chat import PromptFormat, encode_prompt
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset
from nemo_rl.data.types import GenerationRequest, SamplingParams
from nemo_rl.distributed.cache import cache_dir
from nemo_rl.generation.hf import HFGenerator
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.load import load_causal_lm, load_tokenizer, resolve_model

MODEL = "embedded:SmolLM2-135M-Instruct"
TARGET = 1.5


def make_requests(source: str, num_prompts: int, num_samples: int, budgets: tuple[int, int]) -> list[GenerationRequest]:
    """Ask arithmetic questions, each several times with random budgets."""
    tokenizer, questions, draw = load_tokenizer(source), ArithmeticDataset(num_prompts), random.Random(0)
    wording = PromptFormat("{} Answer with the number only.")
    prompts = [encode_prompt(tokenizer, wording.apply(questions[index].messages)) for index in range(num_prompts)]
    return [
        GenerationRequest(prompt, SamplingParams(draw.randint(*budgets)), seed=draw.getrandbits(32))
        for prompt in prompts
        for _ in range(num_samples)
    ]


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack prompts to rows, int64 [B, P], with their attention mask."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    masks = [torch.arange(longest) >= longest - len(prompt) for prompt in prompts]
    return torch.stack(rows), torch.stack(masks).long()


def plain_generate(model: PreTrainedModel, requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Answer with `model.generate` and cut every row to its budget."""
    input_ids, attention_mask = left_padded([request.prompt_ids for request in requests])
    sampled = requests[0].sampling.temperature > 0
    settings = GenerationConfig(
        max_new_tokens=max(request.sampling.max_new_tokens for request in requests),
        pad_token_id=0,
        do_sample=sampled,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}),
    )
    generate = cast(Callable[..., Tensor], model.generate)
    with torch.inference_mode():
        output = generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings)
    answers = output[:, input_ids.shape[1] :]
    return [row[: one.sampling.max_new_tokens].tolist() for row, one in zip(answers, requests, strict=True)]


def our_generate(generator: HFGenerator, requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Answer with the library."""
    return [completion.token_ids.tolist() for completion in generator.generate_now(requests)]


def compare(source: str, dtype: torch.dtype, requests: Sequence[GenerationRequest], turns: int) -> list[Comparison]:
    """Measure greedy decoding and sampling with the weights in `dtype`."""
    plain, _ = load_causal_lm(source, dtype=dtype, attn_implementation="sdpa")
    plain.eval()
    plain.generation_config = GenerationConfig(eos_token_id=None)  # what a request leaves open is taken from here
    ours, _ = load_causal_lm(source, dtype=dtype)
    generator = HFGenerator(CausalLM.wrap(ours.eval()), max_batch_size=len(requests))
    wanted = sum(request.sampling.max_new_tokens for request in requests)
    comparisons: list[Comparison] = []
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        asked = [replace(one, sampling=replace(one.sampling, temperature=temperature)) for one in requests]
        theirs, mine = plain_generate(plain, asked), our_generate(generator, asked)
        lengths = [one.sampling.max_new_tokens for one in asked]
        assert [len(row) for row in theirs] == lengths == [len(row) for row in mine]
        same = sum(left == right for left, right in zip(theirs, mine, strict=True)) / len(asked)
        seconds = take_turns(
            {"plain": partial(plain_generate, plain, asked), "ours": partial(our_generate, generator, asked)}, turns
        )
        comparison = Comparison(
            name=f"{str(dtype).removeprefix('torch.')} {name}",
            theirs=[1000 * second / wanted for second in seconds["plain"]],
            ours=[1000 * second / wanted for second in seconds["ours"]],
            target=TARGET,
            extra={"equal rows": same} if temperature == 0 else {},
        )
        comparison.print()
        comparisons.append(comparison)
    return comparisons


def main() -> None:
    """Compare all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    options = parse_arguments(parser)
    print_machine()
    disable_progress_bar()
    source = resolve_model(MODEL, cache_dir())
    requests = make_requests(source, 2, 2, (4, 8)) if options.quick else make_requests(source, 8, 8, (16, 64))
    lengths = [len(request.prompt_ids) for request in requests]
    print(
        f"{len(requests)} requests, prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{sum(request.sampling.max_new_tokens for request in requests)} tokens wanted"
    )
    print_header("CPU milliseconds a wanted token", "generate", "ours")
    comparisons: list[Comparison] = []
    for name in options.dtype:
        comparisons += compare(source, getattr(torch, name), requests, options.repetitions)
    write_results(options.out, comparisons)


if __name__ == "__main__":
    main()
