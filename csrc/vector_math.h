// Elementwise functions that compilers vectorise, and the x86 versions hot loops are compiled for.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

// e^x for x <= 0, about 1 ulp; 0 below the smallest normal number; NaN stays NaN.
ALWAYS_INLINE float exp_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float f = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in a product with n
  f = f + n * 2.12194440054690583e-4f;
  float p = 1.0f / 5040.0f;
  p = p * f + 1.0f / 720.0f;
  p = p * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + (127u << 23);
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.3f ? 0.0f : p * power;
}

// tanh by its series near 0, where 1 - e^(-2|x|) would lose digits.
ALWAYS_INLINE float tanh_fast(float x) {
  const float a = std::fabs(x);
  const float e = exp_negative(-2.0f * a);
  const float far = std::copysign((1.0f - e) / (1.0f + e), x);
  const float s = x * x;
  float p = 62.0f / 2835.0f;
  p = p * s - 17.0f / 315.0f;
  p = p * s + 2.0f / 15.0f;
  p = p * s - 1.0f / 3.0f;
  p = p * s + 1.0f;
  return a < 0.3f ? x * p : far;
}

#if defined(__x86_64__)
#define ALPHASPIN_AVX2 __attribute__((target("avx2,fma")))
#define ALPHASPIN_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma")))

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#endif

}  // namespace
