"""Every supported family gives the numbers of plain Transformers, packed and with prefixes shared."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import build_stream
from nemo_rl.models.scalar_model import ScalarModel, scalar_values
from tiny_model_table import PAGE, table
from tiny_models import FAMILIES, tiny_config, tiny_model
from tiny_streams import assert_same, both, group_batch


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_shared_equal_plain_transformers(family: str, share_prefixes: bool) -> None:
    plain, ours = both(tiny_model(family))
    assert ours.takes_plans
    batch = group_batch(128)
    assert_same(plain, ours, batch, build_stream(batch, share_prefixes=share_prefixes, min_shared=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_head_on_shared_prefixes_equals_transformers_classifier(family: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(family, num_labels=1, attn_implementation="eager")
        plain = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    batch = group_batch(128)
    sequences = batch.token_ids.split(batch.lengths.tolist())
    expected = torch.cat([plain(tokens[None]).logits[0] for tokens in sequences])
    ours = ScalarModel.wrap(plain)
    assert ours.takes_plans
    # the score of a whole sequence is the value before one more token
    ends = [torch.cat([tokens, tokens.new_tensor([3])]) for tokens in sequences]
    mask = [torch.arange(len(tokens)) == len(tokens) - 1 for tokens in ends]
    cu_seqlens = torch.cat([torch.tensor([0]), batch.lengths + 1]).cumsum(0)
    longer = TokenBatch(torch.cat(ends), cu_seqlens, batch.group_ids, {"loss_mask": torch.cat(mask)})
    stream = build_stream(longer, min_shared=4)
    found = scalar_values(ours.score, ours.stream_hidden(stream)[stream.predictor])
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_the_table_of_the_documentation_says_what_is_found() -> None:
    found = table()
    assert found in PAGE.read_text(), f"run `python tests/tiny_model_table.py`; it is now\n{found}"
