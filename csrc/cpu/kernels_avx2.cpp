// all_kernels.h for AVX2 with FMA: a register tile of 6 x 16 floats in 12 of the 16 registers.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "all_kernels.h"

namespace hia::cpu {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int kWidth = 8, kVectors = 2, kRows = 6;
  static V zero() { return _mm256_setzero_ps(); }
  static V set(float x) { return _mm256_set1_ps(x); }
  static V load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, V x) { _mm256_storeu_ps(to, x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  // For numbers that are not negative: as integers their bits compare like the numbers, and NaN's are the largest.
  static V max_or_nan(V a, V b) {
    const __m256i without_sign = _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), without_sign));
  }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
};

constexpr Kernels kAvx2 = kernels_of<Avx2>("avx2");

}  // namespace

const Kernels* avx2_kernels() { return &kAvx2; }

}  // namespace hia::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else
namespace hia::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace hia::cpu
#endif
