"""The other side of a conversation, for `rollout.environment`: `engine.environments:SecondChance`."""

from engine.scores import final_number


class SecondChance:
    """Says so when the actor's last number is not the last one of the dataset's `answer`, and lets it try again.

    With `rollout.max_turns: 2` and `engine.scores:final_number`, which looks at the last turn, this is the task of
    learning to correct oneself (Kumar et al. 2024, https://arxiv.org/abs/2409.12917, section 3).
    """

    def __init__(self, answer: str):
        self.answer = answer

    def reply(self, conversation: list[dict[str, str]]) -> str | None:
        """None when the last turn is right."""
        said = conversation[-1]["content"]
        right = final_number([""], [said], answer=[self.answer]) == [1.0]
        return None if right else "That is not right. Look for the mistake and answer again."
