// Register-tile products (micro-kernels), for one instruction set. Included by kernels_<isa>.cpp alone, after its
// target pragma: everything has internal linkage, so that no function of one instruction set replaces another's.
//
// `Isa` has the vector type V, its width kWidth in floats, load / store / set / fma / add / sub / mul / max, and the
// shape of its register tile: kRows x (kVectors * kWidth).
#pragma once

#include "conv.h"

namespace hia::cpu {
namespace {

constexpr int64_t kLine = 16;  // floats of a cache line

// Computes rows [0, ROWS) of a b over `depth` and passes them to `store(row, column, vector)`. a has strides row_stride
// and col_stride; b is a panel. `prefetch`: memory that is read soon, one line of it prefetched at each step, or null.
template <class Isa, int ROWS, class Store>
inline __attribute__((always_inline)) void block_product(const float* a, int64_t row_stride, int64_t col_stride,
                                                         const float* b, int64_t depth, const float* prefetch,
                                                         const Store& store) {
  using V = typename Isa::V;
  constexpr int VECTORS = Isa::kVectors, WIDTH = Isa::kWidth, GROUPS = (ROWS + 2) / 3;
  V sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = Isa::zero();
  // three rows share a pointer: [p], [p + stride] and [p + 2 stride] are addressing modes, without arithmetic
  const float* groups[GROUPS];
#pragma GCC unroll 8
  for (int g = 0; g < GROUPS; ++g) groups[g] = a + 3 * g * row_stride;
  const int64_t line = prefetch ? kLine : 0;
  if (!prefetch) prefetch = b;  // is in the cache already
  for (int64_t k = 0; k < depth; ++k, prefetch += line) {
    __builtin_prefetch(prefetch, 0, 2);
    V right[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) right[j] = Isa::load(b + j * WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const V left = Isa::set(groups[i / 3][(i % 3) * row_stride]);
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = Isa::fma(left, right[j], sums[i][j]);
    }
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; ++g) groups[g] += col_stride;
    b += kPanel;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) store(i, j * WIDTH, sums[i][j]);
}

template <class Isa, int ROWS, class Store>
void choose_rows(int64_t rows, const float* a, int64_t row_stride, int64_t col_stride, const float* b, int64_t depth,
                 const float* prefetch, const Store& store) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      block_product<Isa, ROWS>(a, row_stride, col_stride, b, depth, prefetch, store);
    else
      choose_rows<Isa, ROWS - 1>(rows, a, row_stride, col_stride, b, depth, prefetch, store);
  }
}

// Computes a b [rows, 32] in register tiles of about equal height; store.at(row, column) moves the store. `prefetch`:
// `depth` lines for each tile.
template <class Isa, class Store>
void product(int64_t rows, const float* a, int64_t row_stride, int64_t col_stride, const float* b, int64_t depth,
             const Store& store, const float* prefetch = nullptr) {
  const int64_t blocks = (rows + Isa::kRows - 1) / Isa::kRows;
  for (int64_t i = 0, start = 0; i < blocks; ++i) {
    const int64_t count = (rows - start + blocks - i - 1) / (blocks - i);
    for (int64_t j = 0; j < kPanel; j += Isa::kVectors * Isa::kWidth)
      choose_rows<Isa, Isa::kRows>(count, a + start * row_stride, row_stride, col_stride, b + j, depth,
                                   j ? nullptr : prefetch, store.at(start, j));
    start += count;
    if (prefetch) prefetch += depth * kLine;
  }
}

// Stores c = a b.
template <class Isa>
struct StoreTo {
  float* c;
  int64_t row;
  StoreTo at(int64_t i, int64_t j) const { return {c + i * row + j, row}; }
  void operator()(int64_t i, int64_t j, typename Isa::V sum) const { Isa::store(c + i * row + j, sum); }
};

// Adds to c: c += a b.
template <class Isa>
struct AddTo {
  float* c;
  int64_t row;
  AddTo at(int64_t i, int64_t j) const { return {c + i * row + j, row}; }
  void operator()(int64_t i, int64_t j, typename Isa::V sum) const {
    float* to = c + i * row + j;
    Isa::store(to, Isa::add(Isa::load(to), sum));
  }
};

// Returns relu(y + shift + residual).
template <class Isa>
inline typename Isa::V epilogue(typename Isa::V y, const float* shift, const float* residual, bool relu) {
  if (shift) y = Isa::add(y, Isa::load(shift));
  if (residual) y = Isa::add(y, Isa::load(residual));
  return relu ? Isa::max(Isa::zero(), y) : y;  // in this order NaN stays NaN
}

}  // namespace
}  // namespace hia::cpu
