"""The scheduler alone: budgets, turns, gangs, and that everything is given back."""

from __future__ import annotations

from adapterbay.server.batch import Group, Phase, Row, Share
from adapterbay.server.blocks import BlockLedger, blocks_for
from adapterbay.server.prefix import BlockNames, seed
from adapterbay.server.requests import ArmSpec, ClassifyTask, GenerateTask, Part, Request, SamplingSpec, Task
from adapterbay.server.scheduler import Scheduler, Seat


class Slots:
    """Room for `most` different adapters at once."""

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.seated: list[str] = []
        self.steps = 0

    def renew(self) -> None:
        self.steps += 1

    def seat(self, group: Group, *, alone: bool) -> Seat:
        names = [part.name for row in group.rows for part in row.request.arm.parts]
        if len({*self.seated, *names}) > self.most:
            return Seat.FULL
        self.seated.extend(names)
        return Seat.TAKEN

    def leave(self, row: Row) -> None:
        for part in row.request.arm.parts:
            self.seated.remove(part.name)


def row(tokens: int, new: int = 4, name: str | None = None, *, pooled: bool = False) -> Row:
    parts = (Part(name, name, 1, f"sha256:{name}"),) if name else ()
    ids = tuple(range(tokens))
    task: Task = ClassifyTask(ids) if pooled else GenerateTask(ids, SamplingSpec(max_tokens=new))
    return Row(Request(ArmSpec(parts), task, print), list(ids), tokens, 0 if pooled else new)


def sharing(tokens: list[int], new: int = 4, identity: str = "base") -> Row:
    """A row whose full blocks have names."""
    made = Row(
        Request(ArmSpec(), GenerateTask(tuple(tokens), SamplingSpec(max_tokens=new)), print),
        list(tokens),
        len(tokens),
        new,
    )
    made.names, made.reuses = BlockNames(seed(identity)), True
    return made


def group(*rows: Row) -> Group:
    return Group(list(rows), ready=True)


def scheduler(
    blocks: int = 100, most: int = 100, rows: int = 8, tokens: int = 32, *, chunked: bool = True
) -> Scheduler:
    return Scheduler(BlockLedger(blocks), Slots(most), max_rows=rows, step_tokens=tokens, chunked=chunked)


def compute(plan: Scheduler, shares: list[Share]) -> None:
    """What the loop does with a step."""
    for share in shares:
        plan.advance(share)
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
    compute(plan, first)
    second = plan.schedule()
    assert [(s.row, s.start, s.count) for s in second] == [(short, 5, 1), (long, 27, 31)]
    compute(plan, second)
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
    compute(plan, first)
    for share in first:
        plan.finish(share.row)
    second = plan.schedule()
    assert {s.row for s in second} == set(gang.rows)
    assert sum(s.count for s in second) == 32
    assert all(s.count >= 1 for s in second)


def test_a_row_starts_if_a_block_is_left_for_all_that_grow() -> None:
    plan = scheduler(blocks=5)
    first, second = row(20, new=30), row(20, new=30)  # 2 blocks for the prompt, 4 in the end
    plan.add(group(first))
    plan.add(group(second))
    shares = plan.schedule()
    assert [s.row for s in shares] == [first], "both would need a third block and one is left"
    assert len(first.blocks) == 2
    compute(plan, shares)
    while len(first.tokens) < 20 + 29:
        shares = plan.schedule()
        assert [s.row for s in shares] == [first]
        assert len(first.blocks) == blocks_for(len(first.tokens))
        compute(plan, shares)
    plan.finish(first)
    assert [s.row for s in plan.schedule()] == [second]
    plan.finish(second)
    assert plan._blocks.free_blocks == 5
    assert plan.waiting_rows == 0


def decode_all(plan: Scheduler) -> list[list[Row]]:
    """Steps until every row has all its tokens; who ran in each."""
    ran = []
    for _ in range(200):
        shares = plan.schedule()
        assert shares
        ran.append([s.row for s in shares])
        compute(plan, shares)
        for share in shares:
            if len(share.row.tokens) == share.row.prompt_tokens + share.row.max_new_tokens:
                plan.finish(share.row)
        if not plan.running and not plan.waiting_rows:
            return ran
    raise AssertionError("no end")


def test_the_youngest_gives_way_and_goes_on_first() -> None:
    plan = scheduler(blocks=6, rows=4)
    rows = [row(10, new=40, name="old"), row(10, new=40, name="young"), row(10, new=40, name="youngest")]
    late = row(10, new=40, name="late")  # 1 block first, 4 in the end
    for each in rows:
        plan.add(group(each))
    compute(plan, plan.schedule())
    plan.add(group(late))
    ran = decode_all(plan)
    assert plan.preemptions >= 2
    assert all(rows[0] in step for step in ran[:38]), "the oldest never waits"
    finished = [next(i for i in reversed(range(len(ran))) if each in ran[i]) for each in (*rows, late)]
    assert finished == sorted(finished), "rows end in the order in which they came"
    assert plan._blocks.free_blocks == 6


def test_a_group_gives_way_whole_and_goes_on_together() -> None:
    plan = scheduler(blocks=9, rows=4, tokens=100)
    first = row(30, new=60)
    gang = [row(10, new=40), row(10, new=40)]
    plan.add(group(first))
    plan.add(group(*gang, row(10, new=3)))  # one of them ends before
    ran = decode_all(plan)
    assert plan.preemptions >= 2
    for step in ran:
        assert (gang[0] in step) == (gang[1] in step)


def test_a_preempted_row_can_be_cancelled_alone() -> None:
    plan = scheduler(blocks=8, rows=4)
    first, gang = row(30, new=90), [row(10, new=40), row(10, new=40)]
    plan.add(group(first))
    plan.add(group(*gang))
    while not plan.preemptions:
        compute(plan, plan.schedule())
    plan.finish(gang[0])
    assert plan.waiting_rows == 1
    plan.finish(gang[1])
    assert plan.waiting_rows == 0
    plan.finish(first)
    assert plan._blocks.free_blocks == 8
    assert plan.schedule() == []


def test_what_others_are_computing_is_waited_for_and_then_shared() -> None:
    plan = scheduler(tokens=40)
    system = list(range(100, 164))  # 4 full blocks
    rows = [sharing([*system, 7, 8, 9, index]) for index in range(4)]
    other = sharing(list(range(70)), identity="other")
    for each in (*rows, other):
        plan.add(group(each))
    first = plan.schedule()
    assert [(s.row, s.start, s.count) for s in first] == [(rows[0], 0, 40)]
    compute(plan, first)
    second = plan.schedule()
    assert [(s.row, s.start, s.count) for s in second] == [(rows[0], 40, 28), (other, 0, 12)], (
        "who need not wait may go"
    )
    compute(plan, second)
    third = plan.schedule()
    assert [(s.row, s.start) for s in third[1:]] == [(other, 12)]
    compute(plan, third)
    fourth = plan.schedule()
    assert [(s.row, s.start, s.count) for s in fourth[2:]] == [(each, 64, 4) for each in rows[1:]]
    assert all(each.blocks[:4] == rows[0].blocks[:4] for each in rows)
    assert len({each.blocks[4] for each in rows}) == 4
    assert plan.reused_tokens == 3 * 64


def test_nobody_waits_for_a_row_that_is_over() -> None:
    plan = scheduler(tokens=40)
    system = list(range(100, 164))
    rows = [sharing([*system, 7, index]) for index in range(2)]
    for each in rows:
        plan.add(group(each))
    compute(plan, plan.schedule())
    plan.finish(rows[0])  # cancelled in the middle of its prompt
    assert [(s.row, s.start) for s in plan.schedule()] == [(rows[1], 32)]


def test_a_whole_prompt_is_never_shared() -> None:
    plan = scheduler(tokens=100)
    tokens = list(range(32))
    first, second = sharing(tokens), sharing(tokens)
    plan.add(group(first))
    compute(plan, plan.schedule())
    plan.finish(first)
    plan.add(group(second))
    assert [(s.start, s.count) for s in plan.schedule()] == [(16, 16)], "the last token gives the logits"


def test_blocks_are_found_until_they_are_needed_the_least_recently_used_goes_first() -> None:
    plan = scheduler(blocks=6, tokens=100)

    def pass_through(identity: str) -> int:
        each = sharing(list(range(33)), new=2, identity=identity)  # 2 full blocks and one more
        plan.add(group(each))
        shares = plan.schedule()
        compute(plan, shares)
        plan.finish(each)
        return shares[0].start

    assert [pass_through(identity) for identity in ("a", "b", "a", "b")] == [0, 0, 32, 32]
    assert pass_through("a") == 32
    assert pass_through("c") == 0  # takes two that are empty and the last of b
    assert [pass_through(identity) for identity in ("a", "b")] == [32, 16]


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
