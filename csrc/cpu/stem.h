// The encoder's stem on the CPU, fp32: raw pixels -> window, normalise -> K x K convolution, stride 2 -> shift, ReLU ->
// 3 x 3 max-pool, stride 2. The convolution's rows stay in the cache until they are pooled.
//
// A grey image has one channel, and the sum of the three channels' weights w. The convolution is w . (p - m) plus the
// convolution of an image of ones, which is constant except along the border: there the padding is zero after the
// normalisation, and the ones are taps of their own.
#pragma once

#include <cstdint>

namespace hia::cpu {

constexpr int64_t kCopyFloats = 8;  // floats copied at a time
constexpr int64_t kStemBlock = 56;  // outputs of the convolution gathered at a time

enum class Pixel { kUint8, kUint16, kFloat };

struct Stem {
  const void* pixels;    // [images, height, width, channels]
  Pixel type;
  const float* window;   // [images, 2]: black and white
  float centre;          // m, subtracted from the windowed pixel
  const float* weight;   // [outputs / 32, (channels + 1) * kernel * kernel, 32]: the pixels' taps, then the ones'
  const float* inside;   // [outputs]: shift, with the ones' contribution in the interior
  const float* shift;    // [outputs]
  float* out;            // [images, pooled rows, pooled columns, outputs]
  int64_t images, height, width, channels, outputs, kernel;
  bool pool;

  int64_t taps() const { return kernel * kernel; }
  int64_t depth() const { return (channels + 1) * taps(); }
  int64_t rows() const { return (height - 1) / 2 + 1; }  // of the convolution
  int64_t columns() const { return (width - 1) / 2 + 1; }
  int64_t out_rows() const { return pool ? (rows() - 1) / 2 + 1 : rows(); }
  int64_t out_columns() const { return pool ? (columns() - 1) / 2 + 1 : columns(); }
  int64_t padded() const { return (width + kernel + 1) * channels + kCopyFloats; }  // floats of a padded row of pixels
};

// Floats of Kernels::stem's workspace.
inline int64_t stem_floats(const Stem& p) {
  return (p.kernel + 1) * p.padded() + 3 * p.columns() * p.outputs + kStemBlock * (p.depth() + 16);
}

}  // namespace hia::cpu
