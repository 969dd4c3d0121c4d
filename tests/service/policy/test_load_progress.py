import logging
import time

import pytest

from shopr1_service.policy.load_progress import LoadProgress, Step


def test_progress_names_step_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    progress = LoadProgress()
    assert str(progress) == "beginning (step 1 of 4, 0 s since the start)"
    now_s = 107.2
    progress.enter(Step.CHECKING)
    assert str(progress) == "comparing forward strategies with the model (step 3 of 4, 7 s since the start)"


def test_each_step_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "shopr1_service.policy.load_progress"):
        LoadProgress().enter(Step.READING_WEIGHTS)
    assert caplog.messages == ["start, step 2 of 4: reading the policy's weights"]


def test_a_note_is_shown_until_the_next_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    progress = LoadProgress()
    progress.enter(Step.CHECKING)
    caplog.clear()
    with caplog.at_level(logging.INFO, "shopr1_service.policy.load_progress"):
        progress.note("expanded, 4109 tokens")
    what = "comparing forward strategies with the model: expanded, 4109 tokens"
    assert str(progress) == f"{what} (step 3 of 4, 0 s since the start)"
    assert caplog.messages == [f"start, step 3 of 4: {what}"]
    progress.enter(Step.WARMING_UP)
    assert str(progress) == "running warm-up passes (step 4 of 4, 0 s since the start)"
