// What is done to one token's row: normalization, activation, rotation.
#pragma once

#include "vec.h"

namespace adapterbay {

// out = weight · (x / rms(x)), rounded as transformers' RMSNorm rounds: the normalized row first (Zhang and Sennrich
// 2019, arXiv:1910.07467).
template <class T>
inline void rms_norm_row(const T* x, const T* weight, T* out, int64_t n, float eps) {
  V16 squares = set16(0);
  for (int64_t i = 0; i < n; i += 16) {
    const V16 v = load16(x + i, int(std::min<int64_t>(16, n - i)));
    squares = fma(v, v, squares);
  }
  const V16 scale = set16(1.0f / std::sqrt(sum(squares) / float(n) + eps));
  for (int64_t i = 0; i < n; i += 16) {
    const int left = int(std::min<int64_t>(16, n - i));
    T whole[16];
    store16(whole, load16(x + i, left) * scale, 16);
    store16(out + i, load16(weight + i, left) * load16(whole), left);
  }
}

// x += delta
template <class T>
inline void add_row(T* x, const T* delta, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int left = int(std::min<int64_t>(16, n - i));
    store16(x + i, load16(x + i, left) + load16(delta + i, left), left);
  }
}

// out = silu(gate) · up, silu(g) = g / (1 + e^-g)
template <class T>
inline void silu_mul_row(const T* gate, const T* up, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int left = int(std::min<int64_t>(16, n - i));
    const V16 g = load16(gate + i, left);
    T whole[16];
    store16(whole, g / (set16(1) + exp(set16(0) - g)), 16);
    store16(out + i, load16(whole) * load16(up + i, left), left);
  }
}

// Rotates a head in place (Su et al. 2021, arXiv:2104.09864), halves apart as transformers does: cos and sin [size].
template <class T>
inline void rotate_head(T* x, const T* cos, const T* sin, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int left = int(std::min<int64_t>(16, half - i));
    const V16 low = load16(x + i, left), high = load16(x + half + i, left);
    const V16 cos_low = load16(cos + i, left), cos_high = load16(cos + half + i, left);
    const V16 sin_low = load16(sin + i, left), sin_high = load16(sin + half + i, left);
    store16(x + i, low * cos_low - high * sin_low, left);
    store16(x + half + i, high * cos_high + low * sin_high, left);
  }
}

}  // namespace adapterbay
