"""The grid's models, without this library: sharded, they compute what one process computes."""

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest

from flex_model.testing.grid import measure_bare
from flex_model.testing.ranks import RankFailure
from frameworks.rows import ROW_NAMES, row

PIPELINE = "pipelining 1f1b"


@pytest.mark.parametrize("name", ROW_NAMES)
def test_sharded_and_whole_compute_the_same(name):
    errors = measure_bare(row(name))
    assert all(error <= 1e-5 for error in errors.values()), errors


@contextmanager
def _faulty(fault):
    with row(PIPELINE).sharded() as model:
        yield fault(model)


def _measured(fault):
    return measure_bare(replace(row(PIPELINE), sharded=partial(_faulty, fault)))


def _outputs_swapped(model):
    def run(called, microbatches, loss):
        return list(model.schedule(called, microbatches, loss))[::-1]

    return replace(model, schedule=run)


def _microbatches_swapped(model):
    def run(called, microbatches, loss):
        return list(model.schedule(called, microbatches[::-1], loss))[::-1]

    return replace(model, schedule=run)


def _one_microbatch_twice(model):
    def run(called, microbatches, loss):
        return model.schedule(called, [microbatches[0], *microbatches[:-1]], loss)

    return replace(model, schedule=run)


def _losses_added(model):
    def run(called, microbatches, loss):
        return model.schedule(called, microbatches, lambda *of: len(microbatches) * loss(*of))

    return replace(model, schedule=run)


def _no_grads_of_the_first_stage(model):
    return replace(model, weight_grads=dict) if model.is_first else model


def _no_grads_of_the_last_stage(model):
    return replace(model, weight_grads=dict) if model.is_last else model


# What only the first stage has, only the last, or both.
@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (_outputs_swapped, {"output"}),
        (_microbatches_swapped, {"input grad"}),
        (_one_microbatch_twice, {"output", "input grad", "weight grad"}),
        (_losses_added, {"input grad", "weight grad"}),
        (_no_grads_of_the_first_stage, {"weight grad"}),
        (_no_grads_of_the_last_stage, {"weight grad"}),
    ],
)
def test_a_fault_of_a_pipeline_shows_where_it_is(fault, wrong):
    """Catches what no stage is asked for, because each leaves it to another."""
    errors = _measured(fault)
    assert {quantity for quantity, error in errors.items() if error > 1e-2} == wrong, errors


def _outputs_lost(model):
    def run(called, microbatches, loss):
        model.schedule(called, microbatches, loss)
        return []

    return replace(model, schedule=run)


def test_outputs_that_no_stage_returns_are_missed():
    assert _measured(_outputs_lost)["output"] == math.inf


def _without_its_group(model):
    return replace(model, pp_group=None)


def test_a_stage_that_passes_for_the_whole_model_is_refused():
    with pytest.raises(RankFailure):
        _measured(_without_its_group)
