"""An S3 server on loopback: moto's, which checks signatures and policies, in a process of its own.

It is told on its standard input to `stop` and to `start`. When it stops it listens no more and cuts every connection;
what it holds it keeps, as a server does that has a disk.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "0"  # each request is checked, from the first on; read at import

from moto.core import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends
from moto.moto_server import threaded_moto_server
from moto.moto_server.werkzeug_app import MotoRequestHandler

open_connections: set[socket.socket] = set()


class Handler(MotoRequestHandler):
    """Keeps count of connections: clients hold them open, and would be served by a server that has stopped."""

    def setup(self) -> None:
        open_connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        open_connections.discard(self.request)
        with suppress(OSError):  # it was cut
            super().finish()


def keys_of(user: str, bucket: str) -> dict[str, str]:
    """Makes a user that may use one bucket and nothing else, and gives its keys."""
    iam = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    iam.create_user("us-east-1", user)
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    statements = [
        {"Effect": "Allow", "Action": "s3:*", "Resource": resources},
        {"Effect": "Allow", "Action": "s3:ListAllMyBuckets", "Resource": "*"},
    ]
    iam.put_user_policy(user, bucket, json.dumps({"Version": "2012-10-17", "Statement": statements}))
    made = iam.create_access_key(user)
    return {"AWS_ACCESS_KEY_ID": made.access_key_id, "AWS_SECRET_ACCESS_KEY": made.secret_access_key}


def main(port: int, place: Path, buckets: list[str]) -> None:
    """Serves until the input ends.

    Args:
        port: on loopback.
        place: file that gets the keys of each bucket's user, by the name of the bucket.
        buckets: each has a user of its own.
    """
    place.touch(0o600)
    place.write_text(json.dumps({bucket: keys_of(f"user-of-{bucket}", bucket) for bucket in buckets}))
    threaded_moto_server.MotoRequestHandler = Handler
    server = threaded_moto_server.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    print("start", flush=True)  # noqa: T201  the answer
    for line in sys.stdin:
        if line.strip() == "start":
            server.start()
        else:
            server.stop()
            for connection in list(open_connections):
                with suppress(OSError):  # it has just ended by itself
                    connection.shutdown(socket.SHUT_RDWR)
        print(line.strip(), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
