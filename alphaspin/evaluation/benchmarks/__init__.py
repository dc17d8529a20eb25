"""Benchmarks by name (`evaluate --benchmark`). One more is a file beside these and a line below."""

from alphaspin.evaluation.benchmarks.alpaca_eval import AlpacaEval
from alphaspin.evaluation.benchmarks.base import Benchmark
from alphaspin.evaluation.benchmarks.mt_bench import MTBench
from alphaspin.evaluation.benchmarks.open_llm import OpenLLM
from alphaspin.evaluation.benchmarks.tasks import Tasks
from alphaspin.foundation.kinds import Table

BENCHMARKS: dict[str, type[Benchmark]] = {
    "mt-bench": MTBench,
    "alpaca-eval": AlpacaEval,
    "open-llm": OpenLLM,
    "tasks": Tasks,
}
BENCHMARK = Table("benchmark.kind", "benchmark", Benchmark, BENCHMARKS, "mt-bench")
