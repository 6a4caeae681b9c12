"""Reading YAML: merge keys and sections that replace others."""

from pathlib import Path

from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.sources import read_tree


def test_a_mapping_that_merges_another_can_be_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b\n  <<: *a\n  x: 2\nc: *b\nd: {<<: [*b, *a], z: 3}\n")
    assert read_tree(path, GRPOConfig).values == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 2, "y": 1},
        "c": {"x": 2, "y": 1},
        "d": {"x": 2, "y": 1, "z": 3},
    }


def test_a_section_may_replace_the_one_below_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: {b: {x: 1}, y: 1}\n")
    path = tmp_path / "child.yaml"
    path.write_text(
        "defaults: base.yaml\na:\n  b: {_override_: true, z: 3}\n  c: {_override_: true, d: {_override_: true}}\n"
    )
    assert read_tree(path, GRPOConfig).values == {"a": {"b": {"z": 3}, "y": 1, "c": {"d": {}}}}
