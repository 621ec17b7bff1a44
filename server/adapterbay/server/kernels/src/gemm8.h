// y = x Wᵀ + bias with eight bits for both: W [out, in] as int8 with a scale for each output, x as uint8 around 128 with
// a scale for each row, found when it comes (Dettmers et al. 2022, arXiv:2208.07339, section 2). Sums are exact integers.
//
// W lies as [out / 16, in / 4 + 2, 16, 4]; the last two of in / 4 + 2 are a panel's scales (float32) and the sums of its
// weights (int32), which undo the 128.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "gemm.h"

namespace adapterbay {

template <class T>
struct Product8 {
  const uint8_t* x;
  const float* scales;  // of x's rows
  const int8_t* weight;
  const T* bias;  // or null
  T* y;
  int64_t ldy, in;
};

// x [n] to round(x / scale) + 128. A row that is not finite gets a scale that is not, and so does its product.
template <class T>
inline void quantize_row(const T* x, uint8_t* out, float* scale, int64_t n) {
  uint32_t most = 0;  // of |x|, as bits: NaN is larger than all
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    most = std::max(most, bits & 0x7fffffffu);
  }
  float largest;
  std::memcpy(&largest, &most, 4);
  *scale = largest / 127.0f;
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    float q = to_float(x[i]) * inverse;
    q = q > -127.0f ? (q < 127.0f ? q : 127.0f) : -127.0f;  // NaN becomes -127
    const float near = q + 12582912.0f;  // 1.5 · 2^23: the integer stands in the lowest bits, ties to even
    int32_t bits;
    std::memcpy(&bits, &near, 4);
    out[i] = uint8_t(bits - 0x4b400000 + 128);
  }
}

template <int M, int P, class T>
inline void tile8(const Product8<T>& g, int64_t row, int64_t panel, Ahead& ahead) {
  const int64_t fours = g.in / 4, next = (g.in + 8) * kPanel;
  const uint8_t* x = g.x + row * g.in;
  const int8_t* w = g.weight + panel * next;
#if defined(ADAPTERBAY_AVX512) && defined(__AVX512VNNI__)
  __m512i acc[M][P];
  for (int p = 0; p < P; ++p) {
    const __m512i sums = _mm512_loadu_si512(w + p * next + (fours + 1) * 64);
    const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7));
    for (int m = 0; m < M; ++m) acc[m][p] = start;
  }
  for (int64_t k = 0; k < fours; ++k) {
    __m512i wv[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      wv[p] = _mm512_loadu_si512(w + p * next + k * 64);
      _mm_prefetch((const char*)(w + p * next + k * 64) + 2048, _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t four;
      std::memcpy(&four, x + m * g.in + 4 * k, 4);
      const __m512i xv = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) acc[m][p] = _mm512_dpbusd_epi32(acc[m][p], xv, wv[p]);
    }
    if (M > 4) ahead.step();
  }
  for (int p = 0; p < P; ++p) {
    const V16 scale{_mm512_loadu_ps(w + p * next + fours * 64)};
    const V16 bias = g.bias ? load16(g.bias + (panel + p) * kPanel) : set16(0);
    for (int m = 0; m < M; ++m) {
      const V16 sum{_mm512_cvtepi32_ps(acc[m][p])};
      store16(g.y + (row + m) * g.ldy + (panel + p) * kPanel, fma(sum, scale * set16(g.scales[row + m]), bias));
    }
  }
#else
  for (int p = 0; p < P; ++p) {
    const int8_t* own = w + p * next;
    float scale[kPanel];
    int32_t sums[kPanel];
    std::memcpy(scale, own + fours * 64, 64);
    std::memcpy(sums, own + (fours + 1) * 64, 64);
    for (int m = 0; m < M; ++m) {
      int32_t acc[kPanel];
      for (int n = 0; n < kPanel; ++n) acc[n] = -128 * sums[n];
      for (int64_t k = 0; k < fours; ++k)
        for (int n = 0; n < kPanel; ++n)
          for (int i = 0; i < 4; ++i) acc[n] += int32_t(own[k * 64 + 4 * n + i]) * int32_t(x[m * g.in + 4 * k + i]);
      for (int n = 0; n < kPanel; ++n) {
        const float bias = g.bias ? to_float(g.bias[(panel + p) * kPanel + n]) : 0.0f;
        g.y[(row + m) * g.ldy + (panel + p) * kPanel + n] =
            rounded<T>(float(acc[n]) * (scale[n] * g.scales[row + m]) + bias);
      }
    }
  }
  (void)ahead;
#endif
}

template <class T>
inline auto tile8_of(int rows, bool two) {
  using Tile8 = void (*)(const Product8<T>&, int64_t, int64_t, Ahead&);
  static const Tile8 one[] = {nullptr, tile8<1, 1, T>, tile8<2, 1, T>, tile8<3, 1, T>, tile8<4, 1, T>, tile8<5, 1, T>,
                              tile8<6, 1, T>, tile8<7, 1, T>, tile8<8, 1, T>, tile8<9, 1, T>, tile8<10, 1, T>,
                              tile8<11, 1, T>, tile8<12, 1, T>, tile8<13, 1, T>, tile8<14, 1, T>, tile8<15, 1, T>,
                              tile8<16, 1, T>};
  static const Tile8 both[] = {nullptr, tile8<1, 2, T>, tile8<2, 2, T>, tile8<3, 2, T>, tile8<4, 2, T>, tile8<5, 2, T>,
                               tile8<6, 2, T>, tile8<7, 2, T>, tile8<8, 2, T>, tile8<9, 2, T>, tile8<10, 2, T>,
                               tile8<11, 2, T>, tile8<12, 2, T>};
  return two ? both[rows] : one[rows];
}

}  // namespace adapterbay
