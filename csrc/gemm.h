// C = A B or C += A B on tiles that fit the caches: the one matrix product of the CPU kernels.
#pragma once

#include "simd.h"

namespace cdfast {
namespace CDFAST_ISA {

// A(r, k) is a[r * row + k * column], so that A may be transposed.
struct Left {
  const float* data;
  int64_t row, column;
};

// Rows of C and vectors of its columns that one inner loop keeps in registers.
template <int kRows, int kVecs, bool kAdd>
static void product_block(Left a, const float* b, int64_t b_row, float* c, int64_t c_row,
                          int depth) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      acc[r][v] = Vec{};
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + k * b_row + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vec left = splat(a.data[r * a.row + k * a.column]);
#if defined(__GNUC__) && defined(__x86_64__)
      // Keeps the broadcast in a register; GCC repeats it as a memory operand of each product.
      asm("" : "+x"(left));
#endif
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] += left * right[v];
    }
  }
  // C is added last: sums of tiles are added up, not all terms one after another, which rounds less.
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = c + r * c_row + v * kWidth;
      store(to, kAdd ? load(to) + acc[r][v] : acc[r][v]);
    }
  }
}

template <int kRows, int kVecs, bool kAdd>
static void product_columns(int rows, int depth, Left a, const float* b, int64_t b_row, float* c,
                            int64_t c_row) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows) {
    const Left block = {a.data + r * a.row, a.row, a.column};
    product_block<kRows, kVecs, kAdd>(block, b, b_row, c + r * c_row, c_row, depth);
  }
  if (kRows > 4 && r < rows) {
    const Left block = {a.data + r * a.row, a.row, a.column};
    product_block<4, kVecs, kAdd>(block, b, b_row, c + r * c_row, c_row, depth);
  }
}

// rows is a multiple of 4, columns of 16.
template <bool kAdd>
static void product(int rows, int columns, int depth, Left a, const float* b, int64_t b_row,
                    float* c, int64_t c_row) {
  int n = 0;
  // 4 x 4 vectors are the fastest shape where there are 32 registers.
#if CDFAST_VECTOR_BYTES == 64
  for (; n + 64 <= columns; n += 64) {
    product_columns<4, 4, kAdd>(rows, depth, a, b + n, b_row, c + n, c_row);
  }
  for (; n + 32 <= columns; n += 32) {
    product_columns<8, 2, kAdd>(rows, depth, a, b + n, b_row, c + n, c_row);
  }
  for (; n < columns; n += 16) {
    product_columns<8, 1, kAdd>(rows, depth, a, b + n, b_row, c + n, c_row);
  }
#else
  for (; n < columns; n += 2 * kWidth) {
    product_columns<4, 2, kAdd>(rows, depth, a, b + n, b_row, c + n, c_row);
  }
#endif
}

}  // namespace CDFAST_ISA
}  // namespace cdfast
