"""All problems of a file that pydantic refused, in words, with a suggestion for each unknown key."""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError


def _known_keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Keys that `model` knows at `location`."""
    is_table = False
    for part in location:
        if isinstance(part, int) or model is None or is_table:  # a place in a list, or somebody's name in a table
            is_table = False
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        nested = [annotation, *getattr(annotation, "__args__", ())]
        is_table = getattr(annotation, "__origin__", None) is dict
        model = next((each for each in nested if isinstance(each, type) and issubclass(each, BaseModel)), None)
    return [field.alias or name for name, field in model.model_fields.items()] if model is not None else []


def describe_problems(error: ValidationError, model: type[BaseModel]) -> str:
    """Every problem in `error` as ``key: what is wrong``, joined by semicolons."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        location = problem["loc"]
        where = ".".join(str(part) for part in location) or "top level"
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(location[-1]), _known_keys(model, location[:-1]), n=1)
            lines.append(f"{where}: unknown key" + (f", did you mean {close[0]!r}?" if close else ""))
        else:
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
