"""The scheduler alone: budgets, turns, gangs, and that everything is given back."""

from __future__ import annotations

from collections.abc import Sequence

from adapterbay.server.batch import Group, Phase, Row, Share
from adapterbay.server.requests import ArmSpec, ClassifyTask, GenerateTask, Part, Request, SamplingSpec, Task
from adapterbay.server.scheduler import Scheduler


class Blocks:
    def __init__(self, count: int) -> None:
        self.count = count
        self.free = list(range(1, count + 1))

    @property
    def free_blocks(self) -> int:
        return len(self.free)

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        self.free.extend(blocks)


class Slots:
    """Room for `most` different adapters at once."""

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.seated: list[str] = []

    def seat(self, group: Group) -> bool:
        names = [part.name for row in group.rows for part in row.request.arm.parts]
        if len({*self.seated, *names}) > self.most:
            return False
        self.seated.extend(names)
        return True

    def leave(self, row: Row) -> None:
        for part in row.request.arm.parts:
            self.seated.remove(part.name)


def row(tokens: int, new: int = 4, name: str | None = None, *, pooled: bool = False) -> Row:
    parts = (Part(name, name, 1, f"sha256:{name}"),) if name else ()
    ids = tuple(range(tokens))
    task: Task = ClassifyTask(ids) if pooled else GenerateTask(ids, SamplingSpec(max_tokens=new))
    return Row(Request(ArmSpec(parts), task, print), list(ids), tokens, 0 if pooled else new)


def group(*rows: Row) -> Group:
    return Group(list(rows), ready=True)


def scheduler(
    blocks: int = 100, most: int = 100, rows: int = 8, tokens: int = 32, *, chunked: bool = True
) -> Scheduler:
    return Scheduler(Blocks(blocks), Slots(most), max_rows=rows, step_tokens=tokens, chunked=chunked)


def compute(shares: list[Share]) -> None:
    """What the loop does with a step."""
    for share in shares:
        share.row.computed += share.count
        if share.finishes_prompt:
            share.row.phase = Phase.DECODE
            share.row.tokens.append(0)


def names(shares: list[Share]) -> list[str]:
    return [share.row.request.arm.parts[0].name for share in shares]


def test_long_prompts_go_in_chunks_while_others_decode() -> None:
    plan = scheduler()
    short, long = row(5), row(70)
    plan.add(group(short))
    plan.add(group(long))
    first = plan.schedule()
    assert [(s.row, s.count) for s in first] == [(short, 5), (long, 27)]
    compute(first)
    second = plan.schedule()
    assert [(s.row, s.start, s.count) for s in second] == [(short, 5, 1), (long, 27, 31)]
    compute(second)
    third = plan.schedule()
    assert [(s.row, s.start, s.count) for s in third] == [(short, 6, 1), (long, 58, 12)]
    assert third[1].finishes_prompt


def test_adapters_take_turns() -> None:
    plan = scheduler(rows=4, tokens=64)
    for _ in range(6):
        plan.add(group(row(4, name="busy")))
    plan.add(group(row(4, name="quiet")))
    plan.add(group(row(4, name="other")))
    assert names(plan.schedule()) == ["busy", "quiet", "other", "busy"]


def test_a_group_that_is_not_ready_holds_nobody_up() -> None:
    plan = scheduler()
    loading = Group([row(4, name="cold")])
    plan.add(loading)
    plan.add(group(row(4, name="warm")))
    assert names(plan.schedule()) == ["warm"]
    loading.ready = True
    assert "cold" in names(plan.schedule())


def test_all_rows_of_a_group_begin_in_one_step_or_wait() -> None:
    plan = scheduler(rows=4)
    plan.add(group(row(3, name="a"), row(3, name="a")))
    gang = group(*(row(40, name=f"g{i}") for i in range(3)))
    plan.add(gang)
    first = plan.schedule()
    assert len(first) == 2
    compute(first)
    for share in first:
        plan.finish(share.row)
    second = plan.schedule()
    assert {s.row for s in second} == set(gang.rows)
    assert sum(s.count for s in second) == 32
    assert all(s.count >= 1 for s in second)


def test_blocks_are_reserved_for_the_longest_outcome_and_given_back() -> None:
    plan = scheduler(blocks=4, rows=8)
    first, second = row(20, new=30), row(20, new=30)  # 49 positions: 4 blocks of 16
    plan.add(group(first))
    plan.add(group(second))
    assert [s.row for s in plan.schedule()] == [first]
    assert plan._blocks.free_blocks == 0
    compute([Share(first, 0, 20)])
    assert [s.row for s in plan.schedule()] == [first]
    plan.finish(first)
    assert [s.row for s in plan.schedule()] == [second]
    plan.finish(second)
    assert plan._blocks.free_blocks == 4
    assert plan.waiting_rows == 0


def test_rows_that_end_with_their_prompt_keep_no_blocks_unless_chunked() -> None:
    plan = scheduler()
    short, long = row(10, pooled=True), row(40, pooled=True)
    plan.add(group(short))
    plan.add(group(long))
    plan.schedule()
    assert short.blocks == []
    assert len(long.blocks) == 3


def test_no_room_on_the_device_waits_for_room() -> None:
    plan = scheduler(most=1)
    first, second = row(4, name="a"), row(4, name="b")
    plan.add(group(first))
    plan.add(group(second))
    assert [s.row for s in plan.schedule()] == [first]
    plan.finish(first)
    assert [s.row for s in plan.schedule()] == [second]


def test_encoders_take_rows_whole() -> None:
    plan = scheduler(chunked=False)
    big, small = row(50, pooled=True), row(10, pooled=True)
    plan.add(group(big))
    plan.add(group(small))
    first = plan.schedule()
    assert [(s.row, s.count) for s in first] == [(big, 50)]
    plan.finish(big)
    assert [(s.row, s.count) for s in plan.schedule()] == [(small, 10)]


def test_dropped_groups_never_run() -> None:
    plan = scheduler()
    gone = group(row(4, name="a"))
    plan.add(gone)
    plan.drop(gone)
    plan.drop(gone)
    assert plan.schedule() == []
    assert plan.waiting_rows == 0
