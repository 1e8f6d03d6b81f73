// Vectors of CDFAST_VECTOR_BYTES, and the functions that the kernels need on them. Included once
// per instruction set, into a namespace of its own.
#pragma once

#include <cstdint>
#include <cstring>

#include "problem.h"

namespace cdfast {
namespace CDFAST_ISA {

constexpr int kWidth = CDFAST_VECTOR_BYTES / 4;
typedef float Vec __attribute__((vector_size(CDFAST_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(CDFAST_VECTOR_BYTES)));
typedef float UnalignedVec __attribute__((vector_size(CDFAST_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t UnalignedIntVec
    __attribute__((vector_size(CDFAST_VECTOR_BYTES), aligned(4), may_alias));

static CDFAST_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
static CDFAST_INLINE IntVec load(const int32_t* p) {
  return *reinterpret_cast<const UnalignedIntVec*>(p);
}
static CDFAST_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
static CDFAST_INLINE void store(int32_t* p, IntVec x) {
  *reinterpret_cast<UnalignedIntVec*>(p) = x;
}
// x - 0 is x for every x, so that compilers leave the broadcast only; x + 0 is not.
static CDFAST_INLINE Vec splat(float x) { return x - Vec{}; }
static CDFAST_INLINE IntVec splat(int32_t x) { return x - IntVec{}; }

static CDFAST_INLINE float sum(Vec x) {
  float lane[kWidth];
  store(lane, x);
  // Halves are added, so that the order is one of pairs.
  for (int n = kWidth / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}

static CDFAST_INLINE float max(Vec x) {
  float lane[kWidth];
  store(lane, x);
  for (int i = 1; i < kWidth; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
  return lane[0];
}

// exp to about one unit in the last place; 0 instead of subnormal results, NaN stays. Hidden keys
// have -infinity: on the way to 0 no subnormal number may arise, it would cost a hundred cycles.
static CDFAST_INLINE Vec exp(Vec any) {
  const Vec lowest = splat(-87.33f), highest = splat(89.0f);  // the smallest normal, infinity
  Vec x = any < lowest ? lowest : any;
  x = x > highest ? highest : x;
  // x = n ln 2 + r; adding 1.5 * 2^23 rounds to an integer in the low bits.
  const Vec rounder = splat(12582912.0f);
  const Vec shifted = x * splat(1.44269504088896341f) + rounder;
  const Vec n = shifted - rounder;
  const IntVec power = reinterpret_cast<IntVec>(shifted) - reinterpret_cast<IntVec>(rounder);
  // ln 2 in two parts; n times the first is exact.
  const Vec r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, a Chebyshev fit: 0.2 units in the last place.
  Vec series = splat(0.0013933652080595493f);
  series = series * r + splat(0.008363181725144386f);
  series = series * r + splat(0.04166646674275398f);
  series = series * r + splat(0.16666576266288757f);
  series = series * r + splat(0.5f);
  const Vec mantissa = (series * r) * r + r + splat(1.0f);
  // 2^n in two factors: 2^128 is no float32.
  const IntVec half = power >> 1, rest = power - half;
  const Vec first = reinterpret_cast<Vec>((half + splat(127)) << 23);
  const Vec second = reinterpret_cast<Vec>((rest + splat(127)) << 23);
  return any < lowest ? Vec{} : (mantissa * first) * second;
}

// 16-bit formats. Written without branches, so that the loops below become vector instructions.

static CDFAST_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static CDFAST_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

static CDFAST_INLINE float from_bf16(uint16_t x) {
  return from_bits(static_cast<uint32_t>(x) << 16);
}

static CDFAST_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
}

static CDFAST_INLINE float from_f16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu, sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t exponent = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + exponent;
  const uint32_t subnormal =
      to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return from_bits((magnitude < 0x400u ? subnormal : normal) | sign);
}

static CDFAST_INLINE uint16_t to_f16(float x) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the addition.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : rounded;
  half = magnitude >= 0x47800000u ? special : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

}  // namespace CDFAST_ISA
}  // namespace cdfast
