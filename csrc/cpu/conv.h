// Convolutions on the CPU, fp32, channels last, with shift, residual and ReLU behind them; two forms:
//
// direct     what a block of outputs looks at is gathered in the cache and multiplied by the weight;
// Winograd   3 x 3 of stride 1 by minimal filtering F(2 x 2, 3 x 3): 16 multiplications make four outputs, not 36.
//
// This file knows nothing of torch; one instance of `Kernels` exists per instruction set, and the caller splits the
// work among threads. No result depends on how it is split.
#pragma once

#include <cstdint>

namespace hia::conv {

constexpr int64_t kPoints = 16;  // of a transformed tile
constexpr int64_t kPanel = 32;   // output channels side by side in a transformed weight
constexpr int64_t kLanes = 16;   // channels come in multiples of this
constexpr int64_t kMaxRows = 14; // of a register block, with any instruction set
constexpr int64_t kPad = 16;     // floats between points: powers of two would all fall into one set of the cache

// A convolution, its epilogue, and where its tiles lie. Images are [images, height, width, channels].
struct Convolution {
  const float* x;         // [images, height, width, channels]
  const float* weight;    // of Kernels::weight or Kernels::winograd_weight
  const float* shift;     // [outputs], or null
  const float* residual;  // [images, rows, columns, outputs], or null
  float* out;             // [images, rows, columns, outputs]; may be the residual
  int64_t images, height, width, channels, outputs;
  int64_t rows, columns;  // of the result
  int64_t kernel, stride;
  int64_t top, left;      // rows and columns of zeros before the image; 0 rows where a strip brings its neighbours'
  bool relu;

  int64_t depth() const { return kernel * kernel * channels; }
  int64_t pixels() const { return images * rows * columns; }  // of the result

  int64_t tile_rows() const { return (rows + 1) / 2; }
  int64_t tile_columns() const { return (columns + 1) / 2; }
  int64_t tiles() const { return images * tile_rows() * tile_columns(); }
};

// Outputs whose inputs, gathered, stay in a core's second-level cache.
int64_t pixels_at_once(int64_t depth);

// Floats that Kernels::direct works in, for at most `pixels` outputs.
inline int64_t direct_floats(int64_t pixels, int64_t depth) { return pixels * (depth + kPad); }

// Tiles whose transformed channels stay in a core's second-level cache.
int64_t tiles_at_once(int64_t channels);

// Floats that Kernels::winograd works in, for at most `tiles` tiles.
inline int64_t winograd_floats(int64_t tiles, int64_t channels) {
  return kPoints * (tiles * channels + kPad) + kPoints * (tiles * kPanel + kPad) + channels;
}

// Floats between two points of what Kernels::gradient_tiles writes, for at most `tiles` tiles.
inline int64_t point_stride(int64_t tiles, int64_t channels) { return tiles * channels + kPad; }

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
};

// The best instance this processor runs, or null.
const Kernels* kernels();

const Kernels* avx512_kernels();  // null where the compiler had no such instructions
const Kernels* avx2_kernels();

}  // namespace hia::conv
