# The pipeline as an image: `trainer` runs any command (`dvc repro`), `worker` is a Prefect worker with a health check.
# The root may be read-only: a volume at /work, owned by user 10001, and a tmpfs at /tmp are all that is written to.
# Built from the project's folder; docs/how-to/containers.md tells how.

# Any image with Debian's tools and Python 3.11; name one by its digest to build from the same bytes again.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
# Address of PyTorch's wheels without CUDA, a tenth of the size (its installation page has it); empty: those with CUDA.
ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml requirements.lock ./
# What the project needs to run, in the versions of the lock; what only its tests and checks need stays out. Torch comes
# first and alone, so that its index is asked for nothing else.
RUN python3.11 -m venv /opt/venv \
 && python3.11 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], sep='\n')" > runtime.txt \
 && grep -E '^torch(vision)?==' requirements.lock > torch.txt \
 && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--no-deps --index-url "${TORCH_INDEX}"} \
    --constraint requirements.lock --requirement torch.txt \
 && /opt/venv/bin/pip install --no-cache-dir --constraint requirements.lock --requirement runtime.txt
# Editable, as `make install` does: modules are those of the working copy, of which DVC knows the checksums.
WORKDIR /work
COPY pyproject.toml README.md LICENSE ./
COPY fadeformer fadeformer
COPY pipelines pipelines
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --editable . && /opt/venv/bin/pip check

FROM ${BASE} AS trainer
# tini passes signals on and takes note of processes that end; git names the code and keeps experiments, in a volume
# that may belong to root and be writable by a group, which git would not trust.
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
# For the health check alone; Kubernetes asks from outside and sets 0.0.0.0.
ENV PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health')"]
CMD ["worker"]
