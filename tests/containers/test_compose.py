"""What docker/ says, without a container: the Dockerfiles, the compose file, the entry points, the job template."""

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
ENDS = {"deployments"}  # services that do their work and end
VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")
SECRET = re.compile("PASSWORD|SECRET|AUTH_STRING|_KEY$")
GOOD = "hqnfu2746cbals"
DEFAULTS = [
    "password", "password1234", "Password-1234!", "p@ssw0rd123456", "admin", "administrator", "changeme",
    "change-me-now", "CHANGE_THIS_SECRET", "minioadmin", "your-password", "postgres2026", "123456789012",
    "aaaaaaaaaaaaaaaa", "mlflow-mlflow",
]  # fmt: skip
SETTINGS = {
    "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://mlflow@nowhere.invalid/mlflow",
    "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/artifacts",
    "MLFLOW_S3_ENDPOINT_URL": "http://nowhere.invalid:8333",
    "MLFLOW_AUTH_ADMIN_PASSWORD": GOOD,
    "MLFLOW_TRAINER_PASSWORD": GOOD,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": GOOD,
    "PGPASSWORD": GOOD,
    "AWS_SECRET_ACCESS_KEY": GOOD,
}
SECRETS = [name for name in SETTINGS if SECRET.search(name)]
SERVERS = {
    "PREFECT_API_URL": "http://prefect.invalid/api", "PREFECT_API_AUTH_STRING": f"user:{GOOD}",
    "MLFLOW_TRACKING_URI": "http://mlflow.invalid", "MLFLOW_TRACKING_PASSWORD": GOOD,
}  # fmt: skip
TEMPLATE = json.loads((DOCKER / "kubernetes" / "job-template.json").read_text())
assert len(DOCKERFILES) == 2
each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
each_service = pytest.mark.parametrize("name", SERVICES)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and what follows each, lines that go on joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    words = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in words)]


def stages(dockerfile: Path) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, from its FROM."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def hadolint(dockerfile: Path) -> str:
    """What hadolint finds."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("hadolint", path=search)
    assert program, "hadolint is not there; `make install` brings it"
    done = subprocess.run([program, "--no-color", dockerfile], capture_output=True, text=True, check=False)
    assert done.returncode == int(bool(done.stdout)), done
    return done.stdout


@each_dockerfile
def test_hadolint_finds_nothing(dockerfile):
    assert hadolint(dockerfile) == ""


def test_hadolint_finds_what_is_not_to_be(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN pip install torch\n")
    assert "DL3006" in hadolint(tmp_path / "Dockerfile")


@each_dockerfile
def test_the_base_is_an_argument_that_takes_a_digest(dockerfile):
    word, rest = instructions(dockerfile)[0]
    assert (word, rest.split("=")[0]) == ("ARG", "BASE")
    assert re.fullmatch(r"BASE=docker\.io/library/python:3\.11-[a-z-]+", rest)
    named = {stage[0][1].split(" AS ")[-1] for stage in stages(dockerfile)}
    assert {stage[0][1].split()[0] for stage in stages(dockerfile)} <= {"${BASE}", *named}


@each_dockerfile
def test_what_is_left_has_no_compiler_no_cache_and_no_package_list(dockerfile):
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
def test_every_image_is_of_a_user_by_number_and_starts_by_a_list(dockerfile):
    first, *last = stages(dockerfile)
    assert not [rest for word, rest in first if word == "USER"]
    users = [rest for stage in last for word, rest in stage if word == "USER"]
    assert users in (["10001:10001"], ["10002:10002"])  # which a stage takes over from the one before
    entry = next(rest for stage in last for word, rest in stage if word == "ENTRYPOINT")
    assert json.loads(entry)[0] == "tini"


@each_dockerfile
def test_no_layer_has_a_secret(dockerfile):
    found = instructions(dockerfile)
    assert {"FROM", "RUN", "COPY", "USER"} <= {word for word, _ in found}
    assert "ADD" not in {word for word, _ in found}
    settings = [rest for word, rest in found if word in ("ARG", "ENV")]
    assert settings
    assert [rest for rest in settings if SECRET.search(rest.upper())] == []


@each_dockerfile
def test_copied_files_are_there(dockerfile):
    sent = context()
    copies = [rest for word, rest in instructions(dockerfile) if word == "COPY" and not rest.startswith("--from")]
    sources = {source for rest in copies for source in rest.split()[:-1]}
    assert sources
    for source in sources:
        assert source == "." or any(name == source or name.startswith(f"{source}/") for name in sent), source


def context(folder: Path = ROOT) -> set[str]:
    """The files that are sent to whoever builds, of all that may lie in the project's folder."""
    return exclude_paths(str(folder), (ROOT / ".dockerignore").read_text().splitlines()) - {".dockerignore"}


def test_what_is_sent_to_the_builder_is_code_alone(tmp_path):
    kept = [
        "fadeformer/io/atomic.py",
        "pipelines/tracking/store.py",
        "params.yaml",
        ".dvc/config",
        "data/own/README.md",
    ]
    left = [
        ".git/config", ".venv/bin/python", "docker/.env", "docker/env.example", ".dvc/config.local", ".dvc/cache/files",
        "data/raw/image.png", "data/own/patient.dcm", "data/weights/mine.pth", "mlruns/mlflow.db", "reports/index.html",
        "models/best_model.pth", ".prefect/prefect.db", "fadeformer/__pycache__/files.pyc", "dvc.lock", "tests/a.py",
    ]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert {name for name in context(tmp_path) if (tmp_path / name).is_file()} == set(kept)


def test_what_the_stages_depend_on_is_sent():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    known = set(listing.stdout.split())
    pipeline = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    wanted = {name for stage in pipeline.values() for name in stage["deps"]} & known
    assert len(wanted) > 100
    assert wanted | {"params.yaml", "prefect.yaml", "pyproject.toml", "pipelines/orchestration/flows.py"} <= context()


def test_mlflow_has_the_versions_of_the_project():
    ours, server = (
        dict(re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE))
        for path in (ROOT / "requirements.lock", DOCKER / "mlflow.lock")
    )
    ours = {plain(name): version for name, version in ours.items()}
    both = {name: version for name, version in server.items() if plain(name) in ours}
    assert {"mlflow", "SQLAlchemy", "psycopg", "Flask", "boto3", "Flask-WTF"} <= both.keys()
    assert both == {name: ours[plain(name)] for name in both}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def filled(text: str) -> str:
    """The compose file as JSON, its variables and anchors put in, as compose itself reads it."""
    values = VARIABLE.sub(lambda found: found[3] if found[2] == ":-" else GOOD, text)
    return json.dumps(YAML(typ="safe").load(values))


def test_the_compose_file_keeps_its_specification():
    assert set(PyCompose.from_json(filled(COMPOSE)).service_names()) == SERVICES.keys()
    for key, misspelt in (("start_period", "start_perod"), ("service_healthy", "service_helthy"), (": 5s", ": 5x")):
        with pytest.raises(ValueError, match=misspelt.strip(": 5")):
            PyCompose.from_json(filled(COMPOSE.replace(key, misspelt)))


def test_every_variable_is_explained_and_has_no_value():
    described: dict[str, str] = {}
    comment = ""
    for line in (DOCKER / "env.example").read_text().splitlines():
        if line.startswith("#"):
            comment += line
        elif line:
            name, value = line.split("=")
            assert value == "", line
            assert comment, f"{name} is not explained"
            described[name] = comment
        else:
            comment = ""
    assert described.keys() == {name for name, _, _ in VARIABLE.findall(COMPOSE)}


def test_what_nobody_may_know_has_no_default():
    secrets = {name for name, _, _ in VARIABLE.findall(COMPOSE) if SECRET.search(name)}
    assert len(secrets) == 9
    for name, kind, message in VARIABLE.findall(COMPOSE):
        if name in secrets:
            assert kind == ":?", name
            assert message.startswith("set it in docker/.env"), name
        else:
            assert kind == ":-", name


def test_secrets_are_in_no_file_and_no_command():
    seen = 0
    for name, service in SERVICES.items():
        for key, value in service["environment"].items():
            if SECRET.search(key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {key}"
                seen += 1
        words = [
            *service.get("command", []),
            *service.get("entrypoint", []),
            *service["healthcheck"].get("test", []),
        ]
        assert not [word for word in words if any(SECRET.search(one) for one, _, _ in VARIABLE.findall(word))]
    assert seen > 10


@each_service
def test_each_service_is_confined(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "/tmp" in service["tmpfs"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & service.keys()
    own = service["image"].startswith("${WORKER_IMAGE") or service["image"].startswith("${MLFLOW_IMAGE")
    assert own or re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])


@each_service
def test_each_image_has_a_registry_and_a_tag_and_may_be_another(name):
    _, kind, image = VARIABLE.fullmatch(SERVICES[name]["image"]).groups()
    assert kind == ":-"
    registry, tag = re.fullmatch(r"([a-z.]+)/[a-z/-]+:([\w.-]+)", image).groups()
    assert registry == "localhost" or (registry == "docker.io" and re.search(r"\d", tag))


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - ENDS))
def test_each_service_tells_of_its_health(name):
    test = SERVICES[name]["healthcheck"]["test"]
    assert test[0] == "CMD"
    assert "127.0.0.1" in " ".join(test)
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_others_are_waited_for():
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            ends = other in ENDS
            assert how == {"condition": "service_completed_successfully" if ends else "service_healthy"}
    assert set(SERVICES["worker"]["depends_on"]) == {"mlflow", "prefect", "deployments"}
    assert set(SERVICES["mlflow"]["depends_on"]) == {"postgres", "objects"}


def test_ports_are_this_machines_alone():
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports.keys() == {"mlflow", "prefect"}
    for port in itertools.chain.from_iterable(ports.values()):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port)


def test_who_runs_code_reaches_neither_database_nor_objects():
    whole = YAML(typ="safe").load(COMPOSE)
    assert {name for name, network in whole["networks"].items() if (network or {}).get("internal")} == {
        "database", "objects",
    }  # fmt: skip
    members = {
        network: {name for name, service in SERVICES.items() if network in service["networks"]}
        for network in whole["networks"]
    }
    assert members["database"] == {"postgres", "mlflow", "prefect"}
    assert members["objects"] == {"objects", "mlflow"}
    assert [SERVICES[name]["networks"] for name in ("postgres", "objects")] == [["database"], ["objects"]]
    for name in ("worker", "worker-gpu", "deployments"):
        assert SERVICES[name]["networks"] == ["front"]
        assert not {"AWS_SECRET_ACCESS_KEY", "PGPASSWORD"} & SERVICES[name]["environment"].keys()
        assert "MLFLOW_ADMIN_PASSWORD" not in str(SERVICES[name])


def test_volumes_are_named_and_used():
    whole = YAML(typ="safe").load(COMPOSE)
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert {name for name in mounted if not name.startswith("./")} == whole["volumes"].keys()
    assert all((DOCKER / name).is_file() for name in mounted if name.startswith("./"))


def test_the_gpu_is_an_option():
    assert SERVICES["worker"]["profiles"] == ["cpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    device = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert device["capabilities"] == ["gpu"]
    same = {"profiles", "shm_size", "deploy"}
    worker, gpu = ({k: v for k, v in SERVICES[name].items() if k not in same} for name in ("worker", "worker-gpu"))
    assert worker == gpu


def start(script: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs an entry point as a container would, with nothing in its environment but this."""
    search = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    command = [sys.executable, DOCKER / script, *arguments]
    own = {"PATH": search, "HOME": str(folder.parent / "home"), "TMPDIR": str(folder.parent), **environment}
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=120, check=False)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line by which an entry point ended."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


@pytest.fixture
def work(tmp_path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


# The server, what is changed in its environment (None: taken out of it), and the reason not to start.
REFUSED = [
    *(
        ("MLflow", {name: None}, f"{name} is missing")
        for name in sorted(SETTINGS.keys() - {"MLFLOW_TRAINER_PASSWORD", "MLFLOW_S3_ENDPOINT_URL"})
    ),
    *(("the worker", {name: None}, f"{name} is missing") for name in SERVERS if name != "MLFLOW_TRACKING_URI"),
    *(("MLflow", {name: GOOD[:11]}, f"{name} has fewer than 12 characters") for name in SECRETS),
    *(
        (server, {name: f"{user}{password}"}, f"{name} is a password that everybody knows")
        for server, name, user in (
            ("MLflow", "MLFLOW_AUTH_ADMIN_PASSWORD", ""), ("the worker", "PREFECT_API_AUTH_STRING", "user:"),
        )
        for password in DEFAULTS
    ),
]  # fmt: skip


@pytest.mark.parametrize(("server", "changes", "reason"), REFUSED)
def test_no_server_without_settings_and_secrets_of_its_own(server, changes, reason, work):
    command, settings = {
        "MLflow": (["mlflow_start.py"], SETTINGS), "the worker": (["trainer_start.py", "worker"], SERVERS),
    }[server]  # fmt: skip
    environment = {name: value for name, value in {**settings, **changes}.items() if value is not None}
    told = refused(start(*command, folder=work, **environment))
    assert told.startswith(f"{server} does not start: {reason}")
    assert not [value for value in changes.values() if value and value in told.replace(reason, "")]


def test_all_that_mlflow_misses_is_told_at_once(work):
    some = {name: value for name, value in SETTINGS.items() if name not in SECRETS}
    told = refused(start("mlflow_start.py", folder=work, **some))
    assert told.count(" is missing") == len(SECRETS) - 1  # without a trainer's password there is no trainer


def test_a_secret_may_be_a_file(work):
    settings = {name: value for name, value in SETTINGS.items() if name != "PGPASSWORD"}
    (work / "secret").write_text("password1234\n")
    told = refused(start("mlflow_start.py", folder=work, PGPASSWORD_FILE=str(work / "secret"), **settings))
    assert "PGPASSWORD is a password that everybody knows" in told
    told = refused(start("mlflow_start.py", folder=work, PGPASSWORD_FILE=str(work / "none"), **settings))
    assert "which cannot be read" in told


def test_no_prefect_server_without_secrets(work):
    told = refused(
        start("trainer_start.py", "server", folder=work, PREFECT_SERVER_DATABASE_DRIVER="postgresql+asyncpg")
    )
    assert "PREFECT_SERVER_API_AUTH_STRING is missing" in told
    assert "PREFECT_SERVER_DATABASE_PASSWORD is missing" in told
    told = refused(start("trainer_start.py", "server", folder=work, PREFECT_SERVER_API_AUTH_STRING=GOOD))
    assert "is not of the form USER:PASSWORD" in told


def test_a_command_without_servers_needs_no_password(work, code):
    done = start("trainer_start.py", "cat", "params.yaml", folder=work, FADEFORMER_CODE=str(code))
    assert (done.returncode, done.stdout) == (0, "seed: 1\n"), done


def test_a_command_hears_of_an_interrupt_although_it_was_started_in_the_background(work, code):
    ask = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = start("trainer_start.py", sys.executable, "-c", ask, folder=work, FADEFORMER_CODE=str(code))
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.stdout.strip() == "True"


def test_a_command_that_is_not_there_is_told(work, code):
    assert "nothing-of-the-kind cannot be run" in refused(
        start("trainer_start.py", "nothing-of-the-kind", folder=work, FADEFORMER_CODE=str(code))
    )


@pytest.fixture
def code(tmp_path) -> Path:
    """Code as an image has it."""
    folder = tmp_path / "code"
    (folder / "pipelines").mkdir(parents=True)
    (folder / "params.yaml").write_text("seed: 1\n")
    (folder / "pipelines" / "old.py").write_text("old = 1\n")
    (folder / ".gitignore").write_text("/models\n")
    return folder


def lay(work: Path, code: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return start("trainer_start.py", "true", folder=work, FADEFORMER_CODE=str(code), **environment)


def git(work: Path, *words: str) -> str:
    own = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *own, *words], cwd=work, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_same_code_is_the_same_commit_everywhere(work, code, tmp_path):
    assert lay(work, code).returncode == 0
    assert (work / "pipelines" / "old.py").read_text() == "old = 1\n"
    assert git(work, "status", "--porcelain") == ""
    first = git(work, "rev-parse", "HEAD")
    assert lay(work, code).returncode == 0
    assert git(work, "rev-parse", "HEAD") == first
    other = tmp_path / "other"
    other.mkdir()
    assert lay(other, code).returncode == 0
    assert git(other, "rev-parse", "HEAD") == first


def test_a_newer_image_goes_together_with_what_was_changed(work, code):
    lay(work, code)
    (work / "params.yaml").write_text("seed: 2\n")
    (work / "models").mkdir()
    (work / "models" / "best_model.pth").touch()
    (code / "pipelines" / "old.py").unlink()
    (code / "pipelines" / "new.py").write_text("new = 1\n")
    assert lay(work, code).returncode == 0
    assert sorted(path.name for path in (work / "pipelines").iterdir()) == ["new.py"]
    assert (work / "params.yaml").read_text() == "seed: 2\n"
    assert (work / "models" / "best_model.pth").exists()


def test_what_does_not_go_together_is_told_and_left(work, code):
    lay(work, code)
    (work / "params.yaml").write_text("seed: 2\n")
    git(work, "commit", "--quiet", "--all", "--message", "mine")
    (code / "params.yaml").write_text("seed: 3\n")
    assert "changes that do not go together with this image's code" in refused(lay(work, code))
    assert (work / "params.yaml").read_text() == "seed: 2\n"
    assert git(work, "status", "--porcelain") == ""
    commit = re.search(r"git merge (\w+)", lay(work, code).stderr).group(1)
    git(work, "merge", "--quiet", "--strategy-option", "ours", commit)
    assert lay(work, code).returncode == 0


def test_files_of_somebody_else_are_not_written_over(work, code):
    (work / "params.yaml").write_text("seed: 9\n")
    refused(lay(work, code))
    assert (work / "params.yaml").read_text() == "seed: 9\n"


def test_a_clone_is_left_alone(work, code):
    git(work, "init", "--quiet")
    (work / "params.yaml").write_text("seed: 4\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "--message", "mine")
    assert lay(work, code).returncode == 0
    assert (work / "params.yaml").read_text() == "seed: 4\n"
    assert not (work / "pipelines").exists()


def test_a_repository_is_cloned_once(work, code, tmp_path):
    (work / "lost+found").mkdir()  # of a volume's own file system
    source = tmp_path / "source"
    source.mkdir()
    git(source, "init", "--quiet", "--initial-branch=trunk")
    (source / "params.yaml").write_text("seed: 5\n")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "--message", "first")
    assert lay(work, code, FADEFORMER_REPOSITORY=str(source)).returncode == 0
    assert (work / "params.yaml").read_text() == "seed: 5\n"
    git(source, "commit", "--quiet", "--allow-empty", "--message", "second")
    assert lay(work, code, FADEFORMER_REPOSITORY=str(source)).returncode == 0
    assert git(work, "log", "--format=%s") == "first"
    git(work, "pull", "--quiet")
    assert git(work, "log", "--format=%s", "-1") == "second"


def test_a_repository_that_is_not_there_is_told(work, code, tmp_path):
    told = refused(lay(work, code, FADEFORMER_REPOSITORY=str(tmp_path / "nowhere")))
    assert "`git fetch` failed" in told


def job(**given: object) -> dict[str, Any]:
    """The job that Prefect makes of the template, as its worker fills it in."""
    properties = TEMPLATE["variables"]["properties"]
    values = {name: one["default"] for name, one in properties.items() if "default" in one} | given
    return apply_values(TEMPLATE["job_configuration"], values)


def test_every_variable_is_used_and_every_place_has_one():
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == TEMPLATE["variables"]["properties"].keys()
    assert set(TEMPLATE["variables"]["required"]) == {"image", "claim"}


def test_a_job_has_a_gpu_and_no_rights():
    manifest = job(image="registry.example.org/trainer@sha256:0", claim="work", name="run")["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "work"
    other = job(image="image", claim="work", gpus=0)["job_manifest"]["spec"]["template"]["spec"]
    assert other["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 0


def test_passwords_come_from_the_secret():
    pod = job(image="image", claim="work", secret="mine")["job_manifest"]["spec"]["template"]["spec"]  # noqa: S106
    secrets = {one["name"]: one for one in pod["containers"][0]["env"] if SECRET.search(one["name"])}
    assert secrets.keys() == {"MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"}
    for one in secrets.values():
        assert "value" not in one
        assert one["valueFrom"]["secretKeyRef"]["name"] == "mine"


def make(*arguments: str, engine: bool = False, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs make where a Docker engine answers, or none does."""
    (folder / "docker").write_text(f"#!/bin/sh\nexit {int(not engine)}\n")
    (folder / "docker").chmod(0o755)
    own = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["make", "--file", ROOT / "Makefile", *arguments]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)


def test_images_are_built_from_the_base_that_is_named(tmp_path):
    plan = make(
        "--dry-run", "images", "BASE=base@sha256:0", "TORCH_INDEX=http://wheels/cpu", "TAG=cpu", folder=tmp_path
    ).stdout
    assert plan.count("--build-arg BASE=base@sha256:0") == 3
    assert plan.count("--build-arg TORCH_INDEX=http://wheels/cpu ") == 2
    assert "fadeformer-mlflow:cpu" in plan
    assert plan.count("buildah build --layers") == 3
    plan = make("--dry-run", "images", engine=True, folder=tmp_path).stdout
    assert plan.count("docker build") == 3
    assert "build-arg" not in plan


def test_nothing_starts_without_passwords(tmp_path):
    for target in ("up", "down"):
        done = make(target, folder=tmp_path)
        assert done.returncode == 2
        assert "copy docker/env.example to docker/.env" in done.stderr
