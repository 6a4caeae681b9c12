"""PPO from a validated configuration to a finished run: the critic beside what every run that samples has."""

from collections.abc import Sequence
from contextlib import ExitStack

from nemo_rl.algorithms.actor_critic import ActorCritic, SeparateActorCritic, SharedActorCritic
from nemo_rl.algorithms.launch import Loop, SampledParts, launch_sampled
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.algorithms.ppo import train_ppo
from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.start import Model, Start, check_trainable, load_model
from nemo_rl.config.load import LoadedConfig
from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.config.schema.ppo import PPOConfig, SeparateValueConfig
from nemo_rl.errors import ConfigError
from nemo_rl.workers.handles import Learner, Policy
from nemo_rl.workers.train import TrainWorker


def launch_ppo(loaded: LoadedConfig[PPOConfig], command: Sequence[str] = ()) -> Outcome:
    """Run PPO from start, or from the latest checkpoint, to its end; see `launch_sampled`."""
    config, section = loaded.config, loaded.config.critic
    if section is not None:
        check_trainable(section, config.cluster, section="value")

    def build(begun: Start, stack: ExitStack, model: Model[PolicyConfig]) -> Loop:
        critic = None if section is None else start_critic(section, begun, stack, model)

        def loop(run: Run, parts: SampledParts) -> None:
            actor_critic = _actor_critic(config, parts.policy, critic)
            train_ppo(config, run, parts.policy, actor_critic, parts.rollouts, parts.loader)

        return loop

    return launch_sampled(
        config,
        build,
        command,
        head="language_and_value" if section is None else "language",
        with_reference=config.loss_fn.reference_policy_kl_penalty > 0,
    )


def start_critic(section: SeparateValueConfig, begun: Start, stack: ExitStack, policy: Model[PolicyConfig]) -> Learner:
    """Start a separate critic's worker; from then on it is saved and resumed with the run.

    Raises:
        ConfigError: its model has another vocabulary than the policy's.
    """
    model = load_model(section)
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigError(
            f"value.model_name={section.model_name} has {len(model.tokenizer)} tokens and another vocabulary than"
            f" policy.model_name={policy.policy.model_name} with {len(policy.tokenizer)}: a critic reads the policy's"
            " tokens, so give it a model of the same family"
        )
    critic = Learner(begun.worker(stack, TrainWorker, model, head="scalar"))
    begun.checkpoints.include("value", critic)
    return critic


def _actor_critic(config: PPOConfig, policy: Policy, critic: Learner | None) -> ActorCritic:
    if critic is None or config.critic is None:
        return SharedActorCritic(config, policy)
    return SeparateActorCritic(config, policy, critic, config.critic)
