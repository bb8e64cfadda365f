"""`python -m pipelines STAGE`: one stage by its name, Prefect's server coming up while its libraries load."""

import gc
import sys
from importlib import import_module

from pipelines import orchestrator, stage

STAGES = ("download", "validate", "preprocess", "train", "evaluate", "promote")
FLOWS = ("train", "evaluate")


def main() -> None:
    """Runs the stage that the first argument names."""
    if len(sys.argv) != 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python -m pipelines {{{','.join(STAGES)}}}")
    stage.run(sys.argv[1], lambda: load_and_run(sys.argv[1]))


def load_and_run(name: str) -> str:
    """Runs a stage and gives its summary."""
    if name in FLOWS:
        orchestrator.start(last=name == FLOWS[-1])
    try:
        gc.disable()  # what libraries make while they load stays: searching it for garbage is a quarter of their time
        main_of_stage = import_module(f"pipelines.{name}").main
        gc.freeze()
        gc.enable()
        return str(main_of_stage())
    finally:
        orchestrator.give_up()


if __name__ == "__main__":
    main()
