"""`make deploy`: set up a Prefect server for this project's deployments; idempotent.

It creates a work pool, a queue for trainings that runs as many at a time as there are GPUs, the limit that keeps
promotions apart, the automations of automations.yaml, and the deployments of prefect.yaml.
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
from pipelines.orchestration.flows import PROMOTION_LIMIT

WORK_POOL, TRAINING_QUEUE = "local", "training"
AUTOMATIONS = Path(__file__).with_name("automations.yaml")


def main() -> str:
    """Create or update the deployments on the server of `PREFECT_API_URL`."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.orchestration.deploy", description=__doc__)
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="trainings at a time, such as GPUs (1)")
    at_once = parser.parse_args().at_once
    if at_once < 1:
        raise UserError("--at-once is 1 or more")
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        raise UserError("PREFECT_API_URL is not set; `prefect server start`, then set it to that server's address")
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
        client.update_work_queue(queue.id, concurrency_limit=at_once)
        client.upsert_global_concurrency_limit_by_name(PROMOTION_LIMIT, 1)
        for automation in map(AutomationCore.model_validate, YAML(typ="safe").load(AUTOMATIONS)):
            for known in client.read_automations_by_name(automation.name):
                client.delete_automation(known.id)
            client.create_automation(automation)
    _run_prefect("deploy", "--all")
    return f"{address} has the deployments of prefect.yaml; {at_once} at a time in the queue {TRAINING_QUEUE}"


def _run_prefect(*words: str) -> None:
    program = Path(sys.executable).with_name("prefect")
    done = subprocess.run([str(program), "--no-prompt", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"`prefect {' '.join(words)}` failed:\n{done.stderr}{done.stdout}".rstrip())


if __name__ == "__main__":
    runner.run("deploy", main)
