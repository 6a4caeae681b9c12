"""The vocabulary of failure: every error a user can meet, each one sentence that says what, where and what to do.

`exit_code` is what the command line returns: 2 for input that can be corrected before a run, 1 for a failure during it.
All of them carry a single message, so they pickle and cross process borders unchanged.
"""


class NemoRLError(Exception):
    """Root of every error this library raises on purpose."""

    exit_code = 1


class ConfigError(NemoRLError):
    """The configuration cannot describe a run: unknown key, wrong type, impossible combination."""

    exit_code = 2


class DataError(NemoRLError):
    """A data set, a record or a prompt cannot be used."""

    exit_code = 2


class ModelError(NemoRLError):
    """A model folder or a packaged model is missing, damaged or of a kind that cannot be trained."""

    exit_code = 2


class CheckpointError(NemoRLError):
    """A checkpoint is truncated, belongs to another model, or cannot be written."""

    exit_code = 2


class DependencyError(NemoRLError):
    """An optional package is not installed; the message gives the install command."""

    exit_code = 2


class RolloutError(NemoRLError):
    """Rollouts failed beyond what the run tolerates."""


class EnvironmentFailure(NemoRLError):
    """An environment (or a reward function) raised, hung, died or returned a value that is not a finite number."""


class BackendError(NemoRLError):
    """A training or generation backend cannot go on."""


class WorkerError(NemoRLError):
    """A worker failed; the message holds the traceback of the process it ran in."""


class WorkerDiedError(WorkerError):
    """The process of a worker ended before it answered."""
