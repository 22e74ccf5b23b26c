#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace hia::cpu {

namespace {

constexpr int64_t kFloats = 1 << 17;  // half a megabyte: of the second-level cache, the rest is the weight's
constexpr int64_t kMost = 12 * kMaxRows;

// Whole register blocks.
int64_t rows_at_once(int64_t floats) {
  const int64_t rows = kFloats / floats / kMaxRows * kMaxRows;
  return rows < kMaxRows ? kMaxRows : rows > kMost ? kMost : rows;
}

}  // namespace

int64_t pixels_at_once(int64_t depth) { return rows_at_once(depth); }
int64_t tiles_at_once(int64_t channels) { return rows_at_once(kPoints * channels); }

const Kernels* kernels() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const Kernels* const best = [] {
    const char* asked = std::getenv("HIA_CPU_ISA");
    const auto allows = [asked](const char* name) { return asked == nullptr || *asked == 0 || std::strcmp(asked, name) == 0; };
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
