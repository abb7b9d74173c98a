"""Parameters of methods as command-line options, generated from the fields of their dataclasses. Nothing is listed by hand.

Knows the registry and type hints; not what any parameter means. Ranges are checked by the methods themselves.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from longreach.methods import parameters, registry
from longreach.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One field of a method."""

    name: str
    annotation: Any
    default: Any  # None where it is required
    required: bool
    help: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def type(self) -> str:
        return type_name(self.annotation)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "option": self.option, "type": self.type, "default": self.default, "required": self.required, "help": self.help}


def of(method: type[Method]) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(method)
    found = []
    for field in parameters(method):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        required = default is dataclasses.MISSING
        found.append(Parameter(field.name, hints[field.name], None if required else default, required, field.metadata.get("help", "")))
    return tuple(found)


def find(name: str) -> type[Method]:
    known = registry()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"unknown method {name!r}; " + (f"did you mean {near[0]!r}? " if near else "") + f"choose one of: {', '.join(known)}")
    return known[name]


def build(name: str | None, arguments: Sequence[str], command_options: Sequence[str] = ()) -> Method | None:
    """The method `name` with the parameters in `arguments`, what Typer left over; None if no method is named.

    command_options  the options of the command itself, to suggest one where an unknown option looks like it.
    """
    given = split(arguments)
    if name is None:
        if given:
            raise ValueError(_unknown(next(iter(given)), command_options))
        return None
    method = find(name)
    known = {p.option: p for p in of(method)}
    values: dict[str, Any] = {}
    for option, text in given.items():
        negated = known.get("--" + option.removeprefix("--no-")) if option.startswith("--no-") else None
        if option not in known and negated is not None and negated.annotation is bool and text is None:
            values[negated.name] = False
            continue
        if option not in known:
            sentence = f"{name} has no parameter {option}; its parameters are: {', '.join(known) or 'none'}"
            raise ValueError(_unknown(option, [*known, *command_options], sentence))
        values[known[option].name] = convert(option, known[option].annotation, text)
    if missing := [p for p in known.values() if p.required and p.name not in values]:
        meanings = " and ".join(f"{p.option} ({p.help})" for p in missing)
        raise ValueError(f"{name} needs {meanings}; pass {' '.join(p.option + ' ' + _example(p.annotation, 'N') for p in missing)}")
    return method(**values)


def split(arguments: Sequence[str]) -> dict[str, str | None]:
    """["--a", "1", "--b=2", "--c"] -> {"--a": "1", "--b": "2", "--c": None}."""
    found: dict[str, str | None] = {}
    waiting: str | None = None
    for argument in arguments:
        if argument.startswith("-") and not _is_number(argument):
            waiting, _, value = argument.partition("=")
            if waiting in found:
                raise ValueError(f"{waiting} is given twice; pass it once")
            found[waiting] = value if "=" in argument else None
            waiting = None if "=" in argument else waiting
        elif waiting is not None:
            found[waiting], waiting = argument, None
        else:
            raise ValueError(f"unexpected argument {argument!r}; parameters are given as options, such as --window {argument}")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown(option: str, known: Sequence[str], sentence: str | None = None) -> str:
    near = difflib.get_close_matches(option, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if sentence is None:
        owners = [name for name, method in registry().items() if option in {p.option for p in of(method)}]
        sentence = f"there is no option {option}"
        if owners:
            sentence, hint = f"{option} is a parameter of a method", f"; name the method too: {' or '.join(f'--method {name}' for name in owners)}"
    return sentence + hint


def type_name(annotation: Any) -> str:
    """int, "int or none", "floor | true_division", ..."""
    if (options := _options(annotation)) is not None:
        return " or ".join("none" if option is types.NoneType else type_name(option) for option in options)
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"{type_name(typing.get_args(annotation)[0])},..."
    if _is_method(annotation):
        return "method"
    return str(getattr(annotation, "__name__", annotation))


def _options(annotation: Any) -> tuple[Any, ...] | None:
    return typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else None


def _is_method(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Method)


def words(method: Method) -> str:
    """What is passed as --method to have this one: its name, and its parameters that are not the defaults as options."""
    found = [method.name]
    for parameter in of(type(method)):
        value = getattr(method, parameter.name)
        if parameter.required or value != parameter.default:
            found += [parameter.option, shlex.quote(_text(value))]
    return " ".join(found)


def _text(value: Any) -> str:
    if isinstance(value, Method):
        return words(value)
    if isinstance(value, tuple):
        return ",".join(map(_text, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def convert(option: str, annotation: Any, text: str | None) -> Any:
    """The text of an option as a value of its type; raises with the type it wants."""
    if _is_method(annotation) and text and text.strip():
        try:
            name, *arguments = shlex.split(text)
        except ValueError as error:
            raise ValueError(f"{option} {text!r} cannot be taken apart ({str(error).lower()}); pass {option} {_example(annotation)}") from None
        return build(name, arguments)
    if text is None:
        if annotation is bool:
            return True
        raise ValueError(f"{option} needs a value of type {type_name(annotation)}; pass {option} VALUE")
    try:
        return _convert(annotation, text)
    except ValueError:
        wanted = type_name(annotation)
        kind = "one of " if typing.get_origin(annotation) is Literal else "of type "
        raise ValueError(f"{option} must be {kind}{wanted}, not {text!r}; pass for example {option} {_example(annotation)}") from None


def _convert(annotation: Any, text: str) -> Any:
    if (options := _options(annotation)) is not None:
        if types.NoneType in options and text.lower() == "none":
            return None
        for option in options:
            if option is not types.NoneType:
                try:
                    return _convert(option, text)
                except ValueError:
                    continue
        raise ValueError(text)
    if typing.get_origin(annotation) is Literal:
        for choice in typing.get_args(annotation):
            if str(choice) == text:
                return choice
        raise ValueError(text)
    if typing.get_origin(annotation) is tuple:  # "none" has no entry; nothing at all is refused, for it is a variable that was not set
        return tuple(_convert(typing.get_args(annotation)[0], part) for part in text.split(",") if part.strip() and text.lower() != "none")
    if annotation is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if annotation in (int, float, str):
        return annotation(text)
    raise ValueError(text)


def _example(annotation: Any, number: str | None = None) -> str:
    """A value to pass; `number` stands for every number."""
    if (options := _options(annotation)) is not None:
        return _example(next(option for option in options if option is not types.NoneType), number)
    if typing.get_origin(annotation) is Literal:
        return str(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is tuple:
        return ",".join([_example(typing.get_args(annotation)[0], number)] * 2) + ",..."
    if _is_method(annotation):
        return '"METHOD --parameter VALUE"'
    return (number if annotation in (int, float) else None) or {int: "8", float: "0.5", bool: "true"}.get(annotation, "VALUE")


def brief(method: dict[str, Any]) -> str:
    """selfextend --group-size 8 --window 64: what one would type, without the defaults."""
    known = of(find(method["method"]))
    given = [f"{p.option} {typed(method[p.name])}" for p in known if p.required or method[p.name] != p.default]
    return " ".join([method["method"], *given])


def typed(value: Any) -> str:
    """A value of a parameter as one would type it."""
    if isinstance(value, dict):
        return f'"{brief(value)}"'
    return ",".join(str(part) for part in value) or "none" if isinstance(value, list | tuple) else str(value)
