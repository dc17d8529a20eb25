"""Errors that end a command in an orderly way, what a person is told, and the exit codes."""

EXIT_OK = 0
EXIT_INPUT = 2
"""Bad input, found before anything is changed; or a file that cannot be read or written."""
EXIT_STOPPED = 3
"""Training stopped itself, e.g. at a loss that is not finite, or a judge or server failed; the last
checkpoint, all answers and verdicts stand."""
EXIT_RESUMABLE = 75
"""Stopped by SIGTERM or Ctrl-C after saving (sysexits' EX_TEMPFAIL): the same command goes on."""

EXIT_UNREAD = 141
"""Nobody reads what a command prints, as after SIGPIPE; training goes on all the same."""


class InputError(ValueError):
    """Something the user can put right: the message names key and value, or file and line."""


class JudgeError(ValueError):
    """A judge gave no usable verdict. Those it gave before are kept where a cache is."""


class ServerError(ValueError):
    """A request failed for good: the message has its address and what came back."""

    def __init__(self, message: str, status: int | None = None):
        """`status` is that of a final HTTP error, None after retries."""
        super().__init__(message)
        self.status = status


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the work up to here is on disk."""


class TrainingStopped(Exception):
    """Training must not go on, e.g. because the loss is not finite; no update was made."""


class Elsewhere(Exception):
    """Another process of the job failed and says why; this one stops with the same exit code."""

    def __init__(self, code: int):
        """`code` is that exit code."""
        super().__init__(f"another process stopped with exit code {code}")
        self.code = code


EXIT_CODES: dict[type[Exception], int] = {
    InputError: EXIT_INPUT,
    OSError: EXIT_INPUT,
    JudgeError: EXIT_STOPPED,
    ServerError: EXIT_STOPPED,
    TrainingStopped: EXIT_STOPPED,
    Interrupted: EXIT_RESUMABLE,
}
"""Errors that end a run in an orderly way. Any other ends its process, the launcher the others."""

TOLD: dict[type[Exception], str] = {
    Interrupted: "stopped by a signal; the same command goes on from here",
    JudgeError: "{}; its verdicts so far are kept: the same command goes on from here",
    ServerError: "{}; the answers so far are kept: the same command goes on from here",
}
"""What is added to, or said in place of, an error's own words."""


def exit_code(error: Exception) -> int:
    """The exit code of an error of `EXIT_CODES`."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def told(error: Exception) -> str:
    """An error of `EXIT_CODES` as one message."""
    said = str(error)
    if isinstance(error, OSError):
        said = f"{error.filename or 'run folder'}: {error.strerror}"
    return next((text for kind, text in TOLD.items() if isinstance(error, kind)), "{}").format(said)
