"""The checker of a function that the reader writes.

It runs the reader's own function on several inputs beside a reference, which is a library's call,
and says one thing at a time, as a teacher would: not written yet, an error, nothing returned, then
shape, datatype and values with the first that is wrong. What it returns is a function to go on
with, so that the rest of a notebook runs on the reader's function once it is right, and before that
on the reference.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from qlora_nb.ui import checks

NOT_WRITTEN = "not written yet. Put your lines in the place of `raise` and run the cell again"


def call(function: Callable, *arguments):
    """What a function returns: what is compared unless a checker says otherwise."""
    return function(*arguments)


@dataclass(frozen=True)
class Written:
    """A checker: `check = Written(…)`, then `function = check(function)` in the notebook.

    Attributes:
        name: of the function.
        reference: what it must equal: a library's own call, with the same arguments.
        inputs: draws the arguments to try, a tuple for each call, the smallest first: what is wrong
            is told of the first call that shows it.
        equals: what `reference` is, as in "PEFT's layer, output and gradient".
        hint: one sentence that is added when shape or values are wrong.
        mistakes: sentence → a function that is wrong in a typical way. Where the reader's returns
            the same, this sentence is the hint.
        tolerance: for floating point, relative to the largest value of a result: sums may be taken
            in another order. Whole numbers must be equal.
        call: `call(function, *arguments)` is what is compared: with gradients, say.
    """

    name: str
    reference: Callable
    inputs: Callable[[], list[tuple]]
    equals: str
    hint: str
    mistakes: Mapping[str, Callable] = field(default_factory=dict)
    tolerance: float = 1e-4
    call: Callable = call

    def __call__(self, function: Callable) -> Callable:
        """Say in one line what is wrong with the reader's function, or that nothing is; return it
        if it is right, else the reference.
        """
        with torch.random.fork_rng():  # the notebook's own random numbers go on as they were
            torch.manual_seed(0)
            fault = self._fault_of(function)
        if fault:
            print(f"{self.name}: {fault}.")
            return self.reference
        print(f"{self.name}: right, equal to {self.equals}.")
        return function

    def _fault_of(self, function: Callable) -> str:
        for arguments in self.inputs():
            want = self.call(self.reference, *copy.deepcopy(arguments))
            given = copy.deepcopy(arguments)
            try:
                got = self.call(function, *given)
            except Exception as error:
                if isinstance(error, NotImplementedError) and not str(error):
                    return NOT_WRITTEN  # the stub's own error; torch's has a text
                what = ", ".join(map(_described, arguments))
                return f"called with {what} it raises {type(error).__name__}: {error}"
            if got is None:
                return "it returns nothing: its last line must be `return …`"
            if any(map(_changed, given, arguments)):
                return "it changes what it is given: work on a copy"
            fault = difference(got, want, self.tolerance)
            if fault:
                return f"{fault}. Hint: {self._hint(got, arguments)}"
        return ""

    def _hint(self, got: object, arguments: tuple) -> str:
        for sentence, wrong in self.mistakes.items():
            like_this = self.call(wrong, *copy.deepcopy(arguments))
            if not difference(got, like_this, self.tolerance):
                return sentence
        return self.hint


def _changed(given: object, argument: object) -> bool:
    if isinstance(argument, torch.Tensor):
        return not torch.equal(given, argument)
    return isinstance(argument, list) and given != argument


def _described(argument: object) -> str:
    """An argument in a few words: a tensor by its shape, a layer by its type."""
    if isinstance(argument, torch.Tensor):
        return f"a tensor of shape {tuple(argument.shape)}"
    if isinstance(argument, torch.nn.Module):
        return f"a layer {type(argument).__name__}"
    return repr(argument)


def difference(got: object, want: object, tolerance: float) -> str:
    """How a result differs from the one that is needed, "" if it does not. Several results are
    compared one after the other.
    """
    if isinstance(want, torch.Tensor):
        return _difference_of_tensors(got, want, tolerance)
    if not isinstance(want, tuple):
        return checks.fault_of(got, want, tolerance)
    if not isinstance(got, tuple) or len(got) != len(want):
        return f"{len(want)} results are needed, as in `return first, second`"
    for i, (mine, right) in enumerate(zip(got, want)):
        fault = difference(mine, right, tolerance)
        if fault:
            return f"result {i + 1} of {len(want)}: {fault}"
    return ""


def _difference_of_tensors(got: object, want: torch.Tensor, tolerance: float) -> str:
    if not isinstance(got, torch.Tensor):
        return f"a tensor is needed, yours is of type {type(got).__name__}"
    if got.shape != want.shape:
        return f"shape wrong: yours is {tuple(got.shape)}, needed is {tuple(want.shape)}"
    if got.dtype != want.dtype:
        return f"datatype wrong: yours is {got.dtype}, needed is {want.dtype}"
    if not want.is_floating_point():
        tolerance = 0
    mine = got.detach().double()
    right = want.detach().double()
    largest = right.abs().nan_to_num().max().item()
    atol = tolerance * largest
    near = torch.isclose(mine, right, rtol=tolerance, atol=atol, equal_nan=True)
    if near.all():
        return ""
    wrong = ~near
    where = wrong.nonzero()[0].tolist()
    values = f"yours is {mine[*where]:.6g}, needed is {right[*where]:.6g}"
    return f"values wrong: {wrong.sum()} of {wrong.numel()}, the first at {where}: {values}"
