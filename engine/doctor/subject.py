"""What is looked at: this machine, and a run's configuration where one is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.doctor.findings import Skipped
from engine.doctor.hostfile import hosts_in

Stage = Literal["sft", "reward", "dpo", "ppo"]
# Settings that one stage alone has, by which a configuration is told from another's.
OF_DPO = {"ref", "beta", "loss", "label_smoothing", "sft_coef", "ref_logprobs"}
OF_DPO_DATA = {"chosen_column", "rejected_column", "margin_column"}
OF_SFT, OF_SFT_DATA = {"loss_on"}, {"response_column"}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    Attributes:
        settings: a run's flags, `--config FILE --key value`; none to look at the machine alone.
        stage: what the settings are for; told from their names when not given.
        num_accelerators: ranks on each machine; when not given, its GPUs, or 2 where there are none.
        hostfile: of a run on several machines.
        ssh: whether the machines of the hostfile are logged in to.
    """

    settings: Sequence[str] = ()
    stage: Stage | None = None
    num_accelerators: int | None = None
    hostfile: str | None = None
    ssh: bool = False
    kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make()` returned when it was first asked for.

        Raises:
            Skipped: it has failed before. The first time its own error is raised.
        """
        if name not in self.kept:
            try:
                self.kept[name] = (make(), None)
            except Exception as error:
                self.kept[name] = (None, error)
                raise
        value, error = self.kept[name]
        if error is not None:
            raise Skipped(f"needs {name}, of which an earlier line tells") from error
        return value

    @property
    def ranks_here(self) -> int:
        """On one machine."""
        return self.num_accelerators or self.gpus or 2

    @property
    def gpus(self) -> int:
        """Those that torch can use; none where it does not import."""
        try:
            import torch
        except Exception:  # told by the check on libraries
            return 0
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    @property
    def hosts(self) -> dict[str, int]:
        """Host -> slots, of the hostfile."""
        return self.once("the hostfile", lambda: hosts_in(self.hostfile))

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        if self.hostfile is None:
            return self.ranks_here
        return sum(min(slots, self.num_accelerators or slots) for slots in self.hosts.values())

    @property
    def config(self) -> Any:
        """The parsed configuration: a PPOConfig, SFTConfig, RewardModelConfig or DPOConfig."""
        return self.once("the configuration", self._parsed)

    @property
    def is_ppo(self) -> bool:
        return hasattr(self.config, "actor")

    @property
    def main_role(self) -> str:
        """Whose tokenizer the run uses."""
        return next(iter(self.config.models))

    @property
    def models(self) -> dict[str, str]:
        """The models that are loaded, by role; an adapter is none."""
        config, models = self.config, dict(self.config.models)
        if self.is_ppo and (config.shared_trunk or not config.has_critic):
            models.pop("critic", None)
        if self.is_ppo and config.shared_trunk:
            models.pop("reward", None)
        return models

    @property
    def trained(self) -> dict[str, Any]:
        """Role -> its settings of optimizer and adapter."""
        if self.is_ppo:
            return {role: getattr(self.config, role) for role in ("actor", "critic") if role in self.models}
        return {self.main_role: self.config}

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of the run."""
        if self.is_ppo:
            return self.config.data.max_prompt_tokens + self.config.rollout.max_response_tokens
        return self.config.data.max_length

    @property
    def dtype(self) -> str:
        from engine.config import resolved_dtype

        return self.once("the dtype", lambda: resolved_dtype(self.config.dtype, on_gpu=self.gpus > 0))

    def model_config(self, role: str) -> Any:
        """The transformers config of a role's model."""
        from engine.models.loading import model_config

        return self.once(f"the {role}'s model", lambda: model_config(self.models[role]))

    def tokenizer(self, role: str) -> Any:
        from engine.models.loading import load_tokenizer

        self.model_config(role)  # what has no model has no tokenizer, and an earlier check has said so
        template = self.config.data.chat_template if role == self.main_role else None
        return self.once(f"the {role}'s tokenizer", lambda: load_tokenizer(self.models[role], chat_template=template))

    def without_weights(self, role: str) -> Any:
        """A trained role's model as torch builds it, with its adapter; its weights take no memory."""
        return self.once(f"the {role}'s model as it is trained", lambda: self._built(role))

    def _built(self, role: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from engine.models.lora import add_adapter

        scalar = role in ("reward", "critic")
        kind, given = (AutoModelForSequenceClassification, {"num_labels": 1}) if scalar else (AutoModelForCausalLM, {})
        config = self.model_config(role)
        config = type(config).from_dict(config.to_dict() | given)
        with torch.device("meta"):
            model = kind.from_config(config)
            if self.trained[role].has_adapter:
                add_adapter(model, **self.trained[role].adapter)
        return model

    def _parsed(self) -> Any:
        from engine.config import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig, parse

        stages = {"sft": SFTConfig, "reward": RewardModelConfig, "dpo": DPOConfig, "ppo": PPOConfig}
        return parse(stages[self.stage or stage_of(self.settings)], self.settings)


def stage_of(settings: Sequence[str]) -> Stage:
    """The stage whose settings these are, by their names; of SFT and DPO, where nothing tells them apart, by the
    columns of the data.

    Raises:
        ValueError: they are no stage's, or a recipe cannot be read.
    """
    groups: set[str] = set()
    data: dict[str, Any] = {}
    for name, value in _flags(settings):
        said = _recipe(value) if name == "config" else {name: value}
        groups |= {key.split(".")[0] for key in said}
        data |= said["data"] if isinstance(said.get("data"), dict) else {}
        data |= {key.removeprefix("data."): given for key, given in said.items() if key.startswith("data.")}
    if groups & {"actor", "preset"}:
        return "ppo"
    if "model" in groups:
        if groups & OF_DPO or data.keys() & OF_DPO_DATA:
            return "dpo"
        if groups & OF_SFT or data.keys() & OF_SFT_DATA:
            return "sft"
        return "dpo" if _holds_pairs(data) else "sft"
    if "reward" in groups:
        return "reward"
    raise ValueError(
        "The settings name no model: actor.model_name_or_path is PPO's, reward.model_name_or_path alone a reward "
        "model's, model.model_name_or_path SFT's and DPO's. Or say which it is with --stage."
    )


def _flags(settings: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of `--name value` and `--name=value`."""
    words = [*settings, ""]
    found = []
    for number, word in enumerate(settings):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, value if equals else words[number + 1]))
    return found


def _recipe(path: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: it cannot be read, or holds no settings.
    """
    try:
        said = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"--config {path} holds no settings: a recipe has `name: value` lines.")
    return said


def _holds_pairs(data: dict[str, Any]) -> bool:
    """Whether the first source of `data.train` has the columns of preferences."""
    from engine.data.sources import load_source

    train = data.get("train")
    part = dict(subset=data.get("train_subset"), split=data.get("train_split", "train"))
    try:
        columns = load_source(str(train[0] if isinstance(train, list) else train), **part, max_samples=10).columns
    except ValueError:  # told by the check on data
        return False
    return {"chosen", "rejected"} <= set(columns)
