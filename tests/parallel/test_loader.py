"""Planned batches: their order, resuming, sizes, bad input, and ranks that do not see the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import Ranks
from stand_in import planning
from tiny import IGNORE, make_documents, make_model

import hdp
from hdp.balance import DoesNotFit, Plan, PlanError
from hdp.parallel.batch import read_document

LENGTHS = [10, 3, 40, 7, 90, 1, 22, 15, 0, 8, 31, 64, 5]


def batches(**options: Any) -> list[tuple[int, ...]]:
    fields: dict = {"tokens_per_step": 100, "capacity": 50, "planner": "naive", **options}
    return [indices for indices, _ in hdp.Loader(make_documents(LENGTHS), planning(), **fields).plan_batches()]


def test_an_epoch_holds_every_document_once_and_keeps_to_the_token_count():
    for seed in (None, 0, 1):
        drawn = batches(seed=seed)
        assert sorted(i for batch in drawn for i in batch) == list(range(len(LENGTHS)))
        assert all(sum(LENGTHS[i] for i in batch) <= 100 for batch in drawn)
    assert [i for batch in batches(seed=None) for i in batch] == list(range(len(LENGTHS)))


def test_shuffles_depend_on_seed_and_epoch_alone():
    two_epochs = batches(seed=3, steps=2 * len(batches(seed=3)))
    assert two_epochs == batches(seed=3, steps=2 * len(batches(seed=3)))
    assert batches(seed=4) != batches(seed=3) == two_epochs[: len(batches(seed=3))]
    assert two_epochs[: len(two_epochs) // 2] != two_epochs[len(two_epochs) // 2 :]


def test_steps_run_over_several_epochs_and_each_holds_all():
    drawn = batches(seed=0, steps=11)
    assert len(drawn) == 11
    first = len(batches(seed=0))
    assert sorted(i for batch in drawn[:first] for i in batch) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("start", [1, 3, 7])
def test_resuming_goes_on_where_it_stopped(start):
    assert batches(seed=5, steps=9, start=start) == batches(seed=5, steps=9)[start:]


def test_a_document_longer_than_a_step_is_a_batch_of_its_own():
    drawn = batches(seed=None, tokens_per_step=20)
    assert (2,) in drawn and (4,) in drawn
    assert batches(seed=None, tokens_per_step=10**6) == [tuple(range(len(LENGTHS)))]


def test_lengths_known_up_front_are_taken_without_reading():
    class Lazy:
        lengths = np.array(LENGTHS)

        def __len__(self) -> int:
            return len(LENGTHS)

        def __getitem__(self, index: int) -> torch.Tensor:
            raise AssertionError("read while planning")

    list(hdp.Loader(Lazy(), planning(), tokens_per_step=100, capacity=50, planner="naive").plan_batches())


class Measured(list):
    """Two documents that bring lengths of their own."""

    def __init__(self, lengths: list) -> None:
        super().__init__(make_documents([3, 4]))
        self.lengths = lengths


REFUSED = [
    (ValueError, "no documents", {"documents": []}),
    (ValueError, "all 2 documents are empty", {"lengths": [0, 0]}),
    (ValueError, "tokens_per_step is 0", {"tokens_per_step": 0}),
    (PlanError, "capacity is 0", {"capacity": 0}),
    (PlanError, "unknown planner 'magic'", {"planner": "magic"}),
    (DoesNotFit, "of 200 tokens does not fit 2 ranks x 50 tokens", {"lengths": [10, 200]}),
    (ValueError, "document 1: token ids must be one row of integers", {"documents": [torch.ones(3).long(), torch.ones(4)]}),
    (ValueError, "document 0: labels has shape", {"documents": [{"input_ids": torch.ones(3).long(), "labels": [1, 2]}]}),
    (ValueError, "document 0 has no 'input_ids'", {"documents": [{"text": "to be"}]}),
    (DoesNotFit, "^document 2 of 200 tokens .*: use at least 4 ranks, a capacity of", {"lengths": [10, 20, 200]}),
    (ValueError, "documents are a generator without len", {"documents": (d for d in make_documents([3, 4]))}),
    (ValueError, "document 0: token ids are of type str, not numbers", {"documents": ["to be"]}),
    (ValueError, "document 1: token ids are of type NoneType", {"documents": [torch.ones(3).long(), None]}),
    (ValueError, "document 1 has a length of -4", {"documents": Measured([3, -4])}),
    (ValueError, r"lengths of the documents are float64 of shape \(2,\)", {"documents": Measured([3.0, 4.5])}),
    (ValueError, r"of shape \(3,\): there are 2 documents", {"documents": Measured([3, 4, 5])}),
    (ValueError, "capacity is '50': give a whole number", {"capacity": "50"}),
    (ValueError, "tokens_per_step is 0.5: give a whole number", {"tokens_per_step": 0.5}),
    (ValueError, "tokens_per_step is nan: give a whole number", {"tokens_per_step": float("nan")}),
    (ValueError, "'regime' is the engine's: hdp.Loader takes it from its engine", {"regime": "slot"}),
    (ValueError, "'cost' is part of the machine: .*; give machine=", {"cost": None}),
    (PlanError, "machine is 'none.json': give a file of hdp profile --out, a Machine", {"machine": "none.json"}),
    (ValueError, "unknown option 'batch_size' of hdp.Loader: plans take offload, .*tokens_per_step", {"batch_size": 8}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message", "change"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input_is_refused(kind, message, change):
    change = dict(change)
    documents = change.pop("documents", None)
    if documents is None:
        documents = make_documents(change.pop("lengths", LENGTHS))
    fields = {"tokens_per_step": 100, "capacity": 50, "planner": "naive", **change}
    with pytest.raises(kind, match=message) as caught:
        list(hdp.Loader(documents, planning(), **fields).plan_batches())
    assert type(caught.value) is kind


def test_a_later_batch_that_cannot_be_planned_names_its_document():
    def mine(lengths, **options: Any) -> Plan:
        if 90 in lengths:
            raise PlanError(f"sequence {lengths.tolist().index(90)} has no place")
        return hdp.make_plan(lengths, planner="naive", **options)

    loader = hdp.Loader(make_documents(LENGTHS), planning(), tokens_per_step=100, capacity=50, planner=mine, seed=None)
    with pytest.raises(PlanError, match=r"^document 4 has no place$"):
        list(loader.plan_batches())


MASKED = [
    ({"attention_mask": [1, 1, 0]}, "document 1: its attention_mask has zeros"),
    ({"position_ids": [0, 1, 0]}, "document 1: its position_ids are not 0 to 2"),
    ({"position_ids": [0, 1]}, "document 1: its position_ids are not 0 to 2"),
    ({"completion_mask": [0, 0, 1]}, "document 1 has 'completion_mask' but no 'labels'"),
    ({"assistant_masks": [0, 0, 1]}, "document 1 has 'assistant_masks' but no 'labels'"),
]


@pytest.mark.parametrize(("fields", "message"), MASKED, ids=str)
def test_fields_that_would_be_left_out_in_silence_are_refused(fields, message):
    ids = torch.tensor([5, 6, 7])
    with pytest.raises(ValueError, match=message):
        read_document([ids, {"input_ids": ids, **fields}], 1)


def test_fields_that_say_nothing_new_are_taken():
    ids = torch.tensor([5, 6, 7])
    fields = {
        "attention_mask": [1, 1, 1],
        "position_ids": torch.arange(3),
        "completion_mask": [0, 0, 1],
        "labels": [-100, -100, 7],
    }
    found = read_document([{"input_ids": ids, **fields}], 0)
    assert found.input_ids.tolist() == [5, 6, 7] and found.labels.tolist() == [IGNORE, 7, IGNORE]


# ------------------------------------------------------------ on real ranks


def caught(function) -> tuple[str, str]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def plan_error_everywhere(world: hdp.World, lengths: list[int], options: dict) -> tuple[str, str]:
    fields = {"tokens_per_step": 10**4, "capacity": 50, "planner": "naive", **options}
    return caught(lambda: next(iter(hdp.Loader(make_documents(lengths), planning(world), **fields))))


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([10, 101], {}, "of 101 tokens does not fit"),
        ([10], {"capacity": 0}, "capacity is 0"),
        ([10], {"planner": "x"}, "unknown planner"),
    ],
)
def test_all_ranks_refuse_alike(ranks, lengths, options, message):
    for kind, text in ranks(2).run(plan_error_everywhere, lengths, options):
        assert kind == ("DoesNotFit" if "tokens" in message else "PlanError") and message in text


def different(world: hdp.World, what: str) -> tuple[str, str]:
    documents = make_documents([150, 20, 30, 9, 11, 40])
    options: dict[str, Any] = {"tokens_per_step": 10**4, "capacity": 64, "seed": None, "planner": "naive"}
    odd = world.rank == 2
    if what == "lengths" and odd:
        documents[1] = documents[1][:-1]
    elif what == "order" and odd:
        documents[1], documents[2] = documents[2], documents[1]
    elif what == "count":  # the first batches are equal; rank 2 would wait for one more
        options["tokens_per_step"] = 150
        documents = documents if odd else documents[:-1]
    elif what == "planner" and odd:
        options["planner"] = lambda lengths, **_: Plan.from_groups(
            lengths, [(2, 1, 0)] * 6, range(6), world_size=3, capacity=64, regime="step", planner="odd"
        )
    elif what == "tokens" and odd:  # of the document that all share
        documents[0] = documents[0].clone()
        documents[0][77] ^= 1
    elif what == "labels" and odd:
        documents[0] = {"input_ids": documents[0], "labels": torch.full_like(documents[0], IGNORE)}
    return caught(lambda: list(hdp.Loader(documents, planning(world), **options)))


@pytest.mark.parametrize("what", ["lengths", "order", "count", "planner"])
def test_ranks_that_plan_differently_are_named(ranks, what):
    for rank, (kind, text) in enumerate(ranks(3).run(different, what)):
        assert kind == "PlanMismatch"
        assert f"rank {rank}, step 0: ranks {[0, 1] if rank == 2 else [2]} planned another batch" in text


def planned_by_one(world: hdp.World, fails: bool) -> tuple[int, list[str]] | tuple[str, str]:
    """Planner flexsp where it counts its calls, and fails on rank 0 after the check of the longest document."""
    from hdp.balance.planners import flexsp

    calls, make = 0, flexsp.make

    def counted(problem, name):
        nonlocal calls
        calls += 1
        if fails and calls > 1:
            raise PlanError("no plan in time")
        return make(problem, name)

    flexsp.make = counted
    try:
        loader = hdp.Loader(
            make_documents([150, 20, 30, 9, 11, 40]),
            planning(world),
            tokens_per_step=10**4,
            capacity=64,
            planner="flexsp",
        )
        if fails:
            return caught(lambda: list(loader))
        digests = [batch.plan.digest for batch in loader]
        return calls, digests
    finally:
        flexsp.make = make


def test_a_planner_that_stops_by_time_plans_on_one_rank(ranks):
    results = ranks(3).run(planned_by_one, False)
    assert [calls for calls, _ in results] == [2, 1, 1]  # each checked the longest document; one planned
    assert len({tuple(digests) for _, digests in results}) == 1
    assert ranks(3).run(planned_by_one, True) == [("PlanError", "no plan in time")] * 3


@pytest.mark.parametrize("what", ["tokens", "labels"])
def test_ranks_that_hold_different_documents_are_named(ranks, what):
    for rank, (kind, text) in enumerate(ranks(3).run(different, what)):
        assert kind == "PlanMismatch"
        assert f"rank {rank}, step 0: document 0 on rank 2 differs from rank 0's" in text


class Broken:
    """One document cannot be read on rank 1."""

    lengths = np.array([30, 40, 50])

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.rank == 1:
            raise OSError(f"document {index} is on a disk that is gone")
        return make_documents([30, 40, 50])[index]


def read(world: hdp.World) -> None:
    list(hdp.Loader(Broken(world.rank), planning(world), tokens_per_step=10**4, capacity=25, planner="naive"))


def test_a_rank_that_cannot_read_a_document_is_named_by_the_others():
    ranks = Ranks(2)
    try:
        first, second = ranks.outcomes(read)
    finally:
        ranks.close()
    assert second.error.startswith("OSError: document ")
    assert "PeerError: rank 1 failed: OSError: document " in first.error, first


def test_a_world_in_place_of_an_engine_is_refused():
    with pytest.raises(
        ValueError, match=r"hdp\.Loader takes the engine that will run its batches, not SimpleNamespace"
    ):
        hdp.Loader(make_documents(LENGTHS), planning().world, tokens_per_step=100, capacity=50)


def changed_after_planning(world: hdp.World) -> tuple[str, str]:
    documents = make_documents([20, 30])
    (batch,) = hdp.Loader(documents, planning(world), tokens_per_step=100, capacity=50, planner="naive")
    documents[0] = documents[0][:-5]
    return caught(lambda: hdp.shard(make_model(), world).forward_backward(batch))


def test_documents_whose_lengths_changed_after_planning(ranks):
    ((kind, text),) = ranks(1).run(changed_after_planning)
    assert kind == "ValueError" and "has 15 tokens but was planned with 20: the documents' lengths are out" in text


def read_lengths(world: hdp.World) -> list[int]:
    """Documents that this rank reads for one batch of unshared documents."""
    seen: list[int] = []

    class Counting:
        lengths = np.array([20, 21, 22, 23])

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> torch.Tensor:
            seen.append(index)
            return make_documents([20, 21, 22, 23])[index]

    list(hdp.Loader(Counting(), planning(world), tokens_per_step=10**4, capacity=50, planner="naive"))
    return sorted(set(seen))


def test_a_rank_reads_only_documents_that_it_has_a_part_of(ranks):
    first, second = ranks(2).run(read_lengths)
    assert sorted(first + second) == [0, 1, 2, 3] and first and second
