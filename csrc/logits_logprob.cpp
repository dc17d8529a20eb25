// Log-probabilities of target tokens from logits on the CPU: one read forward, one read and one write
// backward, no [N, V] softmax.
//
// Rows are independent and shared out among the threads. A row is taken tile by tile: raw logits to
// fp32 logits after softcap and temperature in a buffer that stays in the L1 cache, then the sum of
// their exponentials, or the gradient. Forward and backward make z' in the same function, so that
// z' - max is the same number in both.
//
// Shape suffixes: N rows, V vocabulary, K targets per row, T vocabulary entries of a tile.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "vector_math.h"

namespace {

using at::Tensor;

constexpr int64_t TILE = 1024;
// Logits of one task.
constexpr int64_t GRAIN = 1 << 15;

#if defined(_OPENMP)
#define SIMD(clauses) _Pragma(clauses)
#else
#define SIMD(clauses)
#endif

ALWAYS_INLINE float to_float(float x) { return x; }

ALWAYS_INLINE float to_float(at::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

ALWAYS_INLINE float to_float(at::Half x) { return c10::detail::fp16_ieee_to_fp32_value(x.x); }

ALWAYS_INLINE void store(float* to, float value) { *to = value; }

// Round to nearest even.
ALWAYS_INLINE void store(at::BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->x = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

ALWAYS_INLINE void store(at::Half* to, float value) {
  to->x = c10::detail::fp16_ieee_from_fp32_value(value);
}

// z' = scale * tanh(z * uncap) with a softcap, scale * z without (uncap 0).
struct Head {
  float scale, uncap, inverse_temperature;

  Head(std::optional<double> softcap, double temperature)
      : scale(static_cast<float>(softcap.value_or(1.0) / temperature)),
        uncap(softcap ? static_cast<float>(1.0 / *softcap) : 0.0f),
        inverse_temperature(static_cast<float>(1.0 / temperature)) {}

  // d z' / d z from z'.
  ALWAYS_INLINE float slope(float z) const {
    if (uncap == 0.0f) return inverse_temperature;
    const float tanh = z / scale;
    return (1.0f - tanh * tanh) * inverse_temperature;
  }
};

// z' of a tile; returns the maximum.
template <typename Scalar>
ALWAYS_INLINE float transform_body(const Scalar* logits_T, int64_t width, Head head, float* z_T) {
  float maximum = std::numeric_limits<float>::lowest();
  if (head.uncap != 0.0f) {
    SIMD("omp simd reduction(max : maximum)")
    for (int64_t t = 0; t < width; ++t) {
      z_T[t] = head.scale * tanh_fast(to_float(logits_T[t]) * head.uncap);
      maximum = z_T[t] > maximum ? z_T[t] : maximum;
    }
  } else {
    SIMD("omp simd reduction(max : maximum)")
    for (int64_t t = 0; t < width; ++t) {
      z_T[t] = to_float(logits_T[t]) * head.scale;
      maximum = z_T[t] > maximum ? z_T[t] : maximum;
    }
  }
  return maximum;
}

ALWAYS_INLINE float sum_body(const float* z_T, int64_t width, float maximum) {
  float sum = 0.0f;
  SIMD("omp simd reduction(+ : sum)")
  for (int64_t t = 0; t < width; ++t) sum += exp_negative(z_T[t] - maximum);
  return sum;
}

// -(sum of the row's upstream gradients) * p * slope.
template <typename Scalar>
ALWAYS_INLINE void gradient_body(const float* z_T, int64_t width, Head head, float maximum,
                                 float log_sum, float grad, Scalar* out_T) {
  if (head.uncap != 0.0f) {
    SIMD("omp simd")
    for (int64_t t = 0; t < width; ++t) {
      const float tanh = z_T[t] / head.scale;
      const float p = exp_negative(z_T[t] - maximum - log_sum);
      store(out_T + t, -grad * p * ((1.0f - tanh * tanh) * head.inverse_temperature));
    }
  } else {
    SIMD("omp simd")
    for (int64_t t = 0; t < width; ++t) {
      const float p = exp_negative(z_T[t] - maximum - log_sum);
      store(out_T + t, -grad * p * head.inverse_temperature);
    }
  }
}

#define ALPHASPIN_VERSION(suffix, attribute)                                                      \
  template <typename Scalar>                                                                      \
  attribute float transform_##suffix(const Scalar* logits, int64_t width, Head head, float* z) {  \
    return transform_body(logits, width, head, z);                                                \
  }                                                                                               \
  attribute float sum_##suffix(const float* z, int64_t width, float maximum) {                    \
    return sum_body(z, width, maximum);                                                           \
  }                                                                                               \
  template <typename Scalar>                                                                      \
  attribute void gradient_##suffix(const float* z, int64_t width, Head head, float maximum,       \
                                   float log_sum, float grad, Scalar* out) {                      \
    gradient_body(z, width, head, maximum, log_sum, grad, out);                                   \
  }

ALPHASPIN_VERSION(baseline, )
#if defined(__x86_64__)
ALPHASPIN_VERSION(avx2, ALPHASPIN_AVX2)
ALPHASPIN_VERSION(avx512, ALPHASPIN_AVX512)
#endif

template <typename Scalar>
struct Loops {
  float (*transform)(const Scalar*, int64_t, Head, float*);
  float (*sum)(const float*, int64_t, float);
  void (*gradient)(const float*, int64_t, Head, float, float, float, Scalar*);
};

template <typename Scalar>
const Loops<Scalar>& loops() {
  static const Loops<Scalar> chosen = [] {
#if defined(__x86_64__)
    if (has_avx512()) {
      return Loops<Scalar>{transform_avx512<Scalar>, sum_avx512, gradient_avx512<Scalar>};
    }
    if (has_avx2()) return Loops<Scalar>{transform_avx2<Scalar>, sum_avx2, gradient_avx2<Scalar>};
#endif
    return Loops<Scalar>{transform_baseline<Scalar>, sum_baseline, gradient_baseline<Scalar>};
  }();
  return chosen;
}

// Calls read(start, width, z_T) with z' of each tile and fills in z' of the targets.
template <typename Scalar, typename Read>
void for_each_tile(const Scalar* logits_V, int64_t vocabulary, Head head, const int64_t* targets_K,
                   std::vector<float>& z_K, const Read& read) {
  alignas(64) float z_T[TILE];
  for (int64_t start = 0; start < vocabulary; start += TILE) {
    const int64_t width = std::min(TILE, vocabulary - start);
    const float maximum = loops<Scalar>().transform(logits_V + start, width, head, z_T);
    for (size_t k = 0; k < z_K.size(); ++k) {
      const int64_t t = targets_K[k] - start;
      if (t >= 0 && t < width) z_K[k] = z_T[t];
    }
    read(start, width, z_T, maximum);
  }
}

bool any_counts(const int64_t* targets_K, int64_t count, int64_t ignore_index) {
  return std::any_of(targets_K, targets_K + count,
                     [&](int64_t target) { return target != ignore_index; });
}

template <typename Function>
void for_rows(const Tensor& logits, const Function& function) {
  const int64_t vocabulary = std::max<int64_t>(logits.size(1), 1);
  at::parallel_for(0, logits.size(0), std::max<int64_t>(1, GRAIN / vocabulary), function);
}

// Shapes, dtypes and devices were checked in Python; memory safety does not rest on that alone.
void check(const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "logits must be fp32, bf16 or fp16, got ", dtype);
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [N, V], got ", logits.sizes());
  TORCH_CHECK_VALUE(targets.dim() == 2 && targets.size(0) == logits.size(0) &&
                        targets.scalar_type() == at::kLong && targets.is_contiguous(),
                    "targets must be contiguous [N, K] int64 with N = ", logits.size(0), ", got ",
                    targets.sizes(), " ", targets.scalar_type());
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); ++i) {
    TORCH_CHECK_VALUE(target[i] == ignore_index || (target[i] >= 0 && target[i] < logits.size(1)),
                      "target ", target[i], " is outside the vocabulary [0, ", logits.size(1),
                      ") and is not ignore_index = ", ignore_index);
  }
}

bool rows_are_dense(const Tensor& matrix) { return matrix.size(1) <= 1 || matrix.stride(1) == 1; }

Tensor dense_rows(const Tensor& matrix) {
  return rows_are_dense(matrix) ? matrix : matrix.contiguous();
}

template <typename Scalar>
void forward(const Tensor& logits, const Tensor& targets, Head head, int64_t ignore_index,
             const Tensor& logp, const Tensor& normaliser) {
  const int64_t vocabulary = logits.size(1), count = targets.size(1);
  const Scalar* logits_NV = logits.const_data_ptr<Scalar>();
  const int64_t* targets_NK = targets.const_data_ptr<int64_t>();
  float* logp_NK = logp.mutable_data_ptr<float>();
  float* normaliser_N2 = normaliser.mutable_data_ptr<float>();
  for_rows(logits, [&](int64_t begin, int64_t end) {
    std::vector<float> z_K(count);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t* targets_K = targets_NK + n * count;
      if (!any_counts(targets_K, count, ignore_index)) continue;
      // Not -inf: a first tile of nothing but -inf (masked padding) would give -inf - -inf.
      float maximum = std::numeric_limits<float>::lowest();
      double sum = 0.0;  // thousands of tile sums are added
      for_each_tile(logits_NV + n * logits.stride(0), vocabulary, head, targets_K, z_K,
                    [&](int64_t, int64_t width, const float* z_T, float tile_maximum) {
                      if (tile_maximum > maximum) {
                        sum *= std::exp(static_cast<double>(maximum) - tile_maximum);
                        maximum = tile_maximum;
                      }
                      sum += loops<Scalar>().sum(z_T, width, maximum);
                    });
      const double log_sum = std::log(sum);
      normaliser_N2[2 * n] = maximum;
      normaliser_N2[2 * n + 1] = static_cast<float>(log_sum);
      for (int64_t k = 0; k < count; ++k) {
        if (targets_K[k] == ignore_index) continue;
        // z - max first: both are large together on peaked rows, and the rest is what matters.
        const double gap = static_cast<double>(z_K[k]) - maximum;
        logp_NK[n * count + k] = static_cast<float>(gap - log_sum);
      }
    }
  });
}

template <typename Scalar>
void backward(const Tensor& out, const Tensor& grad, const Tensor& logits, const Tensor& targets,
              const Tensor& normaliser, Head head, int64_t ignore_index) {
  const int64_t vocabulary = logits.size(1), count = targets.size(1);
  const Scalar* logits_NV = logits.const_data_ptr<Scalar>();
  Scalar* out_NV = out.mutable_data_ptr<Scalar>();
  const float* grad_NK = grad.const_data_ptr<float>();
  const int64_t* targets_NK = targets.const_data_ptr<int64_t>();
  const float* normaliser_N2 = normaliser.const_data_ptr<float>();
  for_rows(logits, [&](int64_t begin, int64_t end) {
    std::vector<float> z_K(count);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t* targets_K = targets_NK + n * count;
      const float* grad_K = grad_NK + n * count;
      Scalar* out_V = out_NV + n * out.stride(0);
      if (!any_counts(targets_K, count, ignore_index)) {
        std::memset(static_cast<void*>(out_V), 0, vocabulary * sizeof(Scalar));
        continue;
      }
      double total = 0.0;
      for (int64_t k = 0; k < count; ++k) {
        if (targets_K[k] != ignore_index) total += grad_K[k];
      }
      const float maximum = normaliser_N2[2 * n], log_sum = normaliser_N2[2 * n + 1];
      // out may be the logits: a tile is read before it is written.
      for_each_tile(logits_NV + n * logits.stride(0), vocabulary, head, targets_K, z_K,
                    [&](int64_t start, int64_t width, const float* z_T, float) {
                      loops<Scalar>().gradient(z_T, width, head, maximum, log_sum,
                                               static_cast<float>(total), out_V + start);
                    });
      for (int64_t k = 0; k < count; ++k) {
        if (targets_K[k] == ignore_index) continue;
        double same = 0.0;  // a token may be the target more than once
        for (int64_t j = 0; j < count; ++j) {
          if (targets_K[j] == targets_K[k]) same += grad_K[j];
        }
        const double p = std::exp(static_cast<double>(z_K[k]) - maximum - log_sum);
        store(out_V + targets_K[k], static_cast<float>((same - total * p) * head.slope(z_K[k])));
      }
    }
  });
}

std::tuple<Tensor, Tensor> logits_logprob_cpu(const Tensor& logits, const Tensor& targets,
                                              std::optional<double> softcap, double temperature,
                                              int64_t ignore_index) {
  const Tensor targets_NK = targets.contiguous();
  check(logits, targets_NK, ignore_index);
  const Tensor logits_NV = dense_rows(logits.detach());
  const Head head(softcap, temperature);
  const auto fp32 = logits.options().dtype(at::kFloat);
  Tensor logp = at::zeros(targets_NK.sizes(), fp32);
  Tensor normaliser = at::zeros({logits.size(0), 2}, fp32);
  const auto run = [&](auto scalar) {
    forward<decltype(scalar)>(logits_NV, targets_NK, head, ignore_index, logp, normaliser);
  };
  switch (logits.scalar_type()) {
    case at::kFloat: run(float()); break;
    case at::kBFloat16: run(at::BFloat16()); break;
    default: run(at::Half());
  }
  return {logp, normaliser};
}

// Writes d loss / d logits to out, which may be the logits themselves.
void logits_logprob_gradient_cpu(Tensor& out, const Tensor& grad, const Tensor& logits,
                                 const Tensor& targets, const Tensor& normaliser,
                                 std::optional<double> softcap, double temperature,
                                 int64_t ignore_index) {
  const Tensor targets_NK = targets.contiguous();
  check(logits, targets_NK, ignore_index);
  TORCH_CHECK_VALUE(out.sizes() == logits.sizes() && out.scalar_type() == logits.scalar_type() &&
                        rows_are_dense(out),
                    "out must be ", logits.sizes(), " with contiguous rows, got ", out.sizes(),
                    " with strides ", out.strides());
  TORCH_CHECK_VALUE(grad.sizes() == targets.sizes() && grad.scalar_type() == at::kFloat,
                    "grad must be fp32 ", targets.sizes(), ", got ", grad.scalar_type(), " ",
                    grad.sizes());
  TORCH_CHECK_VALUE(normaliser.dim() == 2 && normaliser.size(0) == logits.size(0) &&
                        normaliser.size(1) == 2 && normaliser.scalar_type() == at::kFloat,
                    "normaliser must be fp32 [N, 2] with N = ", logits.size(0), ", got ",
                    normaliser.sizes());
  const Tensor logits_NV = dense_rows(logits.detach()), grad_NK = grad.contiguous();
  const Tensor normaliser_N2 = normaliser.contiguous();
  const Head head(softcap, temperature);
  const auto run = [&](auto scalar) {
    backward<decltype(scalar)>(out, grad_NK, logits_NV, targets_NK, normaliser_N2, head,
                               ignore_index);
  };
  switch (logits.scalar_type()) {
    case at::kFloat: run(float()); break;
    case at::kBFloat16: run(at::BFloat16()); break;
    default: run(at::Half());
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alphaspin, m) {
  m.def(
      "logits_logprob_cpu(Tensor logits, Tensor targets, float? softcap, float temperature, "
      "int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "logits_logprob_gradient_cpu(Tensor(a!) out, Tensor grad, Tensor logits, Tensor targets, "
      "Tensor normaliser, float? softcap, float temperature, int ignore_index) -> ()");
}

TORCH_LIBRARY_IMPL(alphaspin, CPU, m) {
  m.impl("logits_logprob_cpu", &logits_logprob_cpu);
  m.impl("logits_logprob_gradient_cpu", &logits_logprob_gradient_cpu);
}
