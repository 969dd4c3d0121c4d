"""The histogram against the library's own: the same text for the same values."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from shopr1_service.monitoring.batch_histogram import BatchHistogram

BOUNDS = (0, 0.75, 1.5, 1002)
VALUES = st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.75, 0.76, 1.5, 1002.0, 1e9, 3]) | st.floats(-5, 2000))
BATCHES = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(['"x\n', "y"]), VALUES), max_size=6)


@given(BATCHES)
def test_it_shows_what_the_librarys_histogram_shows(batches: list[tuple[str, str, list[float]]]) -> None:
    own, reference = CollectorRegistry(), CollectorRegistry()
    ours = BatchHistogram("shopr1_x", "Text.", ("run", "kind"), BOUNDS, own)
    theirs = Histogram("shopr1_x", "Text.", ("run", "kind"), buckets=BOUNDS, registry=reference)
    for run, kind, values in batches:
        ours.labels(run, kind).observe(values)
        series = theirs.labels(run, kind)
        for value in values:
            series.observe(value)
    assert generate_latest(own) == generate_latest(reference)


def test_a_series_is_removed() -> None:
    registry = CollectorRegistry()
    histogram = BatchHistogram("shopr1_x", "Text.", ("run", "kind"), BOUNDS, registry)
    for run, kind in (("a", "x"), ("a", "y"), ("b", "x")):
        histogram.labels(run, kind).observe([1.0])
    histogram.remove("a", "x")
    histogram.remove("a", "no such series")
    assert registry.get_sample_value("shopr1_x_count", {"run": "b", "kind": "x"}) == 1
    assert registry.get_sample_value("shopr1_x_count", {"run": "a", "kind": "x"}) is None
    assert registry.get_sample_value("shopr1_x_count", {"run": "a", "kind": "y"}) == 1
    histogram.labels("a", "x").observe([0.5, 2.0])  # begins again
    assert registry.get_sample_value("shopr1_x_sum", {"run": "a", "kind": "x"}) == 2.5
