// stem.h for one instruction set; product.h says where it is included.
#pragma once

#include "direct_kernels.h"
#include "stem.h"

namespace hia::cpu {
namespace {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

template <class T>
void normalise_row(const T* from, int64_t count, float low, float range, float centre, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    float value = (static_cast<float>(from[i]) - low) / range;
    value = value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value;
    to[i] = value - centre;
  }
}

// Ring buffer of the normalised rows of one image that the convolution reads, with zeros around them.
class PixelRows {
 public:
  PixelRows(const Stem& p, int64_t image, float* ring)
      : p_(p), image_(image), ring_(ring), pad_(p.kernel / 2), next_(-(p.kernel / 2)) {
    for (int64_t i = 0; i < (p.kernel + 1) * p.padded(); ++i) ring[i] = 0;
  }

  // Starts at the convolution's row `row`.
  void seek(int64_t row) { next_ = 2 * row - pad_; }

  // Fills the rows that the convolution's row `row` reads; rows only advance.
  void advance(int64_t row) {
    for (; next_ <= 2 * row + pad_; ++next_) {
      float* to = at(next_) + pad_ * p_.channels;
      const int64_t count = p_.width * p_.channels;
      if (next_ < 0 || next_ >= p_.height) {
        for (int64_t i = 0; i < count; ++i) to[i] = 0;
        continue;
      }
      const float low = p_.window[2 * image_], range = p_.window[2 * image_ + 1] - low;
      const int64_t offset = (image_ * p_.height + next_) * count;
      if (p_.type == Pixel::kUint8)
        normalise_row(static_cast<const uint8_t*>(p_.pixels) + offset, count, low, range, p_.centre, to);
      else if (p_.type == Pixel::kUint16)
        normalise_row(static_cast<const uint16_t*>(p_.pixels) + offset, count, low, range, p_.centre, to);
      else
        normalise_row(static_cast<const float*>(p_.pixels) + offset, count, low, range, p_.centre, to);
    }
  }

  // Returns the pixels of row `row`, from column -kernel / 2 on.
  float* at(int64_t row) const {
    const int64_t rows = p_.kernel + 1;
    return ring_ + (row % rows + rows) % rows * p_.padded();
  }

 private:
  const Stem& p_;
  int64_t image_;
  float* ring_;
  int64_t pad_, next_;
};

// Gathers the receptive field of the convolution's output (row, column); at the border, the mask of the image after it.
// Copies overrun their end: what follows is written later, or is padding.
template <class Isa>
void gather_pixels(const Stem& p, const PixelRows& rows, int64_t row, int64_t column, bool border, float* to) {
  const int64_t pad = p.kernel / 2, count = p.kernel * p.channels;
  for (int64_t i = 0; i < p.kernel; ++i, to += count) {
    const float* from = rows.at(2 * row + i - pad) + 2 * column * p.channels;
    for (int64_t j = 0; j < count; j += kCopyFloats) __builtin_memcpy(to + j, from + j, kCopyFloats * sizeof(float));
  }
  if (!border) return;
  for (int64_t i = 0; i < p.kernel; ++i)
    for (int64_t j = 0; j < p.kernel; ++j) {
      const int64_t y = 2 * row + i - pad, x = 2 * column + j - pad;
      *to++ = y >= 0 && y < p.height && x >= 0 && x < p.width ? 1.0f : 0.0f;
    }
}

// Computes row `row` of the convolution, shift and ReLU: [columns, outputs].
template <class Isa>
void convolve_row(const Stem& p, const PixelRows& rows, int64_t row, float* gathered, float* out) {
  const int64_t pad = p.kernel / 2, columns = p.columns(), depth = p.depth(), stride = depth + kPad;
  const bool edge = 2 * row < pad || 2 * row + pad >= p.height;
  // columns [left, right) read no padding
  const int64_t left = edge ? columns : min_of((pad + 1) / 2, columns);
  const int64_t right = edge ? columns : max_of((p.width - pad + 1) / 2, left);
  for (int64_t start = 0; start < columns;) {
    const bool border = start < left || start >= right;
    const int64_t limit = start < left ? left : start < right ? min_of(right, columns) : columns;
    const int64_t stop = min_of(limit, start + kStemBlock);
    for (int64_t t = start; t < stop; ++t)
      gather_pixels<Isa>(p, rows, row, t, border, gathered + (t - start) * stride);
    const StoreEpilogue<Isa> store{border ? p.shift : p.inside, nullptr, out + start * p.outputs, p.outputs, true};
    for (int64_t panel = 0; panel < p.outputs / kPanel; ++panel)
      product<Isa>(stop - start, gathered, stride, 1, p.weight + panel * depth * kPanel,
                   border ? depth : depth - p.taps(), store.at(0, panel * kPanel));
    start = stop;
  }
}

// Takes the maximum of each window of three columns in up to three rows: [out_columns, outputs].
template <class Isa>
void pool_row(const Stem& p, const float* const* lines, int count, float* out) {
  using V = typename Isa::V;
  for (int64_t column = 0; column < p.out_columns(); ++column) {
    const int64_t first = column ? 2 * column - 1 : 0;
    const int64_t last = 2 * column + 1 < p.columns() ? 2 * column + 1 : p.columns() - 1;
    for (int64_t c = 0; c < p.outputs; c += Isa::kWidth) {
      V largest = Isa::zero();  // after the ReLU nothing is smaller
      for (int i = 0; i < count; ++i)
        for (int64_t j = first; j <= last; ++j)
          largest = Isa::max_or_nan(largest, Isa::load(lines[i] + j * p.outputs + c));
      Isa::store(out + column * p.outputs + c, largest);
    }
  }
}

template <class Isa>
void stem(const Stem& p, int64_t begin, int64_t end, float* work) {
  const int64_t line = p.columns() * p.outputs, out_line = p.out_columns() * p.outputs;
  float* ring = work;
  float* lines = ring + (p.kernel + 1) * p.padded();
  float* gathered = lines + 3 * line;
  for (int64_t index = begin; index < end;) {
    const int64_t image = index / p.out_rows(), first = index % p.out_rows();
    const int64_t stop = p.out_rows() < first + end - index ? p.out_rows() : first + end - index;
    PixelRows rows(p, image, ring);
    int64_t next = p.pool ? (first ? 2 * first - 1 : 0) : first;  // next row of the convolution
    rows.seek(next);
    for (int64_t row = first; row < stop; ++row) {
      float* out = p.out + (image * p.out_rows() + row) * out_line;
      if (!p.pool) {
        rows.advance(row);
        convolve_row<Isa>(p, rows, row, gathered, out);
        continue;
      }
      const int64_t last = 2 * row + 1 < p.rows() ? 2 * row + 1 : p.rows() - 1;
      for (; next <= last; ++next) {
        rows.advance(next);
        convolve_row<Isa>(p, rows, next, gathered, lines + next % 3 * line);
      }
      const float* three[3];
      int count = 0;
      for (int64_t r = row ? 2 * row - 1 : 0; r <= last; ++r) three[count++] = lines + r % 3 * line;
      pool_row<Isa>(p, three, count, out);
    }
    index += stop - first;
  }
}

}  // namespace
}  // namespace hia::cpu
