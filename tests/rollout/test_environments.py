"""environments.py: what the user's class is given and what it may give back."""

import pytest

from engine.rollout.environments import load_environment, new_environment, reply_of

CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
COLUMNS = {"prompt": "hi", "answer": 4}


class Silent:
    def reply(self, conversation):
        return None


class WantsAnswer(Silent):
    def __init__(self, answer):
        self.given = answer


class TakesAll(Silent):
    def __init__(self, **columns):
        self.given = columns


class WantsMore(Silent):
    def __init__(self, question):
        pass


class Breaks(Silent):
    def __init__(self):
        raise KeyError("no board")


class Says:
    def __init__(self, what=None):
        self.what = what

    def reply(self, conversation):
        if isinstance(self.what, Exception):
            raise self.what
        return self.what


no_class = Silent()


# Finding it


def test_the_named_class_is_found():
    assert load_environment("test_environments:Silent").__name__ == "Silent"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_module:Silent", "importing no_such_module failed.*PYTHONPATH"),
        ("test_environments:Missing", "test_environments has no class Missing"),
        ("test_environments:no_class", "test_environments has no class no_class"),
        ("collections:Counter", r"Counter has no method reply\(conversation\)"),
    ],
)
def test_what_is_no_environment_is_named(spec, said):
    with pytest.raises(ValueError, match=rf"rollout\.environment={spec}: {said}"):
        load_environment(spec)


# Making one


def test_it_is_made_with_the_columns_that_it_has_arguments_for():
    new_environment(Silent, COLUMNS)
    assert new_environment(WantsAnswer, COLUMNS).given == 4
    assert new_environment(TakesAll, COLUMNS).given == COLUMNS
    assert new_environment(Says, COLUMNS).what is None


def test_a_missing_column_is_named():
    with pytest.raises(
        ValueError, match=r"environment WantsMore is made with .*missing a required argument: 'question'"
    ):
        new_environment(WantsMore, COLUMNS)


def test_what_its_constructor_raises_is_shown_with_its_name_and_place():
    with pytest.raises(
        ValueError, match=r"environment Breaks raised KeyError: 'no board' \(.*test_environments\.py, line"
    ):
        new_environment(Breaks, COLUMNS)


# Asking it


@pytest.mark.parametrize("reply", [None, "", "go on"])
def test_a_reply_is_text_or_none(reply):
    assert reply_of(Says(reply), CONVERSATION) == reply


@pytest.mark.parametrize(("reply", "kind"), [(3, "int"), (["go"], "list"), (b"go", "bytes"), (True, "bool")])
def test_anything_else_is_refused_with_its_name(reply, kind):
    with pytest.raises(ValueError, match=rf"environment Says replied .*, a {kind}: reply\(conversation\) returns"):
        reply_of(Says(reply), CONVERSATION)


def test_what_it_raises_is_shown_with_its_name_and_place():
    with pytest.raises(
        ValueError, match=r"environment Says raised OSError: down \(.*test_environments\.py, line"
    ) as error:
        reply_of(Says(OSError("down")), CONVERSATION)
    assert isinstance(error.value.__cause__, OSError)


def test_it_cannot_change_the_conversation():
    class Edits:
        def reply(self, conversation):
            conversation[0]["content"] = "changed"
            conversation.clear()

    ours = [dict(message) for message in CONVERSATION]
    reply_of(Edits(), ours)
    assert ours == CONVERSATION
