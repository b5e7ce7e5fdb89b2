"""Every exception this package raises on purpose.

One base class, so that `except MPlusError` catches them all; the command line turns it into a one-line message.
"""

from __future__ import annotations

from collections.abc import Sequence


class MPlusError(Exception):
    """Base class of every error raised on purpose by mplus-agents."""


class InvalidInputError(MPlusError, ValueError):
    """A caller's argument is not allowed; nothing has been changed.

    Args:
        argument: Name of the argument at fault.
        value: The value that was given; long values are shortened in the message.
        allowed: What would have been accepted, in words.
    """

    def __init__(self, argument: str, value: object, allowed: str) -> None:
        self.argument = argument
        self.value = value
        self.allowed = allowed
        super().__init__(f"{argument} is {_shorten(repr(value))}; allowed: {allowed}")


class ConfigError(MPlusError, ValueError):
    """A configuration names an unknown key, or gives a key a value that is not supported."""


class CheckpointError(MPlusError):
    """A checkpoint is refused: tensors are missing, unexpected or misshaped, or the file cannot be used.

    Args:
        message: What is wrong, in one sentence.
        names: The tensors, files or keys at fault.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        listed = ", ".join(self.names[:8]) + (f" and {len(self.names) - 8} more" if len(self.names) > 8 else "")
        super().__init__(f"{message}: {listed}" if listed else message)


class PromptTooLongError(MPlusError, ValueError):
    """A prompt and the tokens asked for do not fit the model's generation window together."""


class StoreError(MPlusError):
    """The database refused or failed an operation; what was acknowledged before is still there."""


class AgentNotFoundError(StoreError, LookupError):
    """No agent of that name exists in the namespace."""


class CorruptBlobError(StoreError):
    """A stored blob does not decode or its checksum differs; the message says which row it is."""


class SchemaVersionError(StoreError):
    """The database has a schema this version does not know; nothing in it was changed."""


class ConflictError(StoreError):
    """Another writer moved the agent first; this write was not made."""


class FingerprintMismatchError(StoreError):
    """The agent was made with another model.

    Args:
        agent: The agent's name.
        fields: For each differing field, the stored value and the value of the model at hand.
        model: What the model was called that made the agent.
    """

    def __init__(self, agent: str, fields: dict[str, tuple[str, str]], model: str = "another model") -> None:
        self.agent = agent
        self.fields = fields
        listed = "; ".join(
            f"{name}: stored {_shorten(old)}, model has {_shorten(new)}" for name, (old, new) in fields.items()
        )
        super().__init__(f"agent {agent!r} was made with {model}, and the model at hand is not the same ({listed})")


def _shorten(text: str, max_chars: int = 80) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 12]}… ({len(text)} characters)"
