"""The one exception a user of the kit meets: what is wrong, with which value, what is allowed, what
to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class KitError(ValueError):
    """A refusal in four parts, short in a notebook (no traceback of library internals), complete as
    `str(error)`.

    Args:
        what: the parameter, file or resource and what is wrong with it.
        value: the offending value, shown with `repr`; leave out where there is none.
        allowed: the allowed range or choices.
        remedy: what to do next.

    >>> print(KitError("max_steps is too small", value=0, allowed="1 or more", remedy="leave it None for the profile's value"))
    max_steps is too small (got 0). Allowed: 1 or more. Do this: leave it None for the profile's
    value.
    """

    _NOTHING = object()

    def __init__(self, what: str, *, value: object = _NOTHING, allowed: str = "", remedy: str = ""):
        self.what, self.allowed, self.remedy = what, allowed, remedy
        self.value = None if value is self._NOTHING else value
        shown = "" if value is self._NOTHING else f" (got {_short(value)})"
        parts = [
            f"{what}{shown}",
            allowed and f"Allowed: {allowed}",
            remedy and f"Do this: {remedy}",
        ]
        super().__init__(" ".join(p if p[-1] in ".?!" else f"{p}." for p in parts if p))

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a long traceback."""
        return [f"{type(self).__name__}: {self}"]


@contextmanager
def refusing(what: str, value: object, remedy: str) -> Iterator[None]:
    """Inside, whatever a library says of what somebody brought (it can be any exception) becomes a
    refusal: `what: reason`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, KitError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = [
            *str(error.__cause__ or error).strip().splitlines(),
            f"nothing is there ({type(error).__name__})",
        ][0][:200]
        raise KitError(f"{what}: {reason}", value=value, remedy=remedy) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's own class, Python's, or the words of another allocator
    (cuBLAS, the driver, the host).
    """
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return True
    words = ("ALLOC_FAILED", "out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)


def explain_missing_names(shell) -> None:
    """From now on a notebook's cell that uses a name no cell has set yet says so in one sentence,
    without a traceback.

    A name that is missing inside a function keeps its traceback: there the line matters.
    """

    def explain(shell, kind, error, trace, tb_offset=None):
        innermost = trace
        while innermost.tb_next:
            innermost = innermost.tb_next
        frame = innermost.tb_frame
        if frame.f_globals is shell.user_ns and frame.f_code.co_name.startswith(
            "<"
        ):  # <module>, <listcomp>, …
            first = f"run the cell above that sets it first ({error.name} = …), or all cells above this one"
            said = f"NameError: {error.name} is not there yet. Do this: {first}."
            error._render_traceback_ = lambda: [said]
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((NameError,), explain)


def _short(value: object, limit: int = 80) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        text = f"something too long to show ({type(value).__name__})"
    return text if len(text) <= limit else text[: limit - 1] + "…"
