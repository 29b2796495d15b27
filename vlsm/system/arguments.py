"""Command lines: a parser whose mistakes are one sentence, numbers with a range, options of every program."""

import argparse
import math
import re
from importlib.metadata import version

from vlsm.system.console import did_you_mean
from vlsm.system.files import forget_inputs

VERSION = "1.0.0"


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and keeps the lines of its epilog.

    rules: which options have an effect only "with" another, or "without" it; rows of (their names, with or
    without, the other, a reason). Mistakes on the command line raise ValueError.
    """

    def __init__(self, description, epilog=None, rules=(), **settings):
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )
        self.rules = rules
        self.values = {}  # of the options that `StoreOnce` has seen
        self.register("action", None, StoreOnce)  # of options without an action of their own
        versions = f"vlsm {VERSION} (PyTorch {version('torch')})"
        self.add_argument("--version", action="version", version=versions, help="show the version, and exit")

    def parse_args(self, argv=None, namespace=None):
        """Do as argparse, at the beginning of a command.

        An empty text is a mistake, such as an unset variable of the shell.
        """
        self.values.clear()
        forget_inputs()
        parsed, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            guess = did_you_mean(word, self._option_string_actions)
            self.error(f"There is no option {word}.{guess} --help shows all.")
        for name, value in vars(parsed).items():
            if isinstance(value, str) and not value.strip():
                self.error(f"{flag(name)} is empty.")
        if namespace is None:  # else a stored run's options are among the parsed ones
            self.refuse_unused(parsed)
        return parsed

    def _check_value(self, action, value):
        """Do as argparse, with a guess for a value that is not among the choices."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += f".{did_you_mean(value, action.choices)}"
            raise

    def refuse_unused(self, parsed):
        """Raise ValueError for an option that has no effect beside the others."""
        given = {name for name, value in vars(parsed).items() if value != self.get_default(name)}
        for names, rule, other, reason in self.rules:
            for name in names.split():
                if name in given and (other in given) == (rule == "without"):
                    self.error(f"{flag(name)} has an effect only {rule} {flag(other)}{reason}.")

    def error(self, message):
        """Raise ValueError, for `friendly_errors` to print as a sentence."""
        raise ValueError(message.removeprefix("argument "))


class StoreOnce(argparse._StoreAction):
    """The action of an option that takes a value: another value for it is a mistake, and replaces nothing."""

    def __call__(self, parser, namespace, values, option_string=None):
        first = parser.values.setdefault(self.dest, values)
        if values != first:
            parser.error(f"{option_string} {first!r} and {values!r}: give one.")
        super().__call__(parser, namespace, values, option_string)


def flag(name):
    """Return an option's flag, such as --image-size of image_size."""
    return f"--{name.replace('_', '-')}"


def number(cast, low=-math.inf, high=math.inf, above=-math.inf):
    """Return a `type=` for numbers from `low`, or above `above`, to `high`.

    cast: int or float.
    """

    def parse(text):
        value = cast(text)  # a ValueError names the text and `parse.__name__`
        wrong = not low <= value <= high or value <= above  # nan is, too
        if wrong or not abs(value) < 2**63:  # torch's largest whole number; infinity is larger
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {limits}")
        return value

    parse.__name__ = cast.__name__
    limits = f"more than {above:.10g}" if above > -math.inf else f"at least {low:.10g}"
    if high < math.inf:
        limits += f" and at most {high:.10g}"
    return parse


def pattern(text):
    """Check a regular expression: a `type=` for argparse. Raises ArgumentTypeError if it is none."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression ({error})") from None
    return text


def add_split_rules(add):
    """Add the options of how a folder of one's own is read and split; add: a parser's `add_argument`."""
    add(
        "--group",
        type=pattern,
        metavar="REGEX",
        help="what this finds in an image's name stays in one split, such as the patient (default: the "
        "subfolder below images/, if there are five or more)",
    )
    add("--no-mask-is-empty", action="store_true", help="an image without a mask shows nothing of the class")
    add(
        "--split-seed",
        type=number(int, 0),
        default=0,
        help="seed of the 80/10/10 split of your own folder (default 0)",
    )


def add_machine_arguments(parser):
    """Add the options of a program that runs a network: --device, --amp, --kernels, --compile."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (default: cuda if available), cpu, cuda, cuda:1, ...")
    add(
        "--amp",
        default="auto",
        choices=["auto", "bf16", "fp16", "off"],
        help="autocast; auto (default): bf16 on a GPU that has it, else fp16; off on a CPU",
    )
    add(
        "--kernels",
        default="auto",
        choices=["auto", "triton", "torch"],
        help="fused Triton kernels (auto, the default: on a GPU) or plain torch",
    )
    add(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="torch.compile the transformer layers (auto, the default: only to train on a GPU); the first "
        "step takes up to a minute",
    )
