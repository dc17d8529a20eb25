"""`make gpu`: everything that needs a CUDA device, in nine minutes at most, into one folder.

    PYTHONPATH=.:kernels:tests python benchmarks/gpu.py OUT [PART ...]

Parts: smoke, tests, benchmarks, step, profile; without names all. First a smoke test, under a
minute: every operator and a tiny run of each method, all failures in one list, smoke.log. Then
kernel tests, the kernel benchmarks with the peers that import, a training step of a billion
parameters beside TRL's, a profile of our kernels, and the roofline. All are processes of their own:
one that fails, crashes, poisons its CUDA context or runs out of time does not stop the next; the
exit code is 1 then, and 2 without a CUDA device. At most eight files, which is what some batch
systems hand back: tables, numbers and plots travel as results.tar.gz, laid out like
benchmarks/results.
"""

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Seconds each part may take: together 515, which leaves 25 for what is around them.
SMOKE, TESTS, BENCHMARKS, STEP, PROFILE, ROOFLINE = 60, 90, 200, 90, 55, 20
PARTS = ("smoke", "tests", "benchmarks", "step", "profile")
SIDE_BY_SIDE = max(2, (os.cpu_count() or 8) - 2)  # each loads torch, or compiles
GENTLY = 10  # seconds to say what is known, after an interrupt
# What runs on the CPU is tested on the CPU, and takes the time the GPU needs.
ON_THE_GPU = "triton or test_models or test_trl or test_only_forms"


def part(name: str, command: list[str], seconds: float, log: Path) -> str | None:
    """Run a command, its output to the end of a file; return what is wrong with how it ended."""
    print(f"{name}: at most {seconds:.0f} s, {log.name}", flush=True)
    start = time.monotonic()
    with log.open("a") as file:
        # A process group of its own, so that workers and compilers stop with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            problem = ending(process.wait(seconds))
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s"
            process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
            with suppress(subprocess.TimeoutExpired):
                process.wait(GENTLY)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"{name}: {problem or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
    return f"{name}: {problem}" if problem else None


def listed(command: list[str], problems: list[str | None]) -> list[str]:
    """The names that a process prints; none, and a problem more, where it does not end well."""
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if problem := ending(found.returncode):
        problems.append(f"{' '.join(command[1:])}: {problem}: {found.stderr.strip()[-200:]}")
        return []
    return found.stdout.split()


def smoke(python: str, log: Path, names: Sequence[str], seconds: int = SMOKE) -> list[str]:
    """Run each of `tests/smoke.py` in a process of its own; return what is wrong with them.

    The log has the problems first, a line each, and then what every failed one printed.
    """
    print(f"smoke: {len(names)} tests, at most {seconds} s, {log.name}", flush=True)
    end = time.monotonic() + seconds
    waiting, running, problems, said = [*names], dict[str, Any](), list[str](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            late = time.monotonic() > end
            while waiting and len(running) < SIDE_BY_SIDE and not late:
                name = waiting.pop(0)
                output = (Path(scratch) / f"{name}.log").open("w+")
                folder = Path(scratch) / name
                command = [python, "-X", "faulthandler", "tests/smoke.py", name, str(folder)]
                running[name] = (
                    output,
                    subprocess.Popen(
                        command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
                    ),
                )
            for name, (output, process) in list(running.items()):
                if process.poll() is None and not late:
                    continue
                if process.poll() is None:
                    os.killpg(process.pid, 9)
                    process.wait()
                    problem = f"stopped, {seconds} s were over"
                else:
                    problem = ending(process.returncode)
                output.seek(0)
                text = output.read()
                output.close()
                del running[name]
                if problem:
                    last = next(reversed(text.strip().splitlines()), "")
                    problems.append(f"smoke {name}: {problem}: {last[:200]}")
                    said.append(f"--- {name}\n{text}")
            if late:
                problems += [f"smoke {name}: not begun, {seconds} s were over" for name in waiting]
                waiting = []
            time.sleep(0.05)
    log.write_text("\n".join([*(problems or ["every one right"]), *said]) + "\n")
    left = seconds - (end - time.monotonic())
    print(f"smoke: {len(problems)} of {len(names)} failed, {left:.0f} s", flush=True)
    return problems


def ending(code: int) -> str | None:
    """What an exit code says of a process; None where all was well."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else None


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


def main(out: Path, parts: Sequence[str] = PARTS) -> int:
    """Run the parts; return the exit code."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here; nothing was run", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for log in out.glob("*.log"):
        log.unlink()
    about, gpu = versions(), family()
    python, problems = sys.executable, list[str | None]()
    folders = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONUNBUFFERED"] = "1"
    if "smoke" in parts:
        problems += smoke(python, out / "smoke.log", listed([python, "tests/smoke.py"], problems))
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch)
        os.environ["ALPHASPIN_RESULTS"] = scratch
        # Of whichever torch and Triton are there, what they deprecate is no failure of the kernels.
        pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default"]
        if "tests" in parts:
            suite = [*pytest, "tests/kernels", "-k", ON_THE_GPU, *workers(), "--durations=10"]
            problems.append(part("tests", suite, TESTS, out / "tests.log"))
        end = time.monotonic() + BENCHMARKS
        cases = [python, "benchmarks/test_kernels.py"]
        for name in listed(cases, problems) if "benchmarks" in parts else []:
            case = f"benchmarks/test_kernels.py::test_kernel[{name}]"
            command, log = [*pytest, case, "--benchmark", "-s", "-v"], out / "benchmarks.log"
            left = max(1.0, end - time.monotonic())
            problems.append(part(f"benchmark {name}", command, left, log))
        if "step" in parts:
            case = "benchmarks/test_end_to_end.py::test_end_to_end[end-to-end-1b-128k]"
            step = [*pytest, case, "--benchmark", "-s", "-v"]
            problems.append(part("step", step, STEP, out / "benchmarks.log"))
        if "profile" in parts:
            profile = [python, "benchmarks/profile_ours.py"]
            problems.append(part("profile", profile, PROFILE, out / "profile.txt"))
        roofline = [python, "benchmarks/roofline.py", "--gpu", gpu, "--hidden", "4096"]
        roofline += ["--vocabulary", "128256", "--tokens", "4096"]
        if numbers := sorted(map(str, results.rglob("*.json"))):
            roofline += ["--measured", *numbers]
        problems.append(part("roofline", roofline, ROOFLINE, out / "roofline.txt"))
        if numbers:
            model = [python, "benchmarks/machine.py", "--measured", *numbers]
            problems.append(part("predicted", model, ROOFLINE, out / "roofline.txt"))
        tables = (path.read_text() for path in sorted(results.rglob("*.md")))
        (out / "tables.md").write_text("\n".join(tables))
        with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
            archive.add(results, "results")
    found = [problem for problem in problems if problem]
    summary = about + ("\n".join(found) if found else "every part passed") + "\n"
    (out / "summary.txt").write_text(summary)
    print(summary, end="")
    return 1 if found else 0


def workers() -> list[str]:
    """Tests side by side, where pytest-xdist is installed: most of their time is compiling."""
    import importlib.util

    return ["-n", str(SIDE_BY_SIDE)] if importlib.util.find_spec("xdist") else []


def family() -> str:
    """The roofline's name of this GPU; h100 if it has none."""
    import roofline
    import torch

    name = torch.cuda.get_device_name().lower()
    return next((gpu for gpu in roofline.GPUS if gpu in name), "h100")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not {*sys.argv[2:]} <= {*PARTS}:
        sys.exit(f"usage: gpu.py OUT [{'] ['.join(PARTS)}]")
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:] or PARTS))
