"""Options declared once: a dataclass field holds the name, the type, the default and the help of a command's
option.
"""

import argparse
import math
from dataclasses import field, fields
from typing import NamedTuple, get_args


class Limits(NamedTuple):
    """What a number may be: at least `low`, more than `above`, at most `high`."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def admit(self, value):
        """Tell whether a number is finite and within the limits."""
        above_low = self.low is None or value >= self.low
        below_high = self.high is None or value <= self.high
        return (
            math.isfinite(value) and above_low and below_high and (self.above is None or value > self.above)
        )

    def __str__(self):
        if self.above is not None:
            return f"more than {self.above:g}" + ("" if self.high is None else f" and at most {self.high:g}")
        if self.low is not None:
            return f"{self.low:g} or more" if self.high is None else f"{self.low:g} to {self.high:g}"
        return "a finite number"


def option(default, help, limits=None, **argparse_options):
    """Declare a dataclass field that is an option; `argparse_options` (type, nargs, ...) go to
    `add_argument`. limits: the `Limits` of its number, or of each of its numbers.
    """
    return field(default=default, metadata=dict(help=help, limits=limits or Limits(), **argparse_options))


def check_fields(options):
    """Raise ValueError, which names the option, for values of another type or beyond their limits."""
    for f in fields(options):
        value, flag = getattr(options, f.name), f"--{f.name.replace('_', '-')}"
        if not f.metadata or value is None:
            continue
        kinds = get_args(f.type) or (f.type,)
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):  # True is an int, too
            raise ValueError(f"{flag} {value!r}: this should be {getattr(f.type, '__name__', f.type)}.")
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{flag} {value}: choose one of {', '.join(choices)}.")
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, (int, float)) and not f.metadata["limits"].admit(number):
                raise ValueError(f"{flag} {number}: give {f.metadata['limits']}.")


def option_parser(description):
    """Return an argparse parser that returns what was given on the command line and no defaults."""
    return argparse.ArgumentParser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )


def add_options(parser, kind, title):
    """Add the options that a dataclass `kind` itself declares, without its base classes', as a group.

    A field is `--name-with-dashes`, of its default's type (a bool is a switch) unless `type` or `action` is
    declared.
    """
    group = parser.add_argument_group(title)
    for f in fields(kind):
        if f.name not in kind.__annotations__ or not f.metadata:
            continue
        how = {name: value for name, value in f.metadata.items() if name != "limits"}
        if isinstance(f.default, bool):
            how.setdefault("action", "store_true")
        elif f.default is not None:
            how.setdefault("type", type(f.default))
        group.add_argument(f"--{f.name.replace('_', '-')}", **how)


def select_fields(kind, values):
    """Return those of the `values` (a dictionary) that are fields of the dataclass `kind` and not None."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in values.items() if name in names and value is not None}
