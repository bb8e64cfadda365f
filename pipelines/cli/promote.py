"""`fadeformer promote`: judge the model that was made, promote it by force, or take a champion back."""

from __future__ import annotations

import argparse

from fadeformer.config import schema
from fadeformer.data import arrays
from fadeformer.errors import UserError
from pipelines import paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, and why."""
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--force", action="store_true", help="promote whatever the gate says; marked as forced for ever")
    way.add_argument("--rollback", action="store_true", help="make an earlier champion the champion again")
    parser.add_argument("--to", metavar="VERSION", help="with --rollback: which (default: the one before the present)")
    parser.add_argument("--reason", help="why, in words; needed with --force and --rollback")
    parser.add_argument(
        "--model", metavar="NAME", help="with --rollback: registered model (default: that of params.yaml and the data)"
    )


def run(arguments: argparse.Namespace) -> str:
    """Judges, forces or takes back."""
    reason = (arguments.reason or "").strip()
    if (arguments.force or arguments.rollback) and not reason:
        raise UserError("--reason is missing; say in words why, such as --reason 'fails on images of the new scanner'")
    if not (arguments.force or arguments.rollback) and reason:
        raise UserError("--reason is of --force and --rollback; without them the rules of promote: decide")
    if (arguments.to or arguments.model) and not arguments.rollback:
        raise UserError("--to and --model are of --rollback; what is judged is what lies in models/ and reports/")
    from pipelines.stages import promote  # MLflow takes seconds to import

    if not arguments.rollback:
        return promote.main(reason or None)
    wanted = arguments.model or promote.model_name(
        schema.load_params(paths.PARAMS).promote, arrays.read_metadata(paths.PROCESSED)
    )
    return promote.roll_back(wanted, arguments.to, reason)
