"""Runs LlamaIndex core's tests with kvcag's LLM in place of MockLLM.

    python benchmarks/core_tests.py CHECKOUT [FOLDER …]

CHECKOUT is the folder `llama-index-core` of a checkout of LlamaIndex. Its tests of LLMs, synthesizers, chat engines,
memory and ingestion run twice: unchanged, and with a `KVCacheLLM` over an `EchoEngine` in place of every
`MockLLM`. Prints the tests that fail only with `KVCacheLLM`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import llama_index.core
import pytest

FOLDERS = ["llms", "response_synthesizers", "chat_engine", "memory", "ingestion"]
_MARK = "outcomes: "


class Outcomes:
    """Each test's outcome, and the last line of its error."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = crash.message.splitlines()[0] if crash else str(report.longrepr)[-200:]
        elif report.when == "call" and report.passed:
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr).splitlines()[-1]


def run(checkout: Path, folders: list[str], *, ours: bool) -> dict[str, Any]:
    """Run the tests in a process of their own."""
    arguments = [sys.executable, __file__, str(checkout), *folders, "--one", "ours" if ours else "mock"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    if line is None:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return json.loads(line.removeprefix(_MARK))


def run_here(checkout: Path, folders: list[str], *, ours: bool) -> None:
    """Run the tests in this process."""
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    try:
        import openai  # noqa: F401
    except ImportError:  # core's conftest imports it, and these tests do not ask it anything
        sys.modules["openai"] = types.ModuleType("openai")
    static = Path(llama_index.core.__file__).parent / "_static"
    os.environ["TIKTOKEN_CACHE_DIR"] = str(static / "tiktoken_cache")  # for the processes that tests start
    if ours:
        put_ours_in_place()
    outcomes = Outcomes()
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--timeout=30",
        "-o",
        "asyncio_mode=auto",
        "-o",
        "addopts=",
    ]
    pytest.main([*options, *(f"tests/{folder}" for folder in folders)], plugins=[outcomes])
    print(f"\n{_MARK}{json.dumps({'failed': outcomes.failed, 'passed': outcomes.passed})}")


def put_ours_in_place() -> None:
    """Let core's `MockLLM` be a `KVCacheLLM` that says what it is asked, as `MockLLM` does.

    `MockLLM` is a completion model, which answers chats by completing their text. Ours takes completions as they are,
    and answers chats from their turns.
    """
    import llama_index.core.llms
    import llama_index.core.llms.mock
    from llama_index.core.llms import CustomLLM, LLMMetadata

    from kvcag.chat_template import Message, Prompt
    from kvcag.llama_index import KVCacheLLM
    from kvcag.testing import EchoEngine, last_user_message, whole_prompt

    def said(prompt: str) -> str:
        turns = whole_prompt(prompt)
        if turns == prompt:
            return prompt
        return f"{turns}\nassistant: " if last_user_message(prompt) else ""

    made_of = {"complete": ("chat", "achat"), "stream_complete": ("stream_chat", "astream_chat")}

    class OursInItsPlace(KVCacheLLM):
        def __init__(self, max_tokens: int | None = None, is_chat_model: bool | None = False, **settings: Any) -> None:
            super().__init__(engine=EchoEngine(said), max_new_tokens=max_tokens, **settings)
            self._is_chat_model = bool(is_chat_model)

        def __init_subclass__(cls, **kwargs: Any) -> None:
            """A test that replaces completions replaces chats: `CustomLLM` makes chats of completions."""
            super().__init_subclass__(**kwargs)
            for completion, chats in made_of.items():
                for chat in chats if completion in cls.__dict__ else ():
                    if chat not in cls.__dict__:
                        setattr(cls, chat, CustomLLM.__dict__[chat])

        @property
        def metadata(self) -> LLMMetadata:
            return super().metadata.model_copy(update={"is_chat_model": self._is_chat_model})

        def _asked(self, prompt: str, formatted: bool) -> list[Message] | Prompt:
            return super()._asked(prompt, formatted=bool(prompt))  # no text is no prompt of a completion model

    llama_index.core.llms.MockLLM = OursInItsPlace
    llama_index.core.llms.mock.MockLLM = OursInItsPlace


def main() -> None:
    """Read the arguments, run, and print."""
    arguments = sys.argv[1:]
    if not arguments:
        raise SystemExit(__doc__)
    which = arguments[arguments.index("--one") + 1] if "--one" in arguments else None
    if which:
        arguments = arguments[: arguments.index("--one")]
    checkout, folders = Path(arguments[0]).resolve(), arguments[1:] or FOLDERS
    if which:
        run_here(checkout, folders, ours=which == "ours")
        return
    mock, ours = (run(checkout, folders, ours=ours) for ours in (False, True))
    new = {test: why for test, why in ours["failed"].items() if test not in mock["failed"]}
    print(f"MockLLM: {mock['passed']} passed, {len(mock['failed'])} failed")
    print(f"KVCacheLLM: {ours['passed']} passed, {len(ours['failed'])} failed, {len(new)} of them with ours alone")
    for test, why in new.items():
        print(f"  {test}: {why}")


if __name__ == "__main__":
    main()
