"""Search hyper-parameters by Optuna's TPE: a run of train.py for each trial, in a folder of its own.

The study is a SQLite file beside the trials. Source of the search space: Adhikari et al., "TuneVLSeg" (ACCV
2024), Table 2, for the prompt learners; the other methods are searched alike.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch

import train
from vlsm.methods.search_space import search_space
from vlsm.model import read_config
from vlsm.system.arguments import Parser, number
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import atomic_write, field, is_filled, locked, read_json, write_csv, write_json
from vlsm.training.arguments import default_folder, method_options, parse_arguments, train_parser, typed
from vlsm.training.gradients import Diverged
from vlsm.training.run import delete_run

EXAMPLES = """examples:
  python -m vlsm.tools.sweep --trials 20 -- --dataset kvasir --peft coop
  python -m vlsm.tools.sweep --trials 40 --out runs/kvasir-coop-sweep --resume
  python -m vlsm.tools.sweep --trials 9 --space space.json -- --dataset demo --peft dense
what follows -- goes to train.py; an option given there is not searched. A space is a JSON file such as
  {"lr": {"low": 1e-5, "high": 5e-3, "log": true}, "dim": [16, 64], "dims": [[8, 16, 32], [32, 16, 8]]}"""


def typed_names(argv):
    """Return the names of the options that stand in a command line of train.py."""
    parser = train_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def distribution(optuna, entry):
    """Return Optuna's distribution of an entry of a space, which checks it: choices, or an interval."""
    if isinstance(entry, list):  # Optuna has no choices that are lists
        choices = [json.dumps(choice) if isinstance(choice, list) else choice for choice in entry]
        return optuna.distributions.CategoricalDistribution(choices)
    entry = dict(entry)
    low, high, log = entry.pop("low"), entry.pop("high"), entry.pop("log", False)
    if entry:
        raise ValueError(f"unknown keys {', '.join(entry)}")
    if isinstance(low, int) and isinstance(high, int):
        return optuna.distributions.IntDistribution(low, high, log=log)
    return optuna.distributions.FloatDistribution(low, high, log=log)


def make_distributions(optuna, space, source):
    """Return {name: distribution} of a space. Raises ValueError for entries without a meaning."""
    known = {action.dest for action in train_parser()._actions}
    distributions = {}
    for name, entry in space.items():
        if name not in known:
            raise ValueError(f"{source}: '{name}' is no option of train.py.")
        try:
            distributions[name] = distribution(optuna, entry)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{source}: '{name}' should be a list of choices, or an interval such as "
                f'{{"low": 1e-5, "high": 1e-2, "log": true}}; it is {entry} ({error}).'
            ) from None
    if not distributions:
        raise ValueError(
            f"{source}: nothing is left to search; every hyper-parameter was given as an option."
        )
    return distributions


def open_study(optuna, file, new):
    """Return the study in a file. Raises ValueError if it is missing though not `new`, or is no study."""
    if not new and (not file.is_file() or not file.stat().st_size):
        raise ValueError(
            f"'{file}', which knows the trials of this sweep, is missing or empty. Start again with another "
            "--out."
        )
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{file.absolute()}", study_name="sweep", direction="maximize",
            load_if_exists=True, pruner=pruner,
        )  # fmt: skip
        study.get_trials()
    except Exception as error:  # of SQLAlchemy, alembic or Optuna
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        raise ValueError(
            f"'{file}' is no study that Optuna can read ({reason}). The runs beside it are whole; start the "
            "search again with another --out."
        ) from error
    return study


def trial_arguments(argv, parameters, folder):
    """Return the command line of a trial: the common options, its parameters and its folder."""
    actions = {action.dest: action for action in train_parser()._actions}
    words = [*argv, f"--out={folder}"]
    for name, value in parameters.items():
        if isinstance(value, str) and value.startswith("["):
            value = json.loads(value)
        words += typed(actions[name], value)
    return words


def run_trial(optuna, study, trial, argv, folder, by_loss):
    """Train with a trial's parameters, to its end or to where the median prunes it.

    by_loss: score a run by its last validation loss, as the published sweep does, not by its best DSC.
    """
    words = trial_arguments(argv, trial.params, folder)
    if (folder / "config.json").is_file():
        words.append("--resume")
    elif is_filled(folder):  # killed before its first file was whole
        delete_run(folder)
    reported = max(study.trials[trial.number].intermediate_values, default=0)  # epochs before a stop

    def score(history):
        return -history[-1]["val_loss"] if by_loss else max(row["val_dsc"] for row in history)

    def report_epochs(run):
        nonlocal reported
        for epoch in range(reported + 1, len(run.history) + 1):
            trial.report(score(run.history[:epoch]), epoch)
        reported = len(run.history)
        trial.set_user_attr("val_dsc", run.best)
        trial.set_user_attr("epochs", reported)

    def after_epoch(run):
        report_epochs(run)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        run = train.main(words, after_epoch)
        report_epochs(run)  # of a run that was stopped behind its last epoch
        study.tell(trial, score(run.history))
    except optuna.TrialPruned:
        say("pruned: below the median of the trials before it")
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except (Diverged, torch.OutOfMemoryError) as error:
        say(f"failed: {error}")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    except ValueError:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise


def search(optuna, study, distributions, argv, out, count, seed, by_loss):
    """Run trials until there are `count`; one that was interrupted goes on first."""
    while True:
        trials = study.get_trials()
        interrupted = [t for t in trials if t.state == optuna.trial.TrialState.RUNNING]
        if interrupted:
            trial = optuna.trial.Trial(study, interrupted[0]._trial_id)
        elif len(trials) < count:
            # a sampler for each trial: its draws depend on the trial's number, not on earlier stops
            startup = min(10, -(-count // 2))
            seed = 1000 * values["seed"] + len(trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=startup)
            trial = study.ask(distributions)
        else:
            return
        parameters = ", ".join(f"{name} {short(value)}" for name, value in trial.params.items())
        say(f"\ntrial {trial.number + 1} of {count}: {parameters}")
        run_trial(optuna, study, trial, argv, out / f"trial-{trial.number:03d}", by_loss)


def short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(study, out):
    """Print a table of the trials, best first, and write it to sweep.csv.

    Raises ValueError if no trial finished an epoch.
    """
    trials = [trial for trial in study.get_trials() if "val_dsc" in trial.user_attrs]
    if not trials:
        raise ValueError("No trial finished an epoch; the lines above say why.")
    trials.sort(key=lambda trial: -trial.user_attrs["val_dsc"])
    names = list(trials[0].params)
    table = [["trial", "state", "val_dsc", "epochs", *names]]
    for trial in trials:
        row = [f"{trial.number:03d}", trial.state.name.lower(), f"{100 * trial.user_attrs['val_dsc']:.2f}"]
        row.append(str(trial.user_attrs["epochs"]))
        row += [short(trial.params[name]) for name in names]
        table.append(row)
    write_csv(out / "sweep.csv", table, atomic_write)
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    complete = any(trial.state.name == "COMPLETE" for trial in trials)
    best = study.best_trial.number if complete else trials[0].number
    say(f"Wrote {out / 'sweep.csv'}. The best: python evaluate.py --ckpt {out / f'trial-{best:03d}'}")


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], EXAMPLES, prog="python -m vlsm.tools.sweep")
    parser.add_argument(
        "--trials", type=number(int, 1), help="runs in all (with --resume: default as before)"
    )
    parser.add_argument("--space", metavar="FILE.json", help="search space (default: the paper's Table 2)")
    parser.add_argument("--out", help="folder of the sweep (default: runs/<dataset>-<method>-...-sweep)")
    parser.add_argument("--resume", action="store_true", help="continue the sweep in --out")
    parser.add_argument("train", nargs="*", metavar="-- OPTIONS", help="options of train.py")
    args = parser.parse_args(argv)
    try:
        import optuna
    except ImportError as error:
        raise ValueError("A sweep needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if args.resume and not args.out:
        raise ValueError("--resume needs the folder of the sweep: --out FOLDER.")
    if args.resume:
        file = Path(args.out, "config.json")
        config = read_json(file) if file.is_file() else {}
        words = field(file, config, "arguments", kind=list, words="the arguments of a sweep")
        space = field(file, config, "space", kind=dict, words="the space of a sweep")
        trials = args.trials or field(file, config, "trials", kind=int)
    else:
        words = args.train
        trials = args.trials or 20
    values = vars(parse_arguments(words))
    if args.space:
        space = read_json(args.space)
    elif not args.resume:
        _, _, config = read_config(values["model"], values["weights"])
        space = search_space(values["peft"], config, values["reference"], method_options(values))
        for name in typed_names(words):
            space.pop(name, None)
    out = Path(
        args.out
        or default_folder(
            values["dataset"], values["model"], values["peft"], values["branches"], values["dim"],
            values["prompt_depth"], "sweep",
        )
    )  # fmt: skip
    distributions = make_distributions(optuna, space, args.space or "the search space")
    if not args.resume and is_filled(out):
        raise FileExistsError(f"'{out}' exists and is not empty. Use --resume, or another --out.")
    with locked(out, "is writing a sweep into"):
        write_json(out / "config.json", dict(arguments=words, space=space, trials=trials), atomic_write)
        study = open_study(optuna, out / "study.db", new=not args.resume)
        try:
            search(optuna, study, distributions, words, out, trials, values["seed"], values["reference"])
        except SystemExit:  # Ctrl-C in a trial
            say(f"Continue the sweep with: python -m vlsm.tools.sweep --out {out} --resume")
            raise
        report(study, out)


if __name__ == "__main__":
    with friendly_errors():
        main()
