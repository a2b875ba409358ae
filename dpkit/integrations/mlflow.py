"""MLflow: the public numbers of a run as an MLflow run; what is not private on request, and marked.

Guarantees:
  * An MLflow run gets what :mod:`dpkit.callbacks` calls public: the settings of the plan as parameters, and steps,
    epsilon, learning rate and the metrics that the loop declared so. With ``nonprivate=True`` the rest is added as
    metrics named ``nonprivate.*``, and the run is tagged ``dpkit.nonprivate = true``: that run must not be shared.
  * No clock after the first step: the timestamp of a metric is the number of charges in milliseconds, and the run ends
    as many milliseconds after it began, because the time of a step grows with the private size of its batch.
  * Nothing is sent anywhere but to the tracking server: MLflow's telemetry is switched off for this process, and no
    system metrics, source files, user names or models are logged.

Not promised: what a tracking server notes by itself. A remote one sees when a step's numbers arrive; do not use one
that should not learn that.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dpkit.callbacks import Callback, Setting, StepRecord
from dpkit.errors import ConfigError

_LONGEST_PARAMETER = 500  # characters; what older tracking servers take


class MLflow(Callback):
    """Logs to MLflow through its client; the run that is active in the process, if any, is left alone.

    Args:
      experiment: name of the experiment; made if missing.
      tracking_uri: where to log; left out, what MLflow takes by itself (``MLFLOW_TRACKING_URI``, or local files).
      run_name: left out, MLflow makes one up.
      nonprivate: also log what is NOT PRIVATE.
    Raises:
      ConfigError: MLflow is not installed, or cannot be logged to.
    """

    def __init__(
        self, experiment: str, *, tracking_uri: str | None = None, run_name: str | None = None, nonprivate: bool = False
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError(
                "logging to MLflow takes the package mlflow, which is not installed: pip install 'dpkit[log]'. The "
                "run folder's metrics.jsonl has the same numbers."
            )
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before the import, which would make the client that sends
        import mlflow

        _stop_telemetry()
        self.nonprivate = nonprivate
        self.run_id: str | None = None
        """Id of the MLflow run, once the engine is attached."""
        with _translated():
            self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._experiment = experiment
        self._run_name = run_name
        self._begun = 0
        self._last: StepRecord | None = None

    def on_begin(self, settings: Mapping[str, Setting]) -> None:
        from mlflow.entities import Param

        self._begun = int(time.time() * 1000)  # before the first step, and therefore public
        tags = {"dpkit.nonprivate": str(self.nonprivate).lower(), "mlflow.note.content": _meaning(settings)}
        parameters = [Param(name, str(value)[:_LONGEST_PARAMETER]) for name, value in settings.items()]
        with _translated():
            found = self._client.get_experiment_by_name(self._experiment)
            experiment = found.experiment_id if found is not None else self._client.create_experiment(self._experiment)
            run = self._client.create_run(experiment, start_time=self._begun, tags=tags, run_name=self._run_name)
            self.run_id = run.info.run_id
            self._client.log_batch(self.run_id, params=parameters)

    def on_step(self, record: StepRecord) -> None:
        values = {"epsilon": record.epsilon, "charged": record.charged}
        if record.learning_rate is not None:
            values["learning_rate"] = record.learning_rate
        self._log(record, values)

    def on_metrics(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        self._log(record, metrics)

    def on_nonprivate(self, record: StepRecord, values: Mapping[str, float]) -> None:
        if self.nonprivate:
            self._log(record, {f"nonprivate.{name}": value for name, value in values.items()})

    def on_end(self) -> None:
        if self.run_id is None:
            return
        charged, planned = (0, 1) if self._last is None else (self._last.charged, self._last.planned)
        status = "FINISHED" if charged >= planned else "KILLED"
        with _translated():
            self._client.set_terminated(self.run_id, status=status, end_time=self._begun + charged)
        self.run_id = self._last = None

    def _log(self, record: StepRecord, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        assert self.run_id is not None  # the engine calls on_begin first
        self._last = record
        metrics = [Metric(name, value, timestamp=record.charged, step=record.step) for name, value in values.items()]
        with _translated():
            self._client.log_batch(self.run_id, metrics=metrics)


def _meaning(settings: Mapping[str, Setting]) -> str:
    rest = "; ".join(
        f"{name}: {settings[name]}"
        for name in ("delta", "unit", "relation", "sampler", "num_examples")
        if name in settings
    )
    return f"Trained by dpkit. epsilon is an upper bound at all charged steps; {rest}"


@contextmanager
def _translated() -> Iterator[None]:
    """MLflow's errors as ours: a server that is not there, an address of no known kind."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise ConfigError(
            f"MLflow cannot be logged to ({' '.join(str(error).split())[:200]}). Check the tracking URI and its "
            "server, or leave MLflow out; the run folder's metrics.jsonl has the same numbers."
        ) from None


def _stop_telemetry() -> None:
    """Takes back the telemetry client of an MLflow that was imported before; versions before 3.2 have none."""
    if importlib.util.find_spec("mlflow.telemetry") is not None:
        from mlflow.telemetry import set_telemetry_client

        set_telemetry_client()
