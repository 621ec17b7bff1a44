// y = x Wᵀ + bias in bfloat16 with float32 sums, W [out, in] laid out once as [out / 16, in / 2, 16, 2]: what one
// instruction takes lies together, and a panel of 16 outputs is read from memory in one go.
//
// Every output is one sum over `in` in order, whatever else is in the batch: a row's bits do not depend on its company.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "vec.h"

namespace adapterbay {

constexpr int64_t kPanel = 16;

// Memory that will be read next. A product of many rows computes longer than it reads, so what comes after it is asked
// for meanwhile, one cache line for each step of its inner loop.
struct Range {
  const char* begin;
  const char* end;
};
struct Ahead {
  const Range* next = nullptr;
  const Range* last = nullptr;
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t wait = 0;  // steps to go: what comes too early is gone again when it is needed
  bool fresh = true;  // whether this tile is the first to go past its panels: then it asks for those behind them
  inline void step() {
#ifdef ADAPTERBAY_AVX512
    if (--wait >= 0) return;
    if (at >= end) {
      if (next == last) return;
      at = next->begin;
      end = next->end;
      ++next;
    }
    _mm_prefetch(at, _MM_HINT_T1);
    at += 64;
#endif
  }
};

struct Product {
  const bf16* x;
  int64_t ldx;
  const bf16* weight;
  const bf16* bias;  // or null
  bf16* y;
  int64_t ldy, in;
};

// M rows by P panels.
template <int M, int P>
inline void tile(const Product& g, int64_t row, int64_t panel, Ahead& ahead) {
  const bf16* x = g.x + row * g.ldx;
  const bf16* w = g.weight + panel * g.in * kPanel;
  bf16* y = g.y + row * g.ldy + panel * kPanel;
  const int64_t pairs = g.in / 2, next = g.in * kPanel;
#ifdef ADAPTERBAY_BF16
  __m512 acc[M][P];
  for (int p = 0; p < P; ++p) {
    const __m512 start = g.bias ? load16(g.bias + (panel + p) * kPanel).v : _mm512_setzero_ps();
    for (int m = 0; m < M; ++m) acc[m][p] = start;
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh wv[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      wv[p] = (__m512bh)_mm512_loadu_si512(w + p * next + k * 32);
      if (ahead.fresh) _mm_prefetch((const char*)(w + (p + P) * next + k * 32), _MM_HINT_T1);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * g.ldx + 2 * k, 4);
      const __m512bh xv = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) acc[m][p] = _mm512_dpbf16_ps(acc[m][p], wv[p], xv);
    }
    if (M > 4) ahead.step();
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) store16(y + m * g.ldy + p * kPanel, V16{acc[m][p]});
#else
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) {
      float acc[kPanel];
      for (int n = 0; n < kPanel; ++n) acc[n] = g.bias ? to_float(g.bias[(panel + p) * kPanel + n]) : 0.0f;
      for (int64_t k = 0; k < pairs; ++k)
        for (int n = 0; n < 2 * kPanel; ++n)
          acc[n / 2] += to_float(w[p * next + k * 32 + n]) * to_float(x[m * g.ldx + 2 * k + n % 2]);
      store16(y + m * g.ldy + p * kPanel, load16(acc));
    }
#endif
}

using Tile = void (*)(const Product&, int64_t, int64_t, Ahead&);
constexpr int kWide = 12;  // rows of a tile of two panels: 24 sums in 32 registers

inline Tile tile_of(int rows, bool two) {
  static const Tile one[] = {nullptr, tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>,
                             tile<7, 1>, tile<8, 1>, tile<9, 1>, tile<10, 1>, tile<11, 1>, tile<12, 1>, tile<13, 1>,
                             tile<14, 1>, tile<15, 1>, tile<16, 1>};
  static const Tile both[] = {nullptr, tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>,
                              tile<7, 2>, tile<8, 2>, tile<9, 2>, tile<10, 2>, tile<11, 2>, tile<12, 2>};
  return two ? both[rows] : one[rows];
}

// Runs `tile(rows, two panels)(row, panel, ahead)` over all outputs, `height` rows by `width` panels at a time. `soon`:
// what each thread will read next, or empty; `steps`: of a tile's inner loop.
template <class F>
inline void over_tiles(int64_t rows, int64_t out, int64_t steps, int64_t height, int64_t width, const std::vector<std::vector<Range>>& soon, F tile) {
  const int64_t panels = out / kPanel;
  const int64_t chunk = std::max<int64_t>(1, 8 * kWide / height) * height;  // rows of one task, past which a panel goes once
  const int64_t chunks = (rows + chunk - 1) / chunk, columns = (panels + width - 1) / width;
  // Of many rows each thread takes its own past all panels, which its cache keeps; otherwise a panel is read once.
  const bool many = chunks >= 4 * at::get_num_threads();
  at::parallel_for(0, chunks * columns, 1, [&](int64_t begin, int64_t end) {
    Ahead ahead;
    const size_t thread = size_t(at::get_thread_num());
    if (thread < soon.size()) {
      ahead.next = soon[thread].data();
      ahead.last = ahead.next + soon[thread].size();
      ahead.wait = (end - begin) * steps;
      for (const Range& range : soon[thread]) ahead.wait -= (range.end - range.begin) / 64 + 1;
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = (many ? task % columns : task / chunks) * width;
      const int64_t top = (many ? task / columns : task % chunks) * chunk;
      const bool two = width == 2 && panel + 1 < panels;
      for (int64_t row = top; row < std::min(rows, top + chunk); row += height) {
        ahead.fresh = row == top;
        tile(int(std::min({height, rows - row, top + chunk - row})), two, row, panel, ahead);
      }
    }
  });
}

}  // namespace adapterbay
