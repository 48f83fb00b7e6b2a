"""Tests of the study's rates by formula and by suggestion, and of what is published of them."""

import json
import math

import pytest

from keras_sngm import typical_learning_rate
from keras_sngm.suggestion import search
from processes import ROOT, run_python
from study import config, formula, suggested
from study.formula import Law, Row
from study.rates import LearningRates
from study.results import Run
from study.suggestions import PLACES, SEEDS, searches
from study.summary import Summary

FOLDER = ROOT / "docs" / "study"


def summary_of(best=0, batch_size=4, steps=12, scores=None):
    """Return a summary of SNGM, whose best rate is 2^(best / 2), of three epochs."""
    tuning = scores or {k: 90.0 - abs(k - best) for k in range(best - 3, best + 4)}
    run = Run(
        *("any", "", "SNGM", batch_size, best, 0, True, 3, steps, 1.0),
        *([0.9], 0.9, 0.1, [1.0], [1.0]),
    )
    return Summary("any", batch_size, "SNGM", tuning, {0: run, 1: run})


def test_scores_between_rates_are_interpolated():
    one = summary_of(scores={-2: 80.0, 0: 90.0, 2: 70.0})
    assert one.score_at(1.0) == pytest.approx(90.0)
    assert one.score_at(2.0**-0.5) == pytest.approx(85.0)
    assert one.score_at(100.0) == one.score_at(2.0) == 70.0


def test_a_law_is_fitted_to_the_best_rates():
    """Best rates of 1 at four updates per epoch and 1/2 at 64 grow as the fourth root falls."""
    summaries = [summary_of(0, 4, 12), summary_of(-2, 4, 192)]
    law = formula.fitted(summaries)
    assert law.exponent == pytest.approx(-0.25)
    assert law.rate(summaries[0]) == pytest.approx(1.0)
    assert law.rate(summaries[1]) == pytest.approx(0.5)
    others = {"a": summaries, "b": [summary_of(6, 4, 12)]}
    assert formula.fitted_without(others, "b") == pytest.approx(law)
    assert formula.fitted_without(others, "a") != pytest.approx(law)


def test_costs_and_distances():
    one = summary_of()
    rows = [formula.row("a", one, rate) for rate in (1.0, 2.0, 0.25)]
    assert [row.cost for row in rows] == pytest.approx([0.0, 2.0, 3.0])
    assert [row.distance for row in rows] == pytest.approx([1.0, 2.0, 4.0])
    found = formula.quality(rows)
    assert found.mean == pytest.approx(5.0 / 3.0)
    assert found.greatest == pytest.approx(3.0)
    assert found.within_a_point == pytest.approx(100.0 / 3.0)
    assert found.within_two == pytest.approx(200.0 / 3.0)
    assert isinstance(rows[0], Row)


def test_the_formula_of_the_package_is_the_law_of_the_study():
    law = LearningRates({}, []).law
    assert law == Law(0.7, -0.25)
    assert law.rate(summary_of(steps=48)) == typical_learning_rate(16)


def test_every_suggestion_is_there():
    """Each setting has one suggestion for each seed, which follows from its losses."""
    found = suggested.read(FOLDER / "suggestions.json")
    wanted = {
        (task, each.setting.name, each.batch_size, seed)
        for task, each in searches(quick=False)
        for seed in SEEDS
    }
    assert {(*one.place, one.seed) for one in found} == wanted
    assert len(found) == len(wanted)
    for one in found:
        exponents = {round(2.0 * math.log2(rate / one.start)): loss for rate, loss in one.losses}
        assert search.next_exponent(exponents) is None
        assert one.learning_rate == pytest.approx(search.suggested_rate(exponents, one.start))
        assert len(one.losses) <= search.MOST_RATES


def test_seeds_of_suggestions_are_not_those_of_the_study():
    for task in PLACES:
        study = config.load(task)
        assert not {*study.tuning_seeds, *study.final_seeds} & set(SEEDS)


def test_suggestions_resume(tmp_path):
    """A second call of the program asks for nothing that is there."""
    command = ("-m", "study.suggestions", "--quick", "--output", tmp_path)
    run_python(*command)
    path = tmp_path / "suggestions.json"
    (one,) = suggested.read(path)
    assert one.updates >= 5
    path.write_text(json.dumps([{**one._asdict(), "seconds": -1.0}]))
    run_python(*command)
    assert [each.seconds for each in suggested.read(path)] == [-1.0]
