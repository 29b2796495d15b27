"""Options declared once: a dataclass field holds the name, the type, the default and the help of a command's
option.
"""

import argparse
from dataclasses import field, fields


def option(default, help, **argparse_options):
    """Declare a dataclass field that is an option; `argparse_options` (type, nargs, ...) go to
    `add_argument`.
    """
    return field(default=default, metadata=dict(help=help, **argparse_options))


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
        how = dict(f.metadata)
        if isinstance(f.default, bool):
            how.setdefault("action", "store_true")
        elif f.default is not None:
            how.setdefault("type", type(f.default))
        group.add_argument(f"--{f.name.replace('_', '-')}", **how)


def select_fields(kind, values):
    """Return those of the `values` (a dictionary) that are fields of the dataclass `kind` and not None."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in values.items() if name in names and value is not None}
