"""`make gpu`: everything that needs a CUDA device, in nine minutes at most, into one folder.

    PYTHONPATH=.:kernels:tests python benchmarks/gpu.py OUT

Kernel tests, the kernel benchmarks with the peers that import, the roofline, and a profile of the
slowest of ours. A part that fails or runs out of time does not stop the next; the exit code is 1
then, and 2 without a CUDA device. At most eight files, which is what some batch systems hand back:
tables, numbers and plots travel as results.tar.gz, laid out like benchmarks/results.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Seconds each part may take: together 510, which leaves half a minute for what is around them.
TESTS, BENCHMARKS, PROFILE, ROOFLINE = 190, 250, 50, 20
# What runs on the CPU is tested on the CPU, and takes the time the GPU needs.
ON_THE_GPU = "not [torch and not [csrc and not [packed"


def part(name: str, command: list[str], seconds: int, log: Path) -> str | None:
    """Run a command, its output to a file; return what is wrong with how it ended."""
    print(f"{name}: at most {seconds} s, {log.name}", flush=True)
    start = time.monotonic()
    with log.open("w") as file:
        # A process group of its own, so that workers and compilers stop with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            problem = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            problem = f"stopped after {seconds} s"
    print(f"{name}: {problem or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
    return f"{name}: {problem}" if problem else None


def versions() -> str:
    import torch

    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        driver = f"nvidia-smi: {error}"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return (
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, commit {commit or 'unknown'}\n"
        f"{device.name}, sm_{device.major}{device.minor}, {device.multi_processor_count} "
        f"multiprocessors; driver: {driver}\n"
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}\n"
    )


def main(out: Path) -> int:
    """Run all parts; return the exit code."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here; nothing was run", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    python, problems = sys.executable, []
    folders = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONUNBUFFERED"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch)
        os.environ["ALPHASPIN_RESULTS"] = scratch
        # Of whichever torch and Triton are there, what they deprecate is no failure of the kernels.
        pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default"]
        tests = [*pytest, "tests/kernels", "-k", ON_THE_GPU, *workers(), "--durations=10"]
        problems.append(part("tests", tests, TESTS, out / "tests.log"))
        kernels = ["benchmarks/test_kernels.py", "--benchmark", "-s", "-v"]
        log = out / "benchmarks.log"
        problems.append(part("benchmarks", [*pytest, *kernels], BENCHMARKS, log))
        profile = [python, "benchmarks/profile_slowest.py", scratch]
        problems.append(part("profile", profile, PROFILE, out / "profile.txt"))
        roofline = [python, "benchmarks/roofline.py", "--gpu", family(), "--hidden", "4096"]
        roofline += ["--vocabulary", "128256", "--tokens", "4096"]
        if numbers := sorted(map(str, results.rglob("*.json"))):
            roofline += ["--measured", *numbers]
        problems.append(part("roofline", roofline, ROOFLINE, out / "roofline.txt"))
        tables = (path.read_text() for path in sorted(results.rglob("*.md")))
        (out / "tables.md").write_text("\n".join(tables))
        with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
            archive.add(results, "results")
    found = [problem for problem in problems if problem]
    summary = versions() + ("\n".join(found) if found else "every part passed") + "\n"
    (out / "summary.txt").write_text(summary)
    print(summary, end="")
    return 1 if found else 0


def workers() -> list[str]:
    """Tests side by side, where pytest-xdist is installed: most of their time is compiling."""
    import importlib.util

    return ["-n", "8"] if importlib.util.find_spec("xdist") else []


def family() -> str:
    """The roofline's name of this GPU; h100 if it has none."""
    import roofline
    import torch

    name = torch.cuda.get_device_name().lower()
    return next((gpu for gpu in roofline.GPUS if gpu in name), "h100")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: gpu.py OUT")
    sys.exit(main(Path(sys.argv[1]).resolve()))
