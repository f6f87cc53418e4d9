// The dtypes of weights: codes, 16-bit storage types, and conversions to and from the type that kernels compute in.
// Shared by the CPU and the CUDA kernels.
//
// Every function is force-inlined. csrc/cpu compiles the same source for several instruction sets; an out-of-line copy
// would be shared by all of them and could hold instructions that the machine lacks.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define FEATHER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FEATHER_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace feather {

// The code of each dtype wherever one is passed as a number: from Python (backends/compiled_module.py) and as the index
// of kernel tables.
enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };
constexpr int kDTypes = 4;

// IEEE binary16, as stored.
struct Half {
  uint16_t bits;
};

// The upper half of a float, as stored.
struct BFloat16 {
  uint16_t bits;
};

// The bytes of `from` as a To of the same size.
template <class To, class From>
FEATHER_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of the same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The bits of a number as an unsigned integer, and back.
FEATHER_HOST_DEVICE uint32_t bits_of(float value) { return bit_cast<uint32_t>(value); }
FEATHER_HOST_DEVICE uint64_t bits_of(double value) { return bit_cast<uint64_t>(value); }
FEATHER_HOST_DEVICE float float_of(uint32_t bits) { return bit_cast<float>(bits); }
FEATHER_HOST_DEVICE double float_of(uint64_t bits) { return bit_cast<double>(bits); }

// Exact: every bfloat16 is a float.
FEATHER_HOST_DEVICE float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Rounds to nearest, ties to even. A NaN becomes the quiet NaN of its sign, except on CUDA devices (sm_80 and later),
// whose conversion instruction drops the sign.
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

// Exact: every half is a float. Denormal floats are avoided as operands because they are slow: a normal half gets a new
// exponent; a denormal one, m 2^-24, becomes the last bits of 0.5 + m 2^-24, from which 0.5 is subtracted.
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

// Rounds to nearest, ties to even; infinite from 65520 on. A NaN becomes the quiet NaN of its sign, except on CUDA
// devices, whose conversion instruction drops the sign.
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
  // Below 2^-14, where halves are multiples of 2^-24: the sum with 0.5 rounds to one.
  const uint32_t denormal = bits_of(float_of(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? denormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return Half{static_cast<uint16_t>(sign | result)};
#endif
}

// For templates: types that need no conversion.
FEATHER_HOST_DEVICE float to_float(float value) { return value; }
FEATHER_HOST_DEVICE double to_float(double value) { return value; }

// The compute type of weights stored as W, in which the predicate and the formulas are evaluated: double for double,
// float for everything else.
template <class W>
struct ComputeOf {
  using type = decltype(to_float(W()));
};
template <class W>
using Compute = typename ComputeOf<W>::type;

// The stored value as a T, exactly.
template <class T, class W>
FEATHER_HOST_DEVICE T load(W value) {
  static_assert(sizeof(T) >= sizeof(W), "load must not narrow a value");
  return to_float(value);
}

// Rounds a float or double to the type of `out`. Doubles reach the 16-bit types by way of float, as in torch.
template <class T>
FEATHER_HOST_DEVICE void store(float& out, T value) {
  out = static_cast<float>(value);
}
template <class T>
FEATHER_HOST_DEVICE void store(double& out, T value) {
  out = value;
}
template <class T>
FEATHER_HOST_DEVICE void store(Half& out, T value) {
  out = to_half(static_cast<float>(value));
}
template <class T>
FEATHER_HOST_DEVICE void store(BFloat16& out, T value) {
  out = to_bfloat16(static_cast<float>(value));
}

// The code of a storage type.
template <class W>
constexpr DType kDTypeOf = DType::kFloat16;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<float> = DType::kFloat32;
template <>
constexpr DType kDTypeOf<double> = DType::kFloat64;

// Whether the compute type of a dtype is double.
FEATHER_HOST_DEVICE bool is_wide(DType dtype) { return dtype == DType::kFloat64; }

}  // namespace feather
