// The matrix products of attn_align_loss. All three are sums of outer products held in registers: a scalar of one
// operand times a vector of the other.
//   logits   Sᵀ[key][query]  = Σ_d k[key][d] · qᵀ[d][query]
//   dq       dqᵀ[d][query]  += Σ_key k[key][d] · Gᵀ[key][query]
//   dk       dk[key][d]     += Σ_query Gᵀ[key][query] · q[query][d]
// Queries lie along the lanes of a vector, so that softmax over keys needs no sum across lanes, and a tail of keys
// needs no mask: it is simply fewer rows.
#pragma once

#include "attn_rows.h"

namespace haste::cpu::HASTE_ISA {
namespace {

// Rows × Vectors accumulators, a row of operands and one scalar fit into the vector registers.
constexpr int kRows = 6;
constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int kKeyGradientRows = 4;
constexpr int kKeyGradientVectors = kVectorRegisters == 32 ? 6 : 3;

// A block of queries, 256 bytes of lanes, meets this many keys at a time; their logits stay in the first-level cache.
template <class T>
constexpr int kQueries = 256 / int(sizeof(T));
constexpr int kKeys = 96;
static_assert(kKeys % kRows == 0 && kKeys % kKeyGradientRows == 0, "tiles of whole rows");

template <class T, int Rows, int Vectors>
struct Accumulators {
  Vector<T> sum[Rows][Vectors];

  HASTE_INLINE void zero() {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vector<T>{};
    }
  }

  HASTE_INLINE void store(T* to, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) HASTE_ISA::store(to + r * stride + v * kLanes<T>, sum[r][v]);
    }
  }

  HASTE_INLINE void add(const T* from, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] += HASTE_ISA::load(from + r * stride + v * kLanes<T>);
    }
  }

  // sum[r] += Σ_i a[r · a_row + i · a_step] · (b + i · b_step)[...]
  HASTE_INLINE void add_products(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t depth) {
    for (int64_t i = 0; i < depth; ++i) {
      Vector<T> row[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) row[v] = HASTE_ISA::load(b + i * b_step + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Vector<T> scalar = broadcast(a[r * a_row + i * a_step]);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] += scalar * row[v];
      }
    }
  }
};

// out[key][query], `keys` rows rounded up to kRows, of kQueries.
template <class T>
void logits(const T* k, int64_t k_stride, int64_t keys, const T* q_transposed, int64_t dim, T scale, T* out) {
  constexpr int panel = kPanelVectors * kLanes<T>;
  for (int64_t query = 0; query < kQueries<T>; query += panel) {
    for (int64_t key = 0; key < keys; key += kRows) {
      for (int64_t d = 0; d < dim; d += kSummedAtOnce) {
        T* sums = out + key * kQueries<T> + query;
        Accumulators<T, kRows, kPanelVectors> tile;
        tile.zero();
        tile.add_products(k + key * k_stride + d, k_stride, 1, q_transposed + d * kQueries<T> + query, kQueries<T>,
                          least(dim - d, kSummedAtOnce));
        if (d > 0) tile.add(sums, kQueries<T>);
        tile.store(sums, kQueries<T>);
      }
    }
  }
  // Not in the loop above: its constants would take registers from the sums.
  for (int64_t i = 0; i < keys * kQueries<T>; i += kLanes<T>) store(out + i, to_logit(load(out + i), scale));
}

// `dim` is rounded up to kRows; k and the result have room for that.
template <class T>
void add_query_gradient(const T* k, int64_t k_stride, int64_t keys, const T* g, int64_t dim, T* dq_transposed) {
  constexpr int panel = kPanelVectors * kLanes<T>;
  for (int64_t query = 0; query < kQueries<T>; query += panel) {
    for (int64_t d = 0; d < dim; d += kRows) {
      T* out = dq_transposed + d * kQueries<T> + query;
      Accumulators<T, kRows, kPanelVectors> tile;
      tile.zero();
      tile.add_products(k + d, 1, k_stride, g + query, kQueries<T>, keys);
      tile.add(out, kQueries<T>);
      tile.store(out, kQueries<T>);
    }
  }
}

template <class T, int Vectors>
void add_key_gradient_panel(const T* g, int64_t keys, const T* q, int64_t q_stride, int64_t queries, T* dk) {
  for (int64_t key = 0; key < keys; key += kKeyGradientRows) {
    T* out = dk + key * q_stride;
    Accumulators<T, kKeyGradientRows, Vectors> tile;
    tile.zero();
    tile.add_products(g + key * kQueries<T>, kQueries<T>, 1, q, q_stride, queries);
    tile.add(out, q_stride);
    tile.store(out, q_stride);
  }
}

// The panel that is `vectors` wide: a template chosen by a number.
template <class T, int Widest, class... Arguments>
void add_key_gradient_of_width(int64_t vectors, Arguments... arguments) {
  if (vectors == Widest) {
    add_key_gradient_panel<T, Widest>(arguments...);
  } else if constexpr (Widest > 1) {
    add_key_gradient_of_width<T, Widest - 1>(vectors, arguments...);
  }
}

// q and dk have rows of q_stride numbers, whole vectors; dk has room for `keys` rounded up to kKeyGradientRows.
template <class T>
void add_key_gradient(const T* g, int64_t keys, const T* q, int64_t q_stride, int64_t queries, T* dk) {
  const int64_t vectors = q_stride / kLanes<T>;
  const int64_t panels = (vectors + kKeyGradientVectors - 1) / kKeyGradientVectors;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = vectors * panel / panels, end = vectors * (panel + 1) / panels;
    add_key_gradient_of_width<T, kKeyGradientVectors>(end - first, g, keys, q + first * kLanes<T>, q_stride, queries,
                                                      dk + first * kLanes<T>);
  }
}

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
