"""Checks that random schemas hold with a real model, and that a conversation's turns answer as full prefills do.

    python benchmarks/structured.py [--schemas 200] [--budget 3 40] [--turns 10] [--out FILE]

Schemas are the test suite's (`tests/schemas.py`, every keyword that a constraint holds), drawn with a fixed seed.
Each output is validated by `jsonschema` and held against its budget; a schema whose shortest output does not fit is
refused, and then answered with the budget that the refusal names.

Turns: a conversation over some 2,000 tokens, free and constrained turns in turn, beside a fresh engine that reads the
same tokens anew for each turn, one after the other in one run. Greedy, fp32.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import jsonschema
from hypothesis import HealthCheck, Phase, given, seed, settings

from kvcag import HFEngine, KVCacheMemory
from kvcag.chat_template import Message, Prompt
from kvcag.demo.model import embedded_model
from kvcag.engines.constrain import Choices
from kvcag.errors import ConstraintBudgetError

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.schemas import Schema, schemas


def holds(engine: HFEngine, schema: Schema, budget: int) -> dict[str, Any]:
    """One schema's output: valid, and of at most `budget` tokens, or of what the refusal says is needed."""
    refused = False
    try:
        engine.constrain(schema, budget)
    except ConstraintBudgetError as error:
        refused, budget = True, error.needed_tokens
    sampling = engine.sampling(max_new_tokens=budget)
    chunks = list(engine.stream(engine.build_prompt("Say something."), sampling, constraint=schema))
    text = "".join(chunk.text for chunk in chunks)
    tokens = chunks[-1].usage.completion_tokens
    jsonschema.validate(json.loads(text), schema)
    if tokens > budget:
        raise AssertionError(f"{tokens} tokens of {budget} for {schema}: {text}")
    return {"budget": budget, "tokens": tokens, "refused_first": refused}


def random_schemas(engine: HFEngine, count: int, budgets: tuple[int, int]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    draw = random.Random(0)

    @seed(0)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(schema=schemas)
    def run(schema: Schema) -> None:
        rows.append(holds(engine, schema, draw.randint(*budgets)))
        if len(rows) % 20 == 0:
            print(f"{len(rows)} schemas", file=sys.stderr)

    run()
    return {
        "schemas": len(rows),
        "valid": len(rows),  # the first that is not ends the run
        "budgets": list(budgets),
        "refused_for_their_budget": sum(row["refused_first"] for row in rows),
        "tokens_of_all": sum(row["tokens"] for row in rows),
    }


def turns(engine: HFEngine, count: int) -> dict[str, Any]:
    filler = " ".join(f"Berth {number} is let to boat {number * 7 % 100}." for number in range(150))
    memory = KVCacheMemory(engine)
    id = memory.create_context([f"The lighthouse keeper is called Ines Falk. She keeps bees. {filler}"])
    fresh = HFEngine(engine.model, engine.tokenizer, prefix_cache_bytes=0)
    asked = [("Who keeps bees?", None), ("Is that so?", Choices(["yes", "no", "maybe"]))]
    messages: list[Message] = []
    equal, prefilled, mine, theirs = 0, [], [], []
    for number in range(count):
        question, constraint = asked[number % 2]
        messages.append({"role": "user", "content": question})
        prompt = engine.template.prompt(memory.with_context(id, messages))
        started = time.perf_counter()
        answer = memory.ask(prompt, constraint=constraint, max_new_tokens=8)
        mine.append(time.perf_counter() - started)
        messages.append({"role": "assistant", "content": answer.text})
        prefilled.append(answer.usage.prompt_tokens - answer.usage.cached_tokens)
        started = time.perf_counter()
        sampling = fresh.sampling(max_new_tokens=8)
        chunks = list(fresh.stream(Prompt((), (), prompt.token_ids), sampling, constraint=constraint))
        theirs.append(time.perf_counter() - started)
        equal += answer.text == "".join(chunk.text for chunk in chunks)
        print(f"turn {number + 1}", file=sys.stderr)
    return {
        "context_tokens": len(prompt.context_ids),
        "turns": count,
        "equal_to_a_full_prefill": equal,
        "prefilled_tokens_of_each_turn": prefilled,
        "seconds_a_turn": median(mine),
        "seconds_a_full_prefill": median(theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--budget", type=int, nargs=2, default=(3, 40), help="each schema's is drawn between these")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "structured.json")
    options = parser.parse_args()
    engine = HFEngine.from_pretrained(embedded_model(), dtype="float32", device="cpu")
    result = {
        "turns": turns(engine, options.turns),
        "schemas": random_schemas(engine, options.schemas, tuple(options.budget)),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
