"""Entry point of the MLflow image: starts a server with authentication, or exits with a message.

All settings are environment variables of MLflow and its libraries; docs/how-to/containers.md lists them. Arguments are
passed on to `mlflow server`.
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

OBJECT_STORE_TIMEOUT = 60.0  # seconds until the object store must answer
AUTH_CACHE_TTL = 60  # seconds during which valid credentials are not checked again
PERMISSIONS = ("READ", "USE", "EDIT", "MANAGE", "NO_PERMISSIONS")  # on the resources of other users


def main() -> None:
    """Validate the settings, create configuration, bucket and accounts, and replace this process with the server."""
    store = os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
    destination = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", "")
    for name, value in (("MLFLOW_BACKEND_STORE_URI", store), ("MLFLOW_ARTIFACTS_DESTINATION", destination)):
        if not value:
            sys.exit(f"MLflow does not start: {name} is missing; docs/how-to/containers.md has an example")
    credentials.require("MLflow", _secret_names(store, destination))
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(_write_settings(store))
    if _uses_own_object_store(destination):
        _create_bucket(urlsplit(destination).netloc)
    _update_accounts(store)
    command = ["mlflow", "server", "--app-name", "basic-auth", "--host", "0.0.0.0", "--port", "5000"]  # noqa: S104
    os.execvp(command[0], [*command, *sys.argv[1:]])  # noqa: S606  replaces this process, so that signals reach the server


def _secret_names(store: str, destination: str) -> list[str]:
    """Return the names of the variables with secrets."""
    names = ["MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"]
    if "MLFLOW_TRAINER_PASSWORD" in os.environ or "MLFLOW_TRAINER_PASSWORD_FILE" in os.environ:
        names.append("MLFLOW_TRAINER_PASSWORD")
    if store.startswith("postgresql") and not urlsplit(store).password:
        names.append("PGPASSWORD")
    if _uses_own_object_store(destination):
        names.append("AWS_SECRET_ACCESS_KEY")
    return names


def _uses_own_object_store(destination: str) -> bool:
    """Return True for a self-hosted object store, which needs keys; in a cloud, a role can replace them."""
    return destination.startswith("s3://") and bool(os.environ.get("MLFLOW_S3_ENDPOINT_URL"))


def _write_settings(store: str) -> Path:
    """Write MLflow's authentication settings to a file; passwords stay in the environment."""
    permission = os.environ.get("MLFLOW_DEFAULT_PERMISSION", PERMISSIONS[0])
    if permission not in PERMISSIONS:
        sys.exit(
            f"MLflow does not start: MLFLOW_DEFAULT_PERMISSION is {permission}; use one of {', '.join(PERMISSIONS)}"
        )
    settings = configparser.RawConfigParser()
    settings["mlflow"] = {
        "default_permission": permission,
        "database_uri": store.replace("%", "%%"),  # MLflow reads the file with interpolation
        "admin_username": "admin",
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": str(
            AUTH_CACHE_TTL
        ),  # without a cache, each request costs several password hashes of 0.2 s
    }
    path = Path(tempfile.mkdtemp(prefix="mlflow.")) / "basic_auth.ini"
    with path.open("w", encoding="utf-8") as file:
        settings.write(file)
    return path


def _create_bucket(bucket: str) -> None:
    """Create the bucket if it does not exist; retry, because an object store reports to be ready too early."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    deadline = time.monotonic() + OBJECT_STORE_TIMEOUT
    while True:
        try:
            if bucket not in [existing["Name"] for existing in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=bucket)
            return
        except (BotoCoreError, ClientError) as error:
            forbidden = isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] == 403
            if forbidden or time.monotonic() > deadline:
                sys.exit(f"MLflow does not start: {bucket} at {client.meta.endpoint_url} cannot be used ({error})")
            time.sleep(1)


def _update_accounts(store: str) -> None:
    """Create or update the accounts admin and, if it has a password, trainer with the current passwords."""
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
