// Convolutions on the CPU, fp32, channels last, with an epilogue of shift, residual and ReLU; two algorithms:
//
// direct     im2col (Chellapilla, Puri and Simard 2006) of a block of outputs that fits the cache, times the weight;
// Winograd   3 x 3 with stride 1 by minimal filtering F(2 x 2, 3 x 3): four outputs take 16 multiplications, not 36.
//
// Independent of torch. kernels.h lists the functions.
#pragma once

#include <cstdint>

namespace hia::cpu {

constexpr int64_t kPoints = 16;  // of a transformed tile
constexpr int64_t kPanel = 32;   // output channels of a panel: contiguous in a packed weight
constexpr int64_t kLanes = 16;   // channels are a multiple of this
constexpr int64_t kMaxRows = 14; // of a register tile, with any instruction set
constexpr int64_t kPad = 16;     // floats between points: strides of a power of two map to one set of the cache

// A convolution with its epilogue, and the geometry of its tiles. Images are [images, height, width, channels].
struct Convolution {
  const float* x;         // [images, height, width, channels]
  const float* weight;    // packed by Kernels::weight or Kernels::winograd_weight
  const float* shift;     // [outputs], or null
  const float* residual;  // [images, rows, columns, outputs], or null
  float* out;             // [images, rows, columns, outputs]; may be the residual
  int64_t images, height, width, channels, outputs;
  int64_t rows, columns;  // of the result
  int64_t kernel, stride;
  int64_t top, left;      // rows and columns of padding before the image; no rows where a strip holds its neighbours'
  bool relu;

  int64_t depth() const { return kernel * kernel * channels; }
  int64_t pixels() const { return images * rows * columns; }  // of the result

  int64_t tile_rows() const { return (rows + 1) / 2; }
  int64_t tile_columns() const { return (columns + 1) / 2; }
  int64_t tiles() const { return images * tile_rows() * tile_columns(); }
};

// Outputs whose gathered inputs fit a core's second-level cache.
int64_t pixels_per_block(int64_t depth);

// Floats of Kernels::direct's workspace, for at most `pixels` outputs.
inline int64_t direct_floats(int64_t pixels, int64_t depth) { return pixels * (depth + kPad); }

// Tiles whose transformed channels fit a core's second-level cache.
int64_t tiles_per_block(int64_t channels);

// Floats of Kernels::winograd's workspace, for at most `tiles` tiles.
inline int64_t winograd_floats(int64_t tiles, int64_t channels) {
  return kPoints * (tiles * channels + kPad) + kPoints * (tiles * kPanel + kPad) + channels;
}

// Floats from one point to the next in the output of Kernels::gradient_tiles, for at most `tiles` tiles.
inline int64_t point_stride(int64_t tiles, int64_t channels) { return tiles * channels + kPad; }

}  // namespace hia::cpu
