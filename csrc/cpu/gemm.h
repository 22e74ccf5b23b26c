// Products of matrices on the CPU, fp32: c = a b^T + bias or c += a b^T, any strides.
#pragma once

#include <cstdint>

namespace hia::cpu {

constexpr int64_t kChain = 256;  // terms that are added one after the other: longer sums lose digits
constexpr int64_t kSum = 768;    // terms of a panel: c is read and written once for so many
constexpr int64_t kGemmRows = 112;  // of a that lie in the second-level cache

struct Gemm {
  const float* a;     // [rows, depth], element (i, k) at i * a_row + k * a_step
  const float* b;     // [columns, depth], element (j, k) at j * b_row + k * b_step
  const float* bias;  // [columns], or null
  float* c;           // [rows, columns], columns one after the other
  int64_t rows, columns, depth;
  int64_t a_row, a_step, b_row, b_step, c_row;
  bool add;           // to what c holds; no bias then
};

// Floats that Kernels::gemm works in, for `panels` panels of 32 columns.
inline int64_t gemm_floats(int64_t panels) { return panels * kSum * 32 + kGemmRows * (kSum + 16) + 14 * 32; }

}  // namespace hia::cpu
