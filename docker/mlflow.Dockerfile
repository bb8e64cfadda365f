# MLflow server with authentication, a PostgreSQL database, and artifacts in an object store, which only it uses.
# The root can be read-only: only /tmp, a tmpfs, is written to. docs/how-to/containers.md lists the variables.

# Any image with Python 3.11; use a digest for reproducible builds.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY docker/mlflow.lock ./
# The lock file is complete, so dependencies are not resolved. A server does not need pip.
RUN python3.11 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --no-deps --requirement mlflow.lock \
 && /opt/venv/bin/pip uninstall --yes pip setuptools \
 && MLFLOW_DISABLE_TELEMETRY=true /opt/venv/bin/python -c "import boto3, psycopg, mlflow.server.auth"

FROM ${BASE}
# tini passes on signals, also to the server's workers.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends 'tini=0.19.*' \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && useradd --uid 10002 --user-group --no-create-home --home-dir /tmp/home --shell /usr/sbin/nologin mlflow
COPY --from=build /opt/venv /opt/venv
COPY docker/credentials.py docker/mlflow_start.py /opt/start/
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp/home \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
WORKDIR /tmp
USER 10002:10002
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:5000/health')"]
ENTRYPOINT ["tini", "-g", "--", "python", "/opt/start/mlflow_start.py"]
