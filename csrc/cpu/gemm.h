// Matrix products on the CPU, fp32: c = a b^T + bias or c += a b^T, any strides.
//
// Blocked as in K. Goto, R. A. van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM Transactions on
// Mathematical Software 34(3), 2008: blocks of the depth (their kc), in each of them packed panels of b and a block of
// a's rows (their mc), which stays in the second-level cache.
#pragma once

#include <cstdint>

namespace hia::cpu {

constexpr int64_t kSumBlock = 256;  // terms summed in sequence; block sums are added then: longer sums lose digits
constexpr int64_t kDepthBlock = 768;  // kc, terms of a panel: c is read and written once for each block of them
constexpr int64_t kRowBlock = 112;    // mc, rows of a that fit the second-level cache

struct Gemm {
  const float* a;     // [rows, depth], element (i, k) at i * a_row_stride + k * a_col_stride
  const float* b;     // [columns, depth], element (j, k) at j * b_row_stride + k * b_col_stride
  const float* bias;  // [columns], or null
  float* c;           // [rows, columns], columns contiguous
  int64_t rows, columns, depth;
  int64_t a_row_stride, a_col_stride, b_row_stride, b_col_stride, c_row_stride;
  bool add;           // to c, without a bias
};

// Floats of Kernels::gemm's workspace, for `panels` panels of 32 columns.
inline int64_t gemm_floats(int64_t panels) {
  return panels * kDepthBlock * 32 + kRowBlock * (kDepthBlock + 16) + 14 * 32;
}

}  // namespace hia::cpu
