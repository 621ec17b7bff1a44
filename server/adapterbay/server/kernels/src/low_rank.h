// y[t] += Σ_p f_p (x[t] A_pᵀ) B_p for each token's own spans p of a pool (LoRA, arXiv:2106.09685, equation 3).
//
// A token touches the rows of its own spans and no others, so nothing of one adapter, not even a NaN, can reach another
// one's tokens. Tokens in a row under one arm go together, four at a time: they read their adapter's rows once.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "gemm.h"

namespace adapterbay {

// What one site's tokens use: int32 [runs, spans, runs x (start, stop, first span, last span), spans x (row, rank,
// factor as float32 bits)].
struct RankPlan {
  const int32_t* data = nullptr;
  int64_t runs() const { return data ? data[0] : 0; }
  const int32_t* run(int64_t i) const { return data + 2 + 4 * i; }
  const int32_t* span(int64_t i) const { return data + 2 + 4 * runs() + 3 * i; }
};

// One site: x [tokens, in], y [tokens, out], a [rows, in], b [rows, out].
template <class T>
struct RankSite {
  const T* x;
  int64_t ldx;
  T* y;
  int64_t ldy;
  const T* a;
  const T* b;
  int64_t in, out;
  RankPlan plan;
};

constexpr int kTogether = 4;

// Up to four tokens [start, start + tokens) of one run.
struct RankPiece {
  int32_t site, start, tokens, first, last;
  int64_t ranks;  // of all spans
  int64_t h;      // where its intermediate results begin: [tokens, ranks]
};

// h[t, r] = f · x_t · A_r for rows [from, to) of the piece's spans, counted one after another.
template <int NT, class T>
inline void shrink(const RankSite<T>& s, const RankPiece& piece, float* h, int64_t from, int64_t to) {
  const T* x = s.x + piece.start * s.ldx;
  int64_t at = 0;
  for (int32_t i = piece.first; i < piece.last; ++i) {
    const int32_t* span = s.plan.span(i);
    const int64_t rank = span[1];
    float factor;
    std::memcpy(&factor, span + 2, 4);
    int64_t r = std::max<int64_t>(0, from - at);
    const int64_t stop = std::min(rank, to - at);
    for (; r < stop;) {
      const T* a = s.a + (span[0] + r) * s.in;
      constexpr int many = NT <= 2 ? 8 : 4;
      float out[NT * many];
      const int count = r + many <= stop ? many : r + 4 <= stop ? 4 : 1;
      if (count == many) dots<NT, many>(x, s.ldx, a, s.in, s.in, out);
      else if (count == 4) dots<NT, 4>(x, s.ldx, a, s.in, s.in, out);
      else dots<NT, 1>(x, s.ldx, a, s.in, s.in, out);
      for (int t = 0; t < NT; ++t)
        for (int k = 0; k < count; ++k) h[t * piece.ranks + at + r + k] = factor * out[t * count + k];
      r += count;
    }
    at += rank;
  }
}

// y[t, c] += Σ_r h[t, r] B[r, c] for columns [from, to), rounded once.
template <int NT, class T>
inline void expand(const RankSite<T>& s, const RankPiece& piece, const float* h, int64_t from, int64_t to) {
  constexpr int W = NT == 1 ? 8 : NT == 2 ? 4 : 2;  // vectors of 16 columns
  for (int64_t c = from; c < to; c += 16 * W) {
    int left[W];
    V16 acc[NT][W];
    for (int w = 0; w < W; ++w) left[w] = int(std::max<int64_t>(0, std::min<int64_t>(16, to - c - 16 * w)));
    for (int t = 0; t < NT; ++t)
      for (int w = 0; w < W; ++w)
        acc[t][w] = left[w] ? load16(s.y + (piece.start + t) * s.ldy + c + 16 * w, left[w]) : set16(0);
    int64_t at = 0;
    for (int32_t i = piece.first; i < piece.last; ++i) {
      const int32_t* span = s.plan.span(i);
      const T* b = s.b + span[0] * s.out + c;
      for (int64_t r = 0; r < span[1]; ++r, ++at, b += s.out) {
        V16 scale[NT];
        for (int t = 0; t < NT; ++t) scale[t] = set16(h[t * piece.ranks + at]);
        for (int w = 0; w < W; ++w) {
          if (!left[w]) continue;
          const V16 row = load16(b + 16 * w, left[w]);
          for (int t = 0; t < NT; ++t) acc[t][w] = fma(scale[t], row, acc[t][w]);
        }
      }
    }
    for (int t = 0; t < NT; ++t)
      for (int w = 0; w < W; ++w)
        if (left[w]) store16(s.y + (piece.start + t) * s.ldy + c + 16 * w, acc[t][w], left[w]);
  }
}

#ifdef ADAPTERBAY_BF16
// The same for bfloat16 rows, two at a time: h is rounded to bfloat16, as it is where each product is one of its own.
template <int NT>
inline void expand(const RankSite<bf16>& s, const RankPiece& piece, const float* h, int64_t from, int64_t to) {
  constexpr int W = NT == 1 ? 4 : NT == 2 ? 3 : 2;  // times 32 columns
  static thread_local std::vector<int32_t> scales;  // of each pair of rows, NT numbers; a row without partner has zero
  scales.clear();
  for (int64_t i = piece.first, at = 0; i < piece.last; ++i) {
    const int64_t rank = s.plan.span(i)[1];
    for (int64_t r = 0; r < rank; r += 2)
      for (int t = 0; t < NT; ++t) {
        const float* own = h + t * piece.ranks + at + r;
        const uint32_t second = r + 1 < rank ? rounded<bf16>(own[1]).bits : 0;
        scales.push_back(int32_t(rounded<bf16>(own[0]).bits | second << 16));
      }
    at += rank;
  }
  const __m512i none = _mm512_setzero_si512();
  // Of each 8 columns `low` holds the first 4 and `high` the last.
  const __m512i in_order = _mm512_add_epi16(
      _mm512_set4_epi64(0x0013001200110010, 0x0003000200010000, 0x0013001200110010, 0x0003000200010000),
      _mm512_set_epi64(0x000c000c000c000c, 0x000c000c000c000c, 0x0008000800080008, 0x0008000800080008,
                       0x0004000400040004, 0x0004000400040004, 0, 0));
  for (int64_t c = from; c < to; c += 32 * W) {
    __mmask32 in[W];
    __m512 low[NT][W], high[NT][W];
    for (int w = 0; w < W; ++w) {
      const int64_t left = std::max<int64_t>(0, to - c - 32 * w);
      in[w] = left >= 32 ? ~__mmask32(0) : __mmask32((uint64_t(1) << left) - 1);
      for (int t = 0; t < NT; ++t) {
        const __m512i y = _mm512_maskz_loadu_epi16(in[w], s.y + (piece.start + t) * s.ldy + c + 32 * w);
        low[t][w] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, y));
        high[t][w] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, y));
      }
    }
    const int32_t* scale = scales.data();
    for (int32_t i = piece.first; i < piece.last; ++i) {
      const int32_t* span = s.plan.span(i);
      const bf16* b = s.b + span[0] * s.out + c;
      for (int64_t r = 0; r < span[1]; r += 2, b += 2 * s.out, scale += NT) {
        const bool pair = r + 1 < span[1];
        for (int w = 0; w < W; ++w) {
          const __m512i one = _mm512_maskz_loadu_epi16(in[w], b + 32 * w);
          const __m512i two = _mm512_maskz_loadu_epi16(pair ? in[w] : __mmask32(0), b + s.out + 32 * w);
          const __m512bh lows = (__m512bh)_mm512_unpacklo_epi16(one, two);
          const __m512bh highs = (__m512bh)_mm512_unpackhi_epi16(one, two);
          for (int t = 0; t < NT; ++t) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(scale[t]);
            low[t][w] = _mm512_dpbf16_ps(low[t][w], lows, both);
            high[t][w] = _mm512_dpbf16_ps(high[t][w], highs, both);
          }
        }
      }
    }
    for (int t = 0; t < NT; ++t)
      for (int w = 0; w < W; ++w) {
        const __m512i y = (__m512i)_mm512_cvtne2ps_pbh(high[t][w], low[t][w]);
        _mm512_mask_storeu_epi16(s.y + (piece.start + t) * s.ldy + c + 32 * w, in[w],
                                 _mm512_permutexvar_epi16(in_order, y));
      }
  }
}
#endif

template <class T>
inline void shrink(const RankSite<T>& s, const RankPiece& p, float* h, int64_t from, int64_t to) {
  if (p.tokens == 1) shrink<1>(s, p, h, from, to);
  else if (p.tokens == 2) shrink<2>(s, p, h, from, to);
  else if (p.tokens == 3) shrink<3>(s, p, h, from, to);
  else shrink<4>(s, p, h, from, to);
}

template <class T>
inline void expand(const RankSite<T>& s, const RankPiece& p, const float* h, int64_t from, int64_t to) {
  if (p.tokens == 1) expand<1>(s, p, h, from, to);
  else if (p.tokens == 2) expand<2>(s, p, h, from, to);
  else if (p.tokens == 3) expand<3>(s, p, h, from, to);
  else expand<4>(s, p, h, from, to);
}

// All sites that can be computed together: those of one input.
template <class T>
class LowRank {
 public:
  explicit LowRank(std::vector<RankSite<T>> sites) : sites_(std::move(sites)), threads_(at::get_num_threads()) {
    for (size_t s = 0; s < sites_.size(); ++s) {
      const RankSite<T>& site = sites_[s];
      for (int64_t r = 0; r < site.plan.runs(); ++r) {
        const int32_t* run = site.plan.run(r);
        int64_t ranks = 0;
        for (int32_t i = run[2]; i < run[3]; ++i) ranks += site.plan.span(i)[1];
        for (int32_t start = run[0]; start < run[1]; start += kTogether) {
          const int32_t tokens = std::min<int32_t>(kTogether, run[1] - start);
          pieces_.push_back({int32_t(s), start, tokens, run[2], run[3], ranks, floats_});
          cost_.push_back(cost_.back() + ranks * (site.in + site.out) * (tokens + 2));
          floats_ += ranks * tokens;
        }
      }
    }
  }

  // What each thread will read of the adapters.
  std::vector<std::vector<Range>> reads() const {
    std::vector<std::vector<Range>> out;
    if (apart())
      for (int64_t thread = 0; thread < threads_; ++thread) {
        out.emplace_back();
        for (int64_t i = first(thread); i < first(thread + 1); ++i) {
          const RankPiece& piece = pieces_[i];
          const RankSite<T>& site = sites_[piece.site];
          for (int32_t k = piece.first; k < piece.last; ++k) {
            const int32_t* span = site.plan.span(k);
            const char *a = (const char*)(site.a + span[0] * site.in), *b = (const char*)(site.b + span[0] * site.out);
            out.back().push_back({a, a + span[1] * site.in * sizeof(T)});
            out.back().push_back({b, b + span[1] * site.out * sizeof(T)});
          }
        }
      }
    return out;
  }

  void run() const {
    if (pieces_.empty()) return;
    std::vector<float> h(floats_);
    if (apart()) {  // a piece is one thread's; equal shares of the cost
      at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = first(begin); i < first(end); ++i) {
          const RankPiece& piece = pieces_[i];
          const RankSite<T>& site = sites_[piece.site];
          shrink(site, piece, h.data() + piece.h, 0, piece.ranks);
          expand(site, piece, h.data() + piece.h, 0, site.out);
        }
      });
      return;
    }
    // Few pieces: all threads share each of them, rows first, then columns.
    const auto share = [&](int64_t n, int64_t thread, int64_t unit) {
      return thread == threads_ ? n : std::min(n, (n * thread / threads_ + unit - 1) / unit * unit);
    };
    at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (const RankPiece& piece : pieces_)
        shrink(sites_[piece.site], piece, h.data() + piece.h, share(piece.ranks, begin, 4), share(piece.ranks, end, 4));
    });
    at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (const RankPiece& piece : pieces_) {
        const RankSite<T>& site = sites_[piece.site];
        expand(site, piece, h.data() + piece.h, share(site.out, begin, 64), share(site.out, end, 64));
      }
    });
  }

 private:
  // Whether there are enough pieces for every thread to have its own.
  bool apart() const { return threads_ == 1 || int64_t(pieces_.size()) >= 2 * threads_; }

  // The first piece of a thread.
  int64_t first(int64_t thread) const {
    if (thread == threads_) return int64_t(pieces_.size());
    return std::lower_bound(cost_.begin(), cost_.end(), cost_.back() * thread / threads_) - cost_.begin();
  }

  std::vector<RankSite<T>> sites_;
  std::vector<RankPiece> pieces_;
  std::vector<int64_t> cost_{0};  // of all pieces before
  int64_t floats_ = 0;
  int64_t threads_;
};

}  // namespace adapterbay
