"""The engine's thread: schedule, run, postprocess.

Everything that touches the model, the block pool or the device's slots happens here and nowhere else; other threads
leave work in the inbox.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from adapterbay.registry.errors import AdapterbayError, Cancelled, DeadlineExceeded, EngineFault
from adapterbay.server.batch import Group, Phase, Row
from adapterbay.server.generation import Generating
from adapterbay.server.pooling import StatePooler, blend_heads, label_logits
from adapterbay.server.requests import (
    ClassifyResult,
    ClassifyTask,
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
    """Owns the scheduler and the runner. On this thread, `left` is called once for each row that is over, and `stuck`
    when rows wait and none can run."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        pooler: bool,
        encoder: bool,
        left: Callable[[Row], None],
        stuck: Callable[[], None],
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._has_pooler = pooler
        self._encoder = encoder
        self._left = left
        self._stuck = stuck
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

    def stop(self) -> None:
        """Ends the thread after the step under way; rows that are left get Cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self) -> None:
        while True:
            self._take_inbox()
            if self._stopping:
                break
            self._reap(time.monotonic())
            if not self._step():
                self._sleep()
        stopped = Cancelled("The server is stopping.")
        for row in list(self.scheduler.running):
            self._end(row, stopped)
        for group in list(self.scheduler.waiting_groups()):
            self.fail_group(group, stopped)

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
        for row in list(self.scheduler.running):
            error = _over(row, now)
            if error is not None:
                self._end(row, error)
        for group in list(self.scheduler.waiting_groups()):
            over = [error for row in group.rows if (error := _over(row, now)) is not None]
            if over:
                self.fail_group(group, over[0])

    def fail_group(self, group: Group, error: AdapterbayError) -> None:
        """Answers a waiting group with an error and drops it."""
        self.drop(group)
        for row in group.rows:
            self._tell(row, error)

    def drop(self, group: Group) -> None:
        """Takes a waiting group out."""
        self.scheduler.drop(group)
        for row in group.rows:
            row.phase = Phase.DONE
            self._left(row)

    def _step(self) -> bool:
        """Schedule, run, postprocess. False when there was nothing to do."""
        shares = self.scheduler.schedule()
        if not shares:
            return False
        now = time.monotonic()
        for share in shares:
            if not share.row.started_at:
                share.row.started_at = now
        try:
            result = self._runner.run(shares)
        except Exception as error:
            log.exception("a step failed")
            fault = EngineFault(f"A step of {len(shares)} rows failed: {error!r}")
            for share in shares:
                self._end(share.row, fault)
            return True
        self.steps += 1
        self._postprocess(result)
        return True

    def _postprocess(self, result: StepResult) -> None:
        now = time.monotonic()
        for share in result.order:
            share.row.computed += share.count
            if share.row.phase is Phase.PREFILL and share.finishes_prompt:
                share.row.phase = Phase.DECODE
                share.row.first_at = now
        if result.logits is not None:
            self._take_tokens(result.drawing, result.logits, now)
        if result.states:
            self._take_states(result, now)

    def _take_tokens(self, rows: tuple[Row, ...], logits: torch.Tensor, now: float) -> None:
        outputs: list[Generating] = [row.output for row in rows]
        drawn = draw(logits, [output.sampling for output in outputs], [output.generator for output in outputs])
        for row, output, token in zip(rows, outputs, drawn, strict=True):
            try:
                delta = output.push(token)
            except AdapterbayError as error:
                self._end(row, error)
                continue
            row.tokens.append(token.token_id)
            self._tell(row, delta)
            if output.finish is not None:
                self._end(row, _generated(row, output, now))

    def _take_states(self, result: StepResult, now: float) -> None:
        ready: list[tuple[Row, torch.Tensor]] = []
        for share in result.order:
            if share.row not in result.states:
                continue
            pooler: StatePooler = share.row.output
            pooler.push(result.states[share.row])
            if share.row.computed == share.row.prompt_tokens:
                ready.append((share.row, pooler.value()))
        labelled = [row for row, _ in ready if isinstance(row.request.task, ClassifyTask)]
        if self._encoder and self._has_pooler and labelled:
            states = torch.stack([state for row, state in ready if row in labelled])
            pooled = dict(zip(labelled, self._runner.pool_first(labelled, states), strict=True))
            ready = [(row, pooled.get(row, state)) for row, state in ready]
        for row, state in ready:
            try:
                self._end(row, _labelled(row, state, now) if row in labelled else _embedded(row, state, now))
            except AdapterbayError as error:
                self._end(row, error)

    def _end(self, row: Row, event: Event) -> None:
        """Ends a running row. Its place is free before its caller hears: who hears may submit the next one at once."""
        self.scheduler.finish(row)
        self._left(row)
        self._tell(row, event)

    def _tell(self, row: Row, event: Event) -> None:
        try:
            row.request.listener(event)
        except Exception:
            log.exception("a listener failed")


def _over(row: Row, now: float) -> AdapterbayError | None:
    if row.request.cancelled:
        return Cancelled("The call was cancelled.")
    if row.request.deadline is not None and now >= row.request.deadline:
        return DeadlineExceeded("The call's deadline passed.")
    return None


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


def _labelled(row: Row, state: torch.Tensor, now: float) -> ClassifyResult:
    task = row.request.task
    assert isinstance(task, ClassifyTask)
    head = blend_heads([r.ready for r in row.residents], [part.weight for part in row.request.arm.parts])
    logits, probabilities = label_logits(state, head)
    return ClassifyResult(
        labels=head.labels,
        logits=tuple(logits),
        probabilities=tuple(probabilities),
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
