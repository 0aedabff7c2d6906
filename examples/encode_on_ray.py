"""Encode a corpus with Ray Data: one engine per actor, all caches in one store.

    python examples/encode_on_ray.py corpus/*.jsonl --store s3://bucket/kv --model Qwen/Qwen3-0.6B --actors 8 --gpus 1

Each line of the files is an object with a string "text". Items in the store are not encoded again, so you can run a
failed job again with the same command. Needs `pip install 'ray[data]'`; see Ray's documentation to start a cluster.
"""

from __future__ import annotations

import argparse
from typing import Any

from kvcag import KVCacheMemory


class Encoder:
    """One actor: it loads the model once, and encodes batch after batch.

    Args:
        model: a hub id or a folder.
        store: an address that every machine reaches, such as `s3://bucket/kv`, or a folder that all of them mount.
    """

    def __init__(self, model: str, store: str) -> None:
        self.memory = KVCacheMemory(model, store=store)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """`{"text": (batch,)}` → the documents' ids."""
        return {"id": self.memory.add([str(text) for text in batch["text"]])}


def main(files: list[str], store: str, model: str, actors: int = 1, gpus: float = 0) -> int:
    """Returns the number of documents that the store has now."""
    import ray

    encoded = ray.data.read_json(files).map_batches(
        Encoder,
        fn_constructor_args=(model, store),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus,
        batch_size=16,
    )
    documents = int(encoded.count())
    print(f"{documents} documents in {store}")
    return documents


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--store", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    main(**vars(parser.parse_args()))
