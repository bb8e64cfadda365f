"""DICOM files in the pipeline; no output contains the name or ID of a patient."""

import shutil

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.data import get_testdata_file

from tests.conftest import Project

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("shared_server")]
# Random, so that this file, which the copy of the project contains, does not contain them.
LETTERS = "".join(np.random.default_rng(774).permutation(list("ABCDEFGHIKLMNOPRSTUVWXYZ")))
NAME, BORN, NUMBER = f"{LETTERS[:10]}^{LETTERS[10:20]}", "1933" + "11" * 2, LETTERS[:8] + "-{:03}-" + LETTERS[8:12]


@pytest.fixture
def scans(tmp_path):
    """Zip of forty patients with two files each, in the classes bright and dark."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    random = np.random.default_rng(0)
    for patient in range(40):
        for number in range(2):
            values = random.integers(0, 2000, (dataset.Rows, dataset.Columns)) + 2000 * (patient % 2)
            dataset.PixelData = values.astype("<i2").tobytes()
            dataset.PatientName, dataset.PatientBirthDate = NAME, BORN
            dataset.PatientID = NUMBER.format(patient)
            dataset.WindowCenter, dataset.WindowWidth = 2000, 4000
            name = f"{NAME}-{patient}-{number}.dcm"  # typical for exports
            path = tmp_path / "scans" / ("bright" if patient % 2 else "dark") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(path)
    # A zip, because DVC would store the file names of a folder in .cache/dvc.
    shutil.make_archive(str(tmp_path / "scans"), "zip", tmp_path / "scans")
    return tmp_path / "scans.zip"


def test_outputs_contain_no_patient_names_or_ids(project: Project, scans):
    project.change(dataset={"name": "folder", "root": str(scans)}, preprocess={"image_size": 16}, train={"epochs": 1})
    output = project.stages()
    rows = pd.read_parquet(project.folder / "data/manifest.parquet")
    assert rows["group"].nunique() == 40
    assert rows.groupby("group")["split"].nunique().max() == 1
    assert rows.groupby("label")["brightness"].mean().diff().abs().max() > 50
    secrets = [word.encode() for word in (*NAME.split("^"), BORN, NUMBER[:8])]
    assert any(secrets[0] in path.read_bytes() for path in scans.with_suffix("").rglob("*.dcm"))
    count = 0
    for path in (*project.folder.rglob("*"), *project.home.rglob("*"), *project.temporary.rglob("*")):
        if path.is_file():
            count += 1
            data = path.read_bytes()
            assert not [word for word in secrets if word in data], path
    assert count > 100
    assert not [word for word in secrets if word in output.encode()]
    assert (project.folder / "data/salt").stat().st_size == 32
    names = project.run("python", "-m", "pipelines.stages.download", "--names")
    assert f"{rows['id'].iloc[0].removesuffix('.png')}\t" in names
    assert f"bright/{NAME}-1-0.dcm" in names
    assert "data/salt" not in project.run("git", "ls-files", "--others", "--exclude-standard")
