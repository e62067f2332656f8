"""What is said of a run before it begins."""

from collections.abc import Iterator
from pathlib import Path

from engine.config import PPOConfig, SupervisedConfig, resolved_dtype
from engine.distributed import comm
from engine.distributed.initialize import (
    Engine,
    Switched,
    WithRewardAdapter,
    parameter_bytes_here,
    parameter_counts,
    stage_of,
)
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.tracking.summary import STAGES, written_plan

COLUMNS = "  {:<8}{:>12}{:>9}{:>6}  {:<10}{:>12}"


def print_banner(lines: Iterator[str]) -> None:
    """Once, by the main rank."""
    if comm.is_main():
        print("\n".join(lines), flush=True)


def ppo_banner(config: PPOConfig, rlhf_engine: DeepSpeedRLHFEngine, num_iterations: int) -> Iterator[str]:
    """Roles, sizes, the memory that was planned for, the output folder; settings that do nothing in this run."""
    yield _title(config, f"{num_iterations} iterations")
    engines = {role: getattr(rlhf_engine, role) for role in ("actor", "critic", "ref", "reward")}
    if engines["critic"] is None and config.has_critic:
        engines["critic"] = "a head on the actor"
    yield from _roles({role: engine for role, engine in engines.items() if engine is not None}, rlhf_engine.dtype)
    if sources := [name for name in ("function", "url") if getattr(config.reward, name)]:
        yield f"  scores    {', '.join(f'reward.{name}' for name in sources)}"
    prompts, samples = config.prompts_per_iteration, config.rollout.samples_per_prompt
    yield f"  rollout   {config.rollout_batch_size} responses an iteration = {prompts} prompts x {samples}"
    epochs = "1 epoch" if config.ppo_epochs == 1 else f"{config.ppo_epochs} epochs"
    yield f"{_minibatch(config, 'responses')}, {config.steps_per_iteration} steps an iteration in {epochs}"
    yield from _places(config)
    for name, why in config.without_effect.items():
        yield f"Note: {name} has no effect in this run: {why}."


def supervised_banner(config: SupervisedConfig, model: Engine, num_iterations: int) -> Iterator[str]:
    """As `ppo_banner`, of a run with one model."""
    yield _title(config, f"{num_iterations} steps")
    role = next(iter(config.models))
    yield from _roles({role: model}, resolved_dtype(config.dtype, on_gpu=comm.device().type == "cuda"))
    yield _minibatch(config, "examples")
    yield from _places(config)


def _title(config: PPOConfig | SupervisedConfig, length: str) -> str:
    ranks = "1 rank" if comm.world_size() == 1 else f"{comm.world_size()} ranks"
    return f"{STAGES[type(config)]}: {length} on {ranks} ({comm.device_name()})"


def _roles(engines: dict[str, Engine | Switched | str], dtype: str) -> Iterator[str]:
    """A line each; of a role that is another's model, whose."""
    yield COLUMNS.format("role", "parameters", "trained", "ZeRO", "dtype", "MiB a rank")
    for role, engine in engines.items():
        if isinstance(engine, Engine):
            count, trained = parameter_counts(engine)
            share = f"{100 * trained / count:.3g}%" if trained else "frozen"
            held = f"{parameter_bytes_here(engine) / 2**20:,.1f}"
            yield COLUMNS.format(role, f"{count:,}", share, stage_of(engine), dtype, held)
        elif isinstance(engine, Switched):
            other = "another adapter" if isinstance(engine, WithRewardAdapter) else "its adapter switched off"
            yield f"  {role:<8}the trained model with {other}"
        else:
            yield f"  {role:<8}{engine}"


def _minibatch(config: PPOConfig | SupervisedConfig, rows: str) -> str:
    """How an optimizer step's rows are cut."""
    micro, ranks = config.micro_batch_size, comm.world_size()
    accumulation = config.minibatch_size // (micro * ranks)
    cut = f"micro-batch {micro} x {ranks} {'rank' if ranks == 1 else 'ranks'} x accumulation {accumulation}"
    return f"  step      {config.minibatch_size} {rows} = {cut}"


def _places(config: PPOConfig | SupervisedConfig) -> Iterator[str]:
    if plan := written_plan(Path(config.output_dir)):
        yield f"  plan      a peak of {plan['peak_bytes'] / 2**30:.2f} GiB a rank"
    yield f"  output    {config.output_dir}"
