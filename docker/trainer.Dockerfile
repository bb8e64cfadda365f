# Image of the pipeline: `trainer` runs any command (`dvc repro`), `worker` is a Prefect worker with a health check.
# The root can be read-only: only /work, a volume of user 10001, and /tmp, a tmpfs, are written to.
# Build it in the project's folder; see docs/how-to/containers.md.

# Any Debian image with Python 3.11; use a digest for reproducible builds.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
# Index URL of PyTorch's CPU wheels (see its installation page), a tenth of the size; empty: wheels with CUDA.
ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml requirements.lock ./
# Runtime dependencies in the locked versions, without those of tests and checks. Torch is installed separately, so that
# its index is used for nothing else.
RUN python3.11 -m venv /opt/venv \
 && python3.11 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], sep='\n')" > runtime.txt \
 && grep -E '^torch(vision)?==' requirements.lock > torch.txt \
 && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--no-deps --index-url "${TORCH_INDEX}"} \
    --constraint requirements.lock --requirement torch.txt \
 && /opt/venv/bin/pip install --no-cache-dir --constraint requirements.lock --requirement runtime.txt
# Editable, like `make install`: modules are imported from the working copy, whose checksums DVC tracks.
WORKDIR /work
COPY pyproject.toml README.md LICENSE ./
COPY fadeformer fadeformer
COPY pipelines pipelines
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --editable . && /opt/venv/bin/pip check

FROM ${BASE} AS trainer
# tini passes on signals and reaps zombie processes. git identifies the code and stores experiments; safe.directory,
# because the volume may belong to root and be group-writable.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends 'git=1:2.*' 'tini=0.19.*' \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp/home --shell /usr/sbin/nologin fadeformer \
 && install --directory --owner fadeformer --group fadeformer /work \
 && git config --system --add safe.directory '*' \
 && git config --system user.name FadeFormer \
 && git config --system user.email fadeformer@localhost
COPY --from=build /opt/venv /opt/venv
COPY docker/credentials.py docker/trainer_start.py /opt/start/
COPY . /opt/fadeformer
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp/home \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_UI_STATIC_DIRECTORY=/tmp/home/prefect-ui
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["tini", "--", "python", "/opt/start/trainer_start.py"]
CMD ["dvc", "repro"]

FROM trainer AS worker
# Only for the health check; Kubernetes checks from outside and sets 0.0.0.0.
ENV PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health')"]
CMD ["worker"]
