"""Every supported family gives the numbers of plain Transformers, packed and with prefixes shared."""

import pytest

from nemo_rl.data.packing import build_stream
from tiny_model_table import PAGE, table
from tiny_models import FAMILIES, tiny_model
from tiny_streams import assert_same, both, group_batch


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_shared_equal_plain_transformers(family: str, share_prefixes: bool) -> None:
    plain, ours = both(tiny_model(family))
    assert ours.takes_plans
    batch = group_batch(128)
    assert_same(plain, ours, batch, build_stream(batch, share_prefixes=share_prefixes, min_shared=4))


def test_the_table_of_the_documentation_says_what_is_found() -> None:
    found = table()
    assert found in PAGE.read_text(), f"run `python tests/tiny_model_table.py`; it is now\n{found}"
