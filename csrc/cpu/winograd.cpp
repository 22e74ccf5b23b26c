#include "winograd.h"

#include <cstdlib>
#include <cstring>

namespace hia::winograd {

int64_t tiles_at_once(int64_t channels) {
  constexpr int64_t kFloats = 2 << 16;  // half a megabyte
  const int64_t tiles = kFloats / (kPoints * channels) / 14 * 14;
  return tiles < 14 ? 14 : tiles > 168 ? 168 : tiles;
}

const Kernels* kernels() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const Kernels* const best = [] {
    const char* asked = std::getenv("HIA_CPU_ISA");
    const auto allows = [asked](const char* name) { return asked == nullptr || std::strcmp(asked, name) == 0; };
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

}  // namespace hia::winograd
