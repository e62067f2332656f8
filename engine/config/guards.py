"""What ends a run that goes wrong."""

from dataclasses import dataclass

from engine.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class KLGuardConfig:
    """What happens to a PPO run whose actor runs away from the ref.

    Attributes:
        max_kl: nats per response, mean over an iteration. Above it the run stops, unless it may go back.
        roll_backs: so many times the run goes back to the newest checkpoint from before the actor ran away, and on from
            there with learning rates that are smaller by `factor`.
        factor: what a roll back multiplies the learning rates with.
    """

    max_kl: float | None = None
    roll_backs: int = 0
    factor: float = 0.5

    def __post_init__(self):
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"kl_guard.max_kl={self.max_kl} must be above 0 nats per response.")
        at_least("kl_guard.roll_backs", self.roll_backs, 0)
        if self.roll_backs and self.max_kl is None:
            raise ValueError(f"kl_guard.roll_backs={self.roll_backs} does nothing without kl_guard.max_kl: set it.")
        if not 0 < self.factor < 1:
            raise ValueError(f"kl_guard.factor={self.factor} must lie between 0 and 1.")
