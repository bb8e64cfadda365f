"""`make deploy`: set up a Prefect server for this project's deployments; idempotent.

It creates a work pool, a queue that limits concurrent trainings to the number of GPUs, the concurrency limit that
serializes promotions, the automations of automations.yaml, and the deployments of prefect.yaml.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from ruamel.yaml import YAML

from fadeformer.errors import TransientError, UserError
from pipelines import runner, server
from pipelines.environment import configure_environment
from pipelines.orchestration.flows import PROMOTION_LIMIT

WORK_POOL, TRAINING_QUEUE = "local", "training"
AUTOMATIONS = Path(__file__).with_name("automations.yaml")


def main() -> str:
    """Create or update the deployments on the server at `PREFECT_API_URL`."""
    configure_environment()
    parser = argparse.ArgumentParser(prog="python -m pipelines.orchestration.deploy", description=__doc__)
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="concurrent trainings: the number of GPUs (default: 1)"
    )
    concurrency = parser.parse_args().concurrency
    if concurrency < 1:
        raise UserError(f"--concurrency is {concurrency}; it must be 1 or more")
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        raise UserError("PREFECT_API_URL is not set; run `prefect server start`, then set it to the server's address")
    if not server.is_reachable(address):
        raise TransientError(f"PREFECT_API_URL is {address}, but no Prefect server answers there; start it")
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(WORK_POOL)
        except ObjectNotFound:
            _run_prefect("work-pool", "create", WORK_POOL, "--type", "process")
        try:
            queue = client.create_work_queue(TRAINING_QUEUE, work_pool_name=WORK_POOL)
        except ObjectAlreadyExists:
            queue = client.read_work_queue_by_name(TRAINING_QUEUE, work_pool_name=WORK_POOL)
        client.update_work_queue(queue.id, concurrency_limit=concurrency)
        client.upsert_global_concurrency_limit_by_name(PROMOTION_LIMIT, 1)
        for automation in map(AutomationCore.model_validate, YAML(typ="safe").load(AUTOMATIONS)):
            for existing in client.read_automations_by_name(automation.name):
                client.delete_automation(existing.id)
            client.create_automation(automation)
    _run_prefect("deploy", "--all")
    return f"{address} has the deployments of prefect.yaml; the queue {TRAINING_QUEUE} runs {concurrency} at a time"


def _run_prefect(*arguments: str) -> None:
    program = Path(sys.executable).with_name("prefect")
    process = subprocess.run([str(program), "--no-prompt", *arguments], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise UserError(f"`prefect {' '.join(arguments)}` failed:\n{process.stderr}{process.stdout}".rstrip())


if __name__ == "__main__":
    runner.run("deploy", main)
