// Log-probabilities of target tokens from hidden states on the CPU, without the [N, V] logits.
//
// A task takes a block of rows through all vocabulary tiles: logits of the tile, running maximum and
// sum (online softmax), and, for the gradient of a frozen head, the running mean E_p[slope W]. Tasks
// share nothing, so there are no barriers, and results depend on the block size only, which is a
// function of N and the number of threads.
//
// The logits of a tile are laid out [vocabulary entry][row]. Everything elementwise then vectorises
// over rows without a horizontal reduction, and the head is the left operand of the first product,
// so that the matrix units of 16-bit types read it where it lies: only the small hidden block is
// packed for that product, once.
//
// One file, though long: forward and backward share the tile's layout, and nothing else does.
//
// Shape suffixes: N rows, H hidden size, V vocabulary, K targets per row, R rows of a block (padded
// to LANES), T vocabulary entries of a tile.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "vector_math.h"

namespace {

using at::Tensor;
namespace blas = at::native::cpublas;

constexpr int64_t TILE = 256;
constexpr int64_t LANES = 16;
constexpr int64_t BLOCK_FP32 = 256;
// Packing the head for the second product costs the same for any number of rows.
constexpr int64_t BLOCK_PACKED = 512;
// The matrix units take rows of the head as they lie if H is a multiple of their depth.
constexpr int64_t DEPTH = 32;

// Read by alphaspin_kernels/_dispatch.py from the bytes of the file, before it is loaded.
__attribute__((used)) const char BUILT_FOR[] = "ALPHASPIN_TORCH=" TORCH_VERSION;

struct Head {
  float cap;  // 0: none
  float temperature;

  // The slope of the cap at the peak of a row, in which p * slope is counted: the largest p * slope
  // of a peaked row is then exactly 1, and rounding it to 16 bits costs nothing. Not 0, so that the
  // others fit into 16 bits.
  float unit(float peak) const {
    if (cap == 0.0f) return 1.0f;
    const float tanh = peak * (temperature / cap);
    return std::max(1.0f - tanh * tanh, 0x1p-14f);
  }
};

// z <- cap(z + bias) / temperature, and the running maximum.
ALWAYS_INLINE void transform_body(float* z_TR, int64_t width, int64_t rows, const float* bias_T,
                                  Head head, float* max_R) {
  for (int64_t t = 0; t < width; ++t) {
    float* z_R = z_TR + t * rows;
    if (bias_T != nullptr) {
      for (int64_t r = 0; r < rows; ++r) z_R[r] += bias_T[t];
    }
    if (head.cap != 0.0f) {
      for (int64_t r = 0; r < rows; ++r) z_R[r] = head.cap * tanh_fast(z_R[r] / head.cap);
    }
    if (head.temperature != 1.0f) {
      for (int64_t r = 0; r < rows; ++r) z_R[r] /= head.temperature;
    }
    for (int64_t r = 0; r < rows; ++r) max_R[r] = z_R[r] > max_R[r] ? z_R[r] : max_R[r];
  }
}

// z <- e^(z - max), times slope / unit where wanted; sum of the e^(z - max) of this tile.
ALWAYS_INLINE void exponentiate_body(float* z_TR, int64_t width, int64_t rows, Head head,
                                     const float* unit_R, const float* max_R, float* sum_R) {
  const float uncap = head.cap != 0.0f ? head.temperature / head.cap : 0.0f;
  for (int64_t r = 0; r < rows; ++r) sum_R[r] = 0.0f;
  for (int64_t t = 0; t < width; ++t) {
    float* z_R = z_TR + t * rows;
    if (unit_R != nullptr && head.cap != 0.0f) {
      for (int64_t r = 0; r < rows; ++r) {
        const float tanh = z_R[r] * uncap;
        const float e = exp_negative(z_R[r] - max_R[r]);
        sum_R[r] += e;
        z_R[r] = e * ((1.0f - tanh * tanh) / unit_R[r]);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        z_R[r] = exp_negative(z_R[r] - max_R[r]);
        sum_R[r] += z_R[r];
      }
    }
  }
}

// The wheel is compiled for any x86-64 or Arm processor; the two hot loops are compiled again for
// the wider registers and chosen when they run.
using Transform = void (*)(float*, int64_t, int64_t, const float*, Head, float*);
using Exponentiate = void (*)(float*, int64_t, int64_t, Head, const float*, const float*, float*);

#define ALPHASPIN_VERSION(suffix, attribute)                                                    \
  attribute void transform_##suffix(float* z, int64_t width, int64_t rows, const float* bias,   \
                                    Head head, float* max) {                                    \
    transform_body(z, width, rows, bias, head, max);                                            \
  }                                                                                             \
  attribute void exponentiate_##suffix(float* z, int64_t width, int64_t rows, Head head,        \
                                       const float* unit, const float* max, float* sum) {       \
    exponentiate_body(z, width, rows, head, unit, max, sum);                                    \
  }

struct Loops {
  Transform transform;
  Exponentiate exponentiate;
  const char* name;
};

ALPHASPIN_VERSION(baseline, )
#if defined(__x86_64__)
ALPHASPIN_VERSION(avx2, ALPHASPIN_AVX2)
ALPHASPIN_VERSION(avx512, ALPHASPIN_AVX512)
#endif

const Loops& loops() {
  static const Loops chosen = [] {
#if defined(__x86_64__)
    if (has_avx512()) return Loops{transform_avx512, exponentiate_avx512, "AVX-512"};
    if (has_avx2()) return Loops{transform_avx2, exponentiate_avx2, "AVX2"};
#endif
    return Loops{transform_baseline, exponentiate_baseline, "baseline"};
  }();
  return chosen;
}

bool has_matrix_units(at::ScalarType dtype) {
  return (dtype == at::kBFloat16 || dtype == at::kHalf) && blas::could_pack(dtype);
}

// C [M, N] (+)= A [M, K] B, B in the layout of the matrix units, [K/2][N][2]. The loop stands in on
// processors without them, so that the packed path is tested everywhere; it is never chosen there.
template <typename Half>
void packed_product(int64_t m, int64_t n, int64_t k, const Half* a, int64_t lda, const Half* b,
                    float* c, bool add, bool units) {
  if (units) {
    blas::brgemm(m, n, k, lda, n, n, add, a, b, c);
    return;
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * n + j] : 0.0f;
      for (int64_t l = 0; l < k; ++l) {
        sum += static_cast<float>(a[i * lda + l]) * static_cast<float>(b[(l / 2 * n + j) * 2 + l % 2]);
      }
      c[i * n + j] = sum;
    }
  }
}

struct Arguments {
  Tensor hidden_NH, weight_VH, targets_NK, bias_V;  // bias fp32, undefined: none
  Tensor active_A;                                  // rows with a target that counts
  Head head;
  int64_t ignore_index;
  float skip_below;                         // tiles with no probability of this size leave the row out
  Tensor logp_NK, lse_N, row_NH, skipped_N;  // row undefined: not wanted
};

// The two products of a block with the head, as fp32 tiles. at::mm, because ATen does not export its
// BLAS wrapper; inside a parallel region it runs on the calling thread.
struct Fp32Products {
  const Tensor& weight_VH;
  Tensor hidden_RH, upcast_TH, weight_TH;

  Fp32Products(const Arguments& args, const Tensor& block_RH, int64_t rows)
      : weight_VH(args.weight_VH), hidden_RH(at::zeros({rows, block_RH.size(1)}, at::kFloat)) {
    hidden_RH.narrow(0, 0, block_RH.size(0)).copy_(block_RH);
    if (weight_VH.scalar_type() != at::kFloat) {
      upcast_TH = at::empty({TILE, block_RH.size(1)}, at::kFloat);
    }
  }

  void logits(int64_t start, int64_t entries, Tensor& z_TR) {
    weight_TH = weight_VH.narrow(0, start, entries);
    if (upcast_TH.defined()) weight_TH = upcast_TH.narrow(0, 0, entries).copy_(weight_TH);
    at::mm_out(z_TR, weight_TH, hidden_RH.t());
  }

  void accumulate(const Tensor& p_TR, Tensor& mean_RH) { mean_RH.addmm_(p_TR.t(), weight_TH); }
};

// The same through the matrix units: 16-bit factors, fp32 sums.
template <typename Half>
struct PackedProducts {
  Tensor weight_VH, hidden_packed, weight_packed, p_RT, tile_TH;
  int64_t rows, width;
  bool direct, units;
  const Half* weight_TH = nullptr;
  int64_t ld = 0, entries = 0;

  PackedProducts(const Arguments& args, const Tensor& block_RH, int64_t padded_rows)
      : weight_VH(args.weight_VH),
        rows(padded_rows),
        width(block_RH.size(1)),
        direct(weight_VH.stride(1) == 1 && weight_VH.stride(0) >= width),
        units(has_matrix_units(weight_VH.scalar_type())) {
    const auto options = block_RH.options();
    const Tensor hidden_RH = block_RH.contiguous();
    hidden_packed = at::zeros({width / 2, rows, 2}, options);
    const Half* from = hidden_RH.const_data_ptr<Half>();
    Half* to = hidden_packed.mutable_data_ptr<Half>();
    for (int64_t r = 0; r < hidden_RH.size(0); ++r) {
      for (int64_t h = 0; h < width; ++h) to[(h / 2 * rows + r) * 2 + h % 2] = from[r * width + h];
    }
    if (!direct) tile_TH = at::empty({TILE, width}, options);
    if (args.row_NH.defined()) {
      weight_packed = at::empty({TILE / 2, width, 2}, options);
      p_RT = at::empty({rows, TILE}, options);
    }
  }

  ~PackedProducts() {
    if (units) blas::brgemm_release();
  }

  void logits(int64_t start, int64_t count, Tensor& z_TR) {
    entries = count;
    if (direct) {
      weight_TH = weight_VH.const_data_ptr<Half>() + start * weight_VH.stride(0);
      ld = weight_VH.stride(0);
    } else {
      tile_TH.narrow(0, 0, entries).copy_(weight_VH.narrow(0, start, entries));
      weight_TH = tile_TH.const_data_ptr<Half>();
      ld = width;
    }
    packed_product(entries, rows, width, weight_TH, ld, hidden_packed.const_data_ptr<Half>(),
                   z_TR.mutable_data_ptr<float>(), false, units);
  }

  void accumulate(const Tensor& p_TR, Tensor& mean_RH) {
    // Entries past the end of the vocabulary are zero in both factors: the depth is always TILE.
    Half* packed = weight_packed.mutable_data_ptr<Half>();
    for (int64_t t = 0; t < TILE; t += 2) {
      const Half* even = weight_TH + t * ld;
      const Half* odd = even + ld;
      Half* to = packed + t * width;
      for (int64_t h = 0; h < width; ++h) {
        to[2 * h] = t < entries ? even[h] : Half(0.0f);
        to[2 * h + 1] = t + 1 < entries ? odd[h] : Half(0.0f);
      }
    }
    const float* from = p_TR.const_data_ptr<float>();
    Half* p = p_RT.mutable_data_ptr<Half>();
    for (int64_t first = 0; first < rows; first += LANES) {
      for (int64_t t = 0; t < TILE; ++t) {
        for (int64_t r = first; r < first + LANES; ++r) {
          p[r * TILE + t] = t < entries ? Half(from[t * rows + r]) : Half(0.0f);
        }
      }
    }
    packed_product(rows, width, TILE, p, TILE, packed, mean_RH.mutable_data_ptr<float>(), true,
                   units);
  }
};

template <typename Products>
void run_block(const Arguments& args, int64_t first, int64_t count) {
  const int64_t rows = (count + LANES - 1) / LANES * LANES;
  const int64_t width = args.hidden_NH.size(1), vocabulary = args.weight_VH.size(0);
  const int64_t targets_per_row = args.targets_NK.size(1);
  const bool with_row = args.row_NH.defined();
  const Tensor rows_R = args.active_A.narrow(0, first, count);
  const int64_t* index_R = rows_R.const_data_ptr<int64_t>();
  const int64_t* targets_NK = args.targets_NK.const_data_ptr<int64_t>();

  Products products(args, args.hidden_NH.index_select(0, rows_R), rows);
  Tensor z = at::empty({TILE, rows}, at::kFloat);
  // Not -inf: a first tile of nothing but -inf (masked padding) would give -inf - -inf.
  Tensor maximum = at::full({2, rows}, std::numeric_limits<float>::lowest(), at::kFloat);
  Tensor tile_sum = at::empty({rows}, at::kFloat);
  Tensor unit = at::empty({rows}, at::kFloat);
  Tensor sum = at::zeros({rows}, at::kDouble);
  Tensor skipped = at::zeros({rows}, at::kDouble);
  Tensor target_z = at::zeros({rows, targets_per_row}, at::kFloat);
  Tensor mean = with_row ? at::zeros({rows, width}, at::kFloat) : Tensor();
  float* z_TR = z.mutable_data_ptr<float>();
  float* max_R = maximum.mutable_data_ptr<float>();
  float* old_max_R = max_R + rows;
  float* tile_sum_R = tile_sum.mutable_data_ptr<float>();
  float* unit_R = unit.mutable_data_ptr<float>();
  double* sum_R = sum.mutable_data_ptr<double>();
  double* skipped_R = skipped.mutable_data_ptr<double>();
  float* target_z_RK = target_z.mutable_data_ptr<float>();
  float* mean_RH = with_row ? mean.mutable_data_ptr<float>() : nullptr;
  const float* bias_V = args.bias_V.defined() ? args.bias_V.const_data_ptr<float>() : nullptr;

  for (int64_t start = 0; start < vocabulary; start += TILE) {
    const int64_t entries = std::min(TILE, vocabulary - start);
    Tensor tile = z.narrow(0, 0, entries);
    products.logits(start, entries, tile);
    std::memcpy(old_max_R, max_R, rows * sizeof(float));
    loops().transform(z_TR, entries, rows, bias_V == nullptr ? nullptr : bias_V + start, args.head,
                      max_R);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t k = 0; k < targets_per_row; ++k) {
        const int64_t target = targets_NK[index_R[r] * targets_per_row + k];
        if (target != args.ignore_index && target >= start && target < start + entries) {
          target_z_RK[r * targets_per_row + k] = z_TR[(target - start) * rows + r];
        }
      }
    }
    const Tensor top = with_row && args.skip_below > 0.0f ? tile.amax(0) : Tensor();
    for (int64_t r = 0; r < rows; ++r) unit_R[r] = args.head.unit(max_R[r]);
    loops().exponentiate(z_TR, entries, rows, args.head, with_row ? unit_R : nullptr, max_R,
                         tile_sum_R);
    for (int64_t r = 0; r < rows; ++r) {
      const float rescale = std::exp(old_max_R[r] - max_R[r]);
      // Double: thousands of tile sums are added.
      sum_R[r] = sum_R[r] * rescale + tile_sum_R[r];
      skipped_R[r] *= rescale;
      if (with_row && rescale != 1.0f) {
        const float mean_rescale = rescale * (args.head.unit(old_max_R[r]) / unit_R[r]);
        for (int64_t h = 0; h < width; ++h) mean_RH[r * width + h] *= mean_rescale;
      }
    }
    // e^(top - max) / sum so far is no less than the final probability.
    bool skip = top.defined();
    for (int64_t r = 0; skip && r < count; ++r) {
      const float largest = std::exp(top.const_data_ptr<float>()[r] - max_R[r]);
      skip = largest < args.skip_below * sum_R[r];
    }
    if (skip) {
      for (int64_t r = 0; r < count; ++r) skipped_R[r] += tile_sum_R[r];
    } else if (with_row) {
      products.accumulate(tile, mean);
    }
  }

  float* logp_NK = args.logp_NK.mutable_data_ptr<float>();
  float* lse_N = args.lse_N.mutable_data_ptr<float>();
  float* skipped_N = args.skipped_N.mutable_data_ptr<float>();
  for (int64_t r = 0; r < count; ++r) {
    skipped_N[index_R[r]] = static_cast<float>(skipped_R[r] / sum_R[r]);
    const double log_sum = std::log(sum_R[r]);
    lse_N[index_R[r]] = static_cast<float>(max_R[r] + log_sum);
    for (int64_t k = 0; k < targets_per_row; ++k) {
      const int64_t at = index_R[r] * targets_per_row + k;
      if (targets_NK[at] == args.ignore_index) continue;
      // z - max first: both are large together on peaked rows, and the rest is what matters.
      const double gap = static_cast<double>(target_z_RK[r * targets_per_row + k]) - max_R[r];
      logp_NK[at] = static_cast<float>(gap - log_sum);
    }
  }
  if (!with_row) return;

  const bool single = targets_per_row == 1;
  for (int64_t r = 0; r < count; ++r) {
    const float normaliser =
        static_cast<float>(args.head.unit(max_R[r]) / (sum_R[r] * args.head.temperature));
    float* row_H = mean_RH + r * width;
    for (int64_t h = 0; h < width; ++h) row_H[h] *= normaliser;
  }
  Tensor result_RH = mean.narrow(0, 0, count);
  if (single) {
    const Tensor chosen = args.targets_NK.select(1, 0).index_select(0, rows_R);
    const Tensor weight_RH = args.weight_VH.index_select(0, chosen).to(at::kFloat);
    Tensor slope = target_z.narrow(0, 0, count);
    if (args.head.cap != 0.0f) {
      const float uncap = args.head.temperature / args.head.cap;
      slope = 1.0f - (slope * uncap).square();
    } else {
      slope = at::ones_like(slope);
    }
    result_RH = weight_RH.mul_(slope / args.head.temperature).sub_(result_RH);
  }
  args.row_NH.index_copy_(0, rows_R, result_RH.to(args.row_NH.scalar_type()));
}

enum class Path { automatic, packed };

bool packs(at::ScalarType dtype, int64_t width, Path path) {
  const bool fits = dtype != at::kFloat && width % DEPTH == 0;
  return fits && (path == Path::packed || has_matrix_units(dtype));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Tensor& hidden, const Tensor& weight,
                                       const Tensor& targets, const std::optional<Tensor>& bias,
                                       std::optional<double> softcap, double temperature,
                                       int64_t ignore_index, bool with_row, double skip_below,
                                       Path path) {
  // Shapes, dtypes and devices were checked in Python; memory safety does not rest on that alone.
  const auto dtype = hidden.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "hidden must be fp32, bf16 or fp16, got ", dtype);
  TORCH_CHECK_VALUE(weight.scalar_type() == dtype, "hidden is ", dtype, " but weight is ",
                    weight.scalar_type());
  TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                    "hidden must be [N, H] and weight [V, H], got ", hidden.sizes(), " and ",
                    weight.sizes());
  TORCH_CHECK_VALUE(targets.dim() == 2 && targets.size(0) == hidden.size(0) &&
                        targets.scalar_type() == at::kLong,
                    "targets must be [N, K] int64 with N = ", hidden.size(0), ", got ",
                    targets.sizes(), " ", targets.scalar_type());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                    "bias must be [V] with V = ", weight.size(0));
  const int64_t rows = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const int64_t targets_per_row = targets.size(1);

  // Detached: the workers' threads have autograd switched on.
  Arguments args;
  args.hidden_NH = hidden.detach();
  args.weight_VH = weight.detach();
  args.targets_NK = targets.contiguous();
  if (bias) args.bias_V = bias->detach().to(at::kFloat).contiguous();
  args.head = Head{static_cast<float>(softcap.value_or(0.0)), static_cast<float>(temperature)};
  args.ignore_index = ignore_index;
  const auto fp32 = hidden.options().dtype(at::kFloat);
  args.logp_NK = at::zeros({rows, targets_per_row}, fp32);
  args.lse_N = at::zeros({rows}, fp32);
  args.skipped_N = at::zeros({rows}, fp32);
  args.skip_below = static_cast<float>(skip_below);
  Tensor row = at::zeros({with_row ? rows : 0, width}, targets_per_row == 1 ? hidden.options() : fp32);
  if (with_row) args.row_NH = row;

  args.active_A = at::empty({rows}, targets.options());
  int64_t* active = args.active_A.mutable_data_ptr<int64_t>();
  const int64_t* targets_NK = args.targets_NK.const_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t n = 0; n < rows; ++n) {
    bool any = false;
    for (int64_t k = 0; k < targets_per_row; ++k) {
      const int64_t target = targets_NK[n * targets_per_row + k];
      if (target == ignore_index) continue;
      TORCH_CHECK_VALUE(target >= 0 && target < vocabulary, "target ", target,
                        " is outside the vocabulary [0, ", vocabulary,
                        ") and is not ignore_index = ", ignore_index);
      any = true;
    }
    if (any) active[count++] = n;
  }

  const bool packed = packs(dtype, width, path);
  const int64_t share = (count + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t largest = packed ? BLOCK_PACKED : BLOCK_FP32;
  const int64_t block = std::min(largest, std::max<int64_t>(LANES, (share + LANES - 1) / LANES * LANES));
  const int64_t blocks = (count + block - 1) / block;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, size = std::min(block, count - first);
      if (!packed) {
        run_block<Fp32Products>(args, first, size);
      } else if (dtype == at::kBFloat16) {
        run_block<PackedProducts<at::BFloat16>>(args, first, size);
      } else {
        run_block<PackedProducts<at::Half>>(args, first, size);
      }
    }
  });
  return {args.logp_NK, args.lse_N, row, args.skipped_N};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob_cpu(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, std::optional<double> softcap, double temperature,
    int64_t ignore_index, bool with_row, double skip_below) {
  return run(hidden, weight, targets, bias, softcap, temperature, ignore_index, with_row,
             skip_below, Path::automatic);
}

// For the tests: the layout of the matrix units, also on processors that have none.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob_cpu_packed(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, std::optional<double> softcap, double temperature,
    int64_t ignore_index, bool with_row, double skip_below) {
  return run(hidden, weight, targets, bias, softcap, temperature, ignore_index, with_row,
             skip_below, Path::packed);
}

std::string linear_logprob_cpu_path(at::ScalarType dtype) {
  const std::string elementwise = std::string(", ") + loops().name;
  if (dtype == at::kFloat) return "fp32 tiles" + elementwise;
  if (has_matrix_units(dtype)) return "matrix units, fp32 sums, if H % 32 == 0" + elementwise;
  return "tiles upcast to fp32, no matrix units" + elementwise;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alphaspin, m) {
  const std::string arguments =
      "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float? softcap, "
      "float temperature, int ignore_index, bool with_row, float skip_below) "
      "-> (Tensor, Tensor, Tensor, Tensor)";
  m.def(("linear_logprob_cpu" + arguments).c_str());
  m.def(("linear_logprob_cpu_packed" + arguments).c_str());
  m.def("linear_logprob_cpu_path(ScalarType dtype) -> str", &linear_logprob_cpu_path);
}

TORCH_LIBRARY_IMPL(alphaspin, CPU, m) {
  m.impl("linear_logprob_cpu", &linear_logprob_cpu);
  m.impl("linear_logprob_cpu_packed", &linear_logprob_cpu_packed);
}
