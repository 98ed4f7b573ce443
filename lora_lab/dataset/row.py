"""The two kinds of row: a conversation, which the model's chat template lays out, and a passage, which none does."""

from dataclasses import dataclass
from enum import StrEnum

from lora_lab.options import Layout


class Role(StrEnum):
    """Who speaks in a turn, by the names that chat templates have. A tool's result is a turn of the user."""

    system = "system"
    user = "user"
    assistant = "assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: Role
    text: str
    trained: bool = True
    """False for an answer that is only read: OpenAI's weight 0."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns: perhaps one of the system first, then user and assistant alternate; the assistant has the last."""

    turns: tuple[Turn, ...]
    given: int = 0
    """The first turns that are read only, whoever speaks them."""

    @classmethod
    def of(cls, question: str, answer: str) -> "Conversation":
        """Make a conversation of one question and its answer."""
        return cls((Turn(Role.user, question), Turn(Role.assistant, answer)))

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """Return what the last answer answers."""
        return self.turns[:-1]

    @property
    def answers(self) -> list[int]:
        """Return the positions of the assistant's turns that may be trained."""
        return [
            place
            for place, turn in enumerate(self.turns)
            if turn.role is Role.assistant and turn.trained and place >= self.given
        ]


@dataclass(frozen=True, slots=True)
class Passage:
    """Plain text; its prompt, if there is one, is read only."""

    prompt: str
    text: str


Row = Conversation | Passage

CONVERSATIONS, PASSAGES = "conversations", "passages"


def as_conversations(layout: Layout, kinds: str) -> bool:
    """Return whether a question becomes a conversation's, as at least some of the rows were.

    Args:
        layout: that was asked for. It decides where `kinds` is not known.
        kinds: of the rows; empty for a trial from before that was recorded."""
    return kinds != PASSAGES if kinds else layout not in (Layout.completion, Layout.text)
