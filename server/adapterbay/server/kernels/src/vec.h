// Sixteen floats at once: AVX-512 where the compiler's flags have it, else arrays that it vectorizes as it can.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ADAPTERBAY_AVX512 1
#include <immintrin.h>
#endif
#if defined(ADAPTERBAY_AVX512) && defined(__AVX512BF16__)
#define ADAPTERBAY_BF16 1
#endif

namespace adapterbay {

// A bfloat16 number as it lies in memory.
struct bf16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  const uint32_t wide = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

template <class T>
inline T rounded(float v);
template <>
inline float rounded<float>(float v) { return v; }
template <>
inline bf16 rounded<bf16>(float v) {  // to nearest, ties to even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &v, 4);
  return bf16{v != v ? uint16_t(0x7fc0) : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}

#ifdef ADAPTERBAY_AVX512

struct V16 {
  __m512 v;
};
inline V16 set16(float x) { return {_mm512_set1_ps(x)}; }
inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
inline V16 load16(const float* p, int n = 16) {
  return {n == 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(n), p)};
}
inline V16 load16(const bf16* p, int n = 16) {
  const __m256i raw = n == 16 ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline void store16(float* p, V16 x, int n = 16) {
  if (n == 16) _mm512_storeu_ps(p, x.v);
  else _mm512_mask_storeu_ps(p, first(n), x.v);
}
inline void store16(bf16* p, V16 x, int n = 16) {
#ifdef ADAPTERBAY_BF16
  const __m256i raw = (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i wide = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
  __m512i near = _mm512_add_epi32(_mm512_add_epi32(wide, _mm512_set1_epi32(0x7fff)), odd);
  near = _mm512_srli_epi32(near, 16);
  near = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  const __m256i raw = _mm512_cvtepi32_epi16(near);
#endif
  if (n == 16) _mm256_storeu_si256((__m256i*)p, raw);
  else _mm256_mask_storeu_epi16(p, first(n), raw);
}
inline V16 operator+(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V16 operator-(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V16 operator*(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V16 operator/(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V16 larger(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline float largest(V16 a) { return _mm512_reduce_max_ps(a.v); }
inline V16 first_of(V16 a, int n) { return {_mm512_maskz_mov_ps(first(n), a.v)}; }  // and zero behind them
inline V16 with_last(V16 a, int n, float x) { return {_mm512_mask_mov_ps(_mm512_set1_ps(x), first(n), a.v)}; }
// Adds in the order of `sums`, so that a sum's bits do not depend on which others are wanted beside it.
inline float sum(V16 a) {
  __m512 v = _mm512_add_ps(a.v, _mm512_permute_ps(a.v, 0x4e));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
  return _mm512_cvtss_f32(_mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e)));
}

// The sum of each of sixteen vectors, by adding while transposing.
inline V16 sums(const V16* v) {
  __m512 two[8], four[4];
  for (int i = 0; i < 8; ++i)
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v), _mm512_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halve = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {halve(halve(four[0], four[1]), halve(four[2], four[3]))};
}

// e^x by a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients), about 1e-7 relative.
inline V16 exp(V16 x) {
  // max and min with x second keep NaN
  const __m512 in = _mm512_max_ps(_mm512_set1_ps(-87.3f), _mm512_min_ps(_mm512_set1_ps(88.7f), x.v));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(in, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), in);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return {_mm512_scalef_ps(p, n)};
}

#else

struct V16 {
  float v[16];
};
template <class F>
inline V16 each(F f) {
  V16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}
inline V16 set16(float x) { return each([&](int) { return x; }); }
template <class T>
inline V16 load16(const T* p, int n = 16) {
  return each([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <class T>
inline void store16(T* p, V16 x, int n = 16) {
  for (int i = 0; i < n; ++i) p[i] = rounded<T>(x.v[i]);
}
inline V16 operator+(V16 a, V16 b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline V16 operator-(V16 a, V16 b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline V16 operator*(V16 a, V16 b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline V16 operator/(V16 a, V16 b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline V16 fma(V16 a, V16 b, V16 c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline V16 larger(V16 a, V16 b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline float largest(V16 a) { return *std::max_element(a.v, a.v + 16); }
inline V16 with_last(V16 a, int n, float x) {
  return each([&](int i) { return i < n ? a.v[i] : x; });
}
inline V16 first_of(V16 a, int n) { return with_last(a, n, 0); }
inline float sum(V16 a) {
  float total = 0;
  for (int i = 0; i < 16; ++i) total += a.v[i];
  return total;
}
inline V16 sums(const V16* v) {
  return each([&](int i) { return sum(v[i]); });
}
inline V16 exp(V16 x) { return each([&](int i) { return std::exp(x.v[i]); }); }

#endif

// out[i] = the sum of v[i], N of them at most 16.
template <int N>
inline void sums_to(const V16* v, float* out) {
  if constexpr (N <= 4) {
    for (int i = 0; i < N; ++i) out[i] = sum(v[i]);
  } else {
    V16 all[16];
    for (int i = 0; i < 16; ++i) all[i] = i < N ? v[i] : set16(0);
    store16(out, sums(all), N);
  }
}

// NT rows of x against NR rows of a, n long each: out[t * NR + r] = x_t · a_r, summed in float32.
template <int NT, int NR, class T>
inline void dots(const T* x, int64_t ldx, const T* a, int64_t lda, int64_t n, float* out) {
  V16 acc[NT * NR];
  for (int i = 0; i < NT * NR; ++i) acc[i] = set16(0);
  for (int64_t i = 0; i < n; i += 16) {
    const int left = int(std::min<int64_t>(16, n - i));
    V16 av[NR];
    for (int r = 0; r < NR; ++r) av[r] = load16(a + r * lda + i, left);
    for (int t = 0; t < NT; ++t) {
      const V16 xv = load16(x + t * ldx + i, left);
      for (int r = 0; r < NR; ++r) acc[t * NR + r] = fma(xv, av[r], acc[t * NR + r]);
    }
  }
  sums_to<NT * NR>(acc, out);
}

#ifdef ADAPTERBAY_BF16
template <int NT, int NR>
inline void dots(const bf16* x, int64_t ldx, const bf16* a, int64_t lda, int64_t n, float* out) {
  V16 acc[NT * NR];
  for (int i = 0; i < NT * NR; ++i) acc[i] = set16(0);
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 in = n - i >= 32 ? ~__mmask32(0) : __mmask32((uint64_t(1) << (n - i)) - 1);
    __m512bh av[NR];
    for (int r = 0; r < NR; ++r) av[r] = (__m512bh)_mm512_maskz_loadu_epi16(in, a + r * lda + i);
    for (int t = 0; t < NT; ++t) {
      const __m512bh xv = (__m512bh)_mm512_maskz_loadu_epi16(in, x + t * ldx + i);
      for (int r = 0; r < NR; ++r) acc[t * NR + r].v = _mm512_dpbf16_ps(acc[t * NR + r].v, xv, av[r]);
    }
  }
  sums_to<NT * NR>(acc, out);
}
#endif

// q · key for up to sixteen keys that lie `stride` apart; 0 behind the last one.
template <class T>
inline V16 scores16(const T* q, const T* keys, int64_t stride, int64_t n, int count) {
  V16 acc[16];
#pragma GCC unroll 16
  for (int t = 0; t < 16; ++t) acc[t] = set16(0);
  for (int64_t i = 0; i < n; i += 16) {
    const int left = int(std::min<int64_t>(16, n - i));
    const V16 qv = load16(q + i, left);
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t)
      if (t < count) acc[t] = fma(qv, load16(keys + t * stride + i, left), acc[t]);
  }
  return sums(acc);
}

#ifdef ADAPTERBAY_BF16
inline V16 scores16(const bf16* q, const bf16* keys, int64_t stride, int64_t n, int count) {
  V16 acc[16];
#pragma GCC unroll 16
  for (int t = 0; t < 16; ++t) acc[t] = set16(0);
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 in = n - i >= 32 ? ~__mmask32(0) : __mmask32((uint64_t(1) << (n - i)) - 1);
    const __m512bh qv = (__m512bh)_mm512_maskz_loadu_epi16(in, q + i);
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t)
      if (t < count)
        acc[t].v = _mm512_dpbf16_ps(acc[t].v, qv, (__m512bh)_mm512_maskz_loadu_epi16(in, keys + t * stride + i));
  }
  return sums(acc);
}
#endif

}  // namespace adapterbay
