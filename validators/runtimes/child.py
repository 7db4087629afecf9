"""A runtime in a process of its own, with limits: its death is a failed check, never ours.

The parent writes a directory, starts `python -P -m tightship.validators.runtimes.child DIRECTORY`, and reads it again:

| file            | by     | content                                                                              |
|-----------------|--------|--------------------------------------------------------------------------------------|
| job.json        | parent | module, job, limits, names of the arrays                                             |
| in/NAME.npy     | parent | arrays of the job                                                                    |
| log             | child  | stdout and stderr                                                                    |
| out/NAME.npy    | child  | arrays of the answer                                                                 |
| result.json     | child  | {"ok": result, "arrays": [...]}, {"missing": why} or {"raised": why}; written last    |
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tightship.errors import EnvironmentFailure, GateFailed, Malformed, TightshipError, Unsupported, UsageError

Arrays = dict[str, np.ndarray]

RUNTIMES = {
    "llama_cpp": "tightship.validators.runtimes.llama_cpp",
    "llama_adapter": "tightship.validators.runtimes.llama_adapter",
    "onnx_runtime": "tightship.validators.runtimes.onnx_runtime",
    "transformers_client": "tightship.validators.runtimes.transformers_client",
    "genai": "tightship.validators.runtimes.genai",
    "speed": "tightship.validators.runtimes.speed",
    "torch_reference": "tightship.validators.runtimes.torch_reference",
}
# Nothing else of the environment reaches a runtime: no tokens, proxies or caches of the user.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV", "NUMBA_CACHE_DIR")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "NO_COLOR")
_LOG_TAIL = 600
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RuntimeDied(GateFailed):
    """The runtime raised, crashed, hung or outgrew its limits. `log` is the end of what it printed."""

    code = "runtime_died"

    def __init__(self, message: str, *, log: str = "", tensor: str | None = None) -> None:
        super().__init__(message, tensor=tensor)
        self.log = log


class RuntimeMissing(EnvironmentFailure):
    """The runtime's package is not installed, or it cannot judge this artifact: a check that did not run."""

    code = "runtime_missing"


@dataclass(frozen=True)
class Limits:
    """What one job may use.

    Attributes:
        seconds: wall time.
        memory: bytes of private writable memory; None means the machine's memory.
        threads: threads of the numeric libraries.
        scratch: where the exchange directory is made; None means the system's temporary directory.
        mapped: bytes of weights that a runtime may map from files beside `memory`; 0 where it need not spare memory.
            Some map them privately, which the kernel counts as data although it can let go of them at any time.
    """

    seconds: float = 1800.0
    memory: int | None = None
    threads: int = 1
    scratch: Path | None = None
    mapped: int = 0

    @property
    def memory_bytes(self) -> int:
        return self.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def cpu_seconds(self) -> int:
        """Bound of CPU time: ends a busy child even where nobody is left to end it."""
        return int(self.seconds * (os.cpu_count() or 1)) + 1


def run_child(
    name: str, job: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, limits: Limits
) -> tuple[dict[str, Any], Arrays]:
    """Answer of `RUNTIMES[name].run(job, arrays)`, computed in a child process.

    Raises:
        UsageError: no such runtime.
        RuntimeMissing: its package is not installed, or it declines this artifact.
        RuntimeDied: it raised, died, or outran its limits; the message says which, the log what it printed last.
    """
    if name not in RUNTIMES:
        raise UsageError(f"runtime {name!r} is unknown; known: {', '.join(RUNTIMES)}")
    with tempfile.TemporaryDirectory(prefix=f"tightship-{name}-", dir=limits.scratch) as folder:
        directory = Path(folder).absolute()  # the child runs elsewhere
        _write_job(directory, RUNTIMES[name], job, arrays, limits)
        status = _supervise(directory, limits)
        log = (directory / "log").read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace").strip()
        answer = directory / "result.json"
        if not answer.is_file():
            raise RuntimeDied(_obituary(name, status, limits, log), log=log)
        result = json.loads(answer.read_text())
        if "missing" in result:
            raise RuntimeMissing(f"{name} did not run: {result['missing']}")
        if "raised" in result:
            raise RuntimeDied(f"{name} failed: {result['raised']}", log=log, tensor=result.get("tensor"))
        # Mapped, not read: the files are unlinked below, and the pages stay until the arrays are let go.
        return result["ok"], _load_arrays(directory / "out", result["arrays"], "r")


def _write_job(
    directory: Path, module: str, job: Mapping[str, Any], arrays: Mapping[str, np.ndarray], limits: Limits
) -> None:
    for folder in ("in", "out", "home"):
        (directory / folder).mkdir()
    _save_arrays(directory / "in", arrays)
    plain = {**asdict(limits), "scratch": None, "memory": limits.memory_bytes, "cpu": limits.cpu_seconds}
    order = {"module": module, "job": {**job, "mapped": limits.mapped > 0}, "limits": plain, "arrays": sorted(arrays)}
    (directory / "job.json").write_text(json.dumps(order))


def _supervise(directory: Path, limits: Limits) -> int | None:
    """Run the child; its return code (negative: signal), or None if it had to be killed for time."""
    command = [sys.executable, "-P", "-m", "tightship.validators.runtimes.child", str(directory)]
    with (directory / "log").open("wb") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=_environment(directory, limits),
            start_new_session=True,
        )
        try:
            return child.wait(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also on Ctrl-C: nothing that the runtime started may live on
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _environment(directory: Path, limits: Limits) -> dict[str, str]:
    kept = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
    home = str(directory / "home")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(limits.threads))
    quiet = {
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the processor from those that work
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "GGML_NO_BACKTRACE": "1",
    }
    return {**kept, **threads, **quiet, **dict.fromkeys(_OFFLINE, "1"), "HOME": home, "HF_HOME": home}


def _obituary(name: str, status: int | None, limits: Limits, log: str) -> str:
    if status is None:
        how = f"did not finish within {limits.seconds:g} s and was killed"
    elif status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
    else:
        how = f"ended with code {status} and no answer"
    last = log.splitlines()[-1] if log else "nothing"
    return f"{name} {how}; it printed last: {last}"


def _save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for key, array in arrays.items():
        np.save(folder / f"{key}.npy", array, allow_pickle=False)


def _load_arrays(folder: Path, names: list[str], mode: Literal["r"] | None = None) -> Arrays:
    return {key: np.load(folder / f"{key}.npy", mmap_mode=mode, allow_pickle=False) for key in names}


def _limit_self(limits: Mapping[str, Any]) -> None:
    # Address space says little about memory (torch and ORT map gigabytes they never touch); RLIMIT_DATA counts the
    # private writable part, which is what a runaway runtime would eat.
    data = limits["memory"] + limits["mapped"]
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # die with the parent, even where it was killed outright
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _answer(directory: Path) -> dict[str, Any]:
    order = json.loads((directory / "job.json").read_text())
    _limit_self(order["limits"])
    try:
        module = importlib.import_module(order["module"])
        result, arrays = module.run(order["job"], _load_arrays(directory / "in", order["arrays"]))
        _save_arrays(directory / "out", arrays)
    except (ImportError, EnvironmentFailure, Unsupported) as error:
        return {"missing": str(error)}
    except MemoryError as error:
        return {"raised": f"out of memory under its limit of {order['limits']['memory']} bytes: {error}"}
    except (GateFailed, Malformed) as error:
        return {"raised": str(error), "tensor": error.tensor}
    except Exception as error:
        import traceback

        traceback.print_exc()
        tensor = error.tensor if isinstance(error, TightshipError) else None
        return {"raised": f"{type(error).__name__}: {error}", "tensor": tensor}
    return {"ok": result, "arrays": sorted(arrays)}


def main(arguments: list[str]) -> int:
    """Entry point of the child: answer the job in the given directory."""
    directory = Path(arguments[0])
    answer = json.dumps(_answer(directory))
    draft = directory / "result.draft"
    draft.write_text(answer)
    draft.replace(directory / "result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
