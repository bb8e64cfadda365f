"""The cluster fixture; its servers run only during one module, because they use memory and CPU time."""

from collections.abc import Iterator

import pytest

from tests import postgresql
from tests.conftest import SMALL_PARAMS, clone
from tests.pipeline import cluster as servers
from tests.pipeline.cluster import Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running deployment of a project with small parameters; skipped without PostgreSQL."""
    postgresql.require()
    project = clone(tmp_path_factory.mktemp("cluster"))
    project.change(**SMALL_PARAMS)
    project.commit("small parameters")
    with servers.running(project) as cluster:
        yield cluster
