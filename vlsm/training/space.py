"""The search space of a sweep, each entry checked, as Optuna's distribution; the study with its trials."""

import argparse
import json

from vlsm.system.arguments import flag
from vlsm.system.files import atomic_write
from vlsm.system.schema import NUMBER, SWITCH, check_fields
from vlsm.training.arguments import checked, stored_options, train_parser

IN_FOLDER = (None, "journal")  # values of --study for a study beside the trials: SQLite, a journal


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


def to_options(values):
    """Return the words of train.py's command line for a trial's values, by name."""
    words = []
    for name, value in values.items():
        option = flag(name)
        if isinstance(value, bool):
            words.append(option if value else flag(f"no_{name}"))
        elif isinstance(value, str) and value.startswith("["):
            words += [option, *map(str, json.loads(value))]
        else:
            words.append(f"{option}={value}")
    return words


def open_study(optuna, out, place, known):
    """Return the study of the sweep in a folder, made if there are no trials yet.

    place: None for a SQLite file in the folder, "journal" for a journal there, or the URL of a database.
    known: the folder held a sweep before. Raises ValueError if the study cannot be read, lacks the folder's
    trials, or is another sweep's.
    """
    name = "sweep"
    try:
        if place is None:
            file = out / "study.db"
            if not file.is_file():  # its tables are made whole, or not at all
                with atomic_write(file) as temporary:
                    load_study(optuna, sqlite_url(temporary), name)
            storage = sqlite_url(file)
        elif place == "journal":
            file = out.absolute() / "study.log"  # absolute, as Optuna's lock is a link to it
            backend = optuna.storages.journal.JournalFileBackend(str(file))
            storage = optuna.storages.JournalStorage(backend)
        else:
            storage = place
            name = out.absolute().name
        study = load_study(optuna, storage, name)
        trials = study.get_trials()
    except Exception as error:  # of SQLAlchemy, alembic, Optuna or a database's driver
        if place not in IN_FOLDER:
            raise ValueError(
                f"The database of --study cannot be used ({type(error).__name__}). Does it run, and is its "
                "driver installed? (pip install psycopg2-binary for postgresql+psycopg2://...)"
            ) from error
        raise ValueError(
            f"Optuna cannot read the study of '{out}' ({type(error).__name__}). The runs in there are whole; "
            "start the search again with another --out."
        ) from error
    if not trials and any(out.glob("trial-*")):
        raise ValueError(
            f"The study of '{out}', which holds its trials, is missing or empty. Give the same --study as "
            "before, or start again with another --out."
        )
    if trials and not known:
        raise ValueError(f"The database of --study has a sweep '{name}' already. Give --out another name.")
    return study


def sqlite_url(file):
    """Return the URL of a SQLite file; a process waits up to a minute while another one writes."""
    return f"sqlite:///{file.absolute()}?timeout=60"


def load_study(optuna, storage, name):
    """Return the study of this name in Optuna's storage, made if it is not there."""
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5),
    )  # fmt: skip
