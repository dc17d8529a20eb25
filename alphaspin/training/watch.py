"""Looks for the ways in which self-play is known to go wrong."""

from collections import deque

import numpy as np
import torch

from alphaspin.foundation import console
from alphaspin.foundation.runs import Metrics
from alphaspin.training.example import REMEDY


class Watch:
    """Looks for the ways in which self-play is known to go wrong, and says so once each."""

    WINDOW = 10

    def __init__(self, stage: str, metrics: Metrics, remedy: str = REMEDY):
        """Alarms go to the console and into the metrics."""
        self._remedy = remedy
        self._stage = stage
        self._metrics = metrics
        self._rewards: deque[tuple[float, float]] = deque(maxlen=2 * self.WINDOW)
        self._fell = False

    def restore(self) -> None:
        """Pick up where a killed run was, from what it recorded."""
        for record in self._metrics.read():
            if record["stage"] == self._stage:
                if "fall together" in record.get("alarm", ""):
                    self._fell = True
                elif "rewards/rejected" in record:
                    self._rewards.append((record["rewards/chosen"], record["rewards/rejected"]))

    def alarm(self, step: int, text: str) -> None:
        """Print and record one alarm."""
        console.alarm(f"{self._stage}: {text}")
        self._metrics.write(self._stage, step, {"alarm": text})

    def check_gradients(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """At the first step A's gradient is rightly zero where B = 0; B's must not be."""
        idle = [
            name
            for name, parameter in parameters.items()
            if ".lora_B." in name and (parameter.grad is None or not parameter.grad.any())
        ]
        if idle:
            self.alarm(1, f"no gradient reaches {len(idle)} adapter matrices, e.g. {idle[0]}")

    def check_rewards(self, step: int, values: dict[str, float]) -> None:
        """Log-probs of chosen and rejected both below the reference and both still falling."""
        if "rewards/rejected" not in values or self._fell:
            return
        self._rewards.append((values["rewards/chosen"], values["rewards/rejected"]))
        if len(self._rewards) < 2 * self.WINDOW:
            return
        pairs = np.array(self._rewards)
        early, late = pairs[: self.WINDOW].mean(0), pairs[self.WINDOW :].mean(0)
        if (late < 0).all() and (late < early).all():
            self._fell = True
            self.alarm(
                step,
                "log-probs of chosen and rejected fall together (mean rewards "
                f"{late[0]:+.3f} and {late[1]:+.3f}): {self._remedy}",
            )
