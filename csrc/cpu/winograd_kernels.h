// Winograd's minimal filtering F(2 x 2, 3 x 3), for one instruction set; product.h says where it is included.
//
//   A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1:
//   Y = A^T [(G g G^T) . (B^T d B)] A for every 4 x 4 tile d of the image and 2 x 2 tile Y of the result.
//
// At each of the 16 points, the elementwise product is a matrix product over the channels. The weight's gradient is the
// adjoint, G^T [(A dY A^T) . (B^T d B)] G, summed over tiles.
#pragma once

#include "product.h"

namespace hia::cpu {
namespace {

constexpr int64_t kSumTiles = 64;  // tiles of a weight's gradient summed in sequence; these sums are added then

// Origin of tile `index` in the result: its image, first row and first column.
struct TileOrigin {
  int64_t image, row, column;

  TileOrigin(const Convolution& p, int64_t index) {
    const int64_t columns = p.tile_columns(), rows = p.tile_rows();
    column = index % columns * 2;
    row = index / columns % rows * 2;
    image = index / (columns * rows);
  }
};

// Computes B^T d B of tile `index`'s 4 x 4 pixels: 16 vectors of channels, `stride` floats apart.
template <class Isa>
void image_tile(const Convolution& p, int64_t index, const float* zeros, float* to, int64_t stride) {
  using V = typename Isa::V;
  const TileOrigin origin(p, index);
  const float* from[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t row = origin.row + i - p.top, column = origin.column + j - p.left;
      const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
      from[i][j] = inside ? p.x + ((origin.image * p.height + row) * p.width + column) * p.channels : zeros;
    }
  for (int64_t c = 0; c < p.channels; c += Isa::kWidth) {
    V half[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V d0 = Isa::load(from[0][j] + c), d1 = Isa::load(from[1][j] + c);
      const V d2 = Isa::load(from[2][j] + c), d3 = Isa::load(from[3][j] + c);
      half[0][j] = Isa::sub(d0, d2);
      half[1][j] = Isa::add(d1, d2);
      half[2][j] = Isa::sub(d2, d1);
      half[3][j] = Isa::sub(d1, d3);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* row = to + c + 4 * i * stride;
      Isa::store(row, Isa::sub(half[i][0], half[i][2]));
      Isa::store(row + stride, Isa::add(half[i][1], half[i][2]));
      Isa::store(row + 2 * stride, Isa::sub(half[i][2], half[i][1]));
      Isa::store(row + 3 * stride, Isa::sub(half[i][1], half[i][3]));
    }
  }
}

// Computes A^T m A, shift, residual and ReLU: a panel of 32 outputs of tile `index`, from 16 rows `stride` floats apart.
template <class Isa>
void result_tile(const Convolution& p, int64_t index, int64_t panel, const float* from, int64_t stride) {
  using V = typename Isa::V;
  const TileOrigin origin(p, index);
  for (int64_t c = 0; c < kPanel; c += Isa::kWidth) {
    V half[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* column = from + c + j * stride;
      const V m1 = Isa::load(column + 4 * stride), m2 = Isa::load(column + 8 * stride);
      half[0][j] = Isa::add(Isa::load(column), Isa::add(m1, m2));
      half[1][j] = Isa::sub(Isa::sub(m1, m2), Isa::load(column + 12 * stride));
    }
    const float* shift = p.shift ? p.shift + panel * kPanel + c : nullptr;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (origin.row + i >= p.rows) break;
      V columns[2] = {Isa::add(half[i][0], Isa::add(half[i][1], half[i][2])),
                   Isa::sub(Isa::sub(half[i][1], half[i][2]), half[i][3])};
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if (origin.column + j >= p.columns) break;
        const int64_t pixel = (origin.image * p.rows + origin.row + i) * p.columns + origin.column + j;
        const int64_t offset = pixel * p.outputs + panel * kPanel + c;
        const float* residual = p.residual ? p.residual + offset : nullptr;
        Isa::store(p.out + offset, epilogue<Isa>(columns[j], shift, residual, p.relu));
      }
    }
  }
}

template <class Isa>
void winograd(const Convolution& p, int64_t begin, int64_t end, float* work) {
  const int64_t tiles_per_cache = tiles_per_block(p.channels);
  const int64_t blocks = (end - begin + tiles_per_cache - 1) / tiles_per_cache;
  const int64_t block = blocks ? (end - begin + blocks - 1) / blocks : 0;
  const int64_t x_stride = point_stride(block, p.channels), out_stride = point_stride(block, kPanel);
  float *x_tiles = work, *out_tiles = x_tiles + kPoints * x_stride, *zeros = out_tiles + kPoints * out_stride;
  for (int64_t c = 0; c < p.channels; ++c) zeros[c] = 0;
  for (int64_t start = begin; start < end; start += block) {
    const int64_t count = end - start < block ? end - start : block;
    for (int64_t t = 0; t < count; ++t) image_tile<Isa>(p, start + t, zeros, x_tiles + t * p.channels, x_stride);
    for (int64_t panel = 0; panel < p.outputs / kPanel; ++panel) {
      for (int64_t point = 0; point < kPoints; ++point)
        product<Isa>(count, x_tiles + point * x_stride, p.channels, 1,
                     p.weight + (panel * kPoints + point) * p.channels * kPanel, p.channels,
                     StoreTo<Isa>{out_tiles + point * out_stride, kPanel});
      for (int64_t t = 0; t < count; ++t) result_tile<Isa>(p, start + t, panel, out_tiles + t * kPanel, out_stride);
    }
  }
}

// Computes G g G^T of kWidth outputs and one channel, from nine vectors of taps to 16 points `stride` floats apart.
template <class Isa>
inline void taps_to_points(const typename Isa::V (&taps)[3][3], float* to, int64_t stride) {
  using V = typename Isa::V;
  const V one_half = Isa::set(0.5f);
  V half[4][3];
  for (int j = 0; j < 3; ++j) {
    const V outer = Isa::add(taps[0][j], taps[2][j]);
    half[0][j] = taps[0][j];
    half[1][j] = Isa::mul(Isa::add(outer, taps[1][j]), one_half);
    half[2][j] = Isa::mul(Isa::sub(outer, taps[1][j]), one_half);
    half[3][j] = taps[2][j];
  }
  for (int i = 0; i < 4; ++i) {
    const V outer = Isa::add(half[i][0], half[i][2]);
    float* row = to + 4 * i * stride;
    Isa::store(row, half[i][0]);
    Isa::store(row + stride, Isa::mul(Isa::add(outer, half[i][1]), one_half));
    Isa::store(row + 2 * stride, Isa::mul(Isa::sub(outer, half[i][1]), one_half));
    Isa::store(row + 3 * stride, half[i][2]);
  }
}

template <class Isa>
void winograd_weight(const float* weight, const float* scale, float* out, int64_t outputs, int64_t channels,
                     bool turned, int64_t begin, int64_t end) {
  using V = typename Isa::V;
  alignas(64) float lanes[9][Isa::kWidth];
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < kPanel; k += Isa::kWidth) {
        for (int64_t lane = 0; lane < Isa::kWidth; ++lane) {
          const int64_t output = panel * kPanel + k + lane;
          const float* taps = weight + (turned ? c * outputs + output : output * channels + c) * 9;
          const float factor = scale ? scale[turned ? c : output] : 1.0f;
          for (int tap = 0; tap < 9; ++tap) lanes[turned ? 8 - tap : tap][lane] = taps[tap] * factor;
        }
        V taps[3][3];
        for (int tap = 0; tap < 9; ++tap) taps[tap / 3][tap % 3] = Isa::load(lanes[tap]);
        taps_to_points<Isa>(taps, out + (panel * kPoints * channels + c) * kPanel + k, channels * kPanel);
      }
}

// Computes A dY A^T of tile `index` of the gradient (p.out): 16 vectors of each panel, `stride` floats apart.
template <class Isa>
void gradient_tile(const Convolution& p, int64_t index, const float* zeros, float* to, int64_t panel_stride,
                   int64_t stride) {
  using V = typename Isa::V;
  const TileOrigin origin(p, index);
  const float* from[2][2];
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      const int64_t row = origin.row + i, column = origin.column + j;
      const bool inside = row < p.rows && column < p.columns;
      from[i][j] = inside ? p.out + ((origin.image * p.rows + row) * p.columns + column) * p.outputs : zeros;
    }
  for (int64_t c = 0; c < p.outputs; c += Isa::kWidth) {
    V half[4][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const V d0 = Isa::load(from[0][j] + c), d1 = Isa::load(from[1][j] + c);
      half[0][j] = d0;
      half[1][j] = Isa::add(d0, d1);
      half[2][j] = Isa::sub(d0, d1);
      half[3][j] = Isa::sub(Isa::zero(), d1);
    }
    float* at = to + c / kPanel * panel_stride + c % kPanel;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* row = at + 4 * i * stride;
      Isa::store(row, half[i][0]);
      Isa::store(row + stride, Isa::add(half[i][0], half[i][1]));
      Isa::store(row + 2 * stride, Isa::sub(half[i][0], half[i][1]));
      Isa::store(row + 3 * stride, Isa::sub(Isa::zero(), half[i][1]));
    }
  }
}

template <class Isa>
void gradient_tiles(const Convolution& p, int64_t first, int64_t block, int64_t begin, int64_t end, const float* zeros,
                    float* x_tiles, float* dout_tiles) {
  for (int64_t t = begin; t < end; ++t) {
    image_tile<Isa>(p, first + t, zeros, x_tiles + t * p.channels, point_stride(block, p.channels));
    gradient_tile<Isa>(p, first + t, zeros, dout_tiles + t * kPanel, block * kPanel, point_stride(block, p.outputs));
  }
}

template <class Isa>
void gradient_product(const Convolution& p, const float* x_tiles, const float* dout_tiles, int64_t block, int64_t count,
                      int64_t point, int64_t begin, int64_t end, float* sums) {
  const float* left = x_tiles + point * point_stride(block, p.channels) + begin;
  const float* right = dout_tiles + point * point_stride(block, p.outputs);
  float* to = sums + (point * p.channels + begin) * p.outputs;
  for (int64_t panel = 0; panel < p.outputs / kPanel; ++panel)
    for (int64_t t = 0; t < count; t += kSumTiles)
      product<Isa>(end - begin, left + t * p.channels, 1, p.channels, right + (panel * block + t) * kPanel,
                   count - t < kSumTiles ? count - t : kSumTiles, AddTo<Isa>{to + panel * kPanel, p.outputs});
}

// Computes G^T s G, the gradient of the taps, from the sums s at the 16 points.
template <class Isa>
void gradient_weight(const float* sums, float* out, int64_t outputs, int64_t channels, int64_t begin, int64_t end) {
  using V = typename Isa::V;
  alignas(64) float lanes[9][Isa::kWidth];
  const int64_t stride = channels * outputs;
  const V one_half = Isa::set(0.5f);
  for (int64_t k = begin; k < end; k += Isa::kWidth)
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = sums + c * outputs + k;
      V half[3][4];
      for (int j = 0; j < 4; ++j) {
        const V s0 = Isa::load(from + j * stride), s1 = Isa::load(from + (4 + j) * stride);
        const V s2 = Isa::load(from + (8 + j) * stride), s3 = Isa::load(from + (12 + j) * stride);
        const V middle = Isa::mul(Isa::add(s1, s2), one_half);
        half[0][j] = Isa::add(s0, middle);
        half[1][j] = Isa::mul(Isa::sub(s1, s2), one_half);
        half[2][j] = Isa::add(s3, middle);
      }
      for (int i = 0; i < 3; ++i) {
        const V middle = Isa::mul(Isa::add(half[i][1], half[i][2]), one_half);
        Isa::store(lanes[3 * i], Isa::add(half[i][0], middle));
        Isa::store(lanes[3 * i + 1], Isa::mul(Isa::sub(half[i][1], half[i][2]), one_half));
        Isa::store(lanes[3 * i + 2], Isa::add(half[i][3], middle));
      }
      for (int64_t lane = 0; lane < Isa::kWidth; ++lane)
        for (int tap = 0; tap < 9; ++tap) out[((k + lane) * channels + c) * 9 + tap] = lanes[tap][lane];
    }
}

}  // namespace
}  // namespace hia::cpu
