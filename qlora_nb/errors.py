"""The one exception a user of the kit meets: what is wrong, with which value, what is allowed, what
to do.

A library's error speaks of the library's insides: forty frames and a tensor's shape. `KitError`
speaks of the parameter, file or resource that a person can change, and ends with a remedy. In a
notebook it is shown as one paragraph, because IPython asks an exception for its
`_render_traceback_` first; the command line prints the same paragraph and exits with 2.

`refusing` turns whatever a library says of a file that somebody brought into such a refusal. A
card's memory that ran out is not refused there: training catches it and tries again with fewer
rows. The host's is said to be what it is, whatever words the system has for it.
"""

import dis
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class KitError(ValueError):
    """A refusal in four parts; `str(error)` is all of them in one paragraph.

    Args:
        what: the parameter, file or resource and what is wrong with it.
        value: the offending value, as `repr` shows it (80 characters); None where there is none.
        allowed: the allowed range or choices.
        remedy: what to do next.

    >>> print(KitError("r is too small", value=0, allowed="1 or more", remedy="leave it None"))
    r is too small (got 0). Allowed: 1 or more. Do this: leave it None.
    """

    def __init__(self, what: str, *, value: object = None, allowed: str = "", remedy: str = ""):
        self.what = what
        self.value = value
        self.allowed = allowed
        self.remedy = remedy
        shown = repr(value)
        if len(shown) > 80:
            shown = f"{shown[:79]}…"
        got = "" if value is None else f" (got {shown})"
        text = _sentence(f"{what}{got}")
        if allowed:
            text += _sentence(f" Allowed: {allowed}")
        if remedy:
            text += _sentence(f" Do this: {remedy}")
        super().__init__(text)

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a long traceback."""
        return [f"{type(self).__name__}: {self}"]


@contextmanager
def refusing(what: str, value: object, remedy: str) -> Iterator[None]:
    """Inside, any exception of a library becomes the refusal `what: first line of the reason`.

    Raises:
        KitError: in place of everything but a `KitError` and torch's OutOfMemoryError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, KitError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = str(error.__cause__ or error).strip()
        if not reason:
            reason = f"nothing is there ({type(error).__name__})"
        first_line = reason.splitlines()[0][:200]
        if is_out_of_memory(error):
            first_line = f"memory ran out ({first_line})"
            remedy = MORE_MEMORY
        raise KitError(f"{what}: {first_line}", value=value, remedy=remedy) from error


MORE_MEMORY = "close other programs and kernels, raise a limit (ulimit -v), or use profile=tiny"

_OUT_OF_MEMORY = (
    "MemoryError",
    "[Errno 12]",
    "Not enough memory",
    "ALLOC_FAILED",
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "bad allocation",
    "failed to map segment",
    "start new thread",
)
"""Words of Python and torch's own error, the system (ENOMEM, Windows), cuBLAS, the driver, C++, the
loader of libraries and Python's threads.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by the name of the error and its words."""
    said = f"{type(error).__name__}: {error}"
    return any(words in said for words in _OUT_OF_MEMORY)


def explain_missing_names(shell) -> None:
    """From now on a notebook's cell that uses a name which no cell has set yet, or which is None
    because the cell that sets it failed, says so in one sentence. Of a parameter that is None on
    purpose it says where the profile's value is.

    Args:
        shell: IPython's `InteractiveShell`.
    """

    def explain(shell, kind, error, trace, tb_offset=None):
        name, where = _missing_name(error, trace, shell.user_ns)
        if name:
            sentence = (
                f"{kind.__name__}: {name} is not there yet{where}. Do this: run the cell above "
                f"that sets it first ({name} = …), or all cells above this one."
            )
            of_profile = getattr(shell.user_ns.get("settings"), name, None)
            if name in shell.user_ns and of_profile is not None:
                sentence = (
                    f"{kind.__name__}: {name} is None, which means the profile's value{where}: "
                    f"settings.{name} has it."
                )
            error._render_traceback_ = lambda: [sentence]
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((NameError, AttributeError, TypeError), explain)


def _missing_name(error: Exception, trace: TracebackType, names: dict) -> tuple[str, str]:
    """The notebook's name that a cell lacked, and the line of a function where that is; both empty
    if something else went wrong.
    """
    where = ""
    in_notebook = False
    for frame, line in traceback.walk_tb(trace):
        in_notebook = frame.f_globals is names
        if not in_notebook:
            continue
        if not frame.f_code.co_name.startswith("<"):  # <module>, <listcomp>, …
            where = f" (line {line} of {frame.f_code.co_name})"
        if "NoneType" in str(error):
            for step in dis.get_instructions(frame.f_code):
                is_read = step.opname in ("LOAD_NAME", "LOAD_GLOBAL")
                if is_read and names.get(step.argval, "") is None:
                    return step.argval, where
    if in_notebook and isinstance(error, NameError):
        return error.name, where
    return "", ""


def show_refusals_alone() -> None:
    """From now on a refusal ends this program with its sentence and without a traceback."""

    def show(kind, error, trace):
        if isinstance(error, KitError):
            print(error, file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = show


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."
