// Attention of one new token over the key/value blocks of its row, read where they lie.
#pragma once

#include <limits>
#include <vector>

#include "vec.h"

namespace adapterbay {

constexpr int64_t kBlockTokens = 16;

// What all rows share. Keys are [slots, kv heads, size], values [slots, kv heads, value size].
template <class T>
struct Cache {
  const T* keys;
  const T* values;
  int64_t kv_heads, size, value_size;
  float scale, softcap;  // softcap 0: none
};

// values of HEADS heads that see the same tokens: acc[h] = acc[h] * fade[h] + Σ_i p[h][i] v_i
template <int HEADS, class T>
inline void add_values(const T* values, int64_t step, int64_t vs, int count, const float* p, const float* fade,
                       float* acc, int64_t stride) {
  for (int64_t d = 0; d < vs; d += 16) {
    const int left = int(std::min<int64_t>(16, vs - d));
    V16 sum[HEADS];
    for (int h = 0; h < HEADS; ++h) sum[h] = load16(acc + h * stride + d, left) * set16(fade[h]);
    for (int i = 0; i < count; ++i) {
      const V16 v = load16(values + i * step + d, left);
      for (int h = 0; h < HEADS; ++h) sum[h] = fma(set16(p[h * kBlockTokens + i]), v, sum[h]);
    }
    for (int h = 0; h < HEADS; ++h) store16(acc + h * stride + d, sum[h], left);
  }
}

// `group` query heads for each of `kvs` key heads from `kv` on, by an online softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867) in float32. q [kvs * group, size], out [kvs * group, value size]; tokens [begin, length) of the row.
// `state` is scratch: kvs * group * (value size + kBlockTokens + 3).
template <class T>
inline void attend_row(const Cache<T>& c, const T* q, const int64_t* table, int64_t begin, int64_t length, int64_t kv,
                       int64_t kvs, int64_t group, T* out, float* state) {
  const int64_t vs = c.value_size, heads = kvs * group, key_step = c.kv_heads * c.size, value_step = c.kv_heads * vs;
  float *acc = state, *p = acc + heads * vs, *fade = p + heads * kBlockTokens, *total = fade + heads;
  float* highest = total + heads;
  std::fill(acc, acc + heads * vs, 0.0f);
  std::fill(total, total + heads, 0.0f);
  std::fill(highest, highest + heads, -std::numeric_limits<float>::infinity());
  for (int64_t from = begin; from < length;) {
    const int64_t block = from / kBlockTokens, stop = std::min(length, (block + 1) * kBlockTokens);
    const int64_t slot = table[block] * kBlockTokens + from % kBlockTokens;
    const int count = int(stop - from);
#ifdef ADAPTERBAY_AVX512
    if (stop < length) {  // the row's next block, which lies anywhere
      const int64_t next = table[block + 1] * kBlockTokens;
      const int64_t tokens = std::min(kBlockTokens, length - stop);
      for (int64_t t = 0; t < tokens; ++t) {
        const char* k = (const char*)(c.keys + (next + t) * key_step + kv * c.size);
        const char* v = (const char*)(c.values + (next + t) * value_step + kv * vs);
        for (size_t i = 0; i < kvs * c.size * sizeof(T); i += 64) _mm_prefetch(k + i, _MM_HINT_T0);
        for (size_t i = 0; i < kvs * vs * sizeof(T); i += 64) _mm_prefetch(v + i, _MM_HINT_T0);
      }
    }
#endif
    for (int64_t h = 0; h < heads; ++h) {
      const T* keys = c.keys + slot * key_step + (kv + h / group) * c.size;
      float* own = p + h * kBlockTokens;
      store16(own, scores16(q + h * c.size, keys, key_step, c.size, count) * set16(c.scale));
      if (c.softcap != 0)
        for (int i = 0; i < count; ++i) own[i] = c.softcap * std::tanh(own[i] / c.softcap);
      float most = highest[h];
      for (int i = 0; i < count; ++i) most = std::max(most, own[i]);
      for (int i = count; i < kBlockTokens; ++i) own[i] = -std::numeric_limits<float>::infinity();
      store16(own, exp(load16(own) - set16(most)));
      for (int i = count; i < kBlockTokens; ++i) own[i] = 0;
      fade[h] = std::exp(highest[h] - most);
      total[h] = total[h] * fade[h] + sum(load16(own));
      highest[h] = most;
    }
    for (int64_t g = 0; g < kvs; ++g) {
      const T* values = c.values + slot * value_step + (kv + g) * vs;
      int64_t h = g * group;
      const int64_t end = h + group;
      for (; h + 4 <= end; h += 4)
        add_values<4>(values, value_step, vs, count, p + h * kBlockTokens, fade + h, acc + h * vs, vs);
      for (; h + 3 <= end; h += 3)
        add_values<3>(values, value_step, vs, count, p + h * kBlockTokens, fade + h, acc + h * vs, vs);
      for (; h < end; ++h)
        add_values<1>(values, value_step, vs, count, p + h * kBlockTokens, fade + h, acc + h * vs, vs);
    }
    from = stop;
  }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < vs; d += 16) {
      const int left = int(std::min<int64_t>(16, vs - d));
      store16(out + h * vs + d, load16(acc + h * vs + d, left) / set16(total[h]), left);
    }
}

}  // namespace adapterbay
