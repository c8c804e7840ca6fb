"""Tests of `task=report` in a real browser: a page shows the content of its folder, escaped, and loads nothing else."""

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hjepa.config.errors import UserError
from hjepa.config.identity import config_hash
from hjepa.config.run import run
from hjepa.config.schema import resolve
from hjepa.sweeps.sweep import Sweep
from hjepa.tasks.report.report import write_report
from hjepa.tasks.report.run_page import run_facts
from hjepa.tracking.run_folder import read_config, read_summary
from tests.helpers.runs import compose, tiny
from tests.integration.test_sweep import job

COMMAND = ("hardware=cpu", "hardware.threads=1", "tracking=none")


def report(*overrides: str) -> None:
    run(compose("task=report", *COMMAND, *overrides))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return the folder of a run with some pictures and an evaluation."""
    root = tmp_path_factory.mktemp("r")
    run(compose(f"output_root={root}", *tiny("name=r", "train.epochs=1", "levels=flat")))
    folder = root / "default" / "r"
    run(compose("task=visualize", f"run={folder}", *COMMAND, "task.shown=2", "task.searched=8", "task.pictures=[pca,attention]"))
    rows = {"trained/depth2": {"class": 0.4321}, "pixels": {"class": 0.1234}}
    results = {"linear": {"key": "0a", "about": "test split", "rows": rows}}
    (folder / "evaluate").mkdir()
    (folder / "evaluate" / "summary.json").write_text(json.dumps(evaluation_summary(results)))
    return folder


def evaluation_summary(results: dict[str, Any]) -> dict[str, Any]:
    """Return the content of evaluate/summary.json with these results by protocol."""
    return {"status": "finished", "checkpoint": "aa", "checkpoints": {"aa": {"results": results}}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield Chromium, with logs of its requests and errors."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("REPORTS ARE NOT TESTED IN A BROWSER: chromium or chromedriver is missing (apt-get install chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="REPORTS ARE NOT TESTED IN A BROWSER: pip install selenium")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield window
    window.quit()


def page_text(browser: Any, file: Path) -> str:
    """Return the text of a page, and check that it renders completely, without errors and without a network."""
    for log in ("performance", "browser"):
        browser.get_log(log)  # discards the entries of earlier pages
    browser.get(file.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in events if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {file.as_uri()}
    assert browser.get_log("browser") == []
    widths = browser.execute_script("return [...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert widths
    assert min(widths) > 0
    assert browser.execute_script("return document.scripts.length") == 0
    for width in (1100, 420):
        browser.set_window_size(width, 900)
        wide = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"the page is wider than {width} pixels"
    return browser.execute_script("return document.body.innerText")


def test_report_of_a_run_in_a_browser(trained: Path, browser: Any) -> None:
    report(f"run={trained}")
    text, summary = page_text(browser, trained / "report.html"), read_summary(trained)
    for key in ("linear", "knn"):
        assert f"{100 * summary['probe'][key]:.1f} %" in text
        assert f"{100 * summary['untrained'][key]:.1f} %" in text
    assert any(words in text for words in ("points better", "points WORSE", "no better"))
    assert "Not drawn yet: predictions, neighbors, scatter." in text
    assert f"task=visualize run={trained}" in text
    assert "43.2%" in text, "the evaluation"
    assert summary["command"] in text
    assert f"{summary['steps']}" in text
    assert browser.execute_script("return document.images.length") == 4, "curves, masks, pca, attention"
    assert "clip_norm: 1.0" not in text, "the config is collapsed"
    browser.execute_script("document.querySelector('details').open = true")
    assert "clip_norm: 1.0" in browser.execute_script("return document.body.innerText")


def test_page_is_readable_in_light_and_dark_mode(trained: Path, browser: Any) -> None:
    report(f"run={trained}")
    brightness = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        browser.get((trained / "report.html").as_uri())
        style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        color, background = ([int(v) for v in color[4:-1].split(",")] for color in browser.execute_script(style))
        assert abs(sum(color) - sum(background)) > 400
        brightness.append(sum(background))
    assert brightness[0] > 600
    assert brightness[1] < 150


def test_report_of_a_sweep_in_a_browser(trained: Path, browser: Any, tmp_path: Path) -> None:
    scores = {("a", "0"): 0.2, ("a", "1"): 0.4, ("b", "0"): 0.6, ("b", "1"): 0.7}
    jobs = [job(n, tmp_path, linear=score, loss=loss, seed=seed) for n, ((loss, seed), score) in enumerate(scores.items())]
    jobs.append(job(4, tmp_path, "failed", 0.9, loss="c", seed="<i>0</i>"))
    jobs[4].state, jobs[4].reason = "FAILED", "<b>no memory</b>"
    shutil.copytree(trained / "plots", tmp_path / "runs" / "3" / "plots")
    jobs.append(job(5, tmp_path, "stopped", 0.9, loss="d", seed="0"))
    sweep = Sweep(tmp_path)
    sweep.save(jobs)
    sweep.refresh(jobs)
    sweep.summarize(jobs)
    report(f"task.sweep={tmp_path}")
    text = page_text(browser, tmp_path / "report.html")
    assert "Best of 6 jobs: loss=b seed=1. Linear probe accuracy 70.0%, 60.0 points better than the untrained network" in text
    assert "Job 4 did not finish: FAILED" in text
    assert "<i>0</i>" in text, "escaped"
    assert "30.0%" in text, "the mean of a"
    assert "14.1%" in text, "its deviation"
    assert browser.execute_script("return document.images.length") == 2, "the plot, and the curves of one run"


def test_contents_of_a_folder_are_escaped(trained: Path, browser: Any, tmp_path: Path) -> None:
    malicious = "<script>document.title='owned'<!--\"'&{{ 7 * 7 }}<img src=http://example.invalid onerror=alert(1)>"
    folder = tmp_path / malicious.replace("/", "")
    shutil.copytree(trained, folder)
    summary = read_summary(folder) | {"status": "failed", "reason": malicious, "command": malicious, "device": malicious}
    (folder / "summary.json").write_text(json.dumps(summary))
    results = {malicious: {"key": "0a", "about": malicious, "rows": {malicious: {malicious: 0.5}}}}
    (folder / "evaluate" / "summary.json").write_text(json.dumps(evaluation_summary(results)))
    config = (folder / "config.yaml").read_text().replace("experiment_name: default", f"experiment_name: {json.dumps(malicious)}")
    (folder / "config.yaml").write_text(config)
    (folder / "visualize" / f"{malicious.replace('/', '')}.png").write_bytes((folder / "visualize" / "pca.png").read_bytes())
    write_report({"run": str(folder), "tracking": {}}, folder, None)
    text = page_text(browser, folder / "report.html")
    assert text.count("{{ 7 * 7 }}") >= 5
    assert "FAILED" in text
    assert malicious in browser.title


@pytest.mark.parametrize("missing", [["summary.json"], ["summary.json", "metrics.jsonl", "plots", "visualize", "evaluate"]])
def test_unfinished_run_has_a_report(trained: Path, tmp_path: Path, missing: list[str]) -> None:
    shutil.copytree(trained, tmp_path / "r")
    for name in missing:
        shutil.rmtree(tmp_path / "r" / name) if (tmp_path / "r" / name).is_dir() else (tmp_path / "r" / name).unlink()
    report(f"run={tmp_path}/r")
    page = (tmp_path / "r" / "report.html").read_text()
    assert f"it has reached step {0 if len(missing) > 1 else 9} so far" in page
    assert "task=evaluate" in page or len(missing) == 1


def test_recorded_command_has_the_config_of_the_run(trained: Path) -> None:
    python, file, *overrides = shlex.split(read_summary(trained)["command"])
    assert (python, file) == ("python", "launch.py")
    assert config_hash(resolve(compose(*overrides))) == config_hash(read_config(trained))


def test_report_is_deterministic(trained: Path) -> None:
    report(f"run={trained}")
    first = (trained / "report.html").read_bytes()
    report(f"run={trained}")
    assert (trained / "report.html").read_bytes() == first


def test_the_page_says_which_pictures_and_probes_are_missing(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "r"))
    summary = json.loads((folder / "visualize" / "summary.json").read_text())
    (folder / "visualize" / "summary.json").write_text(json.dumps(summary | {"skipped": ["neighbors"]}))
    (folder / "summary.json").unlink()
    report(f"run={folder}")
    text = (folder / "report.html").read_text()
    assert "Not drawn yet: predictions, scatter." in text
    assert "no results of probes yet" in text


def test_the_page_shows_the_newer_curves(trained: Path, tmp_path: Path) -> None:
    """Curves of `task=visualize` are older after more training, and newer if they were drawn after it."""
    folder = Path(shutil.copytree(trained, tmp_path / "r"))
    drawn, final = folder / "visualize" / "curves.png", folder / "plots" / "curves.png"
    shutil.copyfile(folder / "visualize" / "pca.png", drawn)
    for time, expected in ((final.stat().st_mtime - 9, final), (final.stat().st_mtime + 9, drawn)):
        os.utime(drawn, (time, time))
        (curves,) = run_facts(folder)["curves"]
        assert curves.file == expected


def test_pictures_and_evaluations_of_an_earlier_step_say_so(trained: Path, tmp_path: Path) -> None:
    folder, steps = Path(shutil.copytree(trained, tmp_path / "r")), read_summary(trained)["steps"]
    (folder / "plots" / "curves.png").rename(folder / "visualize" / "curves.png")
    summary = read_summary(folder / "visualize")
    changed = {
        "pictures": ["attention.png", "curves.png"],
        "step": 3,
        "steps": {"attention.png": 3, "curves.png": 3, "pca.png": steps},
    }
    (folder / "visualize" / "summary.json").write_text(json.dumps(summary | changed))
    evaluation = read_summary(folder / "evaluate")
    for step, note in ((4, f"; the network of step 4 of {steps}"), (steps, "")):
        evaluation["checkpoints"]["aa"]["step"] = step
        (folder / "evaluate" / "summary.json").write_text(json.dumps(evaluation))
        facts = run_facts(folder)
        assert [table.title for table in facts["evaluation"]] == [f"test split{note}"]
    notes = {picture.name: picture.note for picture in (*facts["curves"], *facts["pictures"])}
    assert notes == {"attention": f"The network of step 3 of {steps}.", "curves": "", "masks": "", "pca": ""}
    report(f"run={folder}")
    assert f"The network of step 3 of {steps}." in (folder / "report.html").read_text()


def test_pictures_of_earlier_commands_keep_their_steps_and_the_skipped_ones(trained: Path, tmp_path: Path) -> None:
    """The pictures of the fixture were drawn at the last step by an earlier command, whose summary has no steps of files."""
    folder = Path(shutil.copytree(trained, tmp_path / "r"))
    (folder / "visualize" / "attention.png").unlink()
    (folder / "checkpoints" / "latest.pt").rename(folder / "checkpoints" / "other.pt")
    summary = read_summary(folder / "visualize")
    (folder / "visualize" / "summary.json").write_text(json.dumps(summary | {"step": 3, "steps": {}}))
    run(compose("task=visualize", f"run={folder}", *COMMAND, "task.searched=2", "task.pictures=curves", "task.checkpoint=other"))
    summary = read_summary(folder / "visualize")
    assert summary["steps"] == {"pca.png": 3, "curves.png": read_summary(folder)["steps"]}
    assert summary["skipped"] == ["views"], "the run predicts no other views, whatever was drawn last"


def test_a_config_of_another_program_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml has no experiment_name"):
        report(f"run={tmp_path}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"needs run=.* or task\.sweep=.*; neither is set"),
        (["run=x", "task.sweep=y"], "both are set"),
        (["run=x"], "is no run folder"),
        (["task.sweep=x"], r"is no sweep folder: it has no sweep\.json"),
    ],
)
def test_invalid_options_raise_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        report(*overrides)
    assert "\n" not in str(error.value)
