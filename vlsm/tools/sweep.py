"""Search hyper-parameters by Optuna's TPE: a run of train.py for each trial, in a folder of its own.

Several processes may share a sweep: each takes a trial that no other has claimed, a new one or one whose
process ended in the midst of it.
"""

import argparse
import os
import warnings
from pathlib import Path

import torch

import train
from vlsm.methods.search_space import search_space
from vlsm.model import network_class, read_config
from vlsm.system.arguments import Parser, number
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import atomic_write, is_filled, write_csv, write_json
from vlsm.system.schema import field, read_json
from vlsm.training.arguments import method_options, parse_arguments, train_parser
from vlsm.training.claims import claim, in_turn
from vlsm.training.run import Diverged, selection_score
from vlsm.training.space import IN_FOLDER, make_distributions, open_study, to_options

EXAMPLES = """examples:
  python -m vlsm.tools.sweep --out runs/coop-sweep --trials 20 -- --dataset kvasir --peft coop
  python -m vlsm.tools.sweep --out runs/coop-sweep --trials 40 --resume
  python -m vlsm.tools.sweep --out runs/dims --space space.json -- --dataset demo --peft dense
what follows -- goes to train.py; an option given there is not searched. A space is a JSON file such as
  {"lr": {"low": 1e-5, "high": 5e-3, "log": true}, "dim": [16, 64], "dims": [[8, 16, 32], [32, 16, 8]]}

several processes: start the same command with --resume once for each, such as one for each GPU:
  CUDA_VISIBLE_DEVICES=0 python -m vlsm.tools.sweep --out runs/coop-sweep --resume -- --dataset kvasir &
  CUDA_VISIBLE_DEVICES=1 python -m vlsm.tools.sweep --out runs/coop-sweep --resume -- --dataset kvasir &
They share --trials. A trial whose process was killed is continued by the next process that is free.
Machines that share the folder (NFS 4) do so, too, with --study journal or a database."""


def choose_space(values, words):
    """Return the search space of the method, without the options that train.py's command line gives.

    values: all options by name. words: the command line.
    """
    _, _, config = read_config(values["model"], values["weights"])
    network = network_class(values["model"])
    space = search_space(values["peft"], network, config, values["reference"], method_options(values))
    parser = train_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    for name in vars(parser.parse_args(words)):
        space.pop(name, None)
    return space


def stored_sweep(file, given):
    """Return (words for train.py, space) of the sweep in a config.json.

    Raises ValueError for another file, and if other words than its own are given.
    """
    config = read_json(file)
    words = field(file, config, "arguments", kind=[str], words="the arguments of a sweep")
    space = field(file, config, "space", kind=dict, words="the space of a sweep")
    if given not in ([], words):
        raise ValueError(
            f"'{file.parent}' was begun with other options of train.py. Leave out those after --, or name "
            "another --out."
        )
    return words, space


def next_trial(optuna, study, distributions, count, seed, out):
    """Return a trial that this process has claimed: an interrupted one, else a new one.

    Returns None after `count` trials; other processes may still run some of them.
    """
    with in_turn(out):
        trials = study.get_trials()
        running = [trial for trial in trials if trial.state == optuna.trial.TrialState.RUNNING]
        interrupted = next((trial for trial in running if claim(trial_folder(out, trial))), None)
        if not interrupted and len(trials) >= count:
            return None
        # a sampler for each trial: its draws depend on the trial's number, not on processes or interruptions
        number = interrupted.number if interrupted else len(trials)
        study.sampler = optuna.samplers.TPESampler(
            seed=1000 * seed + number, multivariate=True, n_startup_trials=min(10, -(-count // 2)),
            constant_liar=True,
        )  # fmt: skip
        trial = optuna.trial.Trial(study, interrupted._trial_id) if interrupted else study.ask()
        for name, distribution in distributions.items():  # its process may have ended before it had all
            trial._suggest(name, distribution)
        if not claim(trial_folder(out, trial)):
            raise ValueError(f"Other processes run the sweep in '{out}' with another --study. Give the same.")
        return trial


def run_trial(optuna, study, trial, words, folder, by_loss):
    """Train with a trial's parameters, to its end or to where the median prunes it.

    words: train.py's command line for all trials. by_loss: score a run by its last validation loss, as the
    published sweep does, not by its best DSC.
    """
    words = [*words, f"--out={folder}", *to_options(trial.params)]
    if (folder / "config.json").is_file():
        words.append("--resume")

    def score(history):
        """Return the value of a run so far, which the study maximises."""
        return -history[-1]["val_loss"] if by_loss else max(map(selection_score, history))

    def report_epochs(run):
        """Report the epochs that the study lacks: also those between its last report and an interruption."""
        reported = study.trials[trial.number].intermediate_values  # by epoch
        for epoch in range(len(reported) + 1, len(run.history) + 1):
            trial.report(score(run.history[:epoch]), epoch)
        trial.set_user_attr("val_dsc", run.best)
        trial.set_user_attr("epochs", len(run.history))

    def after_epoch(run):
        report_epochs(run)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        run = train.main(words, after_epoch)
        report_epochs(run)
        study.tell(trial, score(run.history))
    except optuna.TrialPruned:
        say("pruned: below the median of the trials before it")
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except (ValueError, torch.OutOfMemoryError) as error:  # any other error ends the sweep, for --resume
        of_the_trial = isinstance(error, (Diverged, torch.OutOfMemoryError))
        # one of the data is one of all trials; what comes again after --resume is of this trial's values
        if not of_the_trial and "error" not in trial.user_attrs:
            trial.set_user_attr("error", str(error))
            raise
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        say(f"failed: {error}")


def trial_folder(out, trial):
    return out / f"trial-{trial.number:03d}"


def report(study, out):
    """Print a table of the trials, best first, and write it to sweep.csv, unless other processes still run.

    Raises ValueError if no trial finished an epoch.
    """
    trials = study.get_trials()
    if any(trial.state.name == "RUNNING" for trial in trials):
        return say("Other processes still run trials; the last one to end shows the table of all.")
    trials = [trial for trial in trials if "val_dsc" in trial.user_attrs]
    if not trials:
        raise ValueError("No trial finished an epoch; the lines above say why.")
    trials.sort(key=lambda trial: -trial.user_attrs["val_dsc"])
    table = [["trial", "state", "val_dsc", "epochs", *trials[0].params]]
    for trial in trials:
        dsc = f"{100 * trial.user_attrs['val_dsc']:.2f}"
        row = [f"{trial.number:03d}", trial.state.name.lower(), dsc, str(trial.user_attrs["epochs"])]
        table.append(row + [f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial.params.values()])
    write_csv(out / "sweep.csv", table, atomic_write)
    for row in table:
        say("  ".join(cell.rjust(12) for cell in row))
    best = study.best_trial if any(trial.state.name == "COMPLETE" for trial in trials) else trials[0]
    command = f"python evaluate.py --ckpt {trial_folder(out, best)}"
    say(f"Wrote {out / 'sweep.csv'}. Evaluate the best with:\n  {command}")


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], EXAMPLES, prog="python -m vlsm.tools.sweep")
    parser.add_argument("--out", required=True, type=Path, help="folder of the sweep")
    parser.add_argument("--trials", type=number(int, 1), default=20, help="runs in all (default 20)")
    parser.add_argument("--space", metavar="FILE.json", help="search space (default: the paper's Table 2)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the sweep in --out, or take part in it"
    )
    parser.add_argument(
        "--study",
        metavar="PLACE",
        help="where the trials' values are stored, the same for all processes: journal (a file in --out), or "
        "a database such as postgresql+psycopg2://user@host/name (pip install psycopg2-binary; default: a "
        "SQLite file in --out, for processes of one machine)",
    )
    parser.add_argument("train", nargs="*", metavar="-- OPTIONS", help="options of train.py")
    args = parser.parse_args(argv)
    try:
        import optuna
    except ImportError:
        raise ValueError("A sweep needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    file = args.out / "config.json"
    words = args.train
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("A sweep is no program for torchrun: start it once for each process, see --help.")
    is_new = not is_filled(args.out)
    resumed = args.resume and not (is_new and words)
    if resumed:
        words, space = stored_sweep(file, words)
    elif not is_new:
        raise FileExistsError(f"'{args.out}' exists and is not empty. Use --resume, or another --out.")
    values = vars(parse_arguments(words))
    if not resumed:
        space = read_json(args.space) if args.space else choose_space(values, words)
    distributions = make_distributions(optuna, space, args.space or file)
    config = dict(arguments=words, space=space)
    with in_turn(args.out):
        known = file.is_file()
        if args.study in IN_FOLDER:  # before the study, so that the folder is a sweep's
            write_json(file, config, atomic_write)
        study = open_study(optuna, args.out, args.study, known)
        if args.study not in IN_FOLDER:  # once the database is known to have no such sweep
            write_json(file, config, atomic_write)
    while trial := next_trial(optuna, study, distributions, args.trials, values["seed"], args.out):
        say(f"\ntrial {trial.number + 1} of {args.trials}: {trial.params}")
        try:
            run_trial(optuna, study, trial, words, trial_folder(args.out, trial), values["reference"])
        except SystemExit:  # interrupted
            more = " --study ..." if args.study else ""
            say(f"Continue the sweep with:\n  python -m vlsm.tools.sweep --out {args.out} --resume{more}")
            raise
    report(study, args.out)


if __name__ == "__main__":
    with friendly_errors():
        main()
