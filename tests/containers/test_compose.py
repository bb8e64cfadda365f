"""Files in docker/, without containers: Dockerfiles, compose file, entry points and Kubernetes job template."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compose_spec import PyCompose
from docker.utils.build import exclude_paths
from prefect.utilities.templating import apply_values
from ruamel.yaml import YAML

from tests.conftest import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = (DOCKER / "compose.yaml").read_text()
SERVICES: dict[str, Any] = YAML(typ="safe").load(COMPOSE)["services"]
ONE_SHOT = {"deployments"}  # services that exit after their work
VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")
SECRET = re.compile("PASSWORD|SECRET|AUTH_STRING|_KEY$")
VALID_PASSWORD = "hqnfu2746cbals"  # noqa: S105
COMMON_PASSWORDS = [
    "password", "password1234", "Password-1234!", "p@ssw0rd123456", "admin", "administrator", "changeme",
    "change-me-now", "CHANGE_THIS_SECRET", "minioadmin", "your-password", "postgres2026", "123456789012",
    "aaaaaaaaaaaaaaaa", "mlflow-mlflow",
]  # fmt: skip
SETTINGS = {
    "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://mlflow@host.invalid/mlflow",
    "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/artifacts",
    "MLFLOW_S3_ENDPOINT_URL": "http://host.invalid:8333",
    "MLFLOW_AUTH_ADMIN_PASSWORD": VALID_PASSWORD,
    "MLFLOW_TRAINER_PASSWORD": VALID_PASSWORD,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": VALID_PASSWORD,
    "PGPASSWORD": VALID_PASSWORD,
    "AWS_SECRET_ACCESS_KEY": VALID_PASSWORD,
}
SECRETS = [name for name in SETTINGS if SECRET.search(name)]
SERVERS = {
    "PREFECT_API_URL": "http://prefect.invalid/api", "PREFECT_API_AUTH_STRING": f"user:{VALID_PASSWORD}",
    "MLFLOW_TRACKING_URI": "http://mlflow.invalid", "MLFLOW_TRACKING_PASSWORD": VALID_PASSWORD,
}  # fmt: skip
TEMPLATE = json.loads((DOCKER / "kubernetes" / "job-template.json").read_text())
assert len(DOCKERFILES) == 2
each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
each_service = pytest.mark.parametrize("name", SERVICES)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments; continuation lines are joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def stages(dockerfile: Path) -> list[list[tuple[str, str]]]:
    """Instructions of each build stage, starting with FROM."""
    result: list[list[tuple[str, str]]] = []
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            result.append([])
        if result:
            result[-1].append((word, rest))
    return result


def hadolint(dockerfile: Path) -> str:
    """Output of hadolint, empty without findings."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("hadolint", path=search)
    assert program, "hadolint is not installed; run `make install`"
    process = subprocess.run([program, "--no-color", dockerfile], capture_output=True, text=True, check=False)
    assert process.returncode == int(bool(process.stdout)), process
    return process.stdout


@each_dockerfile
def test_dockerfiles_pass_hadolint(dockerfile):
    assert hadolint(dockerfile) == ""


def test_hadolint_reports_violations(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN pip install torch\n")
    assert "DL3006" in hadolint(tmp_path / "Dockerfile")


@each_dockerfile
def test_base_image_is_a_build_argument(dockerfile):
    word, rest = instructions(dockerfile)[0]
    assert (word, rest.split("=")[0]) == ("ARG", "BASE")
    assert re.fullmatch(r"BASE=docker\.io/library/python:3\.11-[a-z-]+", rest)
    named = {stage[0][1].split(" AS ")[-1] for stage in stages(dockerfile)}
    assert {stage[0][1].split()[0] for stage in stages(dockerfile)} <= {"${BASE}", *named}


@each_dockerfile
def test_final_stages_have_no_build_tools_or_caches(dockerfile):
    for stage in stages(dockerfile)[1:]:
        for run in (rest for word, rest in stage if word == "RUN"):
            assert "pip install" not in run
            assert not re.search(r"\b(gcc|g\+\+|build-essential|python3-dev|curl|wget)\b", run)
            if "apt-get install" in run:
                assert "--no-install-recommends" in run
                assert "rm -rf /var/lib/apt/lists/*" in run
    runs = [rest for word, rest in instructions(dockerfile) if word == "RUN"]
    assert any("pip install" in run for run in runs)
    for run in runs:
        assert run.count("pip install") == run.count("pip install --no-cache-dir")


@each_dockerfile
def test_images_set_a_numeric_user_and_exec_entrypoint(dockerfile):
    first, *last = stages(dockerfile)
    assert not [rest for word, rest in first if word == "USER"]
    users = [rest for stage in last for word, rest in stage if word == "USER"]
    assert users in (["10001:10001"], ["10002:10002"])  # inherited by later stages
    entry = next(rest for stage in last for word, rest in stage if word == "ENTRYPOINT")
    assert json.loads(entry)[0] == "tini"


@each_dockerfile
def test_dockerfiles_contain_no_secrets(dockerfile):
    all_instructions = instructions(dockerfile)
    assert {"FROM", "RUN", "COPY", "USER"} <= {word for word, _ in all_instructions}
    assert "ADD" not in {word for word, _ in all_instructions}
    settings = [rest for word, rest in all_instructions if word in ("ARG", "ENV")]
    assert settings
    assert [rest for rest in settings if SECRET.search(rest.upper())] == []


@each_dockerfile
def test_copied_files_are_in_the_build_context(dockerfile):
    files = build_context()
    copies = [rest for word, rest in instructions(dockerfile) if word == "COPY" and not rest.startswith("--from")]
    sources = {source for rest in copies for source in rest.split()[:-1]}
    assert sources
    for source in sources:
        assert source == "." or any(name == source or name.startswith(f"{source}/") for name in files), source


def build_context(folder: Path = ROOT) -> set[str]:
    """Files in the build context, according to .dockerignore."""
    return exclude_paths(str(folder), (ROOT / ".dockerignore").read_text().splitlines()) - {".dockerignore"}


def test_build_context_contains_only_code(tmp_path):
    included = [
        "fadeformer/io/atomic.py",
        "pipelines/tracking/store.py",
        "params.yaml",
        ".dvc/config",
        "data/own/README.md",
    ]
    excluded = [
        ".git/config", ".venv/bin/python", "docker/.env", "docker/env.example", ".dvc/config.local", ".dvc/cache/files",
        "data/raw/image.png", "data/own/patient.dcm", "data/weights/mine.pth", "mlruns/mlflow.db", "reports/index.html",
        "models/best_model.pth", ".prefect/prefect.db", "fadeformer/__pycache__/files.pyc", "dvc.lock", "tests/a.py",
    ]  # fmt: skip
    for name in included + excluded:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert {name for name in build_context(tmp_path) if (tmp_path / name).is_file()} == set(included)


def test_build_context_contains_stage_dependencies():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    pipeline = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    deps = {name for stage in pipeline.values() for name in stage["deps"]}
    files = {name for name in listing.stdout.split() if deps & {name, *map(str, Path(name).parents)}}
    assert len(files) > 100
    other_files = {"params.yaml", "prefect.yaml", "pyproject.toml", "pipelines/orchestration/flows.py"}
    assert files | other_files <= build_context()


def test_mlflow_image_has_the_locked_versions():
    project, server = (
        dict(re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE))
        for path in (ROOT / "requirements.lock", DOCKER / "mlflow.lock")
    )
    project = {normalized(name): version for name, version in project.items()}
    shared = {name: version for name, version in server.items() if normalized(name) in project}
    assert {"mlflow", "SQLAlchemy", "psycopg", "Flask", "boto3", "Flask-WTF"} <= shared.keys()
    assert shared == {name: project[normalized(name)] for name in shared}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def interpolated(text: str) -> str:
    """The compose file as JSON with variables and anchors resolved, as compose reads it."""
    values = VARIABLE.sub(lambda match: match[3] if match[2] == ":-" else VALID_PASSWORD, text)
    return json.dumps(YAML(typ="safe").load(values))


def test_compose_file_follows_its_specification():
    assert set(PyCompose.from_json(interpolated(COMPOSE)).service_names()) == SERVICES.keys()
    for key, misspelled in (("start_period", "start_perod"), ("service_healthy", "service_helthy"), (": 5s", ": 5x")):
        with pytest.raises(ValueError, match=misspelled.strip(": 5")):
            PyCompose.from_json(interpolated(COMPOSE.replace(key, misspelled)))


def test_env_example_documents_all_variables():
    comments: dict[str, str] = {}
    comment = ""
    for line in (DOCKER / "env.example").read_text().splitlines():
        if line.startswith("#"):
            comment += line
        elif line:
            name, value = line.split("=")
            assert value == "", line
            assert comment, f"{name} has no comment"
            comments[name] = comment
        else:
            comment = ""
    assert comments.keys() == {name for name, _, _ in VARIABLE.findall(COMPOSE)}


def test_secrets_have_no_default():
    secrets = {name for name, _, _ in VARIABLE.findall(COMPOSE) if SECRET.search(name)}
    assert len(secrets) == 9
    for name, operator, message in VARIABLE.findall(COMPOSE):
        if name in secrets:
            assert operator == ":?", name
            assert message.startswith("set it in docker/.env"), name
        else:
            assert operator == ":-", name


def test_secrets_are_passed_only_as_variables():
    count = 0
    for name, service in SERVICES.items():
        for key, value in service["environment"].items():
            if SECRET.search(key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {key}"
                count += 1
        words = [
            *service.get("command", []),
            *service.get("entrypoint", []),
            *service["healthcheck"].get("test", []),
        ]
        assert not [word for word in words if any(SECRET.search(variable) for variable, _, _ in VARIABLE.findall(word))]
    assert count > 10


@each_service
def test_services_run_without_privileges(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "/tmp" in service["tmpfs"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & service.keys()
    is_own_image = service["image"].startswith(("${WORKER_IMAGE", "${MLFLOW_IMAGE"))
    assert is_own_image or re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])


@each_service
def test_images_have_registry_and_tag(name):
    _, operator, image = VARIABLE.fullmatch(SERVICES[name]["image"]).groups()
    assert operator == ":-"
    registry, tag = re.fullmatch(r"([a-z.]+)/[a-z/-]+:([\w.-]+)", image).groups()
    assert registry == "localhost" or (registry == "docker.io" and re.search(r"\d", tag))


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - ONE_SHOT))
def test_services_have_a_health_check(name):
    test = SERVICES[name]["healthcheck"]["test"]
    assert test[0] == "CMD"
    assert "127.0.0.1" in " ".join(test)
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_services_wait_for_their_dependencies():
    for service in SERVICES.values():
        for dependency, options in service.get("depends_on", {}).items():
            condition = "service_completed_successfully" if dependency in ONE_SHOT else "service_healthy"
            assert options == {"condition": condition}
    assert set(SERVICES["worker"]["depends_on"]) == {"mlflow", "prefect", "deployments"}
    assert set(SERVICES["mlflow"]["depends_on"]) == {"postgres", "objects"}


def test_ports_are_published_on_loopback_only():
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports.keys() == {"mlflow", "prefect"}
    for port in itertools.chain.from_iterable(ports.values()):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port)


def test_workers_cannot_reach_database_or_object_store():
    compose = YAML(typ="safe").load(COMPOSE)
    assert {name for name, network in compose["networks"].items() if (network or {}).get("internal")} == {
        "database", "objects",
    }  # fmt: skip
    members = {
        network: {name for name, service in SERVICES.items() if network in service["networks"]}
        for network in compose["networks"]
    }
    assert members["database"] == {"postgres", "mlflow", "prefect"}
    assert members["objects"] == {"objects", "mlflow"}
    assert [SERVICES[name]["networks"] for name in ("postgres", "objects")] == [["database"], ["objects"]]
    for name in ("worker", "worker-gpu", "deployments"):
        assert SERVICES[name]["networks"] == ["front"]
        assert not {"AWS_SECRET_ACCESS_KEY", "PGPASSWORD"} & SERVICES[name]["environment"].keys()
        assert "MLFLOW_ADMIN_PASSWORD" not in str(SERVICES[name])


def test_volumes_are_declared_and_used():
    compose = YAML(typ="safe").load(COMPOSE)
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert {name for name in mounted if not name.startswith("./")} == compose["volumes"].keys()
    assert all((DOCKER / name).is_file() for name in mounted if name.startswith("./"))


def test_gpu_worker_differs_only_in_the_gpu():
    assert SERVICES["worker"]["profiles"] == ["cpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    device = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert device["capabilities"] == ["gpu"]
    gpu_keys = {"profiles", "shm_size", "deploy"}
    worker, gpu = (
        {key: value for key, value in SERVICES[name].items() if key not in gpu_keys}
        for name in ("worker", "worker-gpu")
    )
    assert worker == gpu


def start(script: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an entry point as in a container, with a clean environment."""
    search = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    command = [sys.executable, DOCKER / script, *arguments]
    variables = {"PATH": search, "HOME": str(folder.parent / "home"), "TMPDIR": str(folder.parent), **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120, check=False)


def error_message(process: subprocess.CompletedProcess[str]) -> str:
    """The one-line message of an entry point that failed."""
    assert process.returncode == 1, process
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1, process.stderr
    return process.stderr.strip()


@pytest.fixture
def work(tmp_path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


# Server, changes of its environment (None: variable removed), and expected message.
INVALID = [
    *(
        ("MLflow", {name: None}, f"{name} is missing")
        for name in sorted(SETTINGS.keys() - {"MLFLOW_TRAINER_PASSWORD", "MLFLOW_S3_ENDPOINT_URL"})
    ),
    *(("the worker", {name: None}, f"{name} is missing") for name in SERVERS if name != "MLFLOW_TRACKING_URI"),
    *(("MLflow", {name: VALID_PASSWORD[:11]}, f"{name} has fewer than 12 characters") for name in SECRETS),
    *(
        (server, {name: f"{user}{password}"}, f"{name} is a common password")
        for server, name, user in (
            ("MLflow", "MLFLOW_AUTH_ADMIN_PASSWORD", ""), ("the worker", "PREFECT_API_AUTH_STRING", "user:"),
        )
        for password in COMMON_PASSWORDS
    ),
]  # fmt: skip


@pytest.mark.parametrize(("server", "changes", "reason"), INVALID)
def test_server_with_invalid_settings_does_not_start(server, changes, reason, work):
    command, settings = {
        "MLflow": (["mlflow_start.py"], SETTINGS), "the worker": (["trainer_start.py", "worker"], SERVERS),
    }[server]  # fmt: skip
    environment = {name: value for name, value in {**settings, **changes}.items() if value is not None}
    message = error_message(start(*command, folder=work, **environment))
    assert message.startswith(f"{server} does not start: {reason}")
    assert not [value for value in changes.values() if value and value in message.replace(reason, "")]


def test_all_missing_settings_are_reported_together(work):
    not_secret = {name: value for name, value in SETTINGS.items() if name not in SECRETS}
    message = error_message(start("mlflow_start.py", folder=work, **not_secret))
    assert message.count(" is missing") == len(SECRETS) - 1  # the password of the trainer is optional


def test_secrets_are_read_from_files(work):
    settings = {name: value for name, value in SETTINGS.items() if name != "PGPASSWORD"}
    (work / "secret").write_text("password1234\n")
    message = error_message(start("mlflow_start.py", folder=work, PGPASSWORD_FILE=str(work / "secret"), **settings))
    assert "PGPASSWORD is a common password" in message
    message = error_message(start("mlflow_start.py", folder=work, PGPASSWORD_FILE=str(work / "missing"), **settings))
    assert "which cannot be read" in message


def test_prefect_server_needs_its_secrets(work):
    message = error_message(
        start("trainer_start.py", "server", folder=work, PREFECT_SERVER_DATABASE_DRIVER="postgresql+asyncpg")
    )
    assert "PREFECT_SERVER_API_AUTH_STRING is missing" in message
    assert "PREFECT_SERVER_DATABASE_PASSWORD is missing" in message
    message = error_message(
        start("trainer_start.py", "server", folder=work, PREFECT_SERVER_API_AUTH_STRING=VALID_PASSWORD)
    )
    assert "does not have the form USER:PASSWORD" in message


def test_command_without_servers_needs_no_password(work, code):
    process = start("trainer_start.py", "cat", "params.yaml", folder=work, FADEFORMER_CODE=str(code))
    assert (process.returncode, process.stdout) == (0, "seed: 1\n"), process


def test_command_receives_sigint_in_the_background(work, code):
    program = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start("trainer_start.py", sys.executable, "-c", program, folder=work, FADEFORMER_CODE=str(code))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert process.stdout.strip() == "True"


def test_missing_command_is_reported(work, code):
    assert "no-such-command cannot be run" in error_message(
        start("trainer_start.py", "no-such-command", folder=work, FADEFORMER_CODE=str(code))
    )


@pytest.fixture
def code(tmp_path) -> Path:
    """The code in an image."""
    folder = tmp_path / "code"
    (folder / "pipelines").mkdir(parents=True)
    (folder / "params.yaml").write_text("seed: 1\n")
    (folder / "pipelines" / "old.py").write_text("old = 1\n")
    (folder / ".gitignore").write_text("/models\n")
    return folder


def run_image(work: Path, code: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return start("trainer_start.py", "true", folder=work, FADEFORMER_CODE=str(code), **environment)


def git(work: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    process = subprocess.run(["git", *identity, *arguments], cwd=work, capture_output=True, text=True, check=True)
    return process.stdout.strip()


def test_same_code_has_the_same_commit_everywhere(work, code, tmp_path):
    assert run_image(work, code).returncode == 0
    assert (work / "pipelines" / "old.py").read_text() == "old = 1\n"
    assert git(work, "status", "--porcelain") == ""
    first = git(work, "rev-parse", "HEAD")
    assert run_image(work, code).returncode == 0
    assert git(work, "rev-parse", "HEAD") == first
    other = tmp_path / "other"
    other.mkdir()
    assert run_image(other, code).returncode == 0
    assert git(other, "rev-parse", "HEAD") == first


def test_newer_image_is_merged_with_local_changes(work, code):
    run_image(work, code)
    (work / "params.yaml").write_text("seed: 2\n")
    (work / "models").mkdir()
    (work / "models" / "best_model.pth").touch()
    (code / "pipelines" / "old.py").unlink()
    (code / "pipelines" / "new.py").write_text("new = 1\n")
    assert run_image(work, code).returncode == 0
    assert sorted(path.name for path in (work / "pipelines").iterdir()) == ["new.py"]
    assert (work / "params.yaml").read_text() == "seed: 2\n"
    assert (work / "models" / "best_model.pth").exists()


def test_merge_conflict_is_reported_and_aborted(work, code):
    run_image(work, code)
    (work / "params.yaml").write_text("seed: 2\n")
    git(work, "commit", "--quiet", "--all", "--message", "mine")
    (code / "params.yaml").write_text("seed: 3\n")
    assert "changes that conflict with this image's code" in error_message(run_image(work, code))
    assert (work / "params.yaml").read_text() == "seed: 2\n"
    assert git(work, "status", "--porcelain") == ""
    commit = re.search(r"git merge (\w+)", run_image(work, code).stderr).group(1)
    git(work, "merge", "--quiet", "--strategy-option", "ours", commit)
    assert run_image(work, code).returncode == 0


def test_existing_files_are_not_overwritten(work, code):
    (work / "params.yaml").write_text("seed: 9\n")
    error_message(run_image(work, code))
    assert (work / "params.yaml").read_text() == "seed: 9\n"


def test_existing_clone_is_not_changed(work, code):
    git(work, "init", "--quiet")
    (work / "params.yaml").write_text("seed: 4\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "--message", "mine")
    assert run_image(work, code).returncode == 0
    assert (work / "params.yaml").read_text() == "seed: 4\n"
    assert not (work / "pipelines").exists()


def test_repository_is_cloned_once(work, code, tmp_path):
    (work / "lost+found").mkdir()  # exists in new volumes
    source = tmp_path / "source"
    source.mkdir()
    git(source, "init", "--quiet", "--initial-branch=trunk")
    (source / "params.yaml").write_text("seed: 5\n")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "--message", "first")
    assert run_image(work, code, FADEFORMER_REPOSITORY=str(source)).returncode == 0
    assert (work / "params.yaml").read_text() == "seed: 5\n"
    git(source, "commit", "--quiet", "--allow-empty", "--message", "second")
    assert run_image(work, code, FADEFORMER_REPOSITORY=str(source)).returncode == 0
    assert git(work, "log", "--format=%s") == "first"
    git(work, "pull", "--quiet")
    assert git(work, "log", "--format=%s", "-1") == "second"


def test_missing_repository_is_reported(work, code, tmp_path):
    message = error_message(run_image(work, code, FADEFORMER_REPOSITORY=str(tmp_path / "nowhere")))
    assert "`git fetch` failed" in message


def create_job(**variables: object) -> dict[str, Any]:
    """Fill in the template like a Prefect worker."""
    properties = TEMPLATE["variables"]["properties"]
    defaults = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
    return apply_values(TEMPLATE["job_configuration"], defaults | variables)


def test_template_uses_all_its_variables():
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == TEMPLATE["variables"]["properties"].keys()
    assert set(TEMPLATE["variables"]["required"]) == {"image", "claim"}


def test_job_has_a_gpu_and_no_privileges():
    manifest = create_job(image="registry.example.org/trainer@sha256:0", claim="work", name="run")["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "work"
    cpu_pod = create_job(image="image", claim="work", gpus=0)["job_manifest"]["spec"]["template"]["spec"]
    assert cpu_pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 0


def test_job_reads_passwords_from_the_secret():
    pod = create_job(image="image", claim="work", secret="mine")["job_manifest"]["spec"]["template"]["spec"]  # noqa: S106
    variables = pod["containers"][0]["env"]
    secrets = {variable["name"]: variable for variable in variables if SECRET.search(variable["name"])}
    assert secrets.keys() == {"MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"}
    for variable in secrets.values():
        assert "value" not in variable
        assert variable["valueFrom"]["secretKeyRef"]["name"] == "mine"


def make(*arguments: str, engine: bool = False, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run make with or without a Docker engine."""
    (folder / "docker").write_text(f"#!/bin/sh\nexit {int(not engine)}\n")
    (folder / "docker").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["make", "--file", ROOT / "Makefile", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_make_images_uses_the_given_base(tmp_path):
    output = make(
        "--dry-run", "images", "BASE=base@sha256:0", "TORCH_INDEX=http://wheels/cpu", "TAG=cpu", folder=tmp_path
    ).stdout
    assert output.count("--build-arg BASE=base@sha256:0") == 3
    assert output.count("--build-arg TORCH_INDEX=http://wheels/cpu ") == 2
    assert "fadeformer-mlflow:cpu" in output
    assert output.count("buildah build --layers") == 3
    output = make("--dry-run", "images", engine=True, folder=tmp_path).stdout
    assert output.count("docker build") == 3
    assert "build-arg" not in output


def test_make_up_needs_the_env_file(tmp_path):
    for target in ("up", "down"):
        process = make(target, folder=tmp_path)
        assert process.returncode == 2
        assert "copy docker/env.example to docker/.env" in process.stderr
