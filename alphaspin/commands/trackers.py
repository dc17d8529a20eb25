"""`log.trackers`: the numbers of a run in TensorBoard, wandb, MLflow or trackio, by Accelerate.

A run that goes on goes on there too: its manifest keeps by which name each tracker knows it. The
project, or MLflow's experiment, is the run's `name`; where it is kept is the trackers' own matter
(WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, …), of TensorBoard the run folder.
"""

import importlib.util
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from alphaspin.config import Config
from alphaspin.errors import InputError
from alphaspin.foundation import console
from alphaspin.foundation.paths import for_others
from alphaspin.foundation.runs import Mirror, Run
from alphaspin.foundation.section import flat


def check(config: Config) -> None:
    """Whether the trackers are installed.

    Raises:
        InputError: one is not.
    """
    for tracker in config.log.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"log.trackers = {tracker}: not installed (pip install {tracker})")


def start(accelerator: Accelerator, config: Config, folder: Run) -> Mirror | None:
    """Begin, or go on, in all trackers; returns what sends them numbers.

    Raises:
        InputError: one cannot be had, for want of a key or a server perhaps.
    """
    if not config.log.trackers:
        return None
    known, new = folder.manifest.get("trackers", {}), uuid.uuid4().hex[:8]
    ids = {tracker: known.get(tracker, new) for tracker in config.log.trackers}
    label = folder.path.name
    settings: dict[str, dict[str, Any]] = {
        "wandb": {"id": ids.get("wandb"), "name": label, "resume": "allow"},
        "trackio": {"name": f"{label}-{ids.get('trackio')}", "resume": "allow"},
        "mlflow": {"run_id": known.get("mlflow"), "run_name": label},
    }
    told = {key: str(value) for key, value in flat(for_others(config).identity()).items()}
    try:
        accelerator.init_trackers(config.name, init_kwargs=settings)
        found = {tracker.name: tracker for tracker in accelerator.trackers}
        for name, tracker in found.items():
            if name not in known:
                tracker.store_init_configuration(told)
    except Exception as error:  # of any of their libraries
        accelerator.trackers.clear()  # which cannot be finished now
        reason = " ".join(str(error).split()) or repr(error)
        raise InputError(f"log.trackers = {' '.join(ids)}: {reason}") from error
    if missing := [name for name in ids if name not in found]:
        raise InputError(f"log.trackers = {missing[0]}: Accelerate does not find it")
    if "mlflow" in found:  # which gives its runs names of its own
        ids["mlflow"] = found["mlflow"].tracker.info.run_id
    folder.record(trackers=ids)

    def send(values: Mapping[str, float], step: int) -> None:
        for tracker in [*accelerator.trackers]:
            if not _survived(tracker, lambda tracker=tracker: tracker.log(dict(values), step=step)):
                accelerator.trackers.remove(tracker)

    return send


def _survived(tracker: Any, call: Callable[[], Any]) -> bool:
    """Whether a tracker took a call; one that dies does not end the run, and is told of."""
    try:
        call()
    except Exception as error:  # of any of their libraries
        reason = " ".join(str(error).split())[:300] or repr(error)
        console.alarm(
            f"log.trackers: {tracker.name} failed and gets no more numbers of this process "
            f"({reason}); the run goes on, and metrics.jsonl has them all"
        )
        return False
    return True


@contextmanager
def finishing(accelerator: Accelerator) -> Generator[None]:
    """Tell the trackers of the end, whatever it is: what they hold in memory is sent then."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            _survived(tracker, tracker.finish)
