"""The `fadeformer` command: works with trained models, and runs grids and sweeps. `dvc repro` runs the pipeline."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module

from pipelines import runner
from pipelines.environment import configure_environment

COMMANDS = {  # by module of pipelines.cli
    "drift": "detect drift of new images from the reference data of a model",
    "export": "export a model as ONNX or as a torch.export program",
    "predict": "predict images in files, folders or archives",
    "promote": "run the promotion gate again, force a promotion, or roll back to an earlier champion",
    "registry": "show the decisions on models",
    "serve": "serve a model over HTTP, with limits for untrusted clients",
    "sweep": "search hyperparameters in params.yaml",
    "tables": "train a grid of datasets, models and seeds, and write its tables",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the subcommand that the arguments name; imports only the module of that subcommand."""
    configure_environment()
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("fadeformer", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = next((word for word in words if not word.startswith("-")), None)
    for name, description in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=description, description=description)
        if name == command:
            module = import_module(f"pipelines.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    namespace = parser.parse_args(words)
    runner.run(namespace.command, partial(namespace.run, namespace))


if __name__ == "__main__":
    main()
