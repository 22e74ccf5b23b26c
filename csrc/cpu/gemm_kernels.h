// gemm.h for one instruction set; product.h says where it is included.
#pragma once

#include "direct_kernels.h"
#include "gemm.h"

namespace hia::cpu {
namespace {

constexpr int64_t kTile = 16;  // floats of a cache line

// to[j * to_row + i] = from[i * from_row + j] for i < rows, j < columns. Each cache line is read whole and once: rows a
// multiple of a page apart map to one set of the cache, which has fewer ways than a tile has rows.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  alignas(64) float tile[kTile][kTile];
  for (int64_t i = 0; i < rows; i += kTile) {
    const int64_t height = rows - i < kTile ? rows - i : kTile;
    for (int64_t j = 0; j < columns; j += kTile) {
      const int64_t width = columns - j < kTile ? columns - j : kTile;
      for (int64_t u = 0; u < height; ++u)
        __builtin_memcpy(tile[u], from + (i + u) * from_row + j, width * sizeof(float));
      for (int64_t v = 0; v < width; ++v)
        for (int64_t u = 0; u < height; ++u) to[(j + v) * to_row + i + u] = tile[u][v];
    }
  }
}

// Packs columns [j, j + 32) of b^T over terms [k, k + depth) as a panel; columns beyond the last are zero.
template <class Isa>
void pack_panel(const Gemm& p, int64_t j, int64_t k, int64_t depth, float* to) {
  const int64_t valid = p.columns - j < kPanel ? p.columns - j : kPanel;
  const float* from = p.b + j * p.b_row_stride + k * p.b_col_stride;
  if (valid < kPanel)
    for (int64_t i = 0; i < depth * kPanel; ++i) to[i] = 0;
  if (p.b_row_stride == 1)
    for (int64_t t = 0; t < depth; ++t)
      __builtin_memcpy(to + t * kPanel, from + t * p.b_col_stride, valid * sizeof(float));
  else if (p.b_col_stride == 1)
    transpose(from, p.b_row_stride, valid, depth, to, kPanel);
  else
    for (int64_t t = 0; t < depth; ++t)
      for (int64_t i = 0; i < valid; ++i) to[t * kPanel + i] = from[i * p.b_row_stride + t * p.b_col_stride];
}

// Packs rows [i, i + rows) of a over terms [k, k + depth), each followed by kPad unused floats.
template <class Isa>
void pack_rows(const Gemm& p, int64_t i, int64_t rows, int64_t k, int64_t depth, float* to) {
  const float* from = p.a + i * p.a_row_stride + k * p.a_col_stride;
  const int64_t stride = depth + kPad;
  if (p.a_col_stride == 1)
    for (int64_t row = 0; row < rows; ++row)
      __builtin_memcpy(to + row * stride, from + row * p.a_row_stride, depth * sizeof(float));
  else if (p.a_row_stride == 1)
    transpose(from, p.a_col_stride, depth, rows, to, stride);
  else
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t t = 0; t < depth; ++t) to[row * stride + t] = from[row * p.a_row_stride + t * p.a_col_stride];
}

// c [rows, 32] (+)= left right, in sums of at most kSumBlock terms: blocked summation.
template <class Isa, class First>
void blocked_product(int64_t rows, const float* left, int64_t stride, const float* right, int64_t depth, float* c,
                     int64_t c_row_stride, const First& first) {
  for (int64_t t = 0; t < depth; t += kSumBlock) {
    const int64_t terms = depth - t < kSumBlock ? depth - t : kSumBlock;
    if (t)
      product<Isa>(rows, left + t, stride, 1, right + t * kPanel, terms, AddTo<Isa>{c, c_row_stride});
    else
      product<Isa>(rows, left, stride, 1, right, terms, first);
  }
}

// Computes panels [begin, end) of 32 columns.
template <class Isa>
void gemm(const Gemm& p, int64_t begin, int64_t end, float* work) {
  float *panels = work, *left = panels + (end - begin) * kDepthBlock * kPanel;
  float* edge = left + kRowBlock * (kDepthBlock + kPad);
  for (int64_t k = 0; k < p.depth; k += kDepthBlock) {
    const int64_t depth = p.depth - k < kDepthBlock ? p.depth - k : kDepthBlock, stride = depth + kPad;
    for (int64_t panel = begin; panel < end; ++panel)
      pack_panel<Isa>(p, panel * kPanel, k, depth, panels + (panel - begin) * depth * kPanel);
    for (int64_t i = 0; i < p.rows; i += kRowBlock) {
      const int64_t rows = p.rows - i < kRowBlock ? p.rows - i : kRowBlock;
      pack_rows<Isa>(p, i, rows, k, depth, left);
      for (int64_t panel = begin; panel < end; ++panel) {
        const float* right = panels + (panel - begin) * depth * kPanel;
        const int64_t j = panel * kPanel, valid = p.columns - j < kPanel ? p.columns - j : kPanel;
        float* to = p.c + i * p.c_row_stride + j;
        if (valid == kPanel) {
          if (k || p.add)
            blocked_product<Isa>(rows, left, stride, right, depth, to, p.c_row_stride, AddTo<Isa>{to, p.c_row_stride});
          else
            blocked_product<Isa>(rows, left, stride, right, depth, to, p.c_row_stride,
                                 StoreEpilogue<Isa>{p.bias ? p.bias + j : nullptr, nullptr, to, p.c_row_stride, false});
          continue;
        }
        for (int64_t first = 0; first < rows; first += Isa::kRows) {  // a partial panel goes through a buffer
          const int64_t count = rows - first < Isa::kRows ? rows - first : Isa::kRows;
          blocked_product<Isa>(count, left + first * stride, stride, right, depth, edge, kPanel,
                               StoreTo<Isa>{edge, kPanel});
          for (int64_t row = 0; row < count; ++row)
            for (int64_t column = 0; column < valid; ++column) {
              float& at = to[(first + row) * p.c_row_stride + column];
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
