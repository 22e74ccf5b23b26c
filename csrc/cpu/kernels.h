// Table of the CPU kernels, one instance of `Kernels` for each instruction set. The caller splits the work among
// threads; no result depends on how.
#pragma once

#include "conv.h"
#include "gemm.h"
#include "stem.h"

namespace hia::cpu {

struct Kernels {
  const char* name;

  // Computes outputs [begin, end), counted over all images.
  void (*direct)(const Convolution& p, int64_t begin, int64_t end, float* work);

  // Packs weight [outputs, channels, taps] -> [outputs / 32, taps, channels, 32], panels [begin, end) of 32 outputs.
  // `turned`: for the gradient of the input, from [channels, outputs, taps], rotated by 180 degrees.
  // `scale` is per channel of the weight's first axis, or null.
  void (*weight)(const float* weight, const float* scale, float* out, int64_t outputs, int64_t channels, int64_t taps,
                 bool turned, int64_t begin, int64_t end);

  // Computes tiles [begin, end).
  void (*winograd)(const Convolution& p, int64_t begin, int64_t end, float* work);

  // Packs as `weight` does, nine taps -> [outputs / 32, 16, channels, 32].
  void (*winograd_weight)(const float* weight, const float* scale, float* out, int64_t outputs, int64_t channels,
                          bool turned, int64_t begin, int64_t end);

  // Transforms tiles [begin, end) for the weight's gradient, in a block of up to `block` that starts at tile `first`:
  // the image's to `x_tiles` [16, block, channels], the gradient p.out's to `dout_tiles` [16, outputs / 32, block, 32].
  void (*gradient_tiles)(const Convolution& p, int64_t first, int64_t block, int64_t begin, int64_t end,
                         const float* zeros, float* x_tiles, float* dout_tiles);

  // Adds x_tiles^T dout_tiles over the `count` tiles of a block to sums [16, channels, outputs], at point `point` and
  // channels [begin, end).
  void (*gradient_product)(const Convolution& p, const float* x_tiles, const float* dout_tiles, int64_t block,
                           int64_t count, int64_t point, int64_t begin, int64_t end, float* sums);

  // Transforms sums -> [outputs, channels, 3, 3], outputs [begin, end).
  void (*gradient_weight)(const float* sums, float* out, int64_t outputs, int64_t channels, int64_t begin, int64_t end);

  // Computes rows [begin, end) of the result, counted over all images.
  void (*stem)(const Stem& p, int64_t begin, int64_t end, float* work);

  // Computes panels [begin, end) of 32 columns of c.
  void (*gemm)(const Gemm& p, int64_t begin, int64_t end, float* work);
};

// Returns the best instance that this processor supports, or null.
const Kernels* kernels();

const Kernels* avx512_kernels();  // null where the compiler lacks these instructions
const Kernels* avx2_kernels();

}  // namespace hia::cpu
