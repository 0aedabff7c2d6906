"""SchedulerEventHandler: reports what retrievers find to a `CacheScheduler`."""

from __future__ import annotations

from typing import Any

from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
from llama_index.core.instrumentation.events.query import QueryStartEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent, RetrievalStartEvent
from llama_index.core.schema import MetadataMode
from pydantic import PrivateAttr

from kvcag.core import TextualMemoryItem
from kvcag.scheduler import CacheScheduler


class SchedulerEventHandler(BaseEventHandler):
    """Reports retrieved documents to a scheduler, and pauses its encoding as soon as a question comes.

    ```python
    get_dispatcher().add_event_handler(SchedulerEventHandler(scheduler))
    ```

    Args:
        scheduler: the scheduler of the LLM's memory.
    """

    _scheduler: CacheScheduler = PrivateAttr()

    def __init__(self, scheduler: CacheScheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    @classmethod
    def class_name(cls) -> str:
        """The name under which this class is serialised."""
        return "SchedulerEventHandler"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        """Pause encoding ahead when a question starts, and report the nodes that a retriever found."""
        if isinstance(event, QueryStartEvent | RetrievalStartEvent | LLMChatStartEvent):
            self._scheduler.step_aside()
        elif isinstance(event, RetrievalEndEvent):
            nodes = [found.node for found in event.nodes]
            self._scheduler.observe(
                [
                    TextualMemoryItem(
                        id=node.node_id,
                        memory=node.get_content(metadata_mode=MetadataMode.LLM),
                        metadata={**node.metadata, "ref_doc_id": node.ref_doc_id or node.node_id},
                    )
                    for node in nodes
                ]
            )
