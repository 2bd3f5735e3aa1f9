"""Loggers of other libraries, each the real one, without a network."""

import csv
import json

import pytest
from conftest import QUICKSTART, fails, succeeds

from litlora.cli import option_for
from litlora.errors import MissingExtraError, UserError
from litlora.report import loggers
from litlora.report.loggers import LOGGERS, check_loggers
from litlora.settings import FinetuneLoRA, LogConfig
from litlora.settings.log import LOGGERS as NAMES

WORDS = ["--checkpoint_dir", QUICKSTART, "--train.max_steps", 4, "--train.log_interval", 2]
WORDS += ["--train.eval_interval", 2, "--train.save_interval", 0, "--data.max_examples", 60]


def test_a_logger_that_is_not_there_is_named(monkeypatch):
    assert tuple(LOGGERS) == NAMES
    with pytest.raises(UserError, match="to visdom: no such logger; there are tensorboard, wandb"):
        LogConfig(to=["visdom"])
    monkeypatch.setitem(loggers.LOGGERS, "wandb", (loggers.WandB, "no_module_of_this_name"))
    with pytest.raises(MissingExtraError) as raised:
        check_loggers(LogConfig(to=["wandb"]))
    said = raised.value.with_options(lambda name: option_for(FinetuneLoRA, name))
    assert said.startswith("--log.to wandb: needs") and "pip install 'litlora[wandb]'" in said


def expected(run):
    """{figure: {step: value}} of a run's metrics.csv."""
    found = {"train/loss": {}, "val/loss": {}, "train/grad_norm": {}}
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, column in zip(found, ("loss", "val_loss", "grad_norm"), strict=True):
                if row[column]:
                    found[name][int(row["step"])] = pytest.approx(float(row[column]), rel=1e-4)
    assert len(found["train/loss"]) == 3 and len(found["val/loss"]) == 2
    return found


def of_tensorboard(run, home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return lambda name: {event.step: event.value for event in events.Scalars(name)}


def of_wandb(run, home):
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in leveldb_records(file.read_bytes(), start=7):
        record = Record()
        record.ParseFromString(data)
        items = record.history.item
        rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return lambda name: {row["step"]: row[name] for row in rows if name in row}


def leveldb_records(data, start):
    """The records of a log in LevelDB's format: blocks of 32 KiB; crc, length and type before each
    piece; types 1 whole, 2 first, 3 middle, 4 last."""
    at, pieces = start, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece = data[at + 7 : at + 7 + length]
        pieces = piece if kind in (1, 2) else pieces + piece
        if kind in (1, 4):
            yield pieces
        at += 7 + length


def of_mlflow(run, home):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("litlora")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["train.max_steps"] == "4" and found.info.status == "FINISHED"
    return lambda name: {
        metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, name)
    }


def of_trackio(run, home):
    import sqlite3

    (file,) = (home / "trackio").glob("litlora*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics").fetchall()
    rows = [(step, json.loads(metrics)) for step, metrics in rows]
    return lambda name: {step: metrics[name] for step, metrics in rows if name in metrics}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("read", [of_tensorboard, of_wandb, of_mlflow, of_trackio])
def test_a_logger_has_the_figures_of_metrics_csv(read, tmp_path):
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    name = read.__name__.removeprefix("of_")
    words = ["--log.to", f"[{name}]", "--out_dir", tmp_path / "run"]
    done = succeeds("finetune/lora.py", *WORDS, *words, cwd=tmp_path, **environment)
    assert "failed" not in done.stderr
    figures = read(tmp_path / "run", tmp_path)
    for name, values in expected(tmp_path / "run").items():
        assert figures(name) == values


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_said_once_and_stops_nothing(tmp_path):
    words = ["--log.to", "[mlflow]", "--out_dir", tmp_path / "run"]
    unreachable = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = succeeds("finetune/lora.py", *WORDS, *words, cwd=tmp_path, **unreachable)
    assert done.stderr.count("note: MLflow failed (") == 1
    assert (tmp_path / "run/final/lit_model.pth").is_file()
    assert "no such logger" in fails("finetune/lora.py", *WORDS, "--log.to", "[visdom]", cwd=tmp_path)
