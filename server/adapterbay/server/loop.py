"""The engine's thread: schedule, run, postprocess.

Everything that touches the model, the block pool or the device's slots happens here and nowhere else; other threads
leave work in the inbox.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from adapterbay.registry.errors import AdapterbayError, Cancelled, EngineFault
from adapterbay.server.batch import Group, Phase, Row
from adapterbay.server.generation import Generating
from adapterbay.server.heads import Head, HeadPooling
from adapterbay.server.pooling import StatePooler, TokenLabels, label, require_finite
from adapterbay.server.requests import (
    ClassifyResult,
    ClassifyTask,
    ClassifyTokensResult,
    ClassifyTokensTask,
    EmbedResult,
    EmbedTask,
    Event,
    GenerateResult,
    Timings,
)
from adapterbay.server.runner import Runner, StepResult
from adapterbay.server.sampling import draw
from adapterbay.server.scheduler import Scheduler

log = logging.getLogger(__name__)


class Loop:
    """Owns the scheduler and the runner. On this thread, `left` is called once for each row that is over, `stuck` when
    rows wait and none can run, and `broken` when the loop cannot go on, as the last thing."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        left: Callable[[Row], None],
        stuck: Callable[[], None],
        broken: Callable[[EngineFault], None],
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._left = left
        self._stuck = stuck
        self._broken = broken
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.steps = 0

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def post(self, work: Callable[[], None]) -> None:
        """Has `work` done on the engine's thread, before its next step. From any thread."""
        with self._wake:
            self._inbox.append(work)
            self._wake.notify()

    def forget(self) -> None:
        """On the engine's thread: what steps to come could have used of an adapter that leaves is let go."""
        self._runner.forget()

    def stop(self) -> None:
        """Ends the thread after the step under way; rows that are left get Cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception as error:
                log.exception("between two steps something failed")
                fault = _fault("Between two steps something failed", error)
                if not self._end_all(fault):
                    self._broken(fault)
                    return
        self._end_all(Cancelled("The server is stopping."))

    def _turn(self) -> None:
        """What was left in the inbox, then a step; sleeps if there is none to be done."""
        self._take_inbox()
        if self._stopping:
            return
        self._reap(time.monotonic())
        if not self._step():
            self._sleep()

    def _end_all(self, error: AdapterbayError) -> bool:
        """Answers every row with an error. False when not everything that rows held came back: who would go on then
        might give a block to two rows."""
        for end in (
            *(partial(self._end, row, error) for row in self.scheduler.running),
            *(partial(self.fail_group, group, error) for group in self.scheduler.waiting_groups()),
        ):
            try:
                end()
            except Exception:
                log.exception("a row could not be ended")
        return self.scheduler.empty

    def _take_inbox(self) -> None:
        while self._inbox:
            work = self._inbox.popleft()
            try:
                work()
            except Exception:
                log.exception("work that was left for the engine failed")

    def _sleep(self) -> None:
        """Until something is left in the inbox, or the next waiting row's deadline."""
        if self.scheduler.waiting_rows:
            self._stuck()
        with self._wake:
            if self._inbox or self._stopping:
                return
            deadlines = [
                row.request.deadline
                for group in self.scheduler.waiting_groups()
                for row in group.rows
                if row.request.deadline is not None
            ]
            self._wake.wait(max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None)

    def _reap(self, now: float) -> None:
        """Frees rows that nobody waits for any more. A group that has not begun goes whole."""
        waiting = list(self.scheduler.waiting_groups())
        preempted = [row for group in waiting if group.begun for row in group.rows]
        for row in [*self.scheduler.running, *preempted]:
            error = row.request.over(now)
            if error is not None:
                self._end(row, error)
        for group in waiting:
            over = [error for row in group.rows if (error := row.request.over(now)) is not None]
            if over and not group.begun:
                self.fail_group(group, over[0])

    def fail_group(self, group: Group, error: AdapterbayError) -> None:
        """Answers a waiting group with an error and drops it."""
        try:
            self.drop(group)
        finally:
            for row in group.rows:
                self._tell(row, error)

    def drop(self, group: Group) -> None:
        """Takes a waiting group out."""
        self.scheduler.drop(group)
        with ExitStack() as ending:  # all of them, even if one fails, which is raised then
            for row in group.rows:
                row.phase = Phase.DONE
                ending.callback(self._left, row)

    def _step(self) -> bool:
        """Schedule, run, postprocess. False when there was nothing to do."""
        shares = self.scheduler.schedule()
        unseated = self.scheduler.take_unseated()
        for group, why in unseated:
            log.error("adapters could not be placed", exc_info=why)
            self.fail_group(group, _fault("An adapter could not be placed", why))
        if not shares:
            return bool(unseated)  # who stood behind them has not been looked at
        now = time.monotonic()
        for share in shares:
            if not share.row.started_at:
                share.row.started_at = now
        try:
            result = self._runner.run(shares)
            self.steps += 1
            self._postprocess(result)
        except Exception as error:
            log.exception("a step failed")
            fault = _fault(f"A step of {len(shares)} rows failed", error)
            for share in shares:
                if share.row.phase is not Phase.DONE:
                    self._end(share.row, fault)
        return True

    def _postprocess(self, result: StepResult) -> None:
        now = time.monotonic()
        for share in result.order:
            self.scheduler.advance(share)
            if share.row.phase is Phase.PREFILL and share.finishes_prompt:
                share.row.phase = Phase.DECODE
                share.row.first_at = share.row.first_at or now
        if result.logits is not None:
            self._take_tokens(result.drawing, result.logits, now)
        if result.states:
            self._take_states(result, now)

    def _take_tokens(self, rows: tuple[Row, ...], logits: torch.Tensor, now: float) -> None:
        outputs: list[Generating] = [row.output for row in rows]
        drawn = draw(logits, [output.sampling for output in outputs], [output.generator for output in outputs])
        for row, output, token in zip(rows, outputs, drawn, strict=True):
            with self._alone(row):
                delta = output.push(token)
                row.tokens.append(token.token_id)
                self._tell(row, delta)
                if output.finish is not None:
                    self._end(row, _generated(row, output, now))

    def _take_states(self, result: StepResult, now: float) -> None:
        labelled: list[tuple[Row, int, torch.Tensor]] = []  # row, its first token here, states [count, hidden]
        embedded: list[tuple[Row, torch.Tensor]] = []
        for share in result.order:
            row = share.row
            if row not in result.states:
                continue
            # The head of a text sees the states of virtual tokens, too, as in PEFT; nothing else does.
            before = row.placed if isinstance(row.request.task, ClassifyTask) else row.virtual_tokens
            states = result.states[row][max(before - share.start, 0) :]
            start = max(share.start - before, 0)
            if not len(states):
                continue
            if isinstance(row.request.task, ClassifyTokensTask):
                labelled.append((row, start, states))
                continue
            with self._alone(row):
                pooler: StatePooler = row.output
                pooler.push(states, start)
                if not row.left:
                    if isinstance(row.request.task, ClassifyTask):
                        labelled.append((row, start, pooler.value()[None]))
                    else:
                        embedded.append((row, pooler.value()))
        self._take_labels(labelled, now)
        for row, state in embedded:
            with self._alone(row):
                require_finite(state, row.request.arm, "values")
                self._end(row, _embedded(row, state, now))

    def _take_labels(self, labelled: list[tuple[Row, int, torch.Tensor]], now: float) -> None:
        """Labels texts and tokens; rows that share a head, in one product."""
        behind_pooler = [at for at, (row, *_) in enumerate(labelled) if row.head.pooling is HeadPooling.POOLER]
        if behind_pooler:
            rows = [labelled[at][0] for at in behind_pooler]
            pooled = self._runner.pool_first(rows, torch.cat([labelled[at][2] for at in behind_pooler]))
            for at, state in zip(behind_pooler, pooled, strict=True):
                labelled[at] = (*labelled[at][:2], state.reshape(1, -1))
        logits = label([(row.head, states) for row, _, states in labelled])
        for (row, start, _), own in zip(labelled, logits, strict=True):
            with self._alone(row):
                require_finite(own, row.request.arm)
                if isinstance(row.request.task, ClassifyTask):
                    self._end(row, _labelled(row, own[0], now))
                    continue
                tokens: TokenLabels = row.output
                tokens.push(own, start)
                if not row.left:
                    self._end(row, _labelled_tokens(row, tokens.value(), now))

    @contextmanager
    def _alone(self, row: Row) -> Iterator[None]:
        """What goes wrong in here ends this row and no other."""
        try:
            yield
        except AdapterbayError as error:
            self._end(row, error)
        except Exception as error:
            if row.phase is Phase.DONE:
                raise
            log.exception("the result of a row could not be taken")
            self._end(row, _fault("The result of this row could not be taken", error))

    def _end(self, row: Row, event: Event) -> None:
        """Ends a row that has begun. Its place is free before its caller hears, who may submit the next one at once."""
        self.scheduler.finish(row)
        try:
            self._left(row)
        finally:
            self._tell(row, event)

    def _tell(self, row: Row, event: Event) -> None:
        try:
            row.request.listener(event)
        except Exception:
            log.exception("a listener failed")


def _fault(what: str, error: Exception) -> EngineFault:
    """Our own mistake, told to whoever asked. It does not keep the error, whose frames hold tensors; the log has it."""
    return EngineFault(f"{what}: {error!r}")


def _timings(row: Row, now: float) -> Timings:
    return Timings(
        queue=row.started_at - row.request.submitted_at,
        load=max(row.loaded_at - row.request.submitted_at, 0.0),
        prefill=row.first_at - row.started_at,
        decode=now - row.first_at,
    )


def _generated(row: Row, output: Generating, now: float) -> GenerateResult:
    assert output.finish is not None
    return GenerateResult(
        text=output.text,
        token_ids=tuple(output.token_ids),
        finish_reason=output.finish,
        stop=output.stop,
        prompt_tokens=row.prompt_tokens,
        chances=tuple(output.chances),
        timings=_timings(row, now),
    )


def _labelled(row: Row, logits: torch.Tensor, now: float) -> ClassifyResult:
    task, head = row.request.task, row.head
    assert isinstance(task, ClassifyTask)
    assert isinstance(head, Head)
    return ClassifyResult(
        labels=head.labels,
        logits=tuple(logits.tolist()),
        probabilities=tuple(logits.softmax(-1).tolist()),
        tokens=row.prompt_tokens,
        truncated=task.truncated,
        timings=_timings(row, now),
    )


def _labelled_tokens(row: Row, logits: torch.Tensor, now: float) -> ClassifyTokensResult:
    task, head = row.request.task, row.head
    assert isinstance(task, ClassifyTokensTask)
    assert isinstance(head, Head)
    return ClassifyTokensResult(
        labels=head.labels,
        logits=tuple(map(tuple, logits.tolist())),
        probabilities=tuple(map(tuple, logits.softmax(-1).tolist())),
        tokens=row.prompt_tokens,
        truncated=task.truncated,
        timings=_timings(row, now),
    )


def _embedded(row: Row, state: torch.Tensor, now: float) -> EmbedResult:
    task = row.request.task
    assert isinstance(task, EmbedTask)
    vector = state.float()
    if task.normalize:
        vector = torch.nn.functional.normalize(vector, dim=0)
    return EmbedResult(
        values=tuple(vector.tolist()),
        tokens=row.prompt_tokens,
        truncated=task.truncated,
        timings=_timings(row, now),
    )
