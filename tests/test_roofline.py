"""benchmarks/roofline.py against numbers worked out by hand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "roofline.py"
spec = importlib.util.spec_from_file_location("roofline", SCRIPT)
roofline = importlib.util.module_from_spec(spec)
sys.modules["roofline"] = roofline  # its dataclasses look themselves up
spec.loader.exec_module(roofline)


def test_head_by_hand():
    # 3 rows, H 5, V 7: one product is 2·3·7·5 = 210. Bytes: (15 + 35)·2 + 3·(8 + 4) = 136.
    assert roofline.head(3, 5, 7) == roofline.Work(210, 136)
    # A second product, and d hidden (15 numbers) out.
    assert roofline.head(3, 5, 7, products=2) == roofline.Work(420, 166)
    assert roofline.head(3, 5, 7, states=2) == roofline.Work(210, 166)


def test_goal_of_the_head_on_an_h100():
    # 2·4096·128256·4096 = 4.3036e12 operations; at 989 TFLOP/s 4.351 ms. The bytes,
    # 2·(4096·4096 + 128256·4096) + 12·4096 = 1.0843e9, would take .324 ms.
    work = roofline.head(4096, 4096, 128_256)
    assert work.operations == 4_303_557_230_592
    assert work.moved == 1_084_276_736
    assert work.floor(roofline.GPUS["h100"]) == pytest.approx(4.351e-3, rel=1e-3)


def test_lora_by_hand():
    # 2 rows, 3 -> 5, rank 1: 2·2·15 + 2·2·8 = 92; bytes 2·(15 + 8 + 2·8) = 78.
    assert roofline.lora(2, 3, 5, 1) == roofline.Work(92, 78)
    # No row adapted: 60 operations, and no adapter read.
    assert roofline.lora(2, 3, 5, 1, 0) == roofline.Work(60, 62)
    # Backward: 2·2·(15 + 2·5 + 3·3) = 136; bytes 2·(15 + 16 + 2·(6 + 5)) = 106.
    assert roofline.lora_backward(2, 3, 5, 1) == roofline.Work(136, 106)


def test_attention_and_logits_by_hand():
    # 4 tokens, sequences of 4, 6 wide, 2 for keys and values: 2·2·4·4·6/2 = 192 operations,
    # 2·4·(12 + 4) = 128 bytes.
    assert roofline.attention(4, 4, 6, 2) == roofline.Work(192, 128)
    assert roofline.attention(4, 4, 6, 2, backward=True) == roofline.Work(480, 256)
    # Logits of 2 rows and 10 entries: 40 bytes and 24 for targets and log-probs.
    assert roofline.logits(2, 10) == roofline.Work(0, 64)
    assert roofline.logits(2, 10).floor(roofline.Gpu(1.0, 32.0, "")) == 2.0


def test_command_reads_a_model_and_a_measurement(tmp_path):
    config = {
        "hidden_size": 64,
        "vocab_size": 1000,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    # 2·8·1000·64 operations at 1 TFLOP/s: 1.024 us; bytes 129,120 at 1 TB/s: .129 us.
    row = {"operation": "linear_logprob forward", "p50": 2 * 1.024e-6}
    raw = {
        "case": "kernel-x",
        "device": "cuda",
        "dtype": "torch.bfloat16",
        "shape": {"tokens": 8, "hidden": 64, "vocabulary": 1000},
        "rows": [row, {"operation": None, "p50": 1.0}],
    }
    measured = tmp_path / "kernel-x.json"
    measured.write_text(json.dumps({"raw": raw}))
    command = [sys.executable, SCRIPT, "--model", tmp_path, "--tokens", "8", "--rate", "1"]
    command += ["--bandwidth", "1", "--measured", measured]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "segmented_lora forward, all three" in printed
    assert printed.rstrip().endswith("× 2.00")


def test_command_refuses_half_a_model():
    command = [sys.executable, SCRIPT, "--hidden", "64"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "--vocabulary" in failed.stderr
