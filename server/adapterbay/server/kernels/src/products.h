// Products of tensors: the checks, the layout, and which kernel computes it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include "gemm.h"
#include "gemm8.h"
#include "low_rank.h"

namespace adapterbay {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
T* ptr(const Tensor& t) { return reinterpret_cast<T*>(t.data_ptr()); }
template <class T>
T* ptr(const OptionalTensor& t) { return t.has_value() ? ptr<T>(*t) : nullptr; }

template <class F>
void by_type(const Tensor& like, F f) {
  if (like.scalar_type() == at::kBFloat16) f(bf16{});
  else {
    TORCH_CHECK(like.scalar_type() == at::kFloat, "adapterbay kernels compute in float32 and bfloat16");
    f(float{});
  }
}

void check(const Tensor& t, const Tensor& like, int64_t dim, const char* name) {
  TORCH_CHECK(t.dim() == dim && t.is_contiguous() && t.scalar_type() == like.scalar_type() && t.is_cpu(), name,
              ": a contiguous CPU tensor of ", dim, " dimensions in ", like.scalar_type(), " is expected");
}

void check_rows(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK(t.dim() == 2 && t.stride(1) == 1 && t.scalar_type() == like.scalar_type() && t.is_cpu(), name,
              ": rows of ", like.scalar_type(), " are expected");
}

// Rows are few and short in decoding: a region of threads would cost more than they do.
template <class F>
void rows(int64_t count, int64_t width, F f) {
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) f(i);
                   });
}

// The sites of `ranks`, (a, b, plan) for each, that add to y's columns side by side.
template <class T>
std::vector<RankSite<T>> sites_of(const Tensor& x, Tensor& y, at::TensorList ranks) {
  std::vector<RankSite<T>> sites;
  int64_t column = 0;
  for (size_t i = 0; i + 2 < ranks.size(); i += 3) {
    const Tensor &a = ranks[i], &b = ranks[i + 1], &plan = ranks[i + 2];
    check(a, y, 2, "a");
    check(b, y, 2, "b");
    TORCH_CHECK(a.size(0) == b.size(0) && a.size(1) == x.size(1) && column + b.size(1) <= y.size(1),
                "a site's factors do not fit");
    TORCH_CHECK(plan.scalar_type() == at::kInt && plan.is_contiguous(), "a plan is int32");
    if (plan.numel() > 0) {
      RankPlan read{plan.data_ptr<int32_t>()};
      const int64_t runs = read.data[0], spans = plan.numel() > 1 ? read.data[1] : -1;
      TORCH_CHECK(runs >= 0 && spans >= 0 && plan.numel() == 2 + 4 * runs + 3 * spans, "a plan is cut off");
      for (int64_t r = 0; r < runs; ++r) {
        const int32_t* run = read.run(r);
        TORCH_CHECK(0 <= run[0] && run[0] <= run[1] && run[1] <= x.size(0) && 0 <= run[2] && run[2] <= run[3] &&
                        run[3] <= spans,
                    "a plan's run is wrong");
      }
      for (int64_t s = 0; s < spans; ++s) {
        const int32_t* span = read.span(s);
        TORCH_CHECK(span[0] >= 0 && span[1] >= 0 && span[0] + span[1] <= a.size(0), "a plan's span is wrong");
      }
      sites.push_back({ptr<T>(x), x.stride(0), ptr<T>(y) + column, y.stride(0), ptr<T>(a), ptr<T>(b), x.size(1),
                       b.size(1), read});
    }
    column += b.size(1);
  }
  return sites;
}

void add_ranks(const Tensor& x, Tensor& y, at::TensorList ranks) {
  if (ranks.empty()) return;
  check_rows(x, y, "x");
  check_rows(y, y, "y");
  by_type(x, [&](auto kind) { LowRank<decltype(kind)>(sites_of<decltype(kind)>(x, y, ranks)).run(); });
}

void check_product(const Tensor& x, const OptionalTensor& bias, int64_t in, int64_t out) {
  check_rows(x, x, "x");
  TORCH_CHECK(x.size(1) == in, "x has ", x.size(1), " columns, the weight takes ", in);
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == out && bias->scalar_type() == x.scalar_type()),
              "the bias is wrong");
}

Tensor product16(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::TensorList ranks) {
  const int64_t in = 2 * weight.size(1), out = kPanel * weight.size(0), count = x.size(0);
  check_product(x, bias, in, out);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "bfloat16 is expected");
  Tensor y = at::empty({count, out}, x.options());
  const LowRank<bf16> deltas(sites_of<bf16>(x, y, ranks));
  const Product g{ptr<bf16>(x), x.stride(0), ptr<bf16>(weight), ptr<bf16>(bias), ptr<bf16>(y), out, in};
  // Up to 16 rows go past a panel together, so that it is read once; more are cut into tiles of 12 by two panels.
  const int64_t height = count <= 16 ? std::max<int64_t>(count, 1) : kWide, width = count <= 8 || count > 16 ? 2 : 1;
  over_tiles(count, out, in / 2, height, width, deltas.reads(), [&](int rows, bool two, int64_t row, int64_t panel, Ahead& ahead) {
    tile_of(rows, two)(g, row, panel, ahead);
  });
  deltas.run();
  return y;
}

// Memory for the inputs of a product; kept, because a large step's would come from the system at every call.
Inputs8 inputs8(int64_t count, int64_t in) {
  static thread_local std::vector<int8_t> values;
  static thread_local std::vector<float> scales;
  static thread_local std::vector<int32_t> rests;
  if (int64_t(values.size()) < count * in) values.resize(size_t(count * in));
  if (int64_t(scales.size()) < count * in / kGroup) scales.resize(size_t(count * in / kGroup));
  if (int64_t(rests.size()) < count * in / kGroup) rests.resize(size_t(count * in / kGroup));
  return {values.data(), scales.data(), rests.data()};
}

Tensor product8(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::TensorList ranks, int bits) {
  const int64_t in = bits == 8 ? 4 * (weight.size(1) - 1) : kGroup * weight.size(1), count = x.size(0);
  const int64_t out = kPanel * weight.size(0), groups = in / kGroup, height = height8(count);
  check_product(x, bias, in, out);
  Tensor y = at::empty({count, out}, x.options());
  const Inputs8 inputs = inputs8(count, in);
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    rows(count, 2 * in, [&](int64_t i) {
      const int64_t top = i / height * height, tall = std::min(height, count - top), at = i - top;
      const T* row = ptr<T>(x) + i * x.stride(0);
      for (int64_t k = 0; k < groups; ++k) {
        int8_t* values = inputs.values + top * in + k * kGroup * tall + 4 * at;
        const int64_t place = top * groups + k * tall + at;
        if (bits == 8) quantize_group<8>(row + k * kGroup, values, 4 * tall, inputs.scales + place, inputs.rests + place);
        else quantize_group<4>(row + k * kGroup, values, 4 * tall, inputs.scales + place, inputs.rests + place);
      }
    });
    const LowRank<T> deltas(sites_of<T>(x, y, ranks));
    const Product8<T> g{inputs, ptr<uint8_t>(weight), ptr<T>(bias), ptr<T>(y), out, in};
    over_tiles(count, out, groups, height, 2, deltas.reads(),
               [&](int tall, bool two, int64_t row, int64_t panel, Ahead& ahead) {
                 tile8_of<T>(bits, tall, two)(g, row, panel, ahead);
               });
    deltas.run();
  });
  return y;
}

// x Wᵀ + bias with the low-rank deltas. Weights of more than two dimensions are in this room's layout; others are torch's matter.
Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::TensorList ranks = {}) {
  if (weight.dim() < 4) {
    Tensor y = at::linear(x, weight, bias);
    add_ranks(x, y, ranks);
    return y;
  }
  TORCH_CHECK(weight.is_contiguous() && weight.is_cpu(), "the weight is wrong");
  if (weight.scalar_type() == at::kByte) {
    const bool whole = weight.dim() == 4;
    TORCH_CHECK(weight.size(-2) == kPanel && weight.size(-1) == 4, "the weight is wrong");
    TORCH_CHECK(whole ? weight.size(1) > 1 && weight.size(1) % 8 == 1 : weight.size(2) == 5, "the weight is wrong");
    return product8(x, weight, bias, ranks, whole ? 8 : 4);
  }
  TORCH_CHECK(weight.size(2) == kPanel && weight.size(3) == 2, "the weight is wrong");
  return product16(x, weight, bias, ranks);
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) { return product(x, weight, bias); }

}  // namespace
}  // namespace adapterbay
