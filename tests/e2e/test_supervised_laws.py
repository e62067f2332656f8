"""The laws of SFT, reward model and DPO: what may not change their numbers, and what must come of them."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import stages
import tiny
import torch
from runs import Log, digest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from engine.distributed import comm
from engine.models.random_init import local_name
from engine.trainers import ref_logprobs

LN2 = math.log(2)
HELD_OUT = dict(data__eval_fraction=0.3)


@pytest.fixture
def stage_config(tmp_path):
    """`stage_config(stage, **overrides)`; see `tiny.stage_config`."""
    return lambda stage, **overrides: tiny.stage_config(tmp_path, stage, **overrides)


def assert_same(ours: dict, theirs: dict, *, atol: float = 1e-5) -> None:
    """The metrics of every step, and the weights after the last."""
    assert len(ours["metrics"]) == len(theirs["metrics"]) > 0
    for a, b in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=atol)
    for name, tensor in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# What may not change the numbers


@pytest.fixture(scope="module")
def plain(run_ranks, tmp_path_factory):
    """The runs the others are compared with: ZeRO 0, two ranks, something held out."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        stage: run_ranks(stages.train, tiny.stage_config(folder, stage, zero_stage=0, **HELD_OUT))
        for stage in tiny.STAGES
    }


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_training_trains_the_same_model_on_every_rank(plain, stage):
    first, second = plain[stage]
    assert first["metrics"] == second["metrics"] and first["model"] == second["model"]
    assert len(first["metrics"]) == 1 + 3, "an evaluation before the first step"
    losses = [line["eval/loss"] for line in first["metrics"] if "eval/loss" in line]
    assert len(losses) == 2 and losses[0] != losses[1]
    for line in first["metrics"]:
        assert all(map(math.isfinite, line.values()))


@pytest.mark.parametrize("kind", [1, 2, "strict"])
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_the_zero_stage_leaves_the_numbers_alone(run_ranks, stage_config, tmp_path, plain, stage, kind):
    run = run_ranks(stages.train, stage_config(stage, **tiny.sharding(kind, tmp_path), **HELD_OUT))
    assert_same(run[0], plain[stage][0])
    assert run[0]["model"] == run[1]["model"]
    assert (run[0]["whole"] == 0) == (kind == "strict"), "the control: under strict ZeRO-3 alone nothing lies whole"


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_ranks_and_micro_batches_leave_the_numbers_alone(
    run_ranks, stage_config, plain, stage, world_size, micro_batch_size
):
    config = stage_config(stage, zero_stage=0, micro_batch_size=micro_batch_size, **HELD_OUT)
    assert_same(run_ranks(stages.train, config, world_size=world_size)[0], plain[stage][0])


@pytest.mark.parametrize("kind", [0, "strict"])
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_packing_leaves_the_numbers_alone(run_ranks, stage_config, tmp_path, plain, stage, kind):
    config = stage_config(stage, packing=True, **tiny.sharding(kind, tmp_path), **HELD_OUT)
    assert_same(run_ranks(stages.train, config)[0], plain[stage][0])


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_gradient_checkpointing_leaves_the_numbers_alone(run_ranks, stage_config, strict_z3, plain, stage):
    config = stage_config(stage, ds_config=strict_z3, gradient_checkpointing=True, packing=True, **HELD_OUT)
    assert_same(run_ranks(stages.train, config)[0], plain[stage][0])


def refused_packing(config):
    with pytest.raises(ValueError, match="lets packed documents see each other") as error:
        stages.build(config)
    return str(error.value)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_packing_is_refused_where_documents_would_see_each_other(run_ranks, stage_config, strict_z3, stage):
    config = stage_config(stage, model=tiny.OPT, packing=True, ds_config=strict_z3)
    first, second = run_ranks(refused_packing, config)
    assert first == second and first.startswith("packing=true: OPTFor")


def alone_and_together(config, packed):
    """The objective's number of every sequence, in one forward pass of all of them and in one of its own."""
    trainer, minibatches, *_ = stages.build(config)
    examples, passes = minibatches.dataset.examples, []
    ask = trainer.objective.number

    def number(model, batch):
        passes.append(tuple(batch.input_ids.shape))
        return ask(model, batch)

    trainer.objective.number = number
    together = trainer.numbers(examples)
    assert (
        passes == [(1, int(examples.sequences.lengths.sum()))]
        if packed
        else [(len(examples.sequences), int(examples.sequences.lengths.max()))]
    )
    alone = torch.cat([trainer.numbers(examples[torch.tensor([e])]) for e in range(len(examples))])
    return together, alone, len(set(passes[1:]))


@pytest.mark.parametrize(
    ("family", "packed"), [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("opt", False)]
)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_padding_and_neighbours_never_leak(run_ranks, stage_config, stage, family, packed):
    demonstrations = [{"prompt": row["prompt"], "response": row["chosen"]} for row in tiny.PREFERENCES]
    config = stage_config(
        stage,
        model=tiny.MODELS[family],
        rows=demonstrations if stage == "sft" else None,
        packing=packed,
        minibatch_size=16,
        micro_batch_size=16,
    )
    together, alone, shapes = run_ranks(alone_and_together, config, packed, world_size=1)[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert shapes > 3, "of many lengths"


# DPO's ref


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_dpo_begins_at_ln_2_and_never_moves_its_ref(run_ranks, stage_config, tmp_path, kind):
    for rank in run_ranks(stages.train, stage_config("dpo", **tiny.sharding(kind, tmp_path), **HELD_OUT)):
        assert rank["frozen"] is True, "bit for bit after 3 steps"
        before, first, *_, last = rank["metrics"]
        assert before["eval/loss"] == pytest.approx(LN2, abs=1e-6)
        assert first["train/loss"] == pytest.approx(LN2, abs=1e-6)
        assert first["train/accuracy"] == 0.5 and first["train/margin"] == pytest.approx(0, abs=1e-6)
        assert abs(last["train/margin"]) > 1e-3


def precomputed(config, fails):
    """The ref's log-probabilities of all examples, online and by `with_ref_logprobs`, and how many refs were built.

    With `fails` building a ref is an error.
    """
    trainer, minibatches, held_out, _ = stages.build(config)
    parts = [minibatches.dataset.examples, held_out]
    asked = [trainer.objective.prepared(part).ref_logprobs for part in parts]
    build, built = ref_logprobs.ref_engine, []

    def counted(*args, **kwargs):
        assert not fails, "the cache has the answers"
        built.append(1)
        return build(*args, **kwargs)

    ref_logprobs.ref_engine = counted
    try:
        kept = ref_logprobs.with_ref_logprobs(parts, config, dtype=config.dtype)
    finally:
        ref_logprobs.ref_engine = build
    return asked, [part.ref_logprobs for part in kept], len(built)


@pytest.mark.parametrize(("world_size", "kind"), [(1, 0), (2, "strict")])
def test_precomputed_ref_logprobs_are_the_online_ones(run_ranks, stage_config, tmp_path, world_size, kind):
    model = tmp_path / "ref"  # of its own: nobody has asked it before
    shutil.copytree(local_name(tiny.LLAMA), model)
    config = stage_config("dpo", model=str(model), data__eval_fraction=0.3, **tiny.sharding(kind, tmp_path))
    for asked, kept, built in run_ranks(precomputed, config, False, world_size=world_size):
        assert built == 1 and [len(part) for part in kept] == [2 * 5, 2 * 2], "uneven on two ranks"
        for ours, theirs in zip(kept, asked, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            assert ours.abs().min() > 1
    again = run_ranks(precomputed, config, True, world_size=world_size)
    assert all(built == 0 for *_, built in again)
    # Other weights under the same name are another ref.
    weights = model / "model.safetensors"
    shutil.copy(Path(local_name(f"{tiny.LLAMA}&seed=3")) / "model.safetensors", weights)
    for asked, kept, built in run_ranks(precomputed, config, False, world_size=world_size):
        assert built == 1
        torch.testing.assert_close(kept[0], asked[0], rtol=0, atol=1e-5)
        assert (kept[0] - again[0][1][0]).abs().max() > 1e-2


def from_the_script(config):
    """The metrics that launch/train_dpo.py writes down."""
    stages.script("dpo", config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    return [{name: line[name] for name in line if name.startswith(("train/", "eval/", "grad"))} for line in kept]


def test_a_run_with_a_precomputed_ref_is_the_run_with_the_ref_in_memory(run_ranks, stage_config, strict_z3, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(local_name(tiny.LLAMA), model)
    runs = [
        run_ranks(
            from_the_script,
            stage_config("dpo", model=str(model), ref_logprobs=way, ds_config=strict_z3, **HELD_OUT, seed=1),
        )[0]
        for way in ("online", "precomputed")
    ]
    assert len(runs[0]) == len(runs[1]) == 4
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


# Bad numbers on one rank


def poisoned(config, where):
    """Two steps, the first with a NaN on rank 1: hashes of the weights before, between and after; metrics."""
    trainer, minibatches, *_ = stages.build(config)
    name = "loss" if where == "loss" else "number"
    healthy = getattr(trainer.objective, name)

    def poison(*args):
        result = healthy(*args)
        if comm.rank() != 1:
            return result
        if where == "gradient":
            result.register_hook(lambda gradient: gradient * math.nan)
            return result
        return result + math.nan  # a constant: the gradient stays finite, and only the loss tells

    log, batches = Log(), list(minibatches)
    before = digest(trainer.model)
    setattr(trainer.objective, name, poison)
    trainer.train(batches[:1], 1, log)
    between = digest(trainer.model)
    setattr(trainer.objective, name, healthy)
    trainer.train(batches[1:], 2, log)
    return before, between, digest(trainer.model), log.metrics


@pytest.mark.parametrize(("where", "kind"), [("loss", 0), ("loss", "strict"), ("gradient", 2)])
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_nan_on_one_rank_skips_the_step_on_all(run_ranks, stage_config, tmp_path, stage, where, kind):
    first, second = run_ranks(poisoned, stage_config(stage, **tiny.sharding(kind, tmp_path)), where)
    before, between, after, (skipped, healthy) = first
    assert second[:3] == first[:3]
    assert between == before != after
    assert skipped["skipped/steps"] == healthy["skipped/steps"] == 1
    assert math.isnan(skipped["grad_norm"]) and math.isfinite(healthy["grad_norm"])
    assert healthy == second[3][1]


def always_nan_on_rank_one(config):
    trainer, minibatches, *_ = stages.build(config)
    before = digest(trainer.model)
    number = trainer.objective.number
    trainer.objective.number = lambda *args: number(*args) * (math.nan if comm.rank() == 1 else 1.0)
    with pytest.raises(RuntimeError) as error:
        trainer.train(minibatches, 10, Log())
    return str(error.value), trainer.iteration, digest(trainer.model) == before


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_many_skips_in_a_row_stop_the_run(run_ranks, stage_config, strict_z3, stage):
    first, second = run_ranks(always_nan_on_rank_one, stage_config(stage, max_skipped_steps=3, ds_config=strict_z3))
    assert first == second
    said, steps, unchanged = first
    assert "not finite" in said and said.endswith("3 in a row, the run stops.")
    assert steps == 3 and unchanged


# What must come of them


def toy_preferences(count: int) -> list[dict[str, str]]:
    """The chosen response is the one with an exclamation mark; lengths say nothing."""
    rng = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        prompt, chosen, rejected = (
            "".join(chr(97 + letter) for letter in torch.randint(26, (length,), generator=rng).tolist())
            for length in torch.randint(2, 7, (3,), generator=rng).tolist()
        )
        rows.append({"prompt": prompt, "chosen": chosen + "!", "rejected": rejected + "?"})
    return rows


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_separable_preferences_are_learned(run_ranks, stage_config, stage):
    config = stage_config(
        stage,
        rows=toy_preferences(64),
        zero_stage=2,
        learning_rate=3e-3,
        minibatch_size=16,
        micro_batch_size=8,
        num_iterations=25,
        data__eval_fraction=0.25,
    )
    metrics = run_ranks(stages.train, config)[0]["metrics"]
    before, after = metrics[0], metrics[-1]
    assert before["eval/accuracy"] < 0.9
    assert after["eval/accuracy"] > 0.95 and after["train/accuracy"] > 0.95
    assert after["eval/loss"] < before["eval/loss"] and after["eval/margin"] > 0


@pytest.mark.parametrize("packing", [False, True])
def test_sft_learns_a_handful_of_rows_by_heart(run_ranks, stage_config, packing):
    config = stage_config(
        "sft", learning_rate=1e-2, num_iterations=80, minibatch_size=8, micro_batch_size=8, packing=packing
    )
    losses = [line["train/loss"] for line in run_ranks(stages.train, config, world_size=1)[0]["metrics"]]
    assert losses[0] > 4 and losses[-1] < 0.1, losses


# What is exported


def texts(stage: str, tokenizer) -> list[tuple[str, str]]:
    """(prompt, response) of the data sets, each response with its end."""
    if stage == "sft":
        pairs = [(row["prompt"], row["response"]) for row in tiny.DEMONSTRATIONS]
    else:
        pairs = [(row["prompt"], row[answer]) for row in tiny.PREFERENCES for answer in ("chosen", "rejected")]
    return [(prompt, response + tokenizer.eos_token) for prompt, response in pairs]


@pytest.mark.parametrize(("model", "kind"), [("llama", 0), ("llama", "strict"), ("without_pad", "strict")])
@torch.no_grad()
def test_plain_transformers_gives_the_reward_models_scores(
    run_ranks, stage_config, tmp_path, gpt2_without_pad, model, kind
):
    model = gpt2_without_pad if model == "without_pad" else tiny.LLAMA
    config = stage_config("reward", model=model, **tiny.sharding(kind, tmp_path))
    live, _ = run_ranks(stages.script, "reward", config)
    folder = Path(config.output_dir) / "reward"
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = ["".join(pair) for pair in texts("reward", tokenizer)]
    alone = torch.cat([plain(**tokenizer(row, return_tensors="pt")).logits[:, 0] for row in rows])
    assert alone.std() > 1e-3
    wanted = live["numbers"] * plain.config.score_std + plain.config.score_mean  # the live model takes them out
    torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-5)
    if model == tiny.LLAMA:
        batch = tokenizer(rows, padding=True, return_tensors="pt")
        assert batch.attention_mask.min() == 0
        torch.testing.assert_close(plain(**batch).logits[:, 0], wanted, rtol=0, atol=1e-5)
    else:  # transformers would take the last EOS for padding: better an error than another score
        with pytest.raises(ValueError, match="padding token"):
            plain(**tokenizer(rows, padding=True, return_tensors="pt"))
    assert plain.config.score_mean == pytest.approx(alone.mean().item(), abs=1e-5)
    assert plain.config.score_std == pytest.approx(alone.std(correction=0).item(), abs=1e-5)
    assert plain.config.use_cache is True and plain.config.num_labels == 1


@pytest.mark.parametrize(
    ("stage", "model", "kind"), [("sft", "llama", "strict"), ("sft", "without_pad", 2), ("dpo", "llama", "strict")]
)
@torch.no_grad()
def test_plain_transformers_gives_the_language_models_logprobs(
    run_ranks, stage_config, tmp_path, gpt2_without_pad, stage, model, kind
):
    model = gpt2_without_pad if model == "without_pad" else tiny.LLAMA
    config = stage_config(stage, model=model, **tiny.sharding(kind, tmp_path))
    live, _ = run_ranks(stages.script, stage, config)
    folder = Path(config.output_dir) / "model"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(local_name(model)).eval()

    def logprob(language_model, prompt, response):
        first = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + response, return_tensors="pt")["input_ids"]
        logprobs = language_model(ids).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[first - 1 :].sum().item()

    rows = texts(stage, tokenizer)
    wanted = torch.tensor([logprob(plain, *row) for row in rows])
    torch.testing.assert_close(live["numbers"], wanted, rtol=1e-6, atol=2e-5)
    assert (wanted - torch.tensor([logprob(start, *row) for row in rows])).abs().max() > 1e-2, "it was trained"
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert re.search(rf"models +{folder}\n", live["printed"]), "the end says where the model is"
