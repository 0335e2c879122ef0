"""The benchmark of the loader runs."""

from experiments import benchmark


def test_index_and_plan_of_many_rows_are_timed(capsys):
    assert benchmark.main(["loader", "--rows=2000"]) == 0
    said = capsys.readouterr().out
    assert "first plan of 2,000 rows" in said and "batch 1,000,000,000" in said


def test_throughput_and_resuming_are_timed(capsys, monkeypatch):
    from experiments.bench import loader

    monkeypatch.setattr(loader, "lhotse_epoch", lambda manifest, train: None)
    argv = ["loader", "--utterances=3", "--rounds=2", "--threads", "0", "1"]
    assert benchmark.main(argv) == 0
    said = capsys.readouterr().out
    assert "audio-seconds a second of CPU time" in said and "batch 100,000" in said
