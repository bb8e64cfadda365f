"""S3 server of moto, which checks signatures and policies, in a separate process on loopback.

The commands `stop` and `start` on its standard input stop and restart it. A stopped server closes its port and all
connections, but keeps its objects, like a server with a disk.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "0"  # check all requests; read at import

from moto.core import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends
from moto.moto_server import threaded_moto_server
from moto.moto_server.werkzeug_app import MotoRequestHandler

open_connections: set[socket.socket] = set()


class Handler(MotoRequestHandler):
    """Tracks connections, because clients keep them open and a stopped server would still serve them."""

    def setup(self) -> None:
        open_connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        open_connections.discard(self.request)
        with suppress(OSError):  # already closed
            super().finish()


def create_user(user: str, bucket: str) -> dict[str, str]:
    """Create a user with access to only one bucket, and return its keys."""
    iam = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    iam.create_user("us-east-1", user)
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    statements = [
        {"Effect": "Allow", "Action": "s3:*", "Resource": resources},
        {"Effect": "Allow", "Action": "s3:ListAllMyBuckets", "Resource": "*"},
    ]
    iam.put_user_policy(user, bucket, json.dumps({"Version": "2012-10-17", "Statement": statements}))
    key = iam.create_access_key(user)
    return {"AWS_ACCESS_KEY_ID": key.access_key_id, "AWS_SECRET_ACCESS_KEY": key.secret_access_key}


def main(port: int, keys_file: Path, buckets: list[str]) -> None:
    """Serve until the end of standard input.

    Args:
        port: Port on loopback.
        keys_file: File for the keys of each bucket's user, by bucket.
        buckets: Names of the buckets; each has a separate user.
    """
    keys_file.touch(0o600)
    keys_file.write_text(json.dumps({bucket: create_user(f"user-of-{bucket}", bucket) for bucket in buckets}))
    threaded_moto_server.MotoRequestHandler = Handler
    server = threaded_moto_server.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    print("start", flush=True)  # noqa: T201  confirmation
    for line in sys.stdin:
        if line.strip() == "start":
            server.start()
        else:
            server.stop()
            for connection in list(open_connections):
                with suppress(OSError):  # closed by the client
                    connection.shutdown(socket.SHUT_RDWR)
        print(line.strip(), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
