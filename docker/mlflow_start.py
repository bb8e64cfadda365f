"""What MLflow's image starts with: a server that asks for a name and a password, or a message why there is none.

All settings are environment variables, those of MLflow itself and of its libraries; docs/how-to/containers.md lists them.
Arguments are further options of `mlflow server`.
"""

from __future__ import annotations

import configparser
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import credentials

PATIENCE = 60.0  # seconds until the object store must answer
KNOWN = 60  # seconds in which a name and password that were right are not checked again
PERMISSIONS = ("READ", "USE", "EDIT", "MANAGE", "NO_PERMISSIONS")  # on what somebody else has made


def main() -> None:
    """Checks the settings, makes what the server needs, and becomes the server."""
    store = os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
    destination = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", "")
    for name, value in (("MLFLOW_BACKEND_STORE_URI", store), ("MLFLOW_ARTIFACTS_DESTINATION", destination)):
        if not value:
            sys.exit(f"MLflow does not start: {name} is missing; docs/how-to/containers.md has an example")
    credentials.require("MLflow", _secrets(store, destination))
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(_write_settings(store))
    if _own_objects(destination):
        _make_bucket(urlsplit(destination).netloc)
    _keep_accounts(store)
    command = ["mlflow", "server", "--app-name", "basic-auth", "--host", "0.0.0.0", "--port", "5000"]  # noqa: S104
    os.execvp(command[0], [*command, *sys.argv[1:]])  # noqa: S606  in place of this process, so that signals reach it


def _secrets(store: str, destination: str) -> list[str]:
    """The variables whose values nobody else may know."""
    names = ["MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"]
    if "MLFLOW_TRAINER_PASSWORD" in os.environ or "MLFLOW_TRAINER_PASSWORD_FILE" in os.environ:
        names.append("MLFLOW_TRAINER_PASSWORD")
    if store.startswith("postgresql") and not urlsplit(store).password:
        names.append("PGPASSWORD")
    if _own_objects(destination):
        names.append("AWS_SECRET_ACCESS_KEY")
    return names


def _own_objects(destination: str) -> bool:
    """Whether files go to an object store of one's own, which has keys; in a cloud a role may stand for them."""
    return destination.startswith("s3://") and bool(os.environ.get("MLFLOW_S3_ENDPOINT_URL"))


def _write_settings(store: str) -> Path:
    """Writes what MLflow takes from a file; passwords are not in it, they stay in the environment."""
    permission = os.environ.get("MLFLOW_DEFAULT_PERMISSION", PERMISSIONS[0])
    if permission not in PERMISSIONS:
        sys.exit(f"MLflow does not start: MLFLOW_DEFAULT_PERMISSION is {permission}, but {', '.join(PERMISSIONS)} are")
    settings = configparser.RawConfigParser()
    settings["mlflow"] = {
        "default_permission": permission,
        "database_uri": store.replace("%", "%%"),  # it is read with interpolation
        "admin_username": "admin",
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": str(KNOWN),  # else it hashes the password of each call several times: 0.2 s each
    }
    path = Path(tempfile.mkdtemp(prefix="mlflow.")) / "basic_auth.ini"
    with path.open("w", encoding="utf-8") as file:
        settings.write(file)
    return path


def _make_bucket(bucket: str) -> None:
    """Makes the bucket where there is none; an object store says that it is up before it can do so."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if bucket not in [one["Name"] for one in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=bucket)
            return
        except (BotoCoreError, ClientError) as error:
            refused = isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] == 403
            if refused or time.monotonic() > deadline:
                sys.exit(f"MLflow does not start: {bucket} at {client.meta.endpoint_url} cannot be used ({error})")
            time.sleep(1)


def _keep_accounts(store: str) -> None:
    """Gives the administrator, and the trainer if it has an account, the passwords that are set now."""
    logging.disable(logging.INFO)
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    accounts = SqlAlchemyStore()
    accounts.init_db(store)
    for name, variable in (("admin", "MLFLOW_AUTH_ADMIN_PASSWORD"), ("trainer", "MLFLOW_TRAINER_PASSWORD")):
        password = os.environ.pop(variable, None)
        if password is None:
            continue
        if not accounts.has_user(name):
            accounts.create_user(name, password, is_admin=name == "admin")
        elif not accounts.authenticate_user(name, password):
            accounts.update_user(name, password=password)
    accounts.engine.dispose()


if __name__ == "__main__":
    main()
