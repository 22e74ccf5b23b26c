// The functions of the CPU kernels, one instance of `Kernels` an instruction set. The caller splits the work among
// threads, and no result depends on how.
#pragma once

#include "conv.h"
#include "gemm.h"
#include "stem.h"

namespace hia::cpu {

struct Kernels {
  const char* name;

  // Outputs [begin, end), counted over all images.
  void (*direct)(const Convolution& p, int64_t begin, int64_t end, float* work);

  // weight [outputs, channels, taps] -> [outputs / 32, taps, channels, 32], panels [begin, end) of 32 outputs.
  // `turned`: of the convolution that takes gradients back, from [channels, outputs, taps] and turned by 180 degrees.
  // `scale` is per channel of the weight's first axis, or null.
  void (*weight)(const float* weight, const float* scale, float* out, int64_t outputs, int64_t channels, int64_t taps,
                 bool turned, int64_t begin, int64_t end);

  // Tiles [begin, end).
  void (*winograd)(const Convolution& p, int64_t begin, int64_t end, float* work);

  // As `weight` with nine taps -> [outputs / 32, 16, channels, 32].
  void (*winograd_weight)(const float* weight, const float* scale, float* out, int64_t outputs, int64_t channels,
                          bool turned, int64_t begin, int64_t end);

  // The weight's gradient, tiles [begin, end) of a block that starts at tile `first` and holds up to `block`: the
  // image's tiles to `seen` [16, block, channels], those of the gradient p.out to `grads` [16, outputs / 32, block, 32].
  void (*gradient_tiles)(const Convolution& p, int64_t first, int64_t block, int64_t begin, int64_t end,
                         const float* zeros, float* seen, float* grads);

  // sums [16, channels, outputs] += seen^T grads, over the `count` tiles of a block; point `point`, channels
  // [begin, end).
  void (*gradient_product)(const Convolution& p, const float* seen, const float* grads, int64_t block, int64_t count,
                           int64_t point, int64_t begin, int64_t end, float* sums);

  // sums -> [outputs, channels, 3, 3], outputs [begin, end).
  void (*gradient_weight)(const float* sums, float* out, int64_t outputs, int64_t channels, int64_t begin, int64_t end);

  // Rows [begin, end) of the result, counted over all images.
  void (*stem)(const Stem& p, int64_t begin, int64_t end, float* work);

  // Panels [begin, end) of 32 columns of c.
  void (*gemm)(const Gemm& p, int64_t begin, int64_t end, float* work);
};

// The best instance this processor runs, or null.
const Kernels* kernels();

const Kernels* avx512_kernels();  // null where the compiler had no such instructions
const Kernels* avx2_kernels();

}  // namespace hia::cpu
