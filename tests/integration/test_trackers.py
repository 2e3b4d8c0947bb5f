"""Metrics of a training also go where a user wants them, and no key depends on it."""

import json

import pytest

from lesion.cli import run
from lesion.trackers import Tracker

SMOKE = ["run", "modern-lm", "--tier", "smoke", "--verbosity", "quiet", "--steps", "4"]


def test_tensorboard_has_what_metrics_have(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lab = tmp_path / "lab"
    assert run([*SMOKE, "--lab", str(lab), "--track", "tensorboard"]) == 0
    (state,) = (path for path in (lab / "states").iterdir() if not path.name.startswith("."))
    rows = [json.loads(line) for line in (state / "metrics.jsonl").read_text().splitlines()]
    (written,) = (lab / "trackers").glob("training-1")
    events = EventAccumulator(str(written))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4]
    assert run([*SMOKE, "--lab", str(lab)]) == 0, "the same study without a tracker has nothing to do"


def test_an_unknown_or_missing_tracker_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    assert run([*SMOKE, "--lab", str(tmp_path / "lab"), "--track", "mlflow"]) == 2
    assert "no tracker 'mlflow'; there are: tensorboard, trackio, wandb" in capsys.readouterr().err
    assert not (tmp_path / "lab").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package wandb: pip install wandb"):
        Tracker("wandb", tmp_path)
