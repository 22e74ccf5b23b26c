// Convolutions on the CPU, fp32, channels last, with shift, residual and ReLU behind them; two forms:
//
// direct     what a block of outputs looks at is gathered in the cache and multiplied by the weight;
// Winograd   3 x 3 of stride 1 by minimal filtering F(2 x 2, 3 x 3): 16 multiplications make four outputs, not 36.
//
// Nothing here knows of torch. kernels.h lists the functions.
#pragma once

#include <cstdint>

namespace hia::cpu {

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

}  // namespace hia::cpu
