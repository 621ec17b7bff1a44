// The operators, each a thin shell of checks around a kernel.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "attention.h"
#include "products.h"
#include "rows.h"
#include "texts.h"

namespace adapterbay {
namespace {

void rms_norm(const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  check_rows(x, x, "x");
  check(weight, x, 1, "weight");
  TORCH_CHECK(weight.size(0) == x.size(1), "the norm has ", weight.size(0), " weights, x ", x.size(1));
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    rows(x.size(0), x.size(1), [&](int64_t i) {
      rms_norm_row(ptr<T>(x) + i * x.stride(0), ptr<T>(weight), ptr<T>(out) + i * x.size(1), x.size(1), float(eps));
    });
  });
}

// x += delta where there is one; returns the norm of x.
Tensor add_rms_norm(Tensor& x, const OptionalTensor& delta, const Tensor& weight, double eps) {
  check(x, x, 2, "x");
  check(weight, x, 1, "weight");
  TORCH_CHECK(weight.size(0) == x.size(1), "the norm has ", weight.size(0), " weights, x ", x.size(1));
  if (delta) {
    check(*delta, x, 2, "delta");
    TORCH_CHECK(delta->sizes() == x.sizes(), "delta and x differ in shape");
  }
  Tensor out = at::empty_like(x);
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    const int64_t n = x.size(1);
    rows(x.size(0), n, [&](int64_t i) {
      if (delta) add_row(ptr<T>(x) + i * n, ptr<T>(*delta) + i * n, n);
      rms_norm_row(ptr<T>(x) + i * n, ptr<T>(weight), ptr<T>(out) + i * n, n, float(eps));
    });
  });
  return out;
}

Tensor silu_mul(const Tensor& gate_up) {
  check(gate_up, gate_up, 2, "gate_up");
  const int64_t n = gate_up.size(1) / 2;
  Tensor out = at::empty({gate_up.size(0), n}, gate_up.options());
  by_type(gate_up, [&](auto kind) {
    using T = decltype(kind);
    rows(out.size(0), 4 * n, [&](int64_t i) {
      const T* row = ptr<T>(gate_up) + i * 2 * n;
      silu_mul_row(row, row + n, ptr<T>(out) + i * n, n);
    });
  });
  return out;
}

// qkv [tokens, (heads + 2 kv heads) * size], in place; see ops.py.
void rotate_write(Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads, int64_t kv_heads,
                  const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps, const OptionalTensor& keys,
                  const OptionalTensor& values, const OptionalTensor& slots, const OptionalTensor& tokens) {
  check(qkv, qkv, 2, "qkv");
  check(cos, qkv, 2, "cos");
  check(sin, qkv, 2, "sin");
  const int64_t count = qkv.size(0), size = cos.size(1), width = (heads + 2 * kv_heads) * size;
  TORCH_CHECK(qkv.size(1) == width && cos.size(0) == count && sin.sizes() == cos.sizes() && size % 2 == 0,
              "qkv, cos and sin do not fit each other");
  for (const OptionalTensor* norm : {&q_norm, &k_norm})
    if (*norm) {
      check(**norm, qkv, 1, "norm");
      TORCH_CHECK((*norm)->size(0) == size, "a head's norm has its size");
    }
  const bool writes = slots.has_value();
  if (writes) {
    TORCH_CHECK(keys && values && slots->scalar_type() == at::kLong && slots->is_contiguous(), "slots without a cache");
    check(*keys, qkv, 3, "keys");
    check(*values, qkv, 3, "values");
    TORCH_CHECK(keys->size(1) == kv_heads && keys->size(2) == size && values->sizes() == keys->sizes(),
                "the cache is of another shape");
    TORCH_CHECK(!tokens || (tokens->scalar_type() == at::kLong && tokens->is_contiguous()), "tokens are int64");
    TORCH_CHECK((tokens ? tokens->numel() : count) == slots->numel(), "one slot for each token that is written");
    const auto s = slots->accessor<int64_t, 1>();
    for (int64_t i = 0; i < s.size(0); ++i) TORCH_CHECK(s[i] >= 0 && s[i] < keys->size(0), "no such slot");
    if (tokens) {
      const auto t = tokens->accessor<int64_t, 1>();
      for (int64_t i = 0; i < t.size(0); ++i) TORCH_CHECK(t[i] >= 0 && t[i] < count, "no such token");
    }
  }
  by_type(qkv, [&](auto kind) {
    using T = decltype(kind);
    rows(count, 4 * width, [&](int64_t i) {
      T* row = ptr<T>(qkv) + i * width;
      for (int64_t h = 0; h < heads + kv_heads; ++h) {
        const OptionalTensor& norm = h < heads ? q_norm : k_norm;
        if (norm) rms_norm_row(row + h * size, ptr<T>(*norm), row + h * size, size, float(eps));
        rotate_head(row + h * size, ptr<T>(cos) + i * size, ptr<T>(sin) + i * size, size);
      }
    });
    if (!writes) return;
    const int64_t kept = kv_heads * size;
    for (int64_t i = 0; i < slots->numel(); ++i) {
      const int64_t slot = ptr<int64_t>(*slots)[i], token = tokens ? ptr<int64_t>(*tokens)[i] : i;
      const T* k = ptr<T>(qkv) + token * width + heads * size;
      std::memcpy(ptr<T>(*keys) + slot * kept, k, kept * sizeof(T));
      std::memcpy(ptr<T>(*values) + slot * kept, k + kept, kept * sizeof(T));
    }
  });
}

// q: the first columns of [rows.., >= heads * size]; out [rows, heads * value size]; see ops.py.
void attention(const Tensor& q, int64_t heads, const Tensor& keys, const Tensor& values, const Tensor& table,
               const Tensor& lengths, double scale, int64_t window, double softcap, Tensor& out) {
  check_rows(q, q, "q");
  check(keys, q, 3, "keys");
  check(values, q, 3, "values");
  const int64_t count = table.size(0), kv = keys.size(1), size = keys.size(2), vs = values.size(2);
  TORCH_CHECK(table.dim() == 2 && table.is_contiguous() && table.scalar_type() == at::kLong, "block_table is int64");
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == count && lengths.scalar_type() == at::kLong, "lengths, int64");
  TORCH_CHECK(q.size(0) >= count && q.size(1) >= heads * size && kv > 0 && heads % kv == 0, "q does not fit the cache");
  TORCH_CHECK(values.size(0) == keys.size(0) && values.size(1) == kv, "keys and values differ");
  const int64_t* blocks = table.data_ptr<int64_t>();
  const int64_t* length = lengths.data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(length[i] > 0 && length[i] <= table.size(1) * kBlockTokens, "a length does not fit its blocks");
    for (int64_t b = 0; b * kBlockTokens < length[i]; ++b) {
      const int64_t block = blocks[i * table.size(1) + b];
      TORCH_CHECK(block >= 0 && (block + 1) * kBlockTokens <= keys.size(0), "no such block");
    }
  }
  // A task is a row, so that a block is read in one go; fewer heads where there are too few rows for all threads.
  const int64_t group = heads / kv, enough = 4 * at::get_num_threads();
  const int64_t kvs = count >= enough ? kv : 1, queries = count * kv >= enough ? group : 1;
  const int64_t each = kvs * queries, tasks = count * heads / each;
  by_type(q, [&](auto kind) {
    using T = decltype(kind);
    const Cache<T> cache{ptr<T>(keys), ptr<T>(values), kv, size, vs, float(scale), float(softcap)};
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> state(each * (vs + kBlockTokens + 3));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / (heads / each), head = task % (heads / each) * each;
        const int64_t from = window > 0 ? std::max<int64_t>(0, length[row] - window) : 0;
        attend_row(cache, ptr<T>(q) + row * q.stride(0) + head * size, blocks + row * table.size(1), from, length[row],
                   head / group, kvs, queries, ptr<T>(out) + (row * heads + head) * vs, state.data());
      }
    });
  });
}

Tensor paged_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& table,
                       const Tensor& lengths, double scale, int64_t window, double softcap) {
  TORCH_CHECK(q.dim() == 3 && q.size(0) == table.size(0) && q.stride(2) == 1 && q.stride(1) == q.size(2) &&
                  q.size(2) == keys.size(2),
              "q is [rows, heads, size]");
  const int64_t heads = q.size(1);
  Tensor out = at::empty({q.size(0), heads, values.size(2)}, q.options());
  attention(q.as_strided({q.size(0), heads * q.size(2)}, {q.stride(0), 1}), heads, keys, values, table, lengths, scale,
            window, softcap, out);
  return out;
}

// q [heads, tokens, size], k and v [kv heads, keys, size]; out [tokens, heads, value size]; see ops.py.
void text_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& texts, double scale, bool causal,
                    int64_t window, Tensor& out) {
  check(out, q, 3, "out");
  const int64_t tokens = q.size(1), heads = q.size(0), kv = k.size(0), keys = k.size(1), vs = out.size(2);
  for (const Tensor* t : {&q, &k, &v})
    TORCH_CHECK(t->dim() == 3 && t->stride(2) == 1 && t->scalar_type() == q.scalar_type() && t->is_cpu(),
                "q, k and v are [heads, tokens, size]");
  TORCH_CHECK(k.size(2) == q.size(2) && v.sizes() == at::IntArrayRef({kv, keys, vs}) && kv > 0 && heads % kv == 0 &&
                  out.size(0) == tokens && out.size(1) == heads,
              "q, k, v and out do not fit each other");
  TORCH_CHECK(texts.dim() == 2 && texts.size(1) == 4 && texts.is_contiguous() && texts.scalar_type() == at::kLong,
              "texts are int64 [texts, 4]");
  TORCH_CHECK(scale >= 0 && window >= 0, "the scale or the window is negative");
  const Text* text = (const Text*)texts.data_ptr<int64_t>();
  for (int64_t i = 0; i < texts.size(0); ++i) {
    const auto [begin, end, first, last] = text[i];
    TORCH_CHECK(0 <= begin && begin < end && end <= tokens && 0 <= first && first < last && last <= keys &&
                    end - begin <= last - first && last - first <= kMostKeys,
                "a text's bounds are wrong");
  }
  by_type(q, [&](auto kind) {
    using T = decltype(kind);
    const Texts<T> step{ptr<T>(q),     ptr<T>(k),  ptr<T>(v),   q.stride(0), q.stride(1), k.stride(0),  k.stride(1),
                        v.stride(0),   v.stride(1), ptr<T>(out), heads,       kv,          q.size(2),    vs,
                        float(scale), causal,      window};
    attend_texts(step, text, texts.size(0));
  });
}

// The layer up to its attention: norm, q, k and v, low-rank deltas, rotation, cache.
Tensor llama_in(const Tensor& hidden, const Tensor& norm, double eps, const Tensor& weight, const OptionalTensor& bias,
                at::TensorList ranks, const Tensor& cos, const Tensor& sin, int64_t heads, int64_t kv_heads,
                const OptionalTensor& q_norm, const OptionalTensor& k_norm, const OptionalTensor& keys,
                const OptionalTensor& values, const OptionalTensor& slots, const OptionalTensor& tokens) {
  Tensor x = at::empty_like(hidden);
  rms_norm(hidden, norm, eps, x);
  Tensor qkv = product(x, weight, bias, ranks);
  rotate_write(qkv, cos, sin, heads, kv_heads, q_norm, k_norm, eps, keys, values, slots, tokens);
  return qkv;
}

// The layer from its attention on; hidden in place.
void llama_out(Tensor& hidden, const Tensor& context, const Tensor& o, const OptionalTensor& o_bias,
               at::TensorList o_ranks, const Tensor& norm, double eps, const Tensor& gate_up,
               const OptionalTensor& gate_up_bias, at::TensorList gate_up_ranks, const Tensor& down,
               const OptionalTensor& down_bias, at::TensorList down_ranks) {
  const Tensor x = add_rms_norm(hidden, product(context, o, o_bias, o_ranks), norm, eps);
  const Tensor inner = silu_mul(product(x, gate_up, gate_up_bias, gate_up_ranks));
  const Tensor added = product(inner, down, down_bias, down_ranks);
  check(added, hidden, 2, "down");
  by_type(hidden, [&](auto kind) {
    using T = decltype(kind);
    const int64_t n = hidden.size(1);
    rows(hidden.size(0), n, [&](int64_t i) { add_row(ptr<T>(hidden) + i * n, ptr<T>(added) + i * n, n); });
  });
}

Tensor decode_context(const Tensor& qkv, int64_t heads, const Tensor& keys, const Tensor& values, const Tensor& table,
                      const Tensor& lengths, double scale, int64_t window, double softcap) {
  Tensor out = at::empty({table.size(0), heads * values.size(2)}, qkv.options());
  attention(qkv, heads, keys, values, table, lengths, scale, window, softcap, out);
  return out;
}

}  // namespace

// Whether the compiler was told of a processor that multiplies bfloat16 numbers itself.
bool native_bf16() {
#ifdef ADAPTERBAY_BF16
  return true;
#else
  return false;
#endif
}

// Whether it multiplies numbers of eight bits and sums the products itself.
bool native_int8() {
#if defined(ADAPTERBAY_AVX512) && defined(__AVX512VNNI__)
  return true;
#else
  return false;
#endif
}

TORCH_LIBRARY(adapterbay, m) {
  m.def("native_int8() -> bool", &native_int8);
  m.def("native_bf16() -> bool", &native_bf16);
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("add_rms_norm(Tensor(a!) x, Tensor? delta, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def(
      "rotate_write(Tensor(a!) qkv, Tensor cos, Tensor sin, int heads, int kv_heads, Tensor? q_norm, Tensor? k_norm, "
      "float eps, Tensor(b!)? keys, Tensor(c!)? values, Tensor? slots, Tensor? tokens) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor block_table, Tensor lengths, float scale, "
      "int window, float softcap) -> Tensor");
  m.def(
      "text_attention(Tensor q, Tensor k, Tensor v, Tensor texts, float scale, bool causal, int window, Tensor(a!) out) "
      "-> ()");
  m.def("add_ranks(Tensor x, Tensor(a!) y, Tensor[] ranks) -> ()");
  m.def(
      "llama_in(Tensor hidden, Tensor norm, float eps, Tensor weight, Tensor? bias, Tensor[] ranks, Tensor cos, "
      "Tensor sin, int heads, int kv_heads, Tensor? q_norm, Tensor? k_norm, Tensor(a!)? keys, Tensor(b!)? values, "
      "Tensor? slots, Tensor? tokens) -> Tensor");
  m.def(
      "llama_out(Tensor(a!) hidden, Tensor context, Tensor o, Tensor? o_bias, Tensor[] o_ranks, Tensor norm, "
      "float eps, Tensor gate_up, Tensor? gate_up_bias, Tensor[] gate_up_ranks, Tensor down, Tensor? down_bias, "
      "Tensor[] down_ranks) -> ()");
  m.def(
      "decode_context(Tensor qkv, int heads, Tensor keys, Tensor values, Tensor block_table, Tensor lengths, "
      "float scale, int window, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(adapterbay, CPU, m) {
  m.impl("linear", &linear);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("silu_mul", &silu_mul);
  m.impl("rotate_write", &rotate_write);
  m.impl("paged_attention", &paged_attention);
  m.impl("text_attention", &text_attention);
  m.impl("add_ranks", &add_ranks);
  m.impl("llama_in", &llama_in);
  m.impl("llama_out", &llama_out);
  m.impl("decode_context", &decode_context);
}

}  // namespace adapterbay
