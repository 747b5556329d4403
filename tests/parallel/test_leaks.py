"""Changing one document changes no other document's logits by a single bit."""

from __future__ import annotations

import pytest
import torch
from stand_in import planning
from tiny import VOCABULARY, make_documents, make_model

import hdp
from hdp.attention.huggingface import planned_mask
from hdp.balance import Plan
from hdp.parallel.batch import build_inputs

# world: lengths, groups, slots. Long and short documents, shared and whole, in one micro-batch wherever it is possible.
BATCHES: dict[int, tuple[list[int], list[tuple[int, ...]], list[int]]] = {
    1: ([30, 7, 1, 50], [(0,)] * 4, [0, 0, 0, 0]),
    2: ([61, 9, 30, 40, 5], [(0, 1), (0,), (1, 0), (1,), (1,)], [0, 0, 0, 0, 1]),
    3: ([70, 41, 12, 33, 8, 20], [(2, 0, 1), (1, 2), (0,), (0, 2), (1,), (2,)], [0, 0, 0, 0, 0, 1]),
}


def logits_of(world: hdp.World, versions: list[list[torch.Tensor]], plan: Plan) -> list[dict]:
    """Per version of the documents: (sequence, first token, last) to this rank's logits [tokens, vocabulary]."""
    model = make_model("gqa").eval()
    found = []
    for documents in versions:
        loader = hdp.Loader(
            documents, planning(world), tokens_per_step=10**6, capacity=200, planner=lambda *_, **__: plan, seed=None
        )
        (batch,) = loader
        logits = {}
        for micro_batch in plan.micro_batches(world.rank):
            inputs = build_inputs(batch, micro_batch, world.runtime, world.device, {})
            with torch.no_grad():
                output = model(
                    input_ids=inputs.input_ids[None],
                    position_ids=inputs.position_ids[None],
                    attention_mask=planned_mask(world.device),
                    use_cache=False,
                    hdp_route=inputs.route,
                ).logits[0]
            row = 0
            for shard in micro_batch.shards:
                for start, stop in shard.ranges:
                    logits[shard.sequence, start, stop] = output[row : row + stop - start].clone()
                    row += stop - start
            assert row == len(output)
        found.append(logits)
    return found


@pytest.mark.parametrize("schedule", ["ring", "token_ring", "ulysses", "ulysses_home:2", "all_gather"])
@pytest.mark.parametrize("world", BATCHES)
def test_no_bit_of_another_document_changes(ranks, world, schedule):
    lengths, groups, slots = BATCHES[world]
    plan = Plan.from_groups(
        lengths,
        groups,
        slots,
        world_size=world,
        capacity=200,
        regime="step",
        planner="by hand",
        schedule_names=("local", schedule),
    )
    original = make_documents(lengths)
    versions = [original]
    for changed in range(len(lengths)):
        versions.append([(ids + 1) % VOCABULARY if i == changed else ids for i, ids in enumerate(original)])
    by_rank = ranks(world).run(logits_of, versions, plan)
    covered = [0] * len(lengths)
    for first, *others in by_rank:
        for sequence, start, stop in first:
            covered[sequence] += stop - start
        for changed, logits in enumerate(others):
            for key, values in logits.items():
                assert torch.equal(values, first[key]) == (key[0] != changed), (changed, key)
    assert covered == lengths


def test_a_token_changes_only_what_follows_it(ranks):
    """Causality over rank borders: the last token of a shared document reaches no earlier position."""
    length, world = 90, 3
    plan = Plan.from_groups(
        [length], [(1, 2, 0)], [0], world_size=world, capacity=200, regime="step", planner="by hand"
    )
    (ids,) = make_documents([length])
    at = 47
    changed = ids.clone()
    changed[at] = (changed[at] + 1) % VOCABULARY
    for before, after in ranks(world).run(logits_of, [[ids], [changed]], plan):
        for (_, start, stop), values in before.items():
            same = [bool(torch.equal(a, b)) for a, b in zip(values, after[0, start, stop], strict=True)]
            assert same == [token < at for token in range(start, stop)]
