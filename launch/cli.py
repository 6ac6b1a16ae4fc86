"""The `rere` command: train, keys, prepare, evaluate, recommend, compare, reward check, reward train-sasrec."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from catalog.atomic import REFUSALS

if TYPE_CHECKING:
    from launch.config import Config

COMMANDS = {
    "keys": "launch.keys",
    "prepare": "catalog.prepare",
    "evaluate": "launch.evaluate_run",
    "recommend": "launch.recommend",
    "compare": "launch.compare",
}
"""Those with a module of their own, which is imported only for them."""
OWN_PACKAGES = ("catalog", "rollout", "rewards", "learner", "launch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 1 for an error that the user can mend, 130 when interrupted,
    141 when nobody reads its output any more."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _open_standard_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    for number, plain in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == plain:  # else it is ignored, as of a job in the background or of nohup
            signal.signal(number, _interrupt)
    _quiet_libraries()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != signal.SIGTERM:  # as Ray answers it while it starts
            raise
        print("interrupted; everything that was started has been ended", *_notes(stop), sep="\n", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # such as `head`, which has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.stderr.writelines(f"{note}\n" for note in _notes(error))
            return 141
        if (message := _own_message(error)) is None:
            raise
        print(f"error: {message}", *_notes(error), sep="\n", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["reward"]:
        return _reward(arguments[1:])
    if module := COMMANDS.get(next(iter(arguments), "")):
        return int(import_module(module).main(arguments[1:]))
    parser, train = _parsers()
    options, more = parser.parse_known_args(arguments)
    if stray := [text for text in more if text.startswith("-") or "=" not in text]:
        train.error(f"unrecognized arguments: {' '.join(stray)}")
    for group in ("cluster", "data", "model", "algorithm", "name"):
        if vars(options)[group] == "":  # of a shell's variable that is not set, say
            train.error(f"--{group} is empty; name one, or leave the option out")
    options.overrides += more  # argparse takes overrides only before the last option or behind it
    config, resume = _composed(options)
    if _has_everything(config):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # so no library needs to ask
    if options.dry_run:
        from launch.dry_run import dry_run

        dry_run(config, resume=resume, overwrite=options.overwrite)
        return 0
    from launch.run import run

    run(config, resume=resume, overwrite=options.overwrite)
    return 0


def _composed(options: argparse.Namespace) -> tuple["Config", bool]:
    """The configuration that the options of `rere train` mean, and whether it is that of a run to be continued."""
    from launch.compose import compose, place, unheeded
    from launch.config import check

    groups = options.cluster, options.data, options.model, options.algorithm
    overrides = [text for text in options.overrides if text != "--"]
    if options.steps is not None:
        overrides.append(f"train.steps={options.steps}")
    runs, name = place(*groups, overrides)
    name = options.name or name  # no override: YAML would read a number in 007
    started = Path(runs) / name / "config.yaml"
    goes_on = options.resume is not None and started.is_file()
    if goes_on:
        for note in unheeded(*groups, overrides, started):
            print(note, file=sys.stderr)
    config = compose(*groups, overrides, started if goes_on else None)
    config = replace(config, name=name, runs=runs)  # a copied run holds the name of another
    check(config)
    return config, goes_on or options.resume == "yes"


def _has_everything(config: "Config") -> bool:
    """Whether a run fetches nothing from the Hugging Face hub; what a reward of one's own does is not known."""
    from rewards.registry import BUILT_IN

    rewards = {term.name for term in config.rewards}
    return (config.model.path is None or os.path.isdir(config.model.path)) and rewards <= BUILT_IN.keys()


def _reward(arguments: list[str]) -> int:
    if arguments[:1] == ["check"]:
        from rewards.check import main as check

        return check(arguments[1:])
    if arguments[:1] == ["train-sasrec"]:
        from launch.sasrec import main as train_sasrec

        return train_sasrec(arguments[1:])
    asked = arguments[:1] in (["-h"], ["--help"])
    print(
        "usage: rere reward check SPEC | rere reward train-sasrec --data DATA",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else 2


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """That of `rere`, and that of `rere train`, the one command whose options it knows."""
    parser = argparse.ArgumentParser(prog="rere", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="fine-tune, train by RL and evaluate a recommender")
    commands.add_parser("keys", help="the keys of the configuration, their defaults and meanings")
    commands.add_parser("prepare", help="make a data folder of raw interactions")
    commands.add_parser("evaluate", help="ranking metrics of a checkpoint of a run")
    commands.add_parser("recommend", help="the titles that the policy of a run recommends after given ones")
    commands.add_parser("compare", help="finished runs side by side")
    commands.add_parser("reward", help="check a reward on sample groups, or train the collaborative one")
    train.add_argument("--cluster", help="one of configs/cluster, or a YAML (local)")
    train.add_argument("--data", help="one of configs/data, a YAML or a folder (embedded)")
    train.add_argument(
        "--model", help="one of configs/model, a YAML, a Hugging Face directory or organisation/name (small)"
    )
    train.add_argument("--algorithm", help="one of configs/algorithm, or a YAML (rere)")
    train.add_argument("--name", help="name of the run; its folder is runs/NAME")
    train.add_argument("--steps", type=int, help="RL steps")
    train.add_argument("--dry-run", action="store_true", help="print placement, batch arithmetic and configuration")
    resume = train.add_mutually_exclusive_group()
    resume.add_argument(
        "--resume", action="store_const", const="yes", help="continue the run of this name, with its configuration"
    )
    resume.add_argument(
        "--auto-resume",
        action="store_const",
        const="auto",
        dest="resume",
        help="the same where there is a run of this name, else start it",
    )
    train.add_argument("--overwrite", action="store_true", help="replace the run of this name")
    train.add_argument("overrides", nargs="*", help="section.key=value; `rere keys` lists them")
    return parser, train


def _own_message(error: BaseException) -> str | None:
    """The message of an error that this project raises on purpose, also when it comes out of an actor."""
    from ray.exceptions import RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, OSError) and cause.filename is not None and cause.errno in REFUSALS:
        return f"{os.fsdecode(cause.filename)}: {cause.strerror}"  # a file that may not be looked at, or cannot be
    package = type(cause).__module__.partition(".")[0]
    return str(cause) if package in OWN_PACKAGES else None


def _nobody_reads() -> bool:
    """Whether the output goes into a pipe that was closed at its other end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _notes(error: BaseException) -> list[str]:
    """What else a person should know, such as how a run goes on."""
    return getattr(error, "__notes__", [])


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Once: from then on all that was started is being ended, and nothing is to break that off."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _open_standard_streams() -> None:
    """Those that are closed lead nowhere from now on: other files would take their numbers, and be written to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, so its own
            os.set_inheritable(nowhere, True)
            setattr(sys, name, open(nowhere, mode, closefd=False))  # noqa: SIM115


def _quiet_libraries() -> None:
    """Defaults that keep other libraries' chatter off the progress lines; the environment wins."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # who reserves no GPU sees none
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")


if __name__ == "__main__":
    sys.exit(main())
