"""The indexing API, with a memory cube as the destination: caches follow the documents."""

from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index

from kvcag import MemoryCube
from kvcag.langchain import ChatKVCAG, CubeRetriever
from tests.programs.models import tiny

cube = MemoryCube(tiny().memory().engine)
retriever = CubeRetriever(cube=cube)
record_manager = InMemoryRecordManager("kvcag/notes")
record_manager.create_schema()
kitty = Document("kitty says meow", metadata={"source": "kitty.txt"})
doggy = Document("doggy says woof", metadata={"source": "doggy.txt"})


def load(*documents: Document, cleanup: str) -> None:
    done = index(documents, record_manager, retriever, cleanup=cleanup, source_id_key="source", key_encoder="sha256")
    print(cleanup, done, cube.encode(), len(cube.memory))


load(kitty, kitty, doggy, cleanup="incremental")
load(kitty, doggy, cleanup="incremental")
load(Document("kitty says purr", metadata={"source": "kitty.txt"}), cleanup="incremental")
load(doggy, cleanup="full")
print([document.page_content for document in retriever.invoke("Who?")])
print(ChatKVCAG(memory=cube, max_tokens=4).memory() is cube.memory)
