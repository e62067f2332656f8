"""Checks of a configuration, and of the models and tokenizers that it names."""

from pathlib import Path

from engine.doctor.findings import Finding, failed, of_each, ok, warning, with_remedy
from engine.doctor.subject import Subject
from engine.doctor.weights import folder_of, tensors, tensors_in

HEAD, ADAPTERS_HEAD = "score.weight", "base_model.model.score.weight"


@with_remedy("Correct it; the help of the training script (--help) lists every setting.")
def configuration(subject: Subject) -> Finding:
    """It is read, and every setting is one."""
    return ok(f"{type(subject.config).__name__}, {subject.config.output_dir}")


def settings_without_effect(subject: Subject) -> Finding | None:
    """Settings that nothing looks at in this run."""
    if not subject.is_ppo:
        return None
    idle = [f"{name} ({why})" for name, why in subject.config.without_effect.items()]
    if idle:
        return warning(f"nothing looks at {'; '.join(idle)}.", "Leave it out, if that is not what was meant.")
    return ok("none")


def sizes_per_rank(subject: Subject) -> Finding:
    """The ranks can share out the batches."""
    subject.config.check_world_size(subject.world_size)
    return ok(f"shared out evenly among {subject.world_size} ranks")


@with_remedy("Set --dtype float32.")
def dtype(subject: Subject) -> Finding:
    """The device computes in it."""
    import torch

    chosen = subject.dtype
    if subject.is_ppo and subject.config.rollout.logprobs == "drawn" and chosen != "float32":
        said = f"rollout.logprobs=drawn is for float32, the run is in {chosen}."
        return failed(said, "Leave it out, or set --dtype float32.")
    if subject.gpus and chosen == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return failed("dtype=bfloat16: this GPU does not compute in it.", "Set --dtype float16.")
    if subject.gpus and chosen == "float16" and torch.cuda.is_bf16_supported(including_emulation=False):
        return warning("dtype=float16 overflows where bfloat16 does not, which this GPU has.", "Set --dtype bfloat16.")
    if subject.gpus and chosen == "float32":
        return warning("dtype=float32 on a GPU takes twice the memory and time.", "Set --dtype bfloat16.")
    if not subject.gpus and chosen == "bfloat16":
        return warning("dtype=bfloat16 on a CPU is slow and rounds.", "Set --dtype float32.")
    return ok(chosen)


@with_remedy("Take a file of ds_configs/, with --zero_stage 0 to 3, or correct this one.")
def sharding_files(subject: Subject) -> Finding:
    """Every role's ds_config is JSON, and says how memory is sharded and nothing else."""
    from engine.distributed.zero_config import training_config

    roles = [role for role in subject.config.models if not (role == "ref" and _ref_is_no_model(subject))]

    def look(path: Path) -> Finding:
        if path.stem == "zeroauto":  # of a stage that the memory plan will choose there is no file yet
            return ok("auto")
        training_config(path, dtype="float32", max_grad_norm=1.0)
        return ok(path.name)

    return of_each(dict.fromkeys(subject.config.ds_config_of(role) for role in roles), look)


@with_remedy("Correct the name, or train and export the model first: --ROLE.model_name_or_path.")
def model_folders(subject: Subject) -> Finding:
    """Every role's model is there, of a kind that transformers knows, with all files of its weights."""

    def look(role: str) -> Finding:
        config = subject.model_config(role)
        try:
            tensors(subject, role)
        except ValueError as error:
            return failed(f"{role}: {error}", "Copy the whole folder, or export the model again.")
        return ok(f"{role}: {config.model_type}")

    return of_each(subject.models, look)


def language_models(subject: Subject) -> Finding | None:
    """What is to write text, or to be compared with what does, has a head for it."""
    from engine.models.loading import number_of_labels

    def look(role: str) -> Finding:
        subject.model_config(role)
        if number_of_labels(subject.models[role]) is not None:
            said = (
                f"{subject.models[role]} ({role}) has a score head: it is a reward model or critic, no language model."
            )
            return failed(said, f"Name a language model: --{role}.model_name_or_path.")
        return ok(role)

    return of_each([role for role in ("actor", "model", "ref") if role in subject.models], look)


@with_remedy("Name a model that train_reward.py has written.")
def score_heads(subject: Subject) -> Finding | None:
    """The reward model's is trained: with a random one its scores mean nothing. A critic may begin with a fresh one."""
    from engine.models.loading import number_of_labels

    def look(role: str) -> Finding:
        subject.model_config(role)
        name, labels = subject.models[role], number_of_labels(subject.models[role])
        if labels not in (None, 1):
            said = f"{name} ({role}) is a classifier with {labels} labels, and a score head has one."
            return failed(said, "Train it by train_reward.py.")
        names = tensors(subject, role)
        if names is None:
            return ok(f"{role}: its weights are not here to be looked at")
        if HEAD in names:
            return ok(f"{role}: trained")
        if role == "critic":
            return ok("critic: a fresh head, drawn from the seed")
        said = f"{name} is not a reward model: its checkpoint lacks {HEAD}, so its scores would be random."
        return failed(said, "Name one that train_reward.py has written: --reward.model_name_or_path.")

    if subject.is_ppo and subject.config.shared_trunk and subject.config.reward.model_name_or_path is not None:
        name = subject.config.reward.model_name_or_path
        adapters = folder_of(name).glob("adapter_model*.safetensors")
        if not any(ADAPTERS_HEAD in tensors_in(path) for path in adapters):
            said = f"{name} holds no adapter with a score head, and shared_trunk takes one."
            return failed(said, "Train it on the actor's model with --lora.r 8 --lora.export adapter.")
        return ok("reward: an adapter's")
    return of_each([role for role in ("reward", "critic") if subject.is_ppo and role in subject.models], look)


@with_remedy("Name a folder that holds a whole tokenizer, or correct tokenizer_config.json.")
def tokenizers(subject: Subject) -> Finding:
    """Every role's loads, and ends texts."""
    return of_each(subject.models, lambda role: ok(f"{role}: {len(subject.tokenizer(role))} tokens"))


def same_tokenizer(subject: Subject) -> Finding | None:
    """Critic and ref read the ids that the actor writes: in another vocabulary they would be other text."""
    from engine.models.loading import read_alike

    main = subject.main_role

    def look(role: str) -> Finding:
        theirs, ours = subject.tokenizer(role), subject.tokenizer(main)
        if read_alike(theirs, ours):
            return ok(f"the {role}'s is the {main}'s")
        of_each_other = theirs.get_vocab().items() ^ ours.get_vocab().items()
        differ = sorted({token for token, _ in of_each_other})
        said = (
            f"{len(differ)} tokens differ, {differ[0]!r} among them" if differ else "it begins or ends texts otherwise"
        )
        return failed(
            f"the {role}'s tokenizer ({subject.models[role]}) is not the {main}'s: {said}.",
            f"Name a {role} trained with the {main}'s tokenizer: --{role}.model_name_or_path.",
        )

    return of_each([role for role in ("critic", "ref") if role in subject.models], look)


def reward_tokenizer(subject: Subject) -> Finding | None:
    """The reward model may have one of its own; then it is given text."""
    from engine.models.loading import read_alike

    if not (subject.is_ppo and "reward" in subject.models):
        return None
    theirs, ours = subject.tokenizer("reward"), subject.tokenizer("actor")
    same, template = read_alike(theirs, ours), theirs.chat_template == ours.chat_template
    if same and template:
        return ok("the actor's")
    return warning(
        f"the reward model has another {'chat template' if same else 'tokenizer'} than the actor: responses are "
        f"written out as text for it.",
        "Take a reward model that was trained from the same model, unless this is meant.",
    )


def end_of_sequence(subject: Subject) -> Finding:
    """What the model's own settings end a text with is what its tokenizer does."""
    from transformers import GenerationConfig

    role = subject.main_role
    tokenizer, folder = subject.tokenizer(role), folder_of(subject.models[role])
    if (folder / "generation_config.json").is_file():
        settings, said = GenerationConfig.from_pretrained(folder), "generation_config.json"
    else:
        settings, said = subject.model_config(role), "config.json"
    ids = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if ids != [None] and tokenizer.eos_token_id not in ids:
        return warning(
            f"the {role}'s {said} ends a text with {ids}, its tokenizer with {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token!r}): responses end at any of these, training teaches the tokenizer's.",
            f"Correct eos_token_id in {said}, or eos_token in tokenizer_config.json.",
        )
    return ok(f"{tokenizer.eos_token!r}; padding is {tokenizer.pad_token!r}")


def embeddings(subject: Subject) -> Finding:
    """Every model has a row for each token, and a position for the longest sequence of the run."""
    from engine.models.loading import vocabulary_size

    main = subject.main_role

    def look(role: str) -> Finding:
        config = subject.model_config(role).get_text_config()
        known, positions = vocabulary_size(subject.tokenizer(main)), getattr(config, "max_position_embeddings", None)
        if config.vocab_size < known:
            said = f"the {role} embeds {config.vocab_size} tokens, and the {main}'s tokenizer has {known}."
            return failed(said, f"Name a model of this tokenizer: --{role}.model_name_or_path.")
        if positions is not None and positions < subject.longest:
            lower = "data.max_prompt_tokens or rollout.max_response_tokens" if subject.is_ppo else "data.max_length"
            said = f"the {role} was made for {positions} tokens, and sequences may have {subject.longest}."
            return failed(said, f"Lower {lower}.")
        return ok(f"{role}: {positions or 'any number of'} positions")

    return of_each([role for role in subject.models if role != "reward" or not _reads_text(subject)], look)


@with_remedy("Correct lora.target_modules, or leave it out.")
def lora_targets(subject: Subject) -> Finding | None:
    """The layers that an adapter is to be put on are there."""

    def look(role: str) -> Finding:
        subject.without_weights(role)
        return ok(f"{role}: {', '.join(subject.trained[role].lora.target_modules or ['every linear layer'])}")

    return of_each([role for role, settings in subject.trained.items() if settings.has_adapter], look)


@with_remedy("Install it as it says, or leave quantization out.")
def quantization(subject: Subject) -> Finding | None:
    """The library for weights of 4 bits is there."""
    import torch

    from engine.models.quantization import quantization_config

    roles = [role for role in ("actor", "critic", "ref", "reward", "model") if hasattr(subject.config, role)]
    for role in roles:
        if kind := getattr(subject.config, role).quantization:
            quantization_config(kind, dtype=getattr(torch, subject.dtype))
            return ok(f"{role}: {kind}")
    return None


def _ref_is_no_model(subject: Subject) -> bool:
    """Whether it is the trained model with its adapter off."""
    return subject.config.ref_is_the_actor if subject.is_ppo else subject.config.ref_is_the_model


def _reads_text(subject: Subject) -> bool:
    """Whether the reward model has a tokenizer or template of its own, so that the actor's ids do not reach it."""
    from engine.models.loading import read_alike

    if not subject.is_ppo:
        return False
    theirs, ours = subject.tokenizer("reward"), subject.tokenizer("actor")
    return not (theirs.chat_template == ours.chat_template and read_alike(theirs, ours))


CHECKS = [
    *(configuration, settings_without_effect, sizes_per_rank, dtype, sharding_files),
    *(model_folders, language_models, score_heads),
    *(tokenizers, same_tokenizer, reward_tokenizer, end_of_sequence, embeddings, lora_targets, quantization),
]
