"""Search for hyper-parameters: Optuna's TPE over runs of train.py, each in a folder of its own.

The study is a SQLite file beside them. Source of the search space: Adhikari et al., "TuneVLSeg" (ACCV 2024),
Table 2, for the prompt learners; other methods in its manner.
"""

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from vlsm.methods.registry import (
    METHODS,
    PromptLearner,
    check_model,
    complete_options,
    default_options,
    make_tuner,
    split_methods,
)
from vlsm.model import network_class, read_config
from vlsm.system import plots
from vlsm.system.console import say
from vlsm.system.files import atomic_write, read_json, write_csv
from vlsm.training.job import Diverged
from vlsm.training.run_folder import delete_run, make_folder

RATES = {"lr": dict(low=1e-5, high=5e-3, log=True), "weight_decay": dict(low=1e-5, high=1e-2, log=True)}
MAX_DEPTH = 11
PROJECTIONS = {"intermediate_dim": [32, 64, 96, 128], "lora_proj": [False, True]}
SPACES = {
    "cocoop": PROJECTIONS,
    "maple": PROJECTIONS,
    "shared_separate": {"shared_dim": [32, 64]},
    "shared_attention": {
        "heads": [16, 20, 32],
        "dropout": dict(low=0.1, high=0.55),
        "feed_forward": [1280, 1420],
        "norm_first": [False, True],
    },
    "dense": {"dim": [16, 32, 64, 128]},
    "shallow": {"dim": [128, 256, 512]},
    "lora": {"dim": [4, 8, 16, 32]},
}
LISTS = dict(dims=int, intermediate_dim=int, lora_targets=str)  # options that may be lists: what these hold
# Options of the recipe that a space may name.
SEARCHABLE = (
    "lr", "weight_decay", "lr_factor", "lr_patience", "clip", "dice_weight", "bce_weight", "batch_size",
    "augment", "prompts", "seed",
)  # fmt: skip


def default_space(options):
    """Return what is searched for the chosen method.

    No option that was given, nothing that has no effect, nothing that the network cannot be. Raises
    ValueError for --peft none.
    """
    names = split_methods(options.peft)
    if options.peft == "none":
        raise ValueError("--peft none trains nothing, so there is nothing to search. Choose another method.")
    check_model(options.peft, network_class(options.model))
    _, _, config = read_config(options.model, options.weights)
    space = copy.deepcopy(RATES)
    learners = [METHODS[name] for name in names if issubclass(METHODS[name], PromptLearner)]
    if learners:
        depths = [config.max_prompt_depth(kind.encoders, options.reference) for kind in learners]
        space["prompt_depth"] = dict(low=1, high=min(MAX_DEPTH, *depths))
    for name in names:
        space.update(SPACES.get(name, {}))
    if "heads" in space:
        width = config.text.hidden_size + config.vision.hidden_size
        space["heads"] = [h for h in space["heads"] if width % h == 0]
    with torch.device("meta"):
        method_options = complete_options(options.peft, options.method_options, config)
        tuner = make_tuner(options.peft, config, options.reference, method_options)
    if learners and not any(tuner.uses_weight_decay(*item) for item in tuner.named_parameters()):
        del space["weight_decay"]
    return {name: entry for name, entry in space.items() if name not in options.given and entry != []}


def _is_choice(name, value):
    """Tell whether an option may have a value: a list of what `LISTS` says, or a single number or text."""
    if isinstance(value, list):
        return bool(value) and all(type(v) is LISTS.get(name) for v in value)
    return isinstance(value, (bool, int, float) if name in LISTS else (bool, int, float, str))


def _is_entry(name, entry):
    """Tell whether a value describes what to search of an option: a list of choices, or an interval."""
    if isinstance(entry, list):
        return bool(entry) and all(_is_choice(name, value) for value in entry)
    if not isinstance(entry, dict) or not set(entry) <= {"low", "high", "log"}:
        return False
    low, high = (entry.get(k) for k in ("low", "high"))
    for value in (low, high):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
    return low <= high and (low > 0 or not entry.get("log"))


def read_space(path, options):
    """Return the search space of a JSON file. Raises ValueError for what it cannot mean."""
    methods = split_methods(options.peft)
    known = {*SEARCHABLE, *(name for method in methods for name in default_options(method))}
    space = read_json(path)
    for name, entry in space.items():
        if name not in known:
            raise ValueError(
                f"'{path}': --peft {options.peft} has no '{name}' to search; known are "
                f"{', '.join(sorted(known))}."
            )
        if not _is_entry(name, entry):
            raise ValueError(
                f"'{path}': '{name}' should be a list of choices, or an interval such as "
                f'{{"low": 1e-5, "high": 1e-2, "log": true}} with low <= high (log: above 0); it is {entry}.'
            )
    if not space:
        raise ValueError(f"'{path}' names nothing to search.")
    return space


def _distribution(optuna, entry):
    kinds = optuna.distributions
    if isinstance(entry, list):  # Optuna has no choices that are lists
        return kinds.CategoricalDistribution([json.dumps(c) if isinstance(c, list) else c for c in entry])
    whole = all(isinstance(entry[k], int) for k in ("low", "high"))
    kind = kinds.IntDistribution if whole else kinds.FloatDistribution
    return kind(entry["low"], entry["high"], log=entry.get("log", False))


def open_study(optuna, out, new):
    """Return the study in a folder.

    Raises ValueError where the file is none, or is missing though not `new`.
    """
    file = out / "study.db"
    if not new and (not file.is_file() or not file.stat().st_size):
        raise ValueError(
            f"'{file}', which knows the trials of this sweep, is missing or empty. Start again with "
            "--overwrite, or another --out."
        )
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5)
    how = dict(study_name="sweep", direction="maximize", load_if_exists=True, pruner=pruner)
    try:
        study = optuna.create_study(storage=f"sqlite:///{file.absolute()}", **how)
        study.get_trials()
    except Exception as error:  # of SQLAlchemy, alembic or Optuna, by what is broken
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        raise ValueError(
            f"'{file}' is no study that Optuna can read ({reason}). The runs beside it are whole; start the "
            "search again with another --out."
        ) from error
    return study


def _choose_space(options):
    """Return the space of a new sweep, or of the one that goes on. Raises ValueError where there is none."""
    if not options.resume:
        space = read_space(options.sweep_space, options) if options.sweep_space else default_space(options)
        if not space:
            raise ValueError(
                "Every hyper-parameter of the search was given as an option, so nothing is left to search."
            )
        return space
    if options.sweep_space:
        raise ValueError(
            "A sweep that goes on keeps its search space; leave out --sweep-space, or use another --out."
        )
    space = read_json(Path(options.out) / "config.json").get("space")
    if not space:
        raise ValueError(
            f"'{options.out}' holds a single run, not a sweep. Leave out --sweep, or use another --out."
        )
    return space


def run_sweep(options, train):
    """Run so many trials as `options.sweep` says; one that was interrupted goes on first.

    train: train.py's.
    """
    try:
        import optuna
    except ImportError as error:
        raise ValueError("--sweep needs Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    space, out = _choose_space(options), Path(options.out)
    make_folder(options, dict(space=space))
    study = open_study(optuna, out, new=not options.resume)
    distributions = {name: _distribution(optuna, entry) for name, entry in space.items()}
    while True:
        trials = study.get_trials()
        interrupted = [t for t in trials if t.state == optuna.trial.TrialState.RUNNING]
        if interrupted:
            trial = optuna.trial.Trial(study, interrupted[0]._trial_id)
        elif len(trials) < options.sweep:
            # a sampler a trial: its draws depend on the trial's number, not on where the sweep was
            # interrupted
            seed, startup = 1000 * options.seed + len(trials), min(10, -(-options.sweep // 2))
            study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=startup)
            trial = study.ask(distributions)
        else:
            break
        run_trial(optuna, study, trial, options, train)
    report(
        study, out, [name for name, entry in space.items() if isinstance(entry, dict) and entry.get("log")]
    )


def run_trial(optuna, study, trial, options, train):
    """Train with a trial's parameters in a folder of its own, to its end or to where the median prunes it."""
    folder = Path(options.out) / f"trial-{trial.number:03d}"
    own = replace(options, out=str(folder), sweep=None, sweep_folder=options.out, overwrite=False)
    parameters = {
        name: json.loads(value) if name in LISTS and isinstance(value, str) else value
        for name, value in trial.params.items()
    }
    own = replace(own.updated(**parameters), resume=(folder / "config.json").is_file())
    if not own.resume and folder.exists():  # killed before its first file was whole
        delete_run(folder)
    said = ", ".join(f"{name} {_short(value)}" for name, value in parameters.items())
    say(f"\ntrial {trial.number + 1} of {options.sweep}: {said}")
    reported = max(study.trials[trial.number].intermediate_values, default=0)  # epochs before an interruption

    def score(history):  # the published sweep goes by the last validation loss
        return -history[-1]["val_loss"] if options.reference else max(row["val_dsc"] for row in history)

    def report_epochs(job):
        nonlocal reported
        for epoch in range(reported + 1, len(job.history) + 1):
            trial.report(score(job.history[:epoch]), epoch)
        reported = len(job.history)
        trial.set_user_attr("val_dsc", job.best)
        trial.set_user_attr("epochs", reported)

    def after_epoch(job):
        report_epochs(job)
        if trial.should_prune():
            raise optuna.TrialPruned

    states = optuna.trial.TrialState
    try:
        job = train(own, after_epoch)
        report_epochs(job)  # of a run that was interrupted behind its last epoch
        study.tell(trial, score(job.history))
    except optuna.TrialPruned:
        say("pruned: below the median of the trials before it")
        study.tell(trial, state=states.PRUNED)
    except (Diverged, torch.OutOfMemoryError) as error:
        say(f"failed: {error}")
        study.tell(trial, state=states.FAIL)
    except ValueError:
        study.tell(trial, state=states.FAIL)
        raise


def _short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(study, out, log):
    """Print a table, write sweep.csv and sweep.png: validation DSC against each hyper-parameter.

    log: names with a logarithmic axis. Raises ValueError where no trial finished an epoch.
    """
    scored = [t for t in study.get_trials() if "val_dsc" in t.user_attrs]
    trials = sorted(scored, key=lambda t: -t.user_attrs["val_dsc"])
    if not trials:
        raise ValueError("No trial finished an epoch; what each of them said stands above.")
    names = list(dict.fromkeys(name for t in trials for name in t.params))
    table = [["trial", "state", "val_dsc", "epochs", *names]]
    for t in trials:
        dsc, epochs = f"{100 * t.user_attrs['val_dsc']:.2f}", str(t.user_attrs["epochs"])
        table.append(
            [f"{t.number:03d}", t.state.name.lower(), dsc, epochs, *(_short(t.params[n]) for n in names)]
        )
    write_csv(out / "sweep.csv", table, atomic_write)
    widths = [max(map(len, column)) for column in zip(*table)]
    say("\n" + "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in table))
    complete = any(t.state.name == "COMPLETE" for t in trials)
    best = study.best_trial if complete else trials[0]
    columns = {name: [t.params[name] for t in trials] for name in names}
    faint = {i for i, t in enumerate(trials) if t.state.name != "COMPLETE"}
    values = [100 * t.user_attrs["val_dsc"] for t in trials]
    with atomic_write(out / "sweep.png") as temporary:
        plots.scatter(columns, values, trials.index(best), faint, "validation DSC in %", temporary, log)
    best_folder = out / f"trial-{best.number:03d}"
    say(f"Wrote {out / 'sweep.csv'} and sweep.png. The best: python evaluate.py --ckpt {best_folder}")
