"""A memory plan, to be read."""

from engine.memory_plan.plan import Plan


def as_table(plan: Plan) -> str:
    """Roles, then phases, with sizes of one rank."""
    roles = [("role", "sharding", "parameters", "weights", "gradients", "optimizer", "on the host")]
    for name, of in plan.roles.items():
        sizes = (of.weights_bytes, of.gradients_bytes, of.optimizer_bytes, of.host_bytes)
        sharding = plan.sharding[name].stem if plan.sharding[name].stem != "zero0" else f"zero{of.zero_stage}"
        roles.append((name, sharding, counted(of.parameters), *map(readable, sizes)))
    if plan.roles["actor"].average_bytes:
        actor = plan.roles["actor"]
        size = readable(actor.average_bytes)
        roles.append(("actor_ema", roles[1][1], counted(actor.trained_parameters), size, "-", "-", "-"))
    phases = [("phase", "peak", "of which")]
    for name, phase in plan.phases.items():
        parts = sorted(phase.parts.items(), key=lambda item: -item[1])
        phases.append((name, readable(phase.peak_bytes), ", ".join(f"{part} {readable(size)}" for part, size in parts)))
    ranks = "1 rank" if plan.world_size == 1 else f"each of {plan.world_size} ranks"
    peak, host = readable(plan.peak_bytes), readable(plan.host_bytes)
    sizes = plan.sizes
    return (
        f"{_lines(roles)}\n\n{_lines(phases)}\n\n"
        f"Peak on {ranks}, in {plan.dtype}: {peak}. A machine's own memory: {host}.\n"
        f"For prompts of {sizes.prompt_tokens:,} tokens and responses of {sizes.response_tokens:,}, "
        f"{sizes.micro_batch_size} of them in a forward pass, {sizes.rollout_rows} written at the same time."
    )


def readable(size: float) -> str:
    """Bytes in GiB, or in MiB below one; `-` for none."""
    if not size:
        return "-"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def counted(parameters: int) -> str:
    """In billions, or in millions below one, or as they are."""
    units = {"B": 1e9, "M": 1e6}
    sizes = {unit: round(parameters / of, 2) for unit, of in units.items()}
    return next((f"{size:.2f} {unit}" for unit, size in sizes.items() if size >= 1), f"{parameters:,}")


def _lines(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
