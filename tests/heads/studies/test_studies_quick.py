"""Every study as ``featurecache study NAME --quick`` runs it: no network, no images, no weights."""

from __future__ import annotations

import json

import pytest
from support.command import call

from heads.studies.recipes import STUDIES

pytestmark = pytest.mark.slow


def run(*words: str) -> dict:
    result = call("study", *words, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_whole_as_a_trial(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, study = run(name, "--quick"), STUDIES[name]
    default = {images.name for images in study.images if images.default}
    assert set(found["parts"]) == {part.name for part in study.questions if part.images in default}
    assert found["steps"] and all(step["done"] for step in found["steps"])
    page = (tmp_path / "studies" / f"{name}-quick" / "report.html").read_text()
    assert '<body class="untrained">' in page and "drawn for this trial" in page
    assert all(row["grey"] for row in found["published"]) and page.count('class="greyed"') == len(found["published"])
    assert (found["overview"] is None) == (len(found["parts"]) == 1) == ('id="overview"' not in page)
    for record in found["parts"].values():
        chance = record["controls"][0]["test"][record["select"]]
        best = max(family["test"][record["select"]]["value"] for family in record["families"])
        assert best > (1 + chance) / 2, "its small networks learn what it draws"
        assert [control["name"] for control in record["controls"]][:2] == ["chance", "majority class"]
    assert [path.name for path in tmp_path.iterdir()] == ["studies"], "nothing is written elsewhere"


@pytest.mark.parametrize("name", ["pneumonia", "medmnist", "mindlina"])
def test_pneumoniamnist_can_be_given_to_the_studies_it_fits(name, real_data, tmp_path):
    out, first = tmp_path / "s", {"pneumonia": "vit-features,fractions", "mindlina": "pneumonia-cnn"}
    only = first.get(name, "pneumoniamnist-frozen")
    found = run(name, "--quick", "--data", str(real_data / "pneumoniamnist.npz"), "--out", str(out), "--only", only)
    (record,) = found["parts"].values()
    assert record["classes"] == ["normal", "pneumonia"] and record["positive"] == "pneumonia"
    assert "of 5,856 images" in (out / "report.html").read_text()
