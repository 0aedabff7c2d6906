"""Run by `llamacpp.py` in an environment with llama-cpp-python: reads contexts, and answers over them.

    python llamacpp_worker.py MODEL.gguf THREADS CONTEXT TOKENS

Reads one JSON object per line, and writes one value.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

import llama_cpp


def main() -> None:
    path, threads, context, tokens = sys.argv[1], *map(int, sys.argv[2:5])
    model = llama_cpp.Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps(llama_cpp.__version__), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        if asked["do"] == "cold":
            model.reset()
            model.eval(asked["ids"])
            found: float | list[float] = time.perf_counter() - started
        else:
            times = [started]
            for _ in model.generate(asked["ids"], temp=0.0, repeat_penalty=1.0):  # goes on from what is known
                times.append(time.perf_counter())
                if len(times) > tokens:
                    break
            found = [after - before for before, after in pairwise(times)]
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
