// Storage types of weights and their conversions; for the C++ and the CUDA kernels.
//
// Everything here is always inlined: csrc/cpu compiles the same source for several instruction sets, and a shared
// out-of-line copy could hold instructions that the machine lacks.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define FEATHER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FEATHER_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace feather {

// Codes of the dtypes at every boundary (Python, tables of tensors).
enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };
constexpr int kDTypes = 4;

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
FEATHER_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FEATHER_HOST_DEVICE uint32_t bits_of(float value) { return bit_cast<uint32_t>(value); }
FEATHER_HOST_DEVICE uint64_t bits_of(double value) { return bit_cast<uint64_t>(value); }
FEATHER_HOST_DEVICE float float_of(uint32_t bits) { return bit_cast<float>(bits); }
FEATHER_HOST_DEVICE double float_of(uint64_t bits) { return bit_cast<double>(bits); }

FEATHER_HOST_DEVICE float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Round to nearest, ties to even; every NaN becomes the quiet one of its sign. (On a CUDA device the conversions are
// its instructions, whose NaN has no sign; for bfloat16 from sm_80 on.)
FEATHER_HOST_DEVICE BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return BFloat16{static_cast<uint16_t>(value != value ? quiet : rounded)};
#endif
}

// Exact, without denormal operands, which are slow: a normal half by its exponent, a denormal one by the float
// 0.5 + m 2^-24 whose last bits are m.
FEATHER_HOST_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t magnitude = value.bits & 0x7FFFu;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t shifted = magnitude << 13;
  const uint32_t normal = shifted + (magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u);
  const uint32_t denormal = bits_of(float_of(0x3F000000u + magnitude) - 0.5f);
  return float_of(sign | (magnitude < 0x400u ? denormal : normal));
#endif
}

// Round to nearest, ties to even; beyond 65520 infinite; every NaN becomes the quiet one of its sign.
FEATHER_HOST_DEVICE Half to_half(float value) {
#if defined(__CUDA_ARCH__)
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // below 2^-14: the addition to 0.5 rounds at 2^-24
  const uint32_t denormal = bits_of(float_of(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? denormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return Half{static_cast<uint16_t>(sign | result)};
#endif
}

FEATHER_HOST_DEVICE float to_float(float value) { return value; }
FEATHER_HOST_DEVICE double to_float(double value) { return value; }

// The type in which predicates and formulas are evaluated for weights stored as W: float, or double for double.
template <class W>
struct ComputeOf {
  using type = decltype(to_float(W()));
};
template <class W>
using Compute = typename ComputeOf<W>::type;

// The stored value as T, which holds every value of the storage type.
template <class T, class W>
FEATHER_HOST_DEVICE T load(W value) {
  static_assert(sizeof(T) >= sizeof(W), "a value is never narrowed");
  return to_float(value);
}

template <class T>
FEATHER_HOST_DEVICE void store(float& out, T value) {
  out = static_cast<float>(value);
}
template <class T>
FEATHER_HOST_DEVICE void store(double& out, T value) {
  out = value;
}

// From double by way of float, as torch converts.
template <class T>
FEATHER_HOST_DEVICE void store(Half& out, T value) {
  out = to_half(static_cast<float>(value));
}
template <class T>
FEATHER_HOST_DEVICE void store(BFloat16& out, T value) {
  out = to_bfloat16(static_cast<float>(value));
}

template <class W>
constexpr DType kDTypeOf = DType::kFloat16;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<float> = DType::kFloat32;
template <>
constexpr DType kDTypeOf<double> = DType::kFloat64;

}  // namespace feather
