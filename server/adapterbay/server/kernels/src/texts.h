// Attention of texts' last tokens, or of all of them, each over its own text's keys: the scores of four queries at a time
// are held whole, and one softmax in float32 goes over them.
//
// A query's bits depend neither on the other queries nor on how many of its text come with it: every sum goes over the
// keys in order, and what is not seen adds zero.
#pragma once

#include <ATen/Parallel.h>

#include <limits>
#include <vector>

#include "vec.h"

namespace adapterbay {

constexpr int64_t kQueries = 4;       // that are computed together
constexpr int64_t kQueryBlock = 128;  // that share keys and values laid out for them
constexpr int64_t kMostKeys = 8192;   // of a text
constexpr int64_t kAlone = 4096;      // less than so many scores are not worth a region of threads

// q, k, v [heads, tokens, size] with any strides but the last; out [tokens, heads, value size].
template <class T>
struct Texts {
  const T *q, *k, *v;
  int64_t q_head, q_token, k_head, k_token, v_head, v_token;
  T* out;
  int64_t heads, kv_heads, size, value_size;
  float scale;
  bool causal;
  int64_t window;  // a query sees keys that are less than so many away; 0: no bound
};

// The queries [begin, end) are the last of a text whose keys are [first, last).
struct Text {
  int64_t begin, end, first, last;
  int64_t keys() const { return last - first; }
  int64_t place(int64_t query) const { return query - end + keys(); }  // of a query in its text
};

// How numbers lie so that one instruction multiplies sixteen by one: as floats, or where the processor takes them as
// they are, as pairs of bfloat16 numbers whose products are summed. `unit`: the i-th of a row of n; `join`: of two rows
// one below the other, or one and none.
template <class T>
struct Floats {
  using Unit = float;
  static constexpr int64_t kPer = 1;
  static Unit unit(const T* row, int64_t i, int64_t) { return to_float(row[i]); }
  static void join(const T* row, const T*, int64_t n, Unit* out) {
    for (int64_t c = 0; c < n; c += 16) {
      const int left = int(std::min<int64_t>(16, n - c));
      store16(out + c, load16(row + c, left));
    }
  }
  static void weights(const float* p, int64_t n, Unit* out) {
    for (int64_t j = 0; j < n; ++j) out[j] = to_float(rounded<T>(p[j]));
  }
  static V16 mad(V16 acc, const Unit* many, Unit one) { return fma(load16(many), set16(one), acc); }
};
template <class T>
struct Units {
  using In = Floats<T>;
};
#ifdef ADAPTERBAY_BF16
struct Pairs {
  using Unit = int32_t;
  static constexpr int64_t kPer = 2;
  static Unit unit(const bf16* row, int64_t i, int64_t n) {
    Unit out = 0;
    std::memcpy(&out, row + 2 * i, 2 * i + 1 < n ? 4 : 2);
    return out;
  }
  static void join(const bf16* row, const bf16* other, int64_t n, Unit* out) {
    for (int64_t c = 0; c < n; c += 16) {
      const __mmask16 in = first(int(std::min<int64_t>(16, n - c)));
      const __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(in, row + c));
      const __m256i second = other ? _mm256_maskz_loadu_epi16(in, other + c) : _mm256_setzero_si256();
      _mm512_storeu_si512(out + c, _mm512_or_si512(one, _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16)));
    }
  }
  static void weights(const float* p, int64_t n, Unit* out) {
    for (int64_t j = 0; j < n; j += 16) store16((bf16*)out + j, load16(p + j));
  }
  static V16 mad(V16 acc, const Unit* many, Unit one) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_loadu_si512(many), (__m512bh)_mm512_set1_epi32(one))};
  }
};
template <>
struct Units<bf16> {
  using In = Pairs;
};
#endif

// out[t][16 w ..] = Σ_i one[t · lone + i] · many[i · step + 16 w ..] for four queries t.
template <class In, int W>
inline void outer(const typename In::Unit* one, int64_t lone, const typename In::Unit* many, int64_t step, int64_t n,
                  float* out, int64_t ldo) {
  V16 acc[kQueries][W];
  for (int t = 0; t < kQueries; ++t)
    for (int w = 0; w < W; ++w) acc[t][w] = set16(0);
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
#pragma GCC unroll 4
      for (int t = 0; t < kQueries; ++t) acc[t][w] = In::mad(acc[t][w], many + i * step + 16 * w, one[t * lone + i]);
  for (int t = 0; t < kQueries; ++t)
    for (int w = 0; w < W; ++w) store16(out + t * ldo + 16 * w, acc[t][w]);
}

template <class In>
inline void outer(const typename In::Unit* one, int64_t lone, const typename In::Unit* many, int64_t step, int64_t n,
                  int64_t wide, float* out, int64_t ldo) {
  int64_t c = 0;
  for (; c + 64 <= wide; c += 64) outer<In, 4>(one, lone, many + c, step, n, out + c, ldo);
  for (; c + 32 <= wide; c += 32) outer<In, 2>(one, lone, many + c, step, n, out + c, ldo);
  for (; c < wide; c += 16) outer<In, 1>(one, lone, many + c, step, n, out + c, ldo);
}

// In place: e^(scale · (s - max)) of the scores [from, to), zero elsewhere in [0, end). Returns their sum.
inline float exponents(float* s, int64_t from, int64_t to, int64_t end, float scale) {
  constexpr float least = -std::numeric_limits<float>::infinity();
  for (int64_t j = from / 16 * 16; j < from; ++j) s[j] = least;
  V16 most = set16(least);
  for (int64_t j = from / 16 * 16; j < to; j += 16)
    most = larger(with_last(load16(s + j), int(std::min<int64_t>(16, to - j)), least), most);
  const float top = largest(most);
  V16 total = set16(0);
  for (int64_t j = 0; j < end; j += 16) {
    V16 p = set16(0);
    if (j + 16 > from && j < to) {
      p = first_of(exp((load16(s + j) - set16(top)) * set16(scale)), int(std::min<int64_t>(16, to - j)));
      if (j < from) {
        float* own = s + j;
        store16(own, p);
        std::fill(own, s + from, 0.0f);
        p = load16(own);
      }
    }
    store16(s + j, p);
    total = total + p;
  }
  return sum(total);
}

// The text's queries from `begin` to `end`, of all heads that share the key head `kv`.
template <class T>
inline void attend_text(const Texts<T>& x, const Text& text, int64_t begin, int64_t end, int64_t kv) {
  using In = typename Units<T>::In;
  using Unit = typename In::Unit;
  constexpr int64_t per = In::kPer;
  const auto up = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; };
  const int64_t keys = x.causal ? text.place(end - 1) + 1 : text.keys(), start = text.first;
  const int64_t wide = up(keys, 16), vs = up(x.value_size, 16);
  const int64_t parts = up(x.size, per) / per, steps = up(keys, per) / per, group = x.heads / x.kv_heads;
  static thread_local std::vector<Unit> units;
  static thread_local std::vector<float> floats;
  const size_t many = size_t(parts * wide + steps * vs + kQueries * (parts + wide));
  if (units.size() < many) units.resize(many);
  if (floats.size() < size_t(kQueries * (wide + vs))) floats.resize(size_t(kQueries * (wide + vs)));
  Unit *key = units.data(), *value = key + parts * wide, *query = value + steps * vs, *weight = query + kQueries * parts;
  float *scores = floats.data(), *sums = scores + kQueries * wide;
  for (int64_t from = 0; from < wide; from += 16)
    for (int64_t d = 0; d < parts; ++d)
      for (int64_t j = from; j < from + 16; ++j)
        key[d * wide + j] = In::unit(x.k + kv * x.k_head + (start + std::min(j, keys - 1)) * x.k_token, d, x.size);
  for (int64_t j = 0; j < steps; ++j) {
    const T* row = x.v + kv * x.v_head + (start + per * j) * x.v_token;
    In::join(row, per * j + per - 1 < keys ? row + (per - 1) * x.v_token : nullptr, x.value_size, value + j * vs);
  }
  for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
    for (int64_t at = begin; at < end; at += kQueries) {
      const int64_t count = std::min(kQueries, end - at), place = text.place(at);
      const int64_t seen = x.causal ? place + count : keys;
      for (int64_t t = 0; t < kQueries; ++t) {  // behind the last one it stands again
        const T* q = x.q + head * x.q_head + (at + std::min(t, count - 1)) * x.q_token;
        for (int64_t d = 0; d < parts; ++d) query[t * parts + d] = In::unit(q, d, x.size);
      }
      const int64_t width = up(seen, 16), used = up(seen, per) / per;
      outer<In>(query, parts, key, wide, parts, width, scores, wide);
      float total[kQueries];
      for (int64_t t = 0; t < kQueries; ++t) {
        const int64_t mine = std::min(place + t, place + count - 1);
        const int64_t from = x.window ? std::max<int64_t>(0, mine - x.window + 1) : 0;
        const int64_t to = x.causal ? mine + 1 : x.window ? std::min(keys, mine + x.window) : keys;
        total[t] = exponents(scores + t * wide, from, to, width, x.scale);
        In::weights(scores + t * wide, width, weight + t * wide);
      }
      outer<In>(weight, wide, value, vs, used, vs, sums, vs);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < x.value_size; c += 16) {
          const int left = int(std::min<int64_t>(16, x.value_size - c));
          store16(x.out + ((at + t) * x.heads + head) * x.value_size + c,
                  load16(sums + t * vs + c) / set16(total[t]), left);
        }
    }
}

// All texts of a step; equal shares of the cost for each thread.
template <class T>
inline void attend_texts(const Texts<T>& x, const Text* texts, int64_t count) {
  struct Task {
    const Text* text;
    int64_t begin, end;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> cost{0};  // of all tasks before
  for (const Text* text = texts; text < texts + count; ++text)
    for (int64_t begin = text->begin; begin < text->end; begin += kQueryBlock) {
      const int64_t end = std::min(text->end, begin + kQueryBlock);
      const int64_t keys = x.causal ? text->place(end - 1) + 1 : text->keys();
      tasks.push_back({text, begin, end});
      cost.push_back(cost.back() + x.kv_heads * (end - begin + 8) * (keys + 16));
    }
  const int64_t threads = at::get_num_threads(), all = cost.back();
  const auto run = [&](int64_t from, int64_t to) {
    // the heads of the tasks lie one after another; a thread has those that begin in its share
    for (size_t i = 0; i < tasks.size(); ++i) {
      const int64_t each = (cost[i + 1] - cost[i]) / x.kv_heads;
      for (int64_t kv = 0; kv < x.kv_heads; ++kv) {
        const int64_t place = (cost[i] + kv * each) * threads / all;
        if (from <= place && place < to) attend_text(x, *tasks[i].text, tasks[i].begin, tasks[i].end, kv);
      }
    }
  };
  if (all < kAlone) run(0, threads);
  else at::parallel_for(0, threads, 1, run);
}

}  // namespace adapterbay
