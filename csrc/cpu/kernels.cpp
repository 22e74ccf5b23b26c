#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace hia::cpu {

namespace {

constexpr int64_t kBlockFloats = 1 << 17;  // half a megabyte of the second-level cache; the rest is for the weight
constexpr int64_t kMaxBlockRows = 12 * kMaxRows;

// Rows of a block, a multiple of a register tile's.
int64_t rows_per_block(int64_t floats) {
  const int64_t rows = kBlockFloats / floats / kMaxRows * kMaxRows;
  return rows < kMaxRows ? kMaxRows : rows > kMaxBlockRows ? kMaxBlockRows : rows;
}

}  // namespace

int64_t pixels_per_block(int64_t depth) { return rows_per_block(depth); }
int64_t tiles_per_block(int64_t channels) { return rows_per_block(kPoints * channels); }

const Kernels* kernels() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const Kernels* const best = [] {
    const char* asked = std::getenv("HIA_CPU_ISA");
    const auto allows = [asked](const char* name) {
      return asked == nullptr || *asked == 0 || std::strcmp(asked, name) == 0;
    };
    __builtin_cpu_init();
    const Kernels* found = nullptr;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allows("avx2")) found = avx2_kernels();
    if (__builtin_cpu_supports("avx512f") && allows("avx512")) found = avx512_kernels();
    return found;
  }();
  return best;
#else
  return nullptr;
#endif
}

}  // namespace hia::cpu
