"""How people write values: in a notebook, in a shell, in YAML, JSON or Python.

Each type here takes what a person, papermill or a widget hands over and makes of it what a
parameter holds: "1e3" is a number, 'q_proj, k_proj' is a list, 'instruction=question' is a mapping,
a path object is its text. What can be read in no such way goes on as it is, and pydantic refuses
it. `settings` says which parameter is of which type.
"""

import ast
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from qlora_nb import sources
from qlora_nb.errors import KitError


def _number(value: Any) -> Any:
    """Python counts True as 1; a person who writes max_steps=True has made a mistake. Text is read
    as Python reads numbers: "1e3", "1_000".
    """
    if isinstance(value, bool):
        raise ValueError("a number is needed, not True or False")
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _read(text: str, *readers: Callable[[str], Any]) -> Any:
    """What the first reader that can makes of a text; the text itself if none can."""
    for read in readers:
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError, yaml.YAMLError):
            return read(text)
    return text


def _prompts(value: Any) -> Any:
    """A prompt, or a list of prompts, also as JSON or Python write it → a list of prompts. Any
    other text is one prompt, whatever it begins with: "[INST] Where is Anna? [/INST]".
    """
    if isinstance(value, int | float):  # papermill reads -p prompts 7 as a number
        return [str(value)]
    if hasattr(value, "columns"):
        raise ValueError("a table is no list of prompts: give one of its columns")
    if not isinstance(value, str):
        return value
    if value.strip().startswith("["):
        found = _read(value.strip(), json.loads, ast.literal_eval)
        if isinstance(found, list) and found and all(isinstance(prompt, str) for prompt in found):
            return found
    return [value]


def _names(value: Any) -> Any:
    """'q, k', '["q", "k"]', "['q', 'k']", '[q, k]', '- q' and '- k' in two lines → a list."""
    if not isinstance(value, str):
        return value
    names = re.split("[,\n]", value.strip(" \n[](){}"))
    return [name.strip(" -'\"") for name in names if name.strip()]


def _mapping(value: Any) -> Any:
    """'instruction=question, output=answer', JSON, YAML or a dictionary → a dictionary."""
    if not isinstance(value, str):
        return value
    if not re.match(r"\s*\w+\s*=", value):
        return _read(value.strip() or "{}", json.loads, yaml.safe_load)
    pairs = {}
    for pair in re.split(r"[,\n]\s*(?=\w+\s*=)", value):
        name, _, own = pair.partition("=")
        pairs[name.strip()] = own.strip(" ,'\"")
    return pairs


def _text(value: Any) -> Any:
    """A path object is as good as its text. YAML reads `resume: no` as False."""
    if value is False:
        return "no"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _possible(name: str) -> str:
    """A name may be a path: one that no file system can hold, or of a person who is not here, fails
    now and not later.
    """
    try:
        sources.local_path(name).exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"this is no possible path: {reason}") from None
    return name


NUMBER = BeforeValidator(_number)

Int = Annotated[int, NUMBER]

Float = Annotated[float, NUMBER]

Name = Annotated[str, BeforeValidator(_text), Field(min_length=1), AfterValidator(_possible)]

Names = Annotated[list[Name], BeforeValidator(_names), Field(min_length=1)]

Column = Literal["instruction", "input", "output"]

Mapping = Annotated[dict[Column, Name], BeforeValidator(_mapping)]

Prompts = Annotated[list[str], BeforeValidator(_prompts), Field(min_length=1)]


def parameters(arguments: list[str]) -> dict:
    """`-p NAME VALUE`, as often as wanted, as a dictionary."""
    given = {}
    for i in range(0, len(arguments), 3):
        flag, *pair = arguments[i : i + 3]
        if flag not in ("-p", "-r", "--parameters") or len(pair) != 2:
            what = "this argument is not understood"
            raise KitError(what, value=flag, allowed="-p NAME VALUE")
        name, value = pair
        if name in given:
            raise KitError("this parameter is given twice", value=name, remedy="give it once")
        given[name] = value
    return given
