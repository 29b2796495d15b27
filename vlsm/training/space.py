"""The search space of a sweep: each entry checked, as Optuna's distribution."""

import argparse
import json

from vlsm.system.schema import NUMBER, SWITCH, check_fields
from vlsm.training.arguments import checked, stored_options, train_parser


def make_distributions(optuna, space, source):
    """Return {name: Optuna's distribution} of a space, each value checked like one on the command line.

    source: the file of the space, for messages. Raises ValueError for an entry without a meaning, and for a
    space without entries.
    """
    options = stored_options(train_parser())
    if not space:
        raise ValueError("Nothing is left to search: every hyper-parameter was given as an option.")
    distributions = {}
    for name, entry in space.items():
        try:
            if name not in options:
                raise ValueError("train.py has no such option to search")
            if isinstance(entry, list):  # Optuna has no choices that are lists
                for choice in entry:
                    checked(options[name], choice)
                choices = [json.dumps(choice) if isinstance(choice, list) else choice for choice in entry]
                distributions[name] = optuna.distributions.CategoricalDistribution(choices)
                continue
            for end in ("low", "high"):
                if not isinstance(checked(options[name], entry[end]), (int, float)):
                    raise ValueError("its values are no numbers")
            check_fields(source, entry, {"log?": SWITCH, "step?": NUMBER})
            whole = isinstance(entry["low"], int) and isinstance(entry["high"], int)
            kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
            distributions[name] = kind(**entry)
        except (ValueError, TypeError, KeyError, OverflowError, argparse.ArgumentTypeError) as error:
            raise ValueError(
                f"'{source}': the search space's '{name}' should be a list of choices, or an interval such "
                f'as {{"low": 1e-5, "high": 1e-2, "log": true}}; it is {entry!r:.200} ({error}).'
            ) from None
    return distributions
