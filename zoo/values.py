"""Plain values that are checked: dataclasses that read and write JSON objects, and say all that is wrong with one."""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from typing import Any, Self

# of any size: more is a slip, and would ask for memory or take long before it fails
LARGEST = 1 << 20


@dataclass(frozen=True)
class Config:
    """A dataclass of plain values that checks what it is given."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "") -> Self:
        """Build from plain values, nested where a field is a config.

        Raises:
            ValueError: as `problems` says, a line each.
        """
        if problems := cls.problems(values, where):
            raise ValueError("\n".join(problems))
        return cls._build(values)

    @classmethod
    def problems(cls, values: dict[str, Any], where: str = "") -> list[str]:
        """What keeps `values` from being this config, a sentence each, keys prefixed by `where`.

        That is every unknown key with the nearest right one and every wrong type; of a config that has neither, the
        first thing that is wrong in its values.
        """
        prefix = f"{where}." if where else ""
        hints = typing.get_type_hints(cls)
        own: list[str] = []
        nested: dict[str, list[str]] = {}
        for key, value in values.items():
            if key not in hints:
                own.append(f"{prefix}{key}: there is no such key{nearest(key, hints)}")
            elif isinstance(hints[key], type) and issubclass(hints[key], Config):
                if isinstance(value, dict):
                    nested[key] = hints[key].problems(value, prefix + key)
                elif not isinstance(value, hints[key]):
                    own.append(f"{prefix}{key}: must be a section of keys, not {value!r}")
            elif not _fits(hints[key], value):
                own.append(f"{prefix}{key}: must be {_describe(hints[key])}, not {value!r}")
        if not own:
            try:
                cls._build({key: value for key, value in values.items() if not nested.get(key)})
            except ValueError as error:
                # a line begins with the name that the section has by itself
                lines = str(error).splitlines()
                own += [f"{where}.{line.partition('.')[2]}" if where else line for line in lines]
        return own + [problem for problems in nested.values() for problem in problems]

    @classmethod
    def _build(cls, values: dict[str, Any]) -> Self:
        hints = typing.get_type_hints(cls)
        return cls(**{key: _made(hints[key], value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads."""
        return dataclasses.asdict(self)


def nearest(word: str, words: typing.Iterable[str]) -> str:
    """ ", did you mean ...?" for the most similar word, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _made(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, dict):
        return hint.from_dict(value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, list | tuple) or (kinds[-1] is not ... and len(kinds) != len(value)):
            return False
        return all(_fits(kinds[0], item) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint) and not (
        hint is int and isinstance(value, bool)
    )


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        many = "a list" if kinds[-1] is ... else f"a list of {len(kinds)}"
        return f"{many} ({_describe(kinds[0])})"
    return {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        dict: "a section of keys",
        types.NoneType: "null",
    }[typing.get_origin(hint) or hint]


def one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{where}: must be one of {', '.join(allowed)}, not {value!r}{nearest(value, allowed)}"
        )


def positive(where: str, config: Config, *names: str) -> None:
    values = {name: getattr(config, name) for name in names}
    if wrong := [name for name, value in values.items() if not value > 0]:
        raise ValueError("\n".join(f"{where}.{name}: must be above 0, not {values[name]}" for name in wrong))
    for name, value in values.items():
        at_most(f"{where}.{name}", value, LARGEST)


def at_most(where: str, value: float, limit: int) -> None:
    if value > limit:
        raise ValueError(f"{where}: must be {limit} at most, not {value}")
