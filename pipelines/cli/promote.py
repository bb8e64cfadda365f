"""`fadeformer promote`: run the promotion gate on the current model, force its promotion, or roll back."""

from __future__ import annotations

import argparse

from fadeformer.config import schema
from fadeformer.data import arrays
from fadeformer.errors import UserError
from pipelines import paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action and its reason."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--force", action="store_true", help="promote regardless of the gate; recorded as forced")
    action.add_argument("--rollback", action="store_true", help="restore an earlier champion")
    parser.add_argument("--to", metavar="VERSION", help="with --rollback: version (default: the previous champion)")
    parser.add_argument("--reason", help="required with --force and --rollback; recorded in the ledger")
    parser.add_argument(
        "--model", metavar="NAME", help="with --rollback: registered model (default: from params.yaml and the data)"
    )


def run(arguments: argparse.Namespace) -> str:
    """Run the gate, force the promotion, or roll back."""
    reason = (arguments.reason or "").strip()
    if (arguments.force or arguments.rollback) and not reason:
        raise UserError("--reason is missing; describe why, such as --reason 'fails on images of the new scanner'")
    if not (arguments.force or arguments.rollback) and reason:
        raise UserError("--reason needs --force or --rollback; without them the checks of section promote decide")
    if (arguments.to or arguments.model) and not arguments.rollback:
        raise UserError("--to and --model need --rollback; the gate evaluates the model in models/ and reports/")
    from pipelines.stages import promote  # MLflow takes seconds to import

    if not arguments.rollback:
        return promote.main(reason or None)
    config = schema.load_params(paths.PARAMS).promote
    name = arguments.model or promote.model_name(config, arrays.read_metadata(paths.PROCESSED))
    return promote.roll_back(name, arguments.to, reason)
