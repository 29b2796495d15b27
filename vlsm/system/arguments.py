"""Command lines: a parser whose mistakes are one sentence, numbers with a range, options of every program."""

import argparse
import math


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and keeps the lines of its epilog.

    Mistakes on the command line raise ValueError.
    """

    def __init__(self, description, epilog=None, **settings):
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def parse_args(self, argv=None, namespace=None):
        """Do as argparse; an empty text is a mistake, such as an unset variable of the shell."""
        parsed = super().parse_args(argv, namespace)
        for name, value in vars(parsed).items():
            if isinstance(value, str) and not value.strip():
                self.error(f"--{name.replace('_', '-')} is empty.")
        return parsed

    def error(self, message):
        """Raise ValueError, for `friendly_errors` to print as a sentence."""
        raise ValueError(message.removeprefix("argument "))


def number(cast, low=-math.inf, high=math.inf, above=-math.inf):
    """Return a `type=` for numbers from `low`, or above `above`, to `high`.

    cast: int or float.
    """

    def parse(text):
        value = cast(text)  # a ValueError names the text and `parse.__name__`
        if not math.isfinite(value) or not low <= value <= high or value <= above:
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {limits}")
        return value

    parse.__name__ = cast.__name__
    limits = _describe_limits(low, high, above)
    return parse


def _describe_limits(low, high, above):
    """Return the range of a `number` in words."""
    if above > -math.inf:
        return f"more than {above:.10g}" + (f" and at most {high:.10g}" if high < math.inf else "")
    if low > -math.inf:
        return f"{low:.10g} to {high:.10g}" if high < math.inf else f"{low:.10g} or more"
    return "a finite number"


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
        help="torch.compile the transformer layers (auto, the default: on a GPU); the first step takes up to "
        "a minute",
    )
