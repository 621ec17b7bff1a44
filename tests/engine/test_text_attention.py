"""Attention of whole texts by the kernels, against torch's own in float64, and which rows of a step it is for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import drawn
from torch import Tensor

from adapterbay.server.adapters.forms import Prefix
from adapterbay.server.attention import AttentionPlan, Scoring, Segment, prefill
from adapterbay.server.kernels import ops
from adapterbay.server.kv import BlockPool, LayerShape

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = (1, 3, 130, 16, 4, 65)
SHAPES = [(12, 12, 32, 32), (9, 3, 64, 64), (4, 2, 18, 24), (2, 1, 7, 5), (2, 2, 80, 128)]


pytestmark = pytest.mark.usefixtures("kernels")


def whole(lengths: tuple[int, ...]) -> Tensor:
    """Texts of these lengths one after another, all of their tokens: [texts, 4]."""
    ends = list(itertools.accumulate(lengths))
    return torch.tensor([2 * (end - length, end) for length, end in zip(lengths, ends, strict=True)])


def heads_first(flat: Tensor, heads: int) -> Tensor:
    return flat.unflatten(1, (heads, -1)).transpose(0, 1)


def made(tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [heads, tokens, size] as a fused projection leaves them: pieces of one wide row for each token."""
    heads, kv_heads, size, value_size = shape
    wide = drawn(tokens, heads * size + kv_heads * (size + value_size), dtype=dtype)
    q, k, v = wide.split([heads * size, kv_heads * size, kv_heads * value_size], 1)
    return heads_first(q, heads), heads_first(k, kv_heads), heads_first(v, kv_heads)


def expected(q: Tensor, k: Tensor, v: Tensor, texts: Tensor, *, causal: bool, window: int | None = None) -> Tensor:
    out = q.new_zeros(q.shape[1], q.shape[0], v.shape[2], dtype=torch.float64)
    for begin, end, first, last in texts.tolist():
        at, key_at = torch.arange(last - first - (end - begin), last - first)[:, None], torch.arange(last - first)
        seen = (key_at <= at) | torch.tensor(not causal)
        if window is not None:
            seen &= (key_at - at).abs() < window
        mine = q[None, :, begin:end].double(), k[None, :, first:last].double(), v[None, :, first:last].double()
        attended = F.scaled_dot_product_attention(*mine, attn_mask=seen, scale=0.3, enable_gqa=True)
        out[begin:end] = attended[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_see_themselves(
    shape: tuple[int, int, int, int], dtype: torch.dtype, causal: bool, window: int | None, threads: int
) -> None:
    texts = whole(LENGTHS)
    q, k, v = made(sum(LENGTHS), shape, dtype)
    out = torch.full((sum(LENGTHS), shape[0], shape[3]), 7.0, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ops.text_attention(q, k, v, texts[:-1], 0.3, out, causal=causal, window=window)
    finally:
        torch.set_num_threads(before)
    last = int(texts[-1, 0])
    limit = 1e-5 if dtype is torch.float32 else 1.5e-2  # a weight and the result are rounded: 2 · 2^-8 of values near 2
    wanted = expected(q, k, v, texts[:-1], causal=causal, window=window)
    torch.testing.assert_close(out[:last].double(), wanted[:last], atol=limit, rtol=limit)
    assert bool((out[last:] == 7).all()), "tokens of no text were written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_texts_bits_do_not_depend_on_its_company(dtype: torch.dtype, causal: bool) -> None:
    """Not even where its neighbours are not finite."""
    q, k, v = made(sum(LENGTHS), SHAPES[1], dtype)
    texts = whole(LENGTHS)
    start, stop = texts[2, :2].tolist()
    alone = torch.zeros(stop - start, 9, 64, dtype=dtype)
    ops.text_attention(*(x[:, start:stop] for x in (q, k, v)), whole((stop - start,)), 0.3, alone, causal=causal)
    for x in (q, k, v):
        x[:, :start] = math.nan
        x[:, stop:] = math.inf
    out = torch.zeros(sum(LENGTHS), 9, 64, dtype=dtype)
    ops.text_attention(q, k, v, texts, 0.3, out, causal=causal)
    assert torch.equal(out[start:stop], alone)
    assert not out[:start].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 9)])
def test_a_querys_bits_do_not_depend_on_how_much_comes_with_it(
    dtype: torch.dtype, causal: bool, window: int | None
) -> None:
    """A prompt in chunks, or behind what a cache knows of it, gives what it gives whole."""
    tokens = 150
    q, k, v = made(tokens, SHAPES[1], dtype)
    all_at_once = torch.zeros(tokens, 9, 64, dtype=dtype)
    ops.text_attention(q, k, v, whole((tokens,)), 0.3, all_at_once, causal=causal, window=window)
    for cuts in ((0, 1, tokens), (0, 16, 33, tokens), (0, 149, tokens)):
        out = torch.zeros(tokens, 9, 64, dtype=dtype)
        chunks = list(itertools.pairwise(cuts))
        for begin, end in chunks if causal else chunks[-1:]:  # without `causal` all of the text is there
            text = torch.tensor([[begin, end, 0, end]])
            ops.text_attention(q, k, v, text, 0.3, out, causal=causal, window=window)
        first = 0 if causal else cuts[-2]
        assert torch.equal(out[first:], all_at_once[first:])


def test_what_comes_later_in_a_text_is_not_seen() -> None:
    q, k, v = made(40, SHAPES[1], torch.float32)
    out, other = torch.zeros(40, 9, 64), torch.zeros(40, 9, 64)
    ops.text_attention(q, k, v, whole((40,)), 0.3, out, causal=True)
    for x in (q, k, v):
        x[:, 31:] = 1e3
    ops.text_attention(q, k, v, whole((40,)), 0.3, other, causal=True)
    assert torch.equal(out[:31], other[:31])
    assert not torch.equal(out[31:], other[31:])


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = made(8, SHAPES[1], torch.float32)
    out, good = torch.zeros(8, 9, 64), whole((8,))
    for bad in ((0, 9, 0, 9), (-1, 4, 0, 8), (4, 4, 0, 8), (5, 3, 0, 8), (0, 8, 0, 9), (0, 8, 1, 8), (0, 1, -1, 3)):
        with pytest.raises(RuntimeError, match="bounds are wrong"):
            ops.text_attention(q, k, v, torch.tensor([bad]), 0.3, out, causal=True)
    for arguments in (
        (q, k[:, :7], v, good, 0.3, out),
        (q[:8], k, v, good, 0.3, out),
        (q, k, v.bfloat16(), good, 0.3, out),
        (q, k, v, good.int(), 0.3, out),
        (q, k, v, good[:, :2], 0.3, out),
        (q, k, v, good, -0.3, out),
        (q, k, v, good, 0.3, out[:7]),
    ):
        with pytest.raises(RuntimeError):
            ops.text_attention(*arguments, causal=True)
    with pytest.raises(RuntimeError, match="negative"):
        ops.text_attention(q, k, v, good, 0.3, out, causal=True, window=-1)
    long = ops.MOST_KEYS + 1
    q, k, v = made(long, (1, 1, 2, 2), torch.float32)
    with pytest.raises(RuntimeError, match="bounds are wrong"):
        ops.text_attention(q, k, v, whole((long,)), 1.0, torch.zeros(long, 1, 2), causal=True)


def test_the_operator_is_registered_whole() -> None:
    q, k, v = made(8, SHAPES[1], torch.float32)
    torch.library.opcheck(
        torch.ops.adapterbay.text_attention.default,
        (q, k, v, whole((8,)), 1.0, True, 0, torch.zeros(8, 9, 64)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_rows_that_see_more_than_their_new_tokens_go_one_by_one() -> None:
    prefix = Prefix((drawn(2, 3, 64),), (drawn(2, 3, 64),))
    segments = (
        Segment(1, 4, None),
        Segment(4, 9, torch.arange(7)),
        Segment(9, 12, None, prefix),
        Segment(12, 32, None),
        Segment(32, 33 + ops.MOST_KEYS, None),
    )
    plan = AttentionPlan(causal=True, segments=segments)
    texts, others = plan.texts()
    assert texts.tolist() == [[1, 4, 1, 4], [12, 32, 12, 32]]
    assert [segment for segment, _ in others] == [*segments[1:3], segments[4]]
    assert [None if text is None else text.tolist() for _, text in others] == [[[4, 9, 0, 7]], [[9, 12, 0, 5]], None]
    assert plan.texts()[0] is texts


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_a_step_is_the_same_with_and_without_kernels(causal: bool, window: int | None, softcap: float | None) -> None:
    """Whole prompts, one whose beginning lies in the cache, an encoder's text behind a prefix."""
    shape, tokens, slots = LayerShape(3, 64, 64), 22, torch.tensor([18, 3, 30, 31, 4, 9, 25, 17, 40])
    q, k, v = made(tokens, SHAPES[1], torch.float32)
    pool = BlockPool([shape], 1 << 20, torch.float32, torch.device("cpu"))
    pool.keys[0].copy_(drawn(*pool.keys[0].shape))
    pool.values[0].copy_(drawn(*pool.values[0].shape, seed=1))
    prefix = Prefix((drawn(2, 3, 64),), (drawn(2, 3, 64),))
    segments = [Segment(0, 5, None), Segment(5, 16, None), Segment(16, 18, None, None if causal else prefix)]
    if causal:
        segments.append(Segment(18, tokens, slots))
    scoring = Scoring(0.3, window, softcap, None)
    found = []
    for kernels in (False, True):
        out = torch.zeros(tokens, 9, 64)
        plan = AttentionPlan(causal=causal, segments=tuple(segments), pool=pool, kernels=kernels)
        prefill(plan, 0, q, k, v, scoring, out)
        found.append(out)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert bool(found[1][: segments[-1].stop].any(-1).all())
