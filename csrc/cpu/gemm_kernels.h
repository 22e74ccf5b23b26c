// gemm.h for one instruction set; see product.h for where it is included.
#pragma once

#include "direct_kernels.h"
#include "gemm.h"

namespace hia::cpu {
namespace {

constexpr int64_t kTile = 16;  // floats of a cache line

// to[j * to_row + i] = from[i * from_row + j] for i < rows, j < columns. Lines are read whole and once: rows a multiple
// of a page apart share a set of the cache, which holds fewer of them than a tile has.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  alignas(64) float tile[kTile][kTile];
  for (int64_t i = 0; i < rows; i += kTile) {
    const int64_t high = rows - i < kTile ? rows - i : kTile;
    for (int64_t j = 0; j < columns; j += kTile) {
      const int64_t wide = columns - j < kTile ? columns - j : kTile;
      for (int64_t u = 0; u < high; ++u)
        __builtin_memcpy(tile[u], from + (i + u) * from_row + j, wide * sizeof(float));
      for (int64_t v = 0; v < wide; ++v)
        for (int64_t u = 0; u < high; ++u) to[(j + v) * to_row + i + u] = tile[u][v];
    }
  }
}

// Columns [j, j + 32) of b^T over terms [k, k + depth) as a panel; columns that are not there are zero.
template <class Isa>
void pack_panel(const Gemm& p, int64_t j, int64_t k, int64_t depth, float* to) {
  const int64_t there = p.columns - j < kPanel ? p.columns - j : kPanel;
  const float* from = p.b + j * p.b_row + k * p.b_step;
  if (there < kPanel)
    for (int64_t i = 0; i < depth * kPanel; ++i) to[i] = 0;
  if (p.b_row == 1)
    for (int64_t t = 0; t < depth; ++t) __builtin_memcpy(to + t * kPanel, from + t * p.b_step, there * sizeof(float));
  else if (p.b_step == 1)
    transpose(from, p.b_row, there, depth, to, kPanel);
  else
    for (int64_t t = 0; t < depth; ++t)
      for (int64_t i = 0; i < there; ++i) to[t * kPanel + i] = from[i * p.b_row + t * p.b_step];
}

// Rows [i, i + rows) of a over terms [k, k + depth), each followed by kPad floats of nothing.
template <class Isa>
void pack_rows(const Gemm& p, int64_t i, int64_t rows, int64_t k, int64_t depth, float* to) {
  const float* from = p.a + i * p.a_row + k * p.a_step;
  const int64_t stride = depth + kPad;
  if (p.a_step == 1)
    for (int64_t row = 0; row < rows; ++row)
      __builtin_memcpy(to + row * stride, from + row * p.a_row, depth * sizeof(float));
  else if (p.a_row == 1)
    transpose(from, p.a_step, depth, rows, to, stride);
  else
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t t = 0; t < depth; ++t) to[row * stride + t] = from[row * p.a_row + t * p.a_step];
}

// c [rows, 32] (+)= left right, in sums of at most kChain terms.
template <class Isa, class First>
void chained_product(int64_t rows, const float* left, int64_t stride, const float* right, int64_t depth, float* c,
                     int64_t c_row, const First& first) {
  for (int64_t t = 0; t < depth; t += kChain) {
    const int64_t terms = depth - t < kChain ? depth - t : kChain;
    if (t)
      product<Isa>(rows, left + t, stride, 1, right + t * kPanel, terms, Add<Isa>{c, c_row});
    else
      product<Isa>(rows, left, stride, 1, right, terms, first);
  }
}

// Panels [begin, end) of 32 columns.
template <class Isa>
void gemm(const Gemm& p, int64_t begin, int64_t end, float* work) {
  float *panels = work, *left = panels + (end - begin) * kSum * kPanel, *edge = left + kGemmRows * (kSum + kPad);
  for (int64_t k = 0; k < p.depth; k += kSum) {
    const int64_t depth = p.depth - k < kSum ? p.depth - k : kSum, stride = depth + kPad;
    for (int64_t panel = begin; panel < end; ++panel)
      pack_panel<Isa>(p, panel * kPanel, k, depth, panels + (panel - begin) * depth * kPanel);
    for (int64_t i = 0; i < p.rows; i += kGemmRows) {
      const int64_t rows = p.rows - i < kGemmRows ? p.rows - i : kGemmRows;
      pack_rows<Isa>(p, i, rows, k, depth, left);
      for (int64_t panel = begin; panel < end; ++panel) {
        const float* right = panels + (panel - begin) * depth * kPanel;
        const int64_t j = panel * kPanel, there = p.columns - j < kPanel ? p.columns - j : kPanel;
        float* to = p.c + i * p.c_row + j;
        if (there == kPanel) {
          if (k || p.add)
            chained_product<Isa>(rows, left, stride, right, depth, to, p.c_row, Add<Isa>{to, p.c_row});
          else
            chained_product<Isa>(rows, left, stride, right, depth, to, p.c_row,
                                 Finish<Isa>{p.bias ? p.bias + j : nullptr, nullptr, to, p.c_row, false});
          continue;
        }
        for (int64_t first = 0; first < rows; first += Isa::kRows) {  // part of a panel: through a buffer
          const int64_t count = rows - first < Isa::kRows ? rows - first : Isa::kRows;
          chained_product<Isa>(count, left + first * stride, stride, right, depth, edge, kPanel,
                               Put<Isa>{edge, kPanel});
          for (int64_t row = 0; row < count; ++row)
            for (int64_t column = 0; column < there; ++column) {
              float& at = to[(first + row) * p.c_row + column];
              const float start = k || p.add ? at : p.bias ? p.bias[j + column] : 0.0f;
              at = start + edge[row * kPanel + column];
            }
        }
      }
    }
  }
}

}  // namespace
}  // namespace hia::cpu
