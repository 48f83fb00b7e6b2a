"""Tests of the large-batch study: its searches, its resumption when killed, and its reports."""

import dataclasses
import gzip
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

from keras_sngm import SNGM
from processes import importing_project, run_python
from study import config, methods, pictures, results, search, summary, tables, tasks, workers
from study.__main__ import main
from study.config import Search, Setting, Study
from study.page import Report
from study.results import Run, Wanted
from study.training import Trainer

STUDY = ("-m", "study")
REPORT = ("-m", "study.report")
NO_SETTING = Setting("four", {"samples": 8}, {}, epochs=3, weight_decay=0.0)


@pytest.fixture(autouse=True)
def keras_home(tmp_path, monkeypatch):
    """Keep Keras' files in a temporary folder."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


def study_of(*searches, rates=7):
    """Return a study that has these searches."""
    return Study("any", "accuracy", rates, (100, 101), (0, 1, 2), searches)


def search_of(method="SNGM", batch_size=4, start=0):
    """Return a search with the setting `NO_SETTING`, which is never trained."""
    return Search(NO_SETTING, batch_size, method, start)


def run_of(method="SNGM", exponent=0, seed=0, final=True, score=0.5, **changes):
    """Return a run with made-up results; `changes` are fields of the run to replace."""
    run = Run(
        setting="four",
        fingerprint=NO_SETTING.fingerprint,
        method=method,
        batch_size=4,
        exponent=exponent,
        seed=seed,
        final=final,
        epochs=3,
        steps=6,
        seconds=1.0,
        validation=[score / 2, score, score],
        test=score if final else None,
        test_loss=1.0 if final else None,
        train_loss=[1.0, 0.9, 0.8],
        grad_norm=[2.0, 1.0, 0.5],
    )
    return dataclasses.replace(run, **changes)


def runs_with_scores(study, one, score_of):
    """Return all runs that a search asks for, in order, with made-up results.

    Args:
        study: the study.
        one: the search.
        score_of: a function of a run's exponent and seed that returns the score of the run.
    """
    runs = []
    while wanted := search.wanted(study, one, runs):
        now = wanted[0]
        score = score_of(now.exponent, now.seed)
        runs.append(run_of(one.method, now.exponent, now.seed, now.final, score))
    return runs


@pytest.mark.parametrize("peak", [-9, -4, -3, -1, 0, 1, 2, 5, 11])
def test_the_best_rate_is_found_and_never_lies_at_an_edge(peak):
    study = study_of(search_of())
    runs = runs_with_scores(study, search_of(), lambda k, seed: 1.0 - abs(k - peak) / 100)
    tried = {run.exponent for run in runs if not run.final}
    assert {peak - 1, peak, peak + 1} <= tried
    assert len(tried) >= study.rates
    if abs(peak) <= 2:
        assert len(tried) == study.rates
    for k in tried:
        seeds = [run.seed for run in runs if run.exponent == k and not run.final]
        assert seeds == list(study.tuning_seeds)
    final = [run for run in runs if run.final]
    assert [run.seed for run in final] == list(study.final_seeds)
    assert {run.exponent for run in final} == {peak}


@pytest.mark.parametrize("end", [-math.inf, 0, 4, math.inf])
def test_a_search_ends_where_all_rates_up_to_some_are_as_good(end):
    runs = runs_with_scores(study_of(search_of()), search_of(), lambda k, seed: float(k >= end))
    assert len({run.exponent for run in runs}) < 15
    assert len([run for run in runs if run.final]) == 3


def test_rates_are_judged_by_the_mean_of_the_seeds():
    """A learning rate is not chosen for one lucky seed if another seed fails at it."""
    scores = {(3, 100): 1.0, (3, 101): 0.1}
    runs = runs_with_scores(
        study_of(search_of()), search_of(), lambda k, seed: scores.get((k, seed), 0.8 - abs(k) / 50)
    )
    assert {run.exponent for run in runs if run.final} == {0}


def test_seeds_of_tuning_are_not_those_that_are_reported():
    for task in config.available():
        study = config.load(task)
        assert len(study.tuning_seeds) >= 3
        assert len(study.final_seeds) >= (8 if task == "mnist1d" else 3)
        assert not set(study.tuning_seeds) & set(study.final_seeds)


@pytest.mark.parametrize("task", config.available())
def test_every_study_compares_every_method(task):
    study = config.load(task)
    compared = {each.method for each in study.searches}
    variations = set(methods.ABLATIONS)
    if task == "ablations":
        assert compared == {"SNGM", *variations}
    else:
        assert compared == set(methods.METHODS) - variations
    assert len({results.key_of(each) for each in study.searches}) == len(study.searches)
    quick = config.load(task, quick=True)
    assert {each.method for each in quick.searches} == compared
    assert {each.setting.fingerprint for each in quick.searches}.isdisjoint(
        each.setting.fingerprint for each in study.searches
    )


def test_unknown_methods_are_refused(tmp_path, monkeypatch):
    content = json.loads((config.STUDIES / "mnist1d.json").read_text())
    content["settings"][0]["batch_sizes"] = {"8": ["SNGM", "SGNM"]}
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    monkeypatch.setattr(config, "STUDIES", tmp_path)
    with pytest.raises(ValueError, match=r"`batch_sizes` must.*Received: \['SGNM'\]"):
        config.load("wrong")


def test_schedules_warm_up_and_decay():
    plain, warm = methods.schedule("LARS", 100), methods.schedule("LARS, warm-up", 100)
    for schedule in (plain, warm):
        schedule.peak.assign(2.0)
    steps = np.arange(100)
    by_keras = keras.optimizers.schedules.PolynomialDecay(2.0, 100, 0.0, power=1.1)
    expected = [float(by_keras(step)) for step in steps]
    np.testing.assert_allclose([float(plain(step)) for step in steps], expected, rtol=1e-5)
    rates = [float(warm(step)) for step in steps]
    np.testing.assert_allclose(rates[:6], [0.4, 0.8, 1.2, 1.6, 2.0, 2.0], rtol=1e-6)
    assert np.all(np.diff(rates[5:]) < 0)
    assert rates[-1] < 0.05


def small_search(method, quick="mnist1d", batch_size=100, **changes):
    """Return the search of a method in a quick study, changed.

    Args:
        method: the method.
        quick: the name of the study.
        batch_size: the batch size.
        **changes: fields of the setting to replace.
    """
    study = config.load(quick, quick=True)
    (one,) = (each for each in study.searches if each.method == method)
    setting = dataclasses.replace(one.setting, **changes)
    return dataclasses.replace(one, setting=setting, batch_size=batch_size)


@pytest.mark.parametrize("method", ["SNGM", "LARS, warm-up", "AdamW"])
def test_a_trainer_that_is_used_again_trains_as_a_fresh_one(method):
    """A run of a trainer leaves no weights, optimizer state or learning rate to the next run."""
    wanted = Wanted(exponent=-4, seed=3, final=True)
    used = Trainer(small_search(method, epochs=2))
    used.run(Wanted(exponent=2, seed=5, final=False))
    again = [used.run(wanted), Trainer(small_search(method, epochs=2)).run(wanted)]
    for run in again:
        assert len(run.validation) == len(run.train_loss) == len(run.grad_norm) == 2
    np.testing.assert_allclose(again[0].train_loss, again[1].train_loss, rtol=1e-4)
    np.testing.assert_allclose(again[0].grad_norm, again[1].grad_norm, rtol=1e-3)
    assert abs(again[0].test - again[1].test) < 0.02


def test_a_run_is_that_of_plain_keras():
    """Plain Keras with the same weights, batches and schedule gives the losses of a run."""
    one = small_search("SNGM", epochs=2)
    trainer = Trainer(one)
    run = trainer.run(Wanted(exponent=-2, seed=7, final=False))
    keras.utils.set_random_seed(7)
    model = tasks.build(one.setting.model, trainer.task)
    rate = keras.optimizers.schedules.PolynomialDecay(0.5, run.steps, 0.0, power=1.1)
    model.compile(SNGM(rate, weight_decay=1e-4, decoupled_weight_decay=False), trainer.task.loss)
    history = model.fit(
        trainer._batches(7), epochs=2, steps_per_epoch=run.steps // 2, verbose=0, shuffle=False
    )
    np.testing.assert_allclose(run.train_loss, history.history["loss"], rtol=1e-4)


def test_every_epoch_has_whole_batches_in_an_order_of_its_own():
    trainer = Trainer(small_search("SNGM", epochs=2, batch_size=150))
    labels = [y.numpy() for _, y in trainer._batches(0)]
    assert [len(y) for y in labels] == [150] * 4
    first, second = np.concatenate(labels[:2]), np.concatenate(labels[2:])
    assert not np.array_equal(first, second)
    other = [y.numpy() for _, y in trainer._batches(1)]
    assert not np.array_equal(labels[0], other[0])


def test_training_that_fails_ends_and_scores_worst():
    trainer = Trainer(small_search("momentum SGD", epochs=3))
    run = trainer.run(Wanted(exponent=60, seed=0, final=True))
    assert run.test == run.validation[-1] == 0.1
    assert run.test_loss == math.inf
    assert len(run.validation) < 3


def test_batches_larger_than_the_data_are_refused():
    with pytest.raises(ValueError, match="at least one batch.*batch_size=401"):
        Trainer(small_search("SNGM", batch_size=401))


@pytest.mark.parametrize("task, score", [("images", 0.0), ("text", 0.0), ("clicks", 0.3)])
def test_other_tasks_train(task, score, monkeypatch):
    generator = np.random.default_rng(0)

    def load_data():
        return tuple(
            (generator.integers(0, 255, (n, 28, 28), "uint8"), generator.integers(0, 10, n))
            for n in (1_000, 100)
        )

    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", load_data)
    one = config.load(task, quick=True).searches[0]
    run = Trainer(one).run(Wanted(exponent=-2, seed=0, final=True))
    assert score < run.test <= 1.0
    assert math.isfinite(run.test_loss)
    assert run.grad_norm[0] > 0


def test_cifar_and_movielens_come_from_tensorflow_datasets():
    with tfds.testing.mock_data(num_examples=300):
        images = tasks.images("cifar10", samples=200, validation=50, size=32)
        ratings = tasks.ratings("movielens/100k-ratings", samples=200, validation=50, test=50)
    assert [part.x.shape for part in images[:3]] == [
        (200, 32, 32, 3),
        (50, 32, 32, 3),
        (300, 32, 32, 3),
    ]
    assert abs(images.train.x.mean()) < 1e-3
    assert [part.x.shape for part in ratings[:3]] == [(200, 2), (50, 2), (50, 2)]
    assert ratings.train.x.max() < ratings.classes
    assert set(np.unique(ratings.train.y)) <= {0.0, 1.0}


def test_generated_clicks_can_be_predicted_from_pairs_of_fields():
    task = tasks.clicks(samples=4_000, validation=100, test=100)
    x, y = task.train
    assert 0.1 < y.mean() < 0.6
    assert x.min() >= 0
    assert x.max() < task.classes
    fields = [np.unique(column) for column in x.T]
    assert all(a.max() < b.min() for a, b in itertools.pairwise(fields))
    again = tasks.clicks(samples=4_000, validation=100, test=100)
    np.testing.assert_array_equal(again.train.x, x)


def lines_of(path):
    """Return the lines of a file; none if the file does not exist."""
    return path.read_text().splitlines() if path.exists() else []


def write_all_but(count, study, path):
    """Write runs with made-up scores for all searches of a quick study but the last `count`."""
    for each in study.searches[:-count]:
        for run in runs_with_scores(study, each, lambda k, seed: 0.5 - abs(k) / 100):
            changes = {
                "setting": each.setting.name,
                "fingerprint": each.setting.fingerprint,
                "batch_size": each.batch_size,
                "epochs": 1,
                "validation": run.validation[-1:],
                "train_loss": [1.0],
                "grad_norm": [1.0],
            }
            results.append(path, dataclasses.replace(run, **changes))


def test_a_killed_study_goes_on_and_runs_nothing_twice(tmp_path):
    """A study that is killed with half a line written does the rest when it is started again."""
    path = tmp_path / "mnist1d.jsonl"
    study = config.load("mnist1d", quick=True)
    write_all_but(2, study, path)
    there = len(lines_of(path))
    command = [sys.executable, *STUDY, "--task", "mnist1d", "--quick", "--output", tmp_path]
    killed = subprocess.Popen(
        list(map(str, command)),
        env=importing_project(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(lines_of(path)) < there + 3:
        assert killed.poll() is None
        time.sleep(0.1)

    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = path.read_text()
    whole = before[: before.rfind("\n") + 1]
    path.write_text(whole + '{"setting": "4,000 sam')
    printed = run_python(*command[1:])
    assert f"Wrote {path}" in printed
    assert path.read_text().startswith(whole)
    runs = results.read(path)
    done = [(run.search, run.exponent, run.seed) for run in runs]
    assert len(set(done)) == len(done)
    groups = results.grouped(runs)
    for each in study.searches:
        assert search.wanted(study, each, groups[results.key_of(each)]) == []
    compared = set(methods.METHODS) - set(methods.ABLATIONS)
    assert len([run for run in runs if run.final]) == 2 * len(compared)

    text = path.read_text()
    run_python(*command[1:])
    assert path.read_text() == text

    printed = run_python(*REPORT, "--results", tmp_path, MPLBACKEND="agg")
    for method in compared:
        assert f"| {method} |" in printed
    for name in pictures.PICTURES:
        picture = tmp_path / f"mnist1d_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"(./{picture.name})" in printed or f"({picture.name})" in printed


def outcome_of(*arguments):
    """Run a Python program that may fail; return its output and its exit status."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=importing_project(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_results_of_another_configuration_are_refused(tmp_path):
    path = tmp_path / "mnist1d.jsonl"
    results.append(path, run_of(setting="4,000 samples"))
    result = outcome_of(*STUDY, "--task", "mnist1d", "--quick", "--output", tmp_path)
    assert result.returncode != 0
    assert "Choose another `--output`" in result.stderr


def test_data_is_there_before_processes_ask_for_it(tmp_path, monkeypatch):
    """Data is downloaded before the processes of a study start.

    The processes would otherwise download it side by side, into the same files.
    """
    found = []

    def run_all(*arguments):
        found.extend(path.name for path in (tmp_path / "keras" / "datasets").iterdir())
        return []

    monkeypatch.setattr(workers, "run_all", run_all)
    main(["--task", "mnist1d", "--quick", "--output", str(tmp_path)])
    data = config.load("mnist1d", quick=True).searches[0].setting.data
    assert found == [f"mnist1d-{sum(data[key] for key in ('samples', 'validation', 'test'))}.npz"]


def test_a_second_study_that_writes_to_the_same_file_is_refused(tmp_path):
    path = tmp_path / "mnist1d.jsonl"
    with results.only_writer(path):
        second = outcome_of(*STUDY, "--task", "mnist1d", "--quick", "--output", tmp_path)
    assert second.returncode != 0
    assert f"Another process writes to {path}" in second.stderr
    assert not path.exists()


def test_results_can_be_compressed(tmp_path):
    path = tmp_path / "any.jsonl"
    runs = [run_of(seed=seed, test_loss=math.inf) for seed in range(3)]
    for run in runs:
        results.append(path, run)
    assert results.read(path) == runs
    compressed = tmp_path / "any.jsonl.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert results.read(compressed) == runs


def summaries_of(**scores):
    """Return the summary of each method, given its test scores of three seeds."""
    runs = []
    for method, values in scores.items():
        for k, score in {-4: 0.55, -2: 0.56, -1: 0.595, 0: 0.6, 1: 0.592, 2: 0.3}.items():
            runs += [run_of(method, k, seed, final=False, score=score) for seed in (100, 101)]
        runs += [run_of(method, 0, seed, score=value) for seed, value in enumerate(values)]
    return summary.summaries(runs)


def test_summaries_have_mean_deviation_and_range():
    (one,) = summaries_of(SNGM=[0.5, 0.6, 0.7])
    assert one.mean == pytest.approx(60.0)
    assert one.deviation == pytest.approx(10.0)
    assert one.best == 0
    assert one.learning_rate == 1.0
    assert one.good_range == pytest.approx(2.0)
    assert one.best_score == pytest.approx(60.0)
    assert one.range_above(55.0) == pytest.approx(2.0**2.5)
    assert one.curve.shape == one.grad_norm.shape == (3, 3)
    assert summary.epochs_to(one, 45.0) == 2
    assert summary.epochs_to(one, 61.0) is None


def test_leads_are_paired_by_seed():
    """The p-value of a lead comes from the differences of runs with the same seed."""
    ours, theirs = summaries_of(SNGM=[0.51, 0.62, 0.73], LAMB=[0.5, 0.6, 0.7])
    lead, p_value = summary.difference(ours, theirs)
    assert lead == pytest.approx(2.0)
    # The statistic is t = 2 / (1 / sqrt(3)), with 2 degrees of freedom.
    assert p_value == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-6)
    assert tables.lead(ours, theirs) == "+2.0 (p = 0.074)"
    assert tables.lead(theirs, ours) == "-2.0 (p = 0.074)"


def test_searches_that_are_not_done_are_left_out():
    done = [run_of("SNGM", 0, 100, final=False), *(run_of(seed=seed) for seed in range(3))]
    begun = [run_of("LAMB", 0, 100, final=False), run_of("LAMB", seed=0)]
    assert [each.method for each in summary.summaries(done + begun)] == ["SNGM"]


def test_a_report_of_a_study_that_has_only_begun(tmp_path):
    """A report has finished searches only.

    Here the first finished search is not one of SNGM, and another task has no finished search.
    """
    others = [run_of("LAMB", 0, 100, final=False), *(run_of("LAMB", seed=i) for i in range(3))]
    for run in [*others, run_of("AdamW", 0, 100, final=False)]:
        results.append(tmp_path / "mnist1d.jsonl", run)
    results.append(tmp_path / "text.jsonl", run_of("SNGM", 0, 100, final=False))
    report = Report(tmp_path)
    assert "| LAMB |" in report.scores("mnist1d")
    assert "AdamW" not in report.scores("mnist1d")
    report.draw(tmp_path)
    assert (tmp_path / "mnist1d_batch_sizes.png").exists()
    assert not (tmp_path / "text_scores.png").exists()


def test_conversions_relate_rates_by_the_norm():
    sngm, sgd = summaries_of(**{"SNGM": [0.5, 0.6, 0.7], "momentum SGD": [0.5, 0.6, 0.7]})
    assert sgd.typical_norm == 1.0
    assert tables.conversion(sngm, sgd) == pytest.approx(1.0)


def test_growth_of_the_best_rate_with_the_batch_size(tmp_path):
    for batch_size, best in ((4, 0), (64, 2)):
        tuning = run_of(exponent=best, seed=100, final=False, batch_size=batch_size)
        finals = [run_of(exponent=best, seed=i, batch_size=batch_size) for i in range(3)]
        for run in [tuning, *finals]:
            results.append(tmp_path / "text.jsonl", run)
    growth = Report(tmp_path).growth("text", "four", (4, 64), "SNGM")
    assert growth == pytest.approx(0.25)


def test_failed_runs_keep_their_last_score():
    runs = [run_of(seed=0), run_of(seed=1, validation=[0.2], grad_norm=[9.0])]
    tuning = [run_of(seed=100, final=False)]
    (one,) = summary.summaries(runs + tuning)
    np.testing.assert_allclose(one.curve, [[25, 50, 50], [20, 20, 20]])


def test_a_report_may_be_written_anywhere(tmp_path):
    """The links of a report lead to its pictures, which stay beside the results."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for run in [run_of(exponent=0, seed=100, final=False), *(run_of(seed=i) for i in range(3))]:
        results.append(folder / "mnist1d.jsonl", run)
    page = tmp_path / "pages" / "of" / "study.md"
    run_python(*REPORT, "--results", folder, "--output", page.parent, MPLBACKEND="agg")
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert len(links) == len(pictures.PICTURES)
    assert all((page.parent / link).is_file() for link in links)


def test_a_report_needs_a_folder(tmp_path):
    result = outcome_of(*REPORT, "--results", tmp_path / "none")
    assert result.returncode == 2
    assert "`--results` must be a folder" in result.stderr
