"""The error tree, by who is at fault.

Every message says what was expected, what was found, where (site, round, file, row) and what to do.
No message ever holds a patient value, a key or a share.
"""


class HospitiumError(Exception):
    """Anything Hospitium refuses on purpose; shown to people as one line."""


class ConfigError(HospitiumError):
    """A file or an option that a person wrote is wrong."""


class DataRejected(HospitiumError):
    """Local data does not pass the quality check; nothing was trained on it."""


class BudgetExceeded(HospitiumError):
    """The privacy budget does not cover what was asked for; nothing was spent."""


class NotApproved(HospitiumError):
    """The site's policy does not allow what the coordinator asked for."""


class StudyHalted(HospitiumError):
    """A study must not go on by itself before a person has looked into it; nothing is lost."""


class LocalProtocolError(HospitiumError):
    """Our own side asked the protocol for a step that its state does not allow."""


class PeerProtocolError(HospitiumError):
    """Another party broke the protocol.

    ``blame`` is the roster index of the party that the evidence names: 0 is the coordinator,
    ``None`` means the evidence does not name anyone.
    """

    def __init__(self, message: str, blame: int | None = None) -> None:
        super().__init__(message)
        self.blame = blame
