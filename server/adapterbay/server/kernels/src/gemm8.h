// y = x Wᵀ + bias with weights of eight or four bits and inputs of eight, whose products are summed as exact integers.
//
// Inputs become round(x / s), s the largest of 32 neighbours over 127, when they come: with one scale for a whole row
// (Dettmers et al. 2022, arXiv:2208.07339, section 2) a few large inputs of a language model cost all others their bits.
// Weights of eight bits have a scale for each output; of four bits a scale and a smallest value for each 32 inputs.
//
// Eight bits: W lies as [out / 16, in / 4 + 1, 16, 4], w + 128 each; the last of in / 4 + 1 are a panel's scales
// (float32). Four bits: [out / 16, in / 32, 5, 16, 4]: of 32 inputs the first 16 in the low halves of four times 64
// bytes, the last 16 in the high halves; behind them the panel's scales and its smallest values (bfloat16).
#pragma once

#include "gemm.h"

namespace adapterbay {

constexpr int64_t kGroup = 32;  // inputs that share a scale
constexpr int kTall = 7;        // rows of a tile of two panels: 14 sums, and as many over the groups before

// Rows in eight bits, in blocks of the rows that a tile has: [in / 4, rows, 4] values, [in / 32, rows] of the others.
struct Inputs8 {
  int8_t* values;
  float* scales;
  int32_t* rests;  // of eight bits -128 times the sum of a group's values, where its products begin: weights lie as
                   // w + 128; of four bits the sum of what the values stand for (float32), which the least weight takes
};

template <class T>
struct Product8 {
  Inputs8 x;
  const uint8_t* weight;
  const T* bias;  // or null
  T* y;
  int64_t ldy, in;
};

// 32 inputs; `out` is where their first four go, the next come `stride` bytes behind. What is not finite gets a scale
// that is not, and so does its product.
template <int BITS, class T>
inline void quantize_group(const T* x, int8_t* out, int64_t stride, float* scale, int32_t* rest) {
  int32_t sum = 0;
  uint32_t most;  // of |x|, as bits: NaN is larger than all
#ifdef ADAPTERBAY_AVX512
  const __m512 low = load16(x).v, high = load16(x + 16).v;
  const __m512i size = _mm512_set1_epi32(0x7fffffff);
  most = uint32_t(_mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_epi32(_mm512_castps_si512(low), size),
                                                           _mm512_and_epi32(_mm512_castps_si512(high), size))));
#else
  most = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float v = to_float(x[i]);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    most = std::max(most, bits & 0x7fffffffu);
  }
#endif
  float largest;
  std::memcpy(&largest, &most, 4);
  *scale = largest / 127.0f;
  const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
#ifdef ADAPTERBAY_AVX512
  const __m512 times = _mm512_set1_ps(inverse);
  const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, times)), b = _mm512_cvtps_epi32(_mm512_mul_ps(high, times));
  sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
  alignas(16) int32_t fours[8];
  _mm_store_si128((__m128i*)fours, _mm512_cvtsepi32_epi8(a));
  _mm_store_si128((__m128i*)(fours + 4), _mm512_cvtsepi32_epi8(b));
  for (int i = 0; i < 8; ++i) std::memcpy(out + i * stride, fours + i, 4);
#else
  for (int64_t i = 0; i < kGroup; ++i) {
    const float q = std::nearbyint(to_float(x[i]) * inverse);
    const int8_t value = q > -127.0f ? int8_t(q < 127.0f ? q : 127.0f) : int8_t(-127);  // NaN becomes -127
    out[i / 4 * stride + i % 4] = value;
    sum += value;
  }
#endif
  const float whole = float(sum) * *scale;
  if (BITS == 8) *rest = int32_t(-128 * int64_t(sum));
  else std::memcpy(rest, &whole, 4);
}

// Bytes of a panel's weights: of a group, and of all.
template <int BITS>
constexpr int64_t kGroupBytes = BITS == 8 ? kGroup * kPanel : kGroup * kPanel / 2 + 4 * kPanel;
template <int BITS>
inline int64_t panel_bytes(int64_t in) { return in / kGroup * kGroupBytes<BITS> + (BITS == 8 ? 4 * kPanel : 0); }

// M rows by P panels.
template <int BITS, int M, int P, class T>
inline void tile8(const Product8<T>& g, int64_t row, int64_t panel, Ahead& ahead) {
  const int64_t groups = g.in / kGroup, next = panel_bytes<BITS>(g.in);
  const int8_t* x = g.x.values + row * g.in;
  const float* scales = g.x.scales + row * groups;
  const int32_t* rests = g.x.rests + row * groups;
  const uint8_t* w = g.weight + panel * next;
#if defined(ADAPTERBAY_AVX512) && defined(__AVX512VNNI__)
  __m512 total[M][P];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) total[m][p] = _mm512_setzero_ps();
  const auto multiply = [&](__m512i (&acc)[M][P], const __m512i (&wv)[P], const int8_t* fours) {
#pragma GCC unroll 7
    for (int m = 0; m < M; ++m) {
      int32_t four;
      std::memcpy(&four, fours + 4 * m, 4);
      const __m512i xv = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) acc[m][p] = _mm512_dpbusd_epi32(acc[m][p], wv[p], xv);
    }
  };
  for (int64_t k = 0; k < groups; ++k, x += kGroup * M, scales += M, rests += M, w += kGroupBytes<BITS>) {
    __m512i acc[M][P], wv[P];
#pragma GCC unroll 7
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < P; ++p)
        acc[m][p] = BITS == 8 ? _mm512_set1_epi32(rests[m]) : _mm512_setzero_si512();
    if (ahead.fresh)
      for (int p = 0; p < P; ++p)
        for (int64_t line = 0; line < kGroupBytes<BITS>; line += 64)
          _mm_prefetch((const char*)(w + (p + P) * next + line), _MM_HINT_T1);
    if constexpr (BITS == 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        for (int p = 0; p < P; ++p) wv[p] = _mm512_loadu_si512(w + p * next + 64 * j);
        multiply(acc, wv, x + 4 * M * j);
      }
#pragma GCC unroll 7
      for (int m = 0; m < M; ++m)
        for (int p = 0; p < P; ++p)
          total[m][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m][p]), _mm512_set1_ps(scales[m]), total[m][p]);
    } else {
      const __m512i half = _mm512_set1_epi8(0x0f);
      __m512i high[P];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        for (int p = 0; p < P; ++p) {
          const __m512i both = _mm512_loadu_si512(w + p * next + 64 * j);
          wv[p] = _mm512_and_si512(both, half);
          high[p] = _mm512_and_si512(_mm512_srli_epi16(both, 4), half);
        }
        multiply(acc, wv, x + 4 * M * j);
        multiply(acc, high, x + 4 * M * (j + 4));
      }
      for (int p = 0; p < P; ++p) {
        const __m512 step = load16((const bf16*)(w + p * next + 256)).v, least = load16((const bf16*)(w + p * next + 288)).v;
#pragma GCC unroll 7
        for (int m = 0; m < M; ++m) {
          const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[m][p]), step);
          total[m][p] = _mm512_fmadd_ps(product, _mm512_set1_ps(scales[m]), total[m][p]);
          total[m][p] = _mm512_fmadd_ps(least, _mm512_castsi512_ps(_mm512_set1_epi32(rests[m])), total[m][p]);
        }
      }
    }
    if (M > 4) ahead.step();
  }
  for (int p = 0; p < P; ++p) {
    const V16 scale = BITS == 8 ? V16{_mm512_loadu_ps(w + p * next)} : set16(1);
    const V16 bias = g.bias ? load16(g.bias + (panel + p) * kPanel) : set16(0);
    for (int m = 0; m < M; ++m)
      store16(g.y + (row + m) * g.ldy + (panel + p) * kPanel, fma(V16{total[m][p]}, scale, bias));
  }
#else
  for (int p = 0; p < P; ++p)
    for (int m = 0; m < M; ++m) {
      float total[kPanel] = {};
      for (int64_t k = 0; k < groups; ++k) {
        const uint8_t* own = w + p * next + k * kGroupBytes<BITS>;
        const int8_t* values = x + k * kGroup * M + 4 * m;
        const float scale = scales[k * M + m];
        const int32_t start = rests[k * M + m];
        float rest;
        std::memcpy(&rest, &start, 4);
        int32_t acc[kPanel] = {};
        for (int64_t j = 0; j < 8; ++j)
          for (int n = 0; n < kPanel; ++n)
            for (int i = 0; i < 4; ++i) {
              const uint8_t both = own[(BITS == 8 ? j : j % 4) * 64 + 4 * n + i];
              acc[n] += int32_t(BITS == 8 ? both : j < 4 ? both & 15 : both >> 4) * int32_t(values[4 * M * j + i]);
            }
        for (int n = 0; n < kPanel; ++n) {
          if (BITS == 8) total[n] += float(acc[n] + start) * scale;
          else {
            const bf16* last = (const bf16*)(own + 256);
            total[n] += float(acc[n]) * to_float(last[n]) * scale + rest * to_float(last[n + kPanel]);
          }
        }
      }
      for (int n = 0; n < kPanel; ++n) {
        float scale = 1.0f;
        if (BITS == 8) std::memcpy(&scale, w + p * next + groups * kGroupBytes<8> + 4 * n, 4);
        const float bias = g.bias ? to_float(g.bias[(panel + p) * kPanel + n]) : 0.0f;
        g.y[(row + m) * g.ldy + (panel + p) * kPanel + n] = rounded<T>(total[n] * scale + bias);
      }
    }
  (void)ahead;
#endif
}

template <class T>
using Tile8 = void (*)(const Product8<T>&, int64_t, int64_t, Ahead&);

template <int BITS, int M, class T>
inline Tile8<T> tile8_up_to(int rows, bool two) {
  if constexpr (M == 0) return nullptr;
  else {
    if (rows < M) return tile8_up_to<BITS, M - 1, T>(rows, two);
    return two ? tile8<BITS, M, 2, T> : tile8<BITS, M, 1, T>;
  }
}

template <class T>
inline Tile8<T> tile8_of(int bits, int rows, bool two) {
  return bits == 8 ? tile8_up_to<8, kTall, T>(rows, two) : tile8_up_to<4, kTall, T>(rows, two);
}

// Rows of a tile: as many as fit, and tiles of about the same size.
inline int64_t height8(int64_t rows) {
  const int64_t tiles = (rows + kTall - 1) / kTall;
  return tiles ? (rows + tiles - 1) / tiles : 1;
}

}  // namespace adapterbay
