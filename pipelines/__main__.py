"""`python -m pipelines STAGE...`: run stages in the given order and stop at the first one that fails."""

import gc
import sys
from functools import partial
from importlib import import_module

from pipelines import runner
from pipelines.environment import configure_environment
from pipelines.stages import STAGES
from pipelines.tracking import locations


def main() -> None:
    """Run the stages that are named on the command line."""
    configure_environment()
    names = sys.argv[1:]
    if not names or not set(names) <= set(STAGES):
        sys.exit(f"usage: python -m pipelines {{{','.join(STAGES)}}}")
    for name in names:
        runner.run(name, partial(load_and_run, name))


def load_and_run(name: str) -> str:
    """Import the module of a stage and run it, after a check of the settings that a later stage needs."""
    locations.check_store()
    gc.disable()  # collections during the imports of torch, Prefect and MLflow take 1.5 s and free almost nothing
    try:
        module = import_module(f"pipelines.stages.{name}")
    finally:
        gc.enable()
    return str(module.main())


if __name__ == "__main__":
    main()
