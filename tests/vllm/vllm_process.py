"""A vLLM server process on 127.0.0.1, with the settings that work without an accelerator."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from kvcag import VLLMEngine

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_SECONDS = 240

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default half of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # with two on a busy machine of two cores, decoding stalls
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONPATH": str(ROOT),  # kvcag, for the connector
}


class Vllm:
    """A server process.

    Args:
        model: its folder.
        log: where it writes.
        store: of its connector; none without.
        max_model_len: the longest prompt and answer.

    Attributes:
        url: of its API.
    """

    def __init__(self, model: Path, log: Path, store: str = "", max_model_len: int = 2048) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log = log
        # The module and not the `vllm` command: that one asks for the version of a distribution that has another name.
        settings = {
            "model": str(model),
            "served-model-name": "smollm2",
            "host": "127.0.0.1",
            "port": str(port),
            "dtype": "float32",
            "max-model-len": str(max_model_len),
            "max-num-seqs": "2",
            "max-logprobs": "4096",
            "block-size": "32",
            "shutdown-timeout": "30",  # by default, its processes are killed at once
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        switches = ["--enforce-eager", "--enable-prompt-tokens-details"]
        if store:
            connector = {
                "kv_connector": "KVCAGConnector",
                "kv_connector_module_path": "kvcag.vllm_connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"store": store},
            }
            switches += ["--no-async-scheduling", "--kv-transfer-config", json.dumps(connector)]
        self._command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *options, *switches]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **ENVIRONMENT},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it has a process for the engine; both are stopped together
            )
        until = time.monotonic() + START_SECONDS
        with VLLMEngine(self.url, max_retries=0) as probe:
            while True:
                assert self._process.poll() is None, self.log.read_text()[-3000:]
                try:
                    return probe.check_server()
                except ConnectionError:
                    assert time.monotonic() < until, self.log.read_text()[-3000:]
                    time.sleep(1)

    def stop(self) -> None:
        """Stop it with SIGTERM, as a container's runtime does; kill what is left of its processes after a minute."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def __enter__(self) -> Vllm:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
