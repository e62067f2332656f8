"""Tokenizers small enough to write their ids by hand, and conversations in a word each."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, A, B, UNKNOWN = range(5)
SPECIAL = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def word_tokenizer(*, adds_bos: bool = False, adds_eos: bool = False, template: str | None = None):
    """<s> is 0, </s> is 1, `a` is 2, `b` is 3; words are split at blanks."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "a": A, "b": B, "<unk>": UNKNOWN}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    parts = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    fast.chat_template = template
    return fast


def merging_tokenizer(*, prefix: str = ""):
    """`a` is 2, `b` is 3, `ab` is 5. With a prefix, which goes before every text, `_a` is 6 and `_b` is 7."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "a": A, "b": B, "<unk>": UNKNOWN, "ab": 5, "_a": 6, "_b": 7, "_": 8}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("_", "a"), ("_", "b"), ("a", "b")], unk_token="<unk>"))
    if prefix:
        tokenizer.normalizer = normalizers.Prepend(prefix)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
