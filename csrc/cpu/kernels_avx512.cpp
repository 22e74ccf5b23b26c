// all_kernels.h for AVX-512F: a register tile of 14 x 32 floats in 28 of the 32 registers.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,fma"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own header uses undefined vectors under a full mask
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,fma")
#endif

#include "all_kernels.h"

namespace hia::cpu {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int kWidth = 16, kVectors = 2, kRows = 14;
  static V zero() { return _mm512_setzero_ps(); }
  static V set(float x) { return _mm512_set1_ps(x); }
  static V load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, V x) { _mm512_storeu_ps(to, x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  // For numbers that are not negative: as integers their bits compare like the numbers, and NaN's are the largest.
  static V max_or_nan(V a, V b) {
    const __m512i without_sign = _mm512_and_epi32(_mm512_castps_si512(b), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), without_sign));
  }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
};

constexpr Kernels kAvx512 = kernels_of<Avx512>("avx512");

}  // namespace

const Kernels* avx512_kernels() { return &kAvx512; }

}  // namespace hia::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else
namespace hia::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace hia::cpu
#endif
