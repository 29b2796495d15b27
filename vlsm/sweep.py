"""Search for hyper-parameters: Optuna's TPE over runs of train.py, each in a folder of its own; the study is a SQLite file beside them.

Source of the search space: Adhikari et al., "TuneVLSeg" (ACCV 2024), Table 2, for the prompt learners; other methods in its manner.
"""

import copy
import math
import shutil
import warnings
from pathlib import Path

import torch

from . import pictures
from .checkpoint import replacing, write_csv
from .folder import make_folder
from .job import Diverged
from .learners import Learner
from .methods import METHODS, check_model, given, make_tuner, method_options, parts_of, takes
from .model import network, read_config
from .weights import read_json

RATES = {"lr": dict(low=1e-5, high=5e-3, log=True), "weight_decay": dict(low=1e-5, high=1e-2, log=True)}
DEEPEST = 11
PROJECTIONS = {"intermediate_dim": [32, 64, 96, 128], "lora_proj": [False, True]}
SPACES = {
    "cocoop": PROJECTIONS,
    "maple": PROJECTIONS,
    "shared_separate": {"shared_dim": [32, 64]},
    "shared_attention": {
        "heads": [16, 20, 32], "dropout": dict(low=0.1, high=0.55), "feed_forward": [1280, 1420], "norm_first": [False, True],
    },
    "dense": {"dim": [16, 32, 64, 128]},
    "shallow": {"dim": [128, 256, 512]},
    "lora": {"dim": [4, 8, 16, 32]},
}  # fmt: skip
RECIPE = ("lr", "weight_decay", "lr_factor", "lr_patience", "clip", "dice_weight", "bce_weight", "batch_size", "augment", "prompts", "seed")


def default_space(args):
    """What is searched for the chosen method: no option that was given, nothing that has no effect, nothing that the network cannot be."""
    names = parts_of(args.peft)
    if args.peft == "none":
        raise ValueError("--peft none trains nothing, so there is nothing to search. Choose another method.")
    check_model(args.peft, network(args.model))
    _, _, config = read_config(args.model, args.weights)
    space = copy.deepcopy(RATES)
    learners = [METHODS[name] for name in names if issubclass(METHODS[name], Learner)]
    if learners:
        space["prompt_depth"] = dict(low=1, high=min(DEEPEST, *(config.deepest(kind.places, args.reference) for kind in learners)))
    for name in names:
        space.update(SPACES.get(name, {}))
    if "heads" in space:
        space["heads"] = [h for h in space["heads"] if (config.text.hidden_size + config.vision.hidden_size) % h == 0]
    with torch.device("meta"):
        tuner = make_tuner(args.peft, config, args.reference, method_options(args.peft, given(args)))
    if learners and not any(tuner.decays(*item) for item in tuner.named_parameters()):
        del space["weight_decay"]
    return {name: entry for name, entry in space.items() if name not in args.given and entry != []}


def read_space(path, args):
    """The search space of a JSON file. Raises ValueError for what it cannot mean."""
    known = {*RECIPE, *(option for name in parts_of(args.peft) for option in takes(name))}
    space = read_json(path)
    for name, entry in space.items():
        if name not in known:
            raise ValueError(f"'{path}': --peft {args.peft} has no '{name}' to search; known are {', '.join(sorted(known))}.")
        if isinstance(entry, list):
            fine = entry and all(isinstance(v, (bool, int, float, str)) for v in entry)
        else:
            numbers = (
                [entry.get(k) for k in ("low", "high")] if isinstance(entry, dict) and set(entry) <= {"low", "high", "log"} else [None]
            )
            fine = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in numbers)
            fine = fine and numbers[0] <= numbers[1] and (numbers[0] > 0 or not entry.get("log"))
        if not fine:
            raise ValueError(
                f"'{path}': '{name}' should be a list of choices, or an interval such as "
                f'{{"low": 1e-5, "high": 1e-2, "log": true}} with low <= high (log: above 0); it is {entry}.'
            )
    if not space:
        raise ValueError(f"'{path}' names nothing to search.")
    return space


def distribution(optuna, entry):
    kinds = optuna.distributions
    if isinstance(entry, list):
        return kinds.CategoricalDistribution(entry)
    whole = all(isinstance(entry[k], int) for k in ("low", "high"))
    return (kinds.IntDistribution if whole else kinds.FloatDistribution)(entry["low"], entry["high"], log=entry.get("log", False))


def open_study(optuna, out, new):
    """The study in a folder. Raises ValueError where the file is none, or is missing."""
    file = out / "study.db"
    if not new and (not file.is_file() or not file.stat().st_size):
        raise ValueError(
            f"'{file}', which knows the trials of this sweep, is missing or empty. Start again with --overwrite, or another --out."
        )
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{file.absolute()}", study_name="sweep", direction="maximize", load_if_exists=True, pruner=pruner
        )
        study.get_trials()
    except Exception as error:  # of SQLAlchemy, alembic or Optuna, by what is broken
        raise ValueError(
            f"'{file}' is no study that Optuna can read ({type(error).__name__}: {str(error).splitlines()[0][:150]}). "
            "The runs beside it are whole; start the search again with another --out."
        ) from error
    return study


def run(args, train):
    """--sweep: so many trials; one that was interrupted goes on first. `train` is train.py's."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError("--sweep needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    out = Path(args.out)
    if args.resume and args.sweep_space:
        raise ValueError("A sweep that goes on keeps its search space; leave out --sweep-space, or use another --out.")
    if args.resume:
        space = read_json(out / "config.json").get("space")
        if not space:
            raise ValueError(f"'{out}' holds a single run, not a sweep. Leave out --sweep, or use another --out.")
    else:
        space = read_space(args.sweep_space, args) if args.sweep_space else default_space(args)
        if not space:
            raise ValueError("Every hyper-parameter of the search was given as an option, so nothing is left to search.")
    make_folder(args, dict(space=space))
    study = open_study(optuna, out, new=not args.resume)
    distributions = {name: distribution(optuna, entry) for name, entry in space.items()}
    while True:
        trials = study.get_trials()
        waiting = [t for t in trials if t.state == optuna.trial.TrialState.RUNNING]  # left by an interruption
        if waiting:
            trial = optuna.trial.Trial(study, waiting[0]._trial_id)
        elif len(trials) < args.sweep:
            # a sampler a trial: its draws depend on the trial's number, not on where the sweep was interrupted
            study.sampler = optuna.samplers.TPESampler(
                seed=1000 * args.seed + len(trials), multivariate=True, n_startup_trials=min(10, -(-args.sweep // 2))
            )
            trial = study.ask(distributions)
        else:
            break
        one_trial(optuna, study, trial, args, train)
    report(study, out, [name for name, entry in space.items() if isinstance(entry, dict) and entry.get("log")])


def one_trial(optuna, study, trial, args, train):
    """Train with a trial's parameters in a folder of its own, to its end or to where the median of the others prunes it."""
    folder = Path(args.out) / f"trial-{trial.number:03d}"
    own = copy.copy(args)
    vars(own).update(trial.params, out=str(folder), sweep=None, sweep_folder=args.out, overwrite=False)
    own.resume = (folder / "config.json").is_file()
    if not own.resume and folder.exists():  # killed before its first file was whole
        shutil.rmtree(folder)
    print(f"\ntrial {trial.number + 1} of {args.sweep}: {', '.join(f'{k} {_short(v)}' for k, v in trial.params.items())}", flush=True)
    told = max(study.trials[trial.number].intermediate_values, default=0)  # epochs before an interruption

    def score(history):  # the published sweep goes by the last validation loss
        return -history[-1]["val_loss"] if args.reference else max(row["val_dsc"] for row in history)

    def note(job):
        nonlocal told
        for epoch in range(told + 1, len(job.history) + 1):
            trial.report(score(job.history[:epoch]), epoch)
        told = len(job.history)
        trial.set_user_attr("val_dsc", job.best)
        trial.set_user_attr("epochs", told)

    def after_epoch(job):
        note(job)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        job = train(own, after_epoch)
        note(job)  # of a run that was interrupted behind its last epoch
        study.tell(trial, score(job.history))
    except optuna.TrialPruned:
        print("pruned: below the median of the trials before it")
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except (Diverged, torch.OutOfMemoryError) as error:
        print(f"failed: {error}")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    except ValueError:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise


def _short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(study, out, log):
    """A table, sweep.csv and sweep.png: validation DSC against each hyper-parameter."""
    trials = sorted((t for t in study.get_trials() if "val_dsc" in t.user_attrs), key=lambda t: -t.user_attrs["val_dsc"])
    if not trials:
        raise ValueError("No trial finished an epoch; what each of them said stands above.")
    names = list(dict.fromkeys(name for t in trials for name in t.params))
    table = [["trial", "state", "val_dsc", "epochs", *names]]
    for t in trials:
        dsc = f"{100 * t.user_attrs['val_dsc']:.2f}"
        table.append([f"{t.number:03d}", t.state.name.lower(), dsc, str(t.user_attrs["epochs"]), *(_short(t.params[n]) for n in names)])
    write_csv(out / "sweep.csv", table)
    widths = [max(map(len, column)) for column in zip(*table)]
    print("\n" + "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in table))
    best = study.best_trial if any(t.state.name == "COMPLETE" for t in trials) else trials[0]
    heights = [100 * t.user_attrs["val_dsc"] for t in trials]
    with replacing(out / "sweep.png") as temporary:
        columns = {n: [t.params[n] for t in trials] for n in names}
        faint = {i for i, t in enumerate(trials) if t.state.name != "COMPLETE"}
        pictures.scatter(columns, heights, trials.index(best), faint, "validation DSC in %", temporary, log)
    print(f"Wrote {out / 'sweep.csv'} and sweep.png. The best: python evaluate.py --ckpt {out / f'trial-{best.number:03d}'}")
