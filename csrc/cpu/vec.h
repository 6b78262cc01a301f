// Scalar building blocks that the compiler turns into vector code inside `#pragma omp simd` loops.
//
// Everything lives in the namespace of its instruction set, so that no compilation's copy can stand in for another's.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

namespace forge {

// Storage of a bfloat16 number; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};

// Storage of a float16 number.
struct half {
  uint16_t bits;
};

namespace FORGE_ISA {

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Without a conversion instruction, which AVX2 alone does not have: exponent and mantissa move into place and the
// exponent's bias goes from 15 to 127.
inline float to_float(half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t infinite = magnitude + (224u << 23);  // exponent 31 becomes 255: infinity or NaN
  // Exponent 0: mantissa * 2^-24, by way of a number in [2^-14, 2^-13).
  const uint32_t denormal = bits_of_float(float_of_bits(magnitude + (113u << 23)) - 6.103515625e-05f);
  const uint32_t bits = magnitude >= (31u << 23) ? infinite : (magnitude < (1u << 23) ? denormal : normal);
  return float_of_bits(bits | sign);
}

template <class T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>(x != x ? quiet_nan : rounded)};
}

// Round to nearest, ties to even; infinity from 65520 on; NaN stays NaN.
template <>
inline half from_float<half>(float x) {
  const uint32_t all = bits_of_float(x);
  const uint32_t sign = (all >> 16) & 0x8000u, magnitude = all & 0x7fffffffu;
  // The bias goes from 127 to 15, then 13 bits of the mantissa are rounded away; a carry belongs into the exponent.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 adding 0.5 rounds at 2^-24, the spacing of float16 there, and leaves the mantissa in the lowest bits.
  const uint32_t denormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - (126u << 23);
  const uint32_t finite = magnitude < (113u << 23) ? denormal : normal;
  const uint32_t infinite = magnitude > (255u << 23) ? 0x7e00u : 0x7c00u;
  return half{static_cast<uint16_t>((magnitude >= 0x477ff000u ? infinite : finite) | sign)};
}

// e^x by 2^n * p(r), |r| <= ln(2)/2, p the Taylor polynomial of degree 7: relative error below 2 float32 ulp.
// Results below 2^-126 are zero and not computed, since a denormal number costs 100 cycles and more; above the largest
// float the result is +inf; exp(NaN) is NaN.
inline float exp_approx(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.8f ? 88.8f : x);
  // Nearest integer: at 1.5 * 2^23 the spacing of floats is one.
  const float n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  // ln(2) split in two so that n * ln(2) loses nothing: 0.693359375 has 10 significant bits.
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n as two factors: n reaches 128, one above the largest exponent of a float.
  const int32_t half = static_cast<int32_t>(n) >> 1;
  const uint32_t low_bits = static_cast<uint32_t>(half + 127) << 23;
  const uint32_t high_bits = static_cast<uint32_t>(static_cast<int32_t>(n) - half + 127) << 23;
  float low, high;
  std::memcpy(&low, &low_bits, sizeof(low));
  std::memcpy(&high, &high_bits, sizeof(high));
  // Flushed with a bit mask: a conditional would let the compiler jump over the polynomial, and a loop with a jump does
  // not become vector code. NaN comes through p.
  float value = p * low * high;
  uint32_t value_bits;
  std::memcpy(&value_bits, &value, sizeof(value_bits));
  value_bits &= 0u - static_cast<uint32_t>(!(x < -87.3f));
  std::memcpy(&value, &value_bits, sizeof(value));
  return value;
}

// e^x for x <= 0, as exp_approx and with half its instructions; 2^-126 instead of smaller results.
inline float exp_nonpositive(float x) {
  const float clamped = x < -87.3f ? -87.3f : x;
  const float n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// tanh(x), relative error below 4 float32 ulp: the Taylor polynomial below |x| = 0.35, (1 - t) / (1 + t) with t = e^-2|x|
// above it. Both are evaluated, so that the loop stays free of branches.
inline float tanh_approx(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float t = exp_approx(-2.0f * magnitude);
  const float large = (1.0f - t) / (1.0f + t);
  const float s = x * x;
  float p = 21844.0f / 6081075.0f;
  p = p * s - 1382.0f / 155925.0f;
  p = p * s + 62.0f / 2835.0f;
  p = p * s - 17.0f / 315.0f;
  p = p * s + 2.0f / 15.0f;
  p = p * s - 1.0f / 3.0f;
  p = p * s + 1.0f;
  return magnitude < 0.35f ? x * p : (x < 0 ? -large : large);
}

}  // namespace FORGE_ISA
}  // namespace forge
