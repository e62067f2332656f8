"""Fresh models made on the spot: `random://llama?hidden_size=64&num_hidden_layers=2` in place of a folder or hub name.

The model type and the fields after `?` are those of the transformers config; `seed` is this file's own. The tokenizer
is a byte-level one (256 bytes, a pad and an end-of-sequence token, a chat template), so no file is ever downloaded.
`head=score` makes a reward model (a sequence classifier with one label) in place of a language model.

The same name gives the same weights on every rank and at every ZeRO stage: the model is written once to a cache folder
and loaded from there like any other.
"""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

SCHEME = "random://"
# "user: hi<eos>\nassistant: ": short, and every turn ends as a response does.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids 2 to 257; `<pad>` is 0 and `<eos>` is 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def local_name(model_name_or_path: str) -> str:
    """The folder of a `random://` name, made on first use; any other name as it is.

    Raises:
        ValueError: a model type or field that transformers does not know.
    """
    if not model_name_or_path.startswith(SCHEME):
        return model_name_or_path
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf_engine" / "random_models"
    cache.mkdir(parents=True, exist_ok=True)
    key = f"{model_name_or_path} torch{torch.__version__} v2 {CHAT_TEMPLATE}"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    with open(folder.with_suffix(".flock"), "w") as queue:  # the ranks of a node start together: one of them writes
        fcntl.flock(queue, fcntl.LOCK_EX)
        if not folder.exists():
            half_done = folder.with_suffix(".partial")
            shutil.rmtree(half_done, ignore_errors=True)
            _write(model_name_or_path, half_done)
            half_done.rename(folder)
    return str(folder)


def _write(name: str, folder: Path) -> None:
    url = urlsplit(name)
    fields = {key: yaml.safe_load(value) for key, value in parse_qsl(url.query)}
    seed, head = fields.pop("seed", 0), fields.pop("head", "language_model")
    if head not in ("language_model", "score"):
        raise ValueError(f"{name}: head={head} is not one of language_model, score.")
    tokenizer = byte_tokenizer()
    special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    try:
        config = AutoConfig.for_model(url.netloc, **special, **({"vocab_size": len(tokenizer)} | fields))
    except ValueError as error:
        raise ValueError(f"{name}: transformers has no model type {url.netloc!r}.") from error
    except StrictDataclassError as error:  # sizes that do not fit together
        raise ValueError(f"{name}: {error}") from error
    if unknown := sorted(fields.keys() - type(config)().to_dict().keys() - config.attribute_map.keys()):
        raise ValueError(f"{name}: {type(config).__name__} has no field {', '.join(unknown)}.")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if "vocab_size" not in fields:  # transformers has a tokenizer class of its own for some types, with more tokens
        config.vocab_size = max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1
    rng_state = torch.get_rng_state()
    torch.manual_seed(seed)
    if head == "score":
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.set_rng_state(rng_state)
    # Not model.save_pretrained: once a process group exists, it writes on global rank 0 alone and says nothing.
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
