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
    name = sys.argv[1]
    if name in FLOWS:
        orchestrator.start()
    gc.disable()  # what libraries make while they load stays: searching it for garbage is a quarter of their time
    main_of_stage = import_module(f"pipelines.{name}").main
    gc.freeze()
    gc.enable()
    stage.run(name, main_of_stage)


if __name__ == "__main__":
    main()
