"""`python -m pipelines STAGE`: a stage by its name, or several, Prefect's server coming up while libraries load."""

import gc
import sys
from functools import partial
from importlib import import_module

from pipelines import beside, forked, orchestrator, stage

STAGES = ("download", "validate", "preprocess", "train", "evaluate", "promote")
EARLY = ("validate", "preprocess")  # where these have run, a flow follows


def main() -> None:
    """Runs the stages that the arguments name, one after the other, until one fails."""
    names = sys.argv[1:]
    if not names or not set(names) <= set(STAGES):
        sys.exit(f"usage: python -m pipelines {{{','.join(STAGES)}}}")
    if len(names) == 1:
        forked.begin(names[0])
        if (status := forked.run(names[0])) is not None:
            sys.exit(status)
    for name in names:
        stage.run(name, partial(load_and_run, name))


def load_and_run(name: str) -> str:
    """Runs a stage and gives its summary."""
    if name in beside.OF_STAGE:
        beside.start(beside.OF_STAGE[name])
    if name in stage.FLOWS:
        orchestrator.start(last=name == stage.FLOWS[-1])
    elif name in EARLY:
        orchestrator.start_early(name)
    try:
        gc.disable()  # what libraries make while they load stays: searching it for garbage is a quarter of their time
        main_of_stage = import_module(f"pipelines.{name}").main
        gc.freeze()
        gc.enable()
        summary = str(main_of_stage())
        if name in EARLY:
            orchestrator.leave()
        return summary
    finally:
        beside.give_up()
        orchestrator.give_up()


if __name__ == "__main__":
    main()
