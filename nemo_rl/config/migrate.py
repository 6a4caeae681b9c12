"""`nemo-rl migrate FILE`: a NeMo RL configuration in the keys of today."""

from pathlib import Path

from nemo_rl.config.interpolation import interpolate
from nemo_rl.config.load import dump_values, validate
from nemo_rl.config.nemo.tables import DIALECTS
from nemo_rl.config.nemo.translate import algorithm_of, translate
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.registry import COMMANDS
from nemo_rl.config.sources import read_tree
from nemo_rl.errors import ConfigError


def migrate(path: str | Path) -> tuple[str, tuple[str, ...]]:
    """Translate a configuration of any algorithm.

    Returns:
        The YAML of what was written, interpolations resolved, and the notes.

    Raises:
        ConfigError: the file is no configuration of an algorithm that both know, or cannot be translated.
    """
    tree = read_tree(path, GRPOConfig)
    algorithm = algorithm_of(tree.values)
    if algorithm is None:
        raise ConfigError(f"{path} has no section of an algorithm: it needs one of {', '.join(DIALECTS)}")
    schema = COMMANDS.get(algorithm, GRPOConfig)
    interpolate(tree, schema)
    notes = translate(tree, schema, algorithm)
    if algorithm in COMMANDS:
        validate(tree, schema)
    return dump_values(tree.values), notes
