"""A report says what is in the folder, escapes all of it, and needs nothing but itself: seen in a real browser."""

import json
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
from hjepa.tasks.report.html import tables
from hjepa.tracking.run_folder import read_config, read_summary
from tests.helpers.runs import compose, tiny
from tests.integration.test_sweep import job

HERE = ("hardware=cpu", "hardware.threads=1", "tracking=none")


def report(*overrides: str) -> None:
    run(compose("task=report", *HERE, *overrides))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with some pictures and an evaluation."""
    root = tmp_path_factory.mktemp("r")
    run(compose(f"output_root={root}", *tiny("name=r", "train.epochs=1", "levels=flat")))
    folder = root / "default" / "r"
    run(compose("task=visualize", f"run={folder}", *HERE, "task.shown=2", "task.searched=8", "task.pictures=[pca,attention]"))
    rows = {"trained/depth2": {"class": 0.4321}, "pixels": {"class": 0.1234}}
    results = {"linear": {"key": "0a", "about": "test split", "rows": rows}}
    (folder / "evaluate").mkdir()
    found = {"status": "finished", "checkpoint": "aa", "checkpoints": {"aa": {"results": results}}}
    (folder / "evaluate" / "summary.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, which writes down what it fetches and what goes wrong."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("REPORTS ARE NOT SEEN IN A BROWSER: there is no chromium with chromedriver (apt-get install chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="REPORTS ARE NOT SEEN IN A BROWSER: pip install selenium")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield window
    window.quit()


def see(browser: Any, file: Path) -> str:
    """The text of a page that renders whole, without complaint and without a network."""
    for log in ("performance", "browser"):
        browser.get_log(log)  # of pages before
    browser.get(file.as_uri())
    fetched = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in fetched if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {file.as_uri()}
    assert browser.get_log("browser") == []
    widths = browser.execute_script("return [...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert widths
    assert min(widths) > 0
    assert browser.execute_script("return document.scripts.length") == 0
    for width in (1100, 420):
        browser.set_window_size(width, 900)
        wide = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"nothing sticks out at {width} pixels"
    return browser.execute_script("return document.body.innerText")


def test_a_run_in_a_browser(trained: Path, browser: Any) -> None:
    report(f"run={trained}")
    text, summary = see(browser, trained / "report.html"), read_summary(trained)
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
    assert "clip_norm: 1.0" not in text, "the whole config is folded"
    browser.execute_script("document.querySelector('details').open = true")
    assert "clip_norm: 1.0" in browser.execute_script("return document.body.innerText")


def test_dark_and_light_are_readable(trained: Path, browser: Any) -> None:
    report(f"run={trained}")
    found = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        browser.get((trained / "report.html").as_uri())
        style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        ink, paper = ([int(v) for v in color[4:-1].split(",")] for color in browser.execute_script(style))
        assert abs(sum(ink) - sum(paper)) > 400
        found.append(sum(paper))
    assert found[0] > 600
    assert found[1] < 150


def test_a_sweep_in_a_browser(trained: Path, browser: Any, tmp_path: Path) -> None:
    scores = {("a", "0"): 0.2, ("a", "1"): 0.4, ("b", "0"): 0.6, ("b", "1"): 0.7}
    jobs = [job(n, tmp_path, linear=score, loss=loss, seed=seed) for n, ((loss, seed), score) in enumerate(scores.items())]
    jobs.append(job(4, tmp_path, "failed", 0.9, loss="c", seed="<i>0</i>"))
    jobs[4].state, jobs[4].reason = "FAILED", "<b>no memory</b>"
    shutil.copytree(trained / "plots", tmp_path / "runs" / "3" / "plots")
    jobs.append(job(5, tmp_path, "stopped", 0.9, loss="d", seed="0"))
    Sweep(tmp_path).end(jobs)
    report(f"task.sweep={tmp_path}")
    text = see(browser, tmp_path / "report.html")
    assert "Best of 6 jobs: loss=b seed=1. Linear probe accuracy 70.0%, 60.0 points better than the untrained network" in text
    assert "Job 4 did not finish: FAILED" in text
    assert "<i>0</i>" in text, "shown, not obeyed"
    assert "30.0%" in text, "the mean of a"
    assert "14.1%" in text, "its deviation"
    assert browser.execute_script("return document.images.length") == 2, "the plot, and the curves of one run"


def test_what_a_folder_holds_is_shown_and_never_obeyed(trained: Path, browser: Any, tmp_path: Path) -> None:
    evil = "<script>document.title='owned'<!--\"'&{{ 7 * 7 }}<img src=http://example.invalid onerror=alert(1)>"
    folder = tmp_path / evil.replace("/", "")
    shutil.copytree(trained, folder)
    summary = read_summary(folder) | {"status": "failed", "reason": evil, "command": evil, "device": evil}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluate" / "summary.json").write_text(json.dumps({evil: {evil: {evil: evil}}}))
    config = (folder / "config.yaml").read_text().replace("experiment_name: default", f"experiment_name: {json.dumps(evil)}")
    (folder / "config.yaml").write_text(config)
    (folder / "visualize" / f"{evil.replace('/', '')}.png").write_bytes((folder / "visualize" / "pca.png").read_bytes())
    from hjepa.tasks.report.report import report as make

    make({"run": str(folder), "tracking": {}}, folder, None)
    text = see(browser, folder / "report.html")
    assert text.count("{{ 7 * 7 }}") >= 5
    assert "FAILED" in text
    assert evil in browser.title


@pytest.mark.parametrize("lost", [["summary.json"], ["summary.json", "metrics.jsonl", "plots", "visualize", "evaluate"]])
def test_a_run_that_goes_on_has_a_report(trained: Path, tmp_path: Path, lost: list[str]) -> None:
    shutil.copytree(trained, tmp_path / "r")
    for name in lost:
        shutil.rmtree(tmp_path / "r" / name) if (tmp_path / "r" / name).is_dir() else (tmp_path / "r" / name).unlink()
    report(f"run={tmp_path}/r")
    page = (tmp_path / "r" / "report.html").read_text()
    assert f"it got to step {0 if len(lost) > 1 else 9} so far" in page
    assert "task=evaluate" in page or len(lost) == 1


def test_the_recorded_command_names_the_same_run(trained: Path) -> None:
    python, file, *overrides = shlex.split(read_summary(trained)["command"])
    assert (python, file) == ("python", "launch.py")
    assert config_hash(resolve(compose(*overrides))) == config_hash(read_config(trained))


def test_the_same_folder_gives_the_same_report(trained: Path) -> None:
    report(f"run={trained}")
    first = (trained / "report.html").read_bytes()
    report(f"run={trained}")
    assert (trained / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], r"needs run=.* or task\.sweep=.*; neither was given"),
        (["run=x", "task.sweep=y"], "both were given"),
        (["run=x"], "is no run folder"),
        (["task.sweep=x"], r"is no sweep folder: it has no sweep\.json"),
    ],
)
def test_mistakes_are_told_in_one_sentence(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        report(*overrides)
    assert "\n" not in str(error.value)


def test_tables_are_found_wherever_they_are() -> None:
    records = [{"a": 1, "b": 0.5}, {"a": 2, "c": None}]
    (table,) = tables({"x": {"y": records, "plain": 3}})
    assert table.title == "x / y"
    assert table.heads == ["a", "b", "c"]
    assert table.rows == [["1", "0.5", ""], ["2", "", ""]]
    (named,) = tables({"rows": {"trained": {"linear": 0.25}, "pixels": {"knn": 1.0}}})
    assert named.heads == ["", "linear", "knn"]
    assert named.rows == [["trained", "0.25", ""], ["pixels", "", "1"]]
    assert list(tables({"status": "finished", "nothing": [], "deep": {"er": [1, 2]}})) == []
